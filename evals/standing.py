"""How far an evaluation is, told from what it leaves on disk; no model is loaded."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from evals.answer_files import ANSWERS
from evals.config import EvalModel, EvalRecipe
from evals.run import RESULTS
from mmalign.standing import Standing


def standing(recipe: EvalRecipe) -> Standing:
    """complete where the results are those of this very recipe; else answers are there, or not.

    A model whose folder was written after the results may be another: begun, and the run itself
    tells, by the weights, which answers are still its own.
    """
    results = recipe.output / RESULTS
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # Those are written anew.
        config = json.loads(results.read_text(encoding="utf-8"))["config"]
        ended = results.stat().st_mtime_ns
        model = recipe.model
        parts = Path(model.path).rglob("*") if isinstance(model, EvalModel) else ()
        if config == recipe.model_dump(mode="json") and all(
            part.stat().st_mtime_ns <= ended for part in parts
        ):
            return Standing.COMPLETE
    return Standing.BEGUN if (recipe.output / ANSWERS).exists() else Standing.ABSENT
