"""How far an evaluation is, told from what it leaves on disk; no model is loaded."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from evals.answer_files import ANSWERS, RESULTS
from evals.config import EvalModel, EvalRecipe
from mmalign.standing import Standing


def standing(recipe: EvalRecipe) -> Standing:
    """complete where the results are those of this very recipe; else answers are there, or not.

    Where the model, its adapter, or a file that a benchmark reads was written after the results, it
    may be another: begun, and the run itself tells which answers are still good. Pictures are not
    looked at.
    """
    results = recipe.output / RESULTS
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # Those are written anew.
        config = json.loads(results.read_text(encoding="utf-8"))["config"]
        ended = results.stat().st_mtime_ns
        same = config == recipe.model_dump(mode="json")
        if same and all(part.stat().st_mtime_ns <= ended for part in _parts(recipe)):
            return Standing.COMPLETE
    return Standing.BEGUN if (recipe.output / ANSWERS).exists() else Standing.ABSENT


def _parts(recipe: EvalRecipe) -> Iterator[Path]:
    """What the results were made of: the model's files, and those that its benchmarks name."""
    if isinstance(recipe.model, EvalModel):
        for folder in filter(None, (recipe.model.path, recipe.model.adapter)):
            yield from Path(folder).rglob("*")
    for benchmark in recipe.benchmarks:
        for value in dict(benchmark).values():
            for one in value if isinstance(value, tuple) else (value,):
                if isinstance(one, str | Path) and Path(one).is_file():
                    yield Path(one)
