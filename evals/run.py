"""Run a recipe: ask what has not been answered yet, score every answer, write the results.

runs/eval/base/
  answers.jsonl      every answer, appended as it comes; a killed run continues from here
  model.json         which model the answers are of
  items/<suite>.jsonl
  results.json       written last: no results, not complete
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from evals.answer_files import ANSWERS, RESULTS, Answer, read_answers, read_model
from evals.answering import (
    AnyBench,
    Asked,
    answer,
    asked_by,
    check_files,
    files_of,
    fingerprint_of,
    keys_of,
)
from evals.base import Row, Suite, cluster_of
from evals.benchmarks.verifiable import VerifiableBench
from evals.config import EvalRecipe
from evals.image_preference import ImagePreferenceRecipe
from evals.judged import JudgedBench
from evals.judging import Judge
from evals.known import RULES
from evals.questions import QuestionBench
from evals.rules import answer_tokens
from evals.stats import intervals
from evals.unread import with_readings
from mmalign import log
from mmalign.errors import DataError
from mmalign.generate.base import Generation, Generator
from mmalign.store import write_atomically

PACKAGES = ("mmalign", "numpy", "torch", "transformers")
_logger = log.get_logger("evals")


def evaluate(
    recipe: EvalRecipe, generator: Generator | None = None, judge: Generator | None = None
) -> Path:
    """Run a recipe and return its output folder. Without a generator, loads the recipe's model.

    Answers already there, from the same model to the same question with the same limits, are kept.
    Questions whose picture or clip cannot be read are unanswered, and are asked again next time.
    judge: in the place of the recipe's server, under its name.
    """
    asked, judging = asked_by(recipe), _judge(recipe.output, recipe, judge)
    if judging is not None:
        # A judge that cannot be asked is told before hours of answers, not after.
        judging.open()
    _check_folder(recipe)
    if generator is None:
        check_files(asked)
    model, answers = answer(recipe, asked, generator)
    return _finish(recipe.output, recipe, model, asked, answers, judging)


def rescore(folder: str | Path, recipe: EvalRecipe, judge: Generator | None = None) -> Path:
    """Write items and results anew from the answers in a folder, without a model.

    A judge is asked for the verdicts that are not there yet, and for no others.
    Raises DataError saying how many of the recipe's questions have no answer there.
    """
    folder = Path(folder)
    asked: list[Asked] = [(benchmark, benchmark.requests()) for benchmark in recipe.benchmarks]
    model, judging = read_model(folder), _judge(folder, recipe, judge)
    if fingerprint_of(model["name"], recipe) != model["fingerprint"]:
        raise DataError(
            "holds answers of another model, or of one loaded with other settings",
            where=str(folder),
            got=model["name"],
            wanted=f"those of {getattr(recipe.model, 'path', None) or recipe.model}",
            fix="score them with the `model` section that they were generated with",
        )
    return _finish(folder, recipe, model, asked, read_answers(folder), judging)


def _check_folder(recipe: EvalRecipe) -> None:
    """Say where pictures now come from another folder: answers are kept by their names.

    Raises DataError where the folder has the results of another model.
    """
    try:
        results = json.loads((recipe.output / RESULTS).read_text(encoding="utf-8"))
        were = {one["key"]: one.get("images") or one.get("videos") for one in results["suites"]}
        model = results["config"]["model"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if (differ := _different(model, recipe.model.model_dump(mode="json"))) is not None:
        raise DataError(
            "holds the results of another model, which would be lost",
            where=str(recipe.output),
            got=f"model.{differ[0]}={differ[1]}",
            wanted=f"model.{differ[0]}={differ[2]}",
            fix="give this run an output of its own, or delete the folder",
        )
    for benchmark in recipe.benchmarks:
        one = dict(benchmark)
        now, was = one.get("images") or one.get("videos"), were.get(benchmark.key)
        if now is not None and was is not None and str(Path(now).absolute()) != was:
            _logger.warning(
                "%s: answers are kept by the pictures' names, and those there are to pictures in "
                "%s; if the ones in %s differ, give this run an output of its own",
                *(benchmark.key, was, now),
            )


def _different(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The first setting in which two models differ, with both values.

    A setting that one of them does not know, as results of an earlier version, makes no difference.
    """
    names = ["path", "model", *(name for name in b if name in a)]
    return next(((k, a.get(k), b.get(k)) for k in names if a.get(k) != b.get(k)), None)


def _judge(folder: Path, recipe: EvalRecipe, generator: Generator | None) -> Judge | None:
    return None if recipe.judge is None else Judge(recipe.judge, folder, generator)


