"""Compare two finished runs item by item, and say which differences are more than luck."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evals.answer_files import RESULTS
from evals.base import Row, cluster_of, read_jsonl, shown
from evals.known import RULES
from evals.rules import Rules, Test
from evals.stats import Interval, mcnemar, paired_differences
from mmalign import log
from mmalign.errors import DataError

_logger = log.get_logger("evals")
# From this share of unread answers on, a difference may be one of form.
_MUCH_UNREAD = 0.2
_ANEW = "write it anew with `mmalign eval rescore` and its recipe"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How metric `b` differs from `a` on the same items; `interval` is of the difference.

    p is McNemar's exact one or the paired bootstrap's, as `test` says. Relative figures are of
    (b - a) / a, None where a is or may well be 0.
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

    @property
    def testable(self) -> bool:
        """Whether both runs have anything that the metric counts."""
        return not math.isnan(self.interval[0])


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
        tested = list(suite.rules.pairs(*suite.items))
        pairs = [(a, b) for _, _, a, b in tested]
        results = paired_differences(pairs, suite.clusters, samples=samples, seed=seed)
        for (metric, test, a, b), result in zip(tested, results, strict=True):
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
    them different questions or was judged differently; says so where prompts differ.
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
        for folder, of in zip(folders, held, strict=True):
            _tell(folder, of[key])
        rules = RULES.get(held[0][key]["benchmark"])
        if rules is None:
            _logger.warning(
                "%s is left out: no benchmark here is called %s",
                *(key, held[0][key]["benchmark"]),
            )
            continue
        rows = [read_items(one, of[key]) for one, of in zip(folders, held, strict=True)]
        for folder, others, of in zip(folders[1:], rows[1:], held[1:], strict=True):
            pair = f"{folders[0]} and {folder}, {key}"
            _check_same(pair, rows[0], others, rules.same)
            _check_judge(pair, held[0][key].get("judge"), of[key].get("judge"))
            if asked_otherwise(rows[0], others):
                _logger.warning("%s: the prompts differ, and may make the difference", pair)
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
    rules = RULES.get(suite["benchmark"])
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


def _tell(folder: Path, suite: Mapping[str, Any]) -> None:
    """Say what makes a run's numbers doubtful: questions without an answer, answers not read."""
    if missing := suite.get("num_missing"):
        _logger.warning(
            "%s, %s: %s of %s questions are unanswered, and count as the benchmark says",
            *(folder, suite["key"], missing, suite.get("num_items")),
        )
    if (rate := suite["metrics"].get("unparsed_rate") or 0) > _MUCH_UNREAD:
        _logger.warning(
            "%s, %s: the strict reading finds no answer in %.0f %% of the responses; look at them",
            *(folder, suite["key"], 100 * rate),
        )


def asked_otherwise(a_rows: Mapping[str, Row], b_rows: Mapping[str, Row]) -> bool:
    """Whether the first question that both were asked was put in other words."""
    name = next((name for name in a_rows if name in b_rows), None)
    return name is not None and a_rows[name].get("prompt") != b_rows[name].get("prompt")


def _check_judge(where: str, a: Mapping[str, Any] | None, b: Mapping[str, Any] | None) -> None:
    same = ("model", "settings", "asked")
    odd = [name for name in same if (a or {}).get(name) != (b or {}).get(name)]
    if odd:
        models = [str((one or {}).get("model")) for one in (a, b)]
        raise DataError(
            f"the runs were judged differently: {', '.join(odd)} of the judge differ",
            where=where,
            got=" and ".join(models),
            fix="score both with one judge and one judge_prompt: mmalign eval rescore",
        )


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
