"""Compare two finished runs item by item, and say which differences are more than luck."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from evals import (
    chair,
    image_preference,
    pope,
    reward_bench,
    tempcompass,
    verifiable,
    video_choices,
    video_hallucer,
    videomme,
    vidhalluc,
)
from evals.base import Row, cluster_of, read_jsonl, shown
from evals.run import RESULTS
from evals.stats import Interval, Ratio, mcnemar, paired_difference
from mmalign import log
from mmalign.errors import DataError

Test = Literal["mcnemar", "bootstrap"]
_logger = log.get_logger("evals")
_ANEW = "write it anew with `mmalign eval rescore` and its recipe"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How metric `b` differs from `a` on the same items; `interval` is of the difference.

    Accuracy and format rate have McNemar's exact p, the others the paired bootstrap's. Relative
    figures are of (b - a) / a, None where a is or may well be 0.
    """

    suite: str
    metric: str
    a: float
    b: float
    difference: float
    interval: Interval
    relative: float | None
    relative_interval: Interval | None
    p_value: float
    test: Test


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How one benchmark is compared: metrics from rows, the fields of a row, the tests.

    read: fields that a row must hold. same: those that must agree between the runs as well, beside
    the picture or clip. compared: metrics with their tests; those that a suite lacks are left out.
    Without it all of them, by the bootstrap. paired: metrics that take the items of both runs,
    as the values of either.
    """

    metrics: Callable[[Sequence[Row]], dict[str, Ratio]]
    read: tuple[str, ...]
    same: tuple[str, ...]
    compared: dict[str, Test] | None = None
    paired: Callable[[Sequence[Row], Sequence[Row]], dict[str, tuple[Ratio, Ratio]]] | None = None

    def tests(self, metrics: Mapping[str, Ratio]) -> dict[str, Test]:
        """The test of each of the metrics that is compared."""
        wanted = self.compared or dict.fromkeys(metrics, "bootstrap")
        return {name: test for name, test in wanted.items() if name in metrics}

    def pairs(
        self, a_items: Sequence[Row], b_items: Sequence[Row]
    ) -> Iterator[tuple[str, Test, Ratio, Ratio]]:
        """(metric, test, of a, of b) for all that is compared."""
        a, b = self.metrics(a_items), self.metrics(b_items)
        for name, test in self.tests(a).items():
            if name in b:
                yield name, test, a[name], b[name]
        if self.paired is not None:
            for name, (ours, theirs) in self.paired(a_items, b_items).items():
                yield name, "bootstrap", ours, theirs


def _of_clips(
    metrics: Callable[[Sequence[Row]], dict[str, Ratio]], compared: dict[str, Test] | None = None
) -> Rules:
    """The rules of a benchmark of evals.clip_questions; its two accuracies, if nothing is said."""
    return Rules(
        metrics=metrics,
        read=("answer", "official", "strict", "correct_official", "correct_strict"),
        same=("label", "categories", "cluster", "group"),
        compared=compared or {"official/accuracy": "mcnemar", "strict/accuracy": "mcnemar"},
    )


_RULES = {
    "pope": Rules(
        metrics=pope.metrics,
        read=("answer", "official", "strict", "correct_official"),
        same=("label",),
        compared={
            "official/accuracy": "mcnemar",
            "official/f1": "bootstrap",
            "yes_ratio": "bootstrap",
        },
    ),
    "reward_bench": Rules(
        metrics=reward_bench.metrics,
        read=("answer", "correct", "category", "num_written", "num_cut"),
        same=("image", "question"),
        compared={"acc": "mcnemar", "acc_plus": "bootstrap"},
    ),
    "verifiable": Rules(
        metrics=verifiable.metrics,
        read=(
            "answer",
            "category",
            "correct",
            "well_formed",
            "no_answer",
            "undecided",
            "finished",
            "num_tokens",
        ),
        same=("prompt", "truth"),
        compared={
            "accuracy": "mcnemar",
            "format": "mcnemar",
            "no_answer": "bootstrap",
            "undecided": "bootstrap",
            "finished": "bootstrap",
            "response_tokens": "bootstrap",
        },
    ),
    "image_preference": Rules(
        metrics=image_preference.metrics,
        read=("scores",),
        same=("prompt",),
        paired=image_preference.win_rates,
    ),
    "chair": Rules(
        metrics=chair.metrics,
        read=("answer", "mentioned", "spans", "hallucinated", "recalled", "num_words"),
        same=("truth",),
        compared={
            "chair_i": "bootstrap",
            "chair_s": "bootstrap",
            "recall": "bootstrap",
            "num_words": "bootstrap",
            "order": "bootstrap",
        },
    ),
    "video_hallucer": _of_clips(
        video_hallucer.metrics,
        {
            "official/accuracy": "mcnemar",
            "official/basic": "mcnemar",
            "official/hallucination": "mcnemar",
            "strict/accuracy": "mcnemar",
            "yes_difference": "bootstrap",
        },
    ),
    "tempcompass": _of_clips(tempcompass.metrics),
    "tvbench": _of_clips(video_choices.metrics),
    "mvbench": _of_clips(video_choices.metrics),
    "longvideobench": _of_clips(video_choices.metrics),
    "mlvu": _of_clips(video_choices.mlvu_metrics),
    "videomme": _of_clips(
        videomme.metrics, {"official/accuracy": "bootstrap", "strict/accuracy": "mcnemar"}
    ),
    "vidhalluc_binary": _of_clips(vidhalluc.binary_metrics),
    "vidhalluc_choice": _of_clips(vidhalluc.metrics),
    "vidhalluc_order": _of_clips(vidhalluc.metrics),
}


def compare(
    a_dir: str | Path,
    b_dir: str | Path,
    *,
    suites: Collection[str] | None = None,
    seed: int = 0,
    samples: int = 2000,
) -> list[Comparison]:
    """Compare run b with run a on every suite that both hold, pictures resampled together.

    suites: only these keys. A suite of a benchmark without rules here is left out, with a note.
    Raises DataError when a run is not complete, when they share no suite, or when a suite asked
    them different questions.
    """
    found: list[Comparison] = []
    for suite in matched([a_dir, b_dir], suites):
        for metric, test, a, b in suite.rules.pairs(*suite.items):
            result = paired_difference(a, b, suite.clusters, samples=samples, seed=seed)
            p_value = result.p_value
            if test == "mcnemar":
                p_value = mcnemar(a.numerator, b.numerator)
            found.append(
                Comparison(
                    suite=suite.key,
                    metric=metric,
                    a=a.value,
                    b=b.value,
                    difference=result.difference,
                    interval=result.interval,
                    relative=result.relative,
                    relative_interval=result.relative_interval,
                    p_value=p_value,
                    test=test,
                )
            )
    return found


@dataclass(frozen=True, kw_only=True)
class Matched:
    """One suite of several runs. items: by run, in the same order. clusters: of each item."""

    key: str
    rules: Rules
    items: list[list[Row]]
    clusters: list[str]


def matched(
    folders: Sequence[str | Path], suites: Collection[str] | None = None
) -> Iterator[Matched]:
    """The suites that all the runs hold, items matched by id.

    suites: only these keys. A suite of a benchmark without rules here is left out, with a note.
    Raises DataError when a run is not complete, when they share no suite, or when a suite asked
    them different questions.
    """
    folders = [Path(folder) for folder in folders]
    held = [{suite["key"]: suite for suite in read_results(one)["suites"]} for one in folders]
    shared = [key for key in held[0] if all(key in suites_of for suites_of in held)]
    where = " and ".join(map(str, folders))
    if not shared:
        raise DataError(
            "share no suite",
            where=where,
            got=" and ".join(", ".join(suites_of) for suites_of in held),
            fix="run both with the same benchmarks",
        )
    for key in shared:
        if suites is not None and key not in suites:
            continue
        rules = _RULES.get(held[0][key]["benchmark"])
        if rules is None:
            _logger.warning(
                "%s is left out: only %s are compared, and it is of %s",
                *(key, ", ".join(_RULES), held[0][key]["benchmark"]),
            )
            continue
        rows = [read_items(one, of[key]) for one, of in zip(folders, held, strict=True)]
        for folder, others in zip(folders[1:], rows[1:], strict=True):
            _check_same(f"{folders[0]} and {folder}, {key}", rows[0], others, rules.same)
        yield Matched(
            key=key,
            rules=rules,
            items=[[of[name] for name in rows[0]] for of in rows],
            clusters=[cluster_of(row) for row in rows[0].values()],
        )


def read_results(folder: Path) -> dict[str, Any]:
    """What a finished evaluation wrote last. Raises DataError when it did not, or not that."""
    path = folder / RESULTS
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        complete = all(
            {"key", "benchmark", "items", "metrics"} <= set(s) for s in results["suites"]
        )
    except (FileNotFoundError, NotADirectoryError):
        what, fix = f"holds no {RESULTS}", "run its recipe again; it continues where it stopped"
        if not folder.is_dir():
            what, fix = (
                "is no folder",
                "correct the path, or run its recipe with `mmalign eval run`",
            )
        raise DataError(f"{what}, so no finished evaluation", where=str(folder), fix=fix) from None
    except (OSError, ValueError) as error:
        raise DataError(f"cannot be read ({error})", where=str(path), fix=_ANEW) from None
    except (KeyError, TypeError):
        complete = False
    if not complete:
        raise DataError("is not what an evaluation writes", where=str(path), fix=_ANEW)
    return results


def read_items(folder: Path, suite: Mapping[str, Any]) -> dict[str, Row]:
    """The scored items of one suite, by id. Raises DataError when they, or fields, are missing."""
    path = folder / suite["items"]
    if not path.exists():
        raise DataError("is missing", where=str(path), fix=_ANEW)
    rules = _RULES.get(suite["benchmark"])
    fields = ("id", *rules.same, *rules.read) if rules else ("id",)
    items: dict[str, Row] = {}
    for where, row in read_jsonl(path):
        missing = [field for field in fields if field not in row]
        if rules and not {"image", "video"} & row.keys():
            missing.append("image")
        if missing:
            raise DataError(f"field {missing[0]} is missing", where=where, fix=_ANEW)
        items[row["id"]] = row
    return items


def _check_same(
    where: str, a_rows: dict[str, Row], b_rows: dict[str, Row], same: tuple[str, ...]
) -> None:
    odd = sorted(a_rows.keys() ^ b_rows.keys())
    odd += [
        name
        for name in a_rows.keys() & b_rows.keys()
        if shown(a_rows[name]) != shown(b_rows[name])
        or any(a_rows[name][field] != b_rows[name][field] for field in same)
    ]
    if odd:
        raise DataError(
            f"the runs asked different questions: {len(odd)} differ, such as {min(odd)}",
            where=where,
            got=f"{len(a_rows)} and {len(b_rows)} items",
            fix="run both with the same files and limit; answers already there are kept",
        )