def _finish(
    folder: Path,
    recipe: EvalRecipe,
    model: dict[str, str],
    asked: Sequence[Asked],
    answers: dict[str, Answer],
    judge: Judge | None,
) -> Path:
    """Score every suite, then replace the folder's items and, last, its results."""
    scored: list[Suite] = []
    for benchmark, requests in asked:
        keys = keys_of(benchmark, requests, model["fingerprint"])
        missing = [name for name, key in keys.items() if key not in answers]
        if missing:
            raise DataError(
                f"{len(missing)} of {len(keys)} answers are missing, such as {missing[0]}",
                where=f"{folder / ANSWERS}, {benchmark.key}",
                fix="run the recipe to generate them; the answers already there are kept",
            )
        given = {name: answers[key] for name, key in keys.items()}
        made = {name: whole for name, answer in given.items() if (whole := _whole(name, answer))}
        if not made:
            named = [one for request in requests for one, _ in files_of(request) if one]
            where = f"{requests[0].media_root} holds {named[0]}" if named else "its data is whole"
            raise DataError(
                f"none of its {len(keys)} questions was answered: the warnings say why",
                where=benchmark.key,
                fix=f"check that {where}, and that a server, if it is one, replies",
            )
        suite = _scored(benchmark, made, judge)
        items = [{**row, "num_tokens": _num_tokens(row, given)} for row in suite.items]
        rules = RULES.get(suite.benchmark)
        counted = answer_tokens(items) if rules is None or rules.length else {}
        scored.append(dataclasses.replace(suite, items=items, metrics=suite.metrics | counted))
    return write_results(folder, recipe, model, scored)


def _scored(benchmark: AnyBench, made: Mapping[str, Generation], judge: Judge | None) -> Suite:
    """The suite of a benchmark's answers, by request id, with what its judge says of them."""
    if isinstance(benchmark, VerifiableBench):
        return benchmark.score(made)
    texts = {name: whole.text for name, whole in made.items()}
    if isinstance(benchmark, JudgedBench):
        assert judge is not None, "a recipe with judged benchmarks has a judge"
        asked = benchmark.verdict_requests(texts)
        return benchmark.score(texts, judge.judge(benchmark.key, asked, benchmark.reader()))
    suite = benchmark.score(texts)
    if isinstance(benchmark, QuestionBench) and benchmark.judge_unread:
        assert judge is not None, "a recipe that has answers judged has a judge"
        return with_readings(benchmark, suite, texts, judge)
    return suite


def write_results(
    folder: Path,
    recipe: EvalRecipe | ImagePreferenceRecipe,
    model: dict[str, str],
    suites: Sequence[Suite],
) -> Path:
    """Replace the folder's items and, last, its results; returns the folder.

    model: its name and fingerprint.
    """
    (folder / RESULTS).unlink(missing_ok=True)
    for suite in suites:
        write_atomically(folder / _items(suite), "".join(map(_line, suite.items)))
    results = {
        "name": recipe.name,
        "model": model["name"],
        "fingerprint": model["fingerprint"],
        "config": recipe.model_dump(mode="json"),
        "versions": _versions(),
        "suites": [_summary(suite, recipe) for suite in suites],
    }
    write_atomically(folder / RESULTS, json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    return folder


def _whole(name: str, answer: Answer) -> Generation | None:
    """The answer to a request as it was generated; None where there was none."""
    if answer.text is None:
        return None
    return Generation(
        id=name, text=answer.text, num_tokens=answer.num_tokens, finished=answer.finished
    )


def _num_tokens(row: Row, given: dict[str, Answer]) -> int:
    """Tokens of an item's answers; it may take several, such as those to a pair's two responses."""
    return sum(given[name].num_tokens for name in row.get("requests", [row["id"]]))


def _summary(suite: Suite, recipe: EvalRecipe | ImagePreferenceRecipe) -> dict[str, Any]:
    clusters = [cluster_of(row) for row in suite.items]
    spread = intervals(suite.metrics, clusters, samples=recipe.bootstrap_samples, seed=recipe.seed)
    return {
        "key": suite.key,
        "benchmark": suite.benchmark,
        "split": suite.split,
        "method": suite.method,
        "num_items": len(suite.items),
        "num_unparsed": suite.num_unparsed,
        "num_missing": sum(row["answer"] is None for row in suite.items),
        **{
            name: str(folder.absolute())
            for name, folder in (("images", suite.images), ("videos", suite.videos))
            if folder is not None
        },
        "metrics": {name: metric.value for name, metric in suite.metrics.items()},
        # JSON has no NaN, which stands for a metric of nothing at all.
        "intervals": {
            name: [None if math.isnan(end) else end for end in spread[name]]
            for name in suite.metrics
        },
        **({} if suite.judge is None else {"judge": suite.judge}),
        "items": _items(suite),
    }


def _items(suite: Suite) -> str:
    return f"items/{suite.key}.jsonl"


def _line(row: dict[str, Any]) -> str:
    # ASCII: an answer may hold U+2028, at which many readers would break the line.
    return json.dumps(row) + "\n"


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
