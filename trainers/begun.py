"""What a run began from: facts that may not change while it is resumed, and what run.json says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from accelerate import Accelerator

from mmalign.config import dump_yaml
from mmalign.errors import TrainingError
from mmalign.store import Dataset, write_atomically
from trainers.config import Recipe
from trainers.directory import RunDirectory
from trainers.images.config import ImageRecipe
from trainers.rows import Survey

START = "start.json"


def check_unmoved(run: RunDirectory, dataset: Dataset[Any], facts: Mapping[str, str]) -> bool:
    """Whether the run began from these very facts.

    Raises TrainingError where it did not, and has checkpoints that hang on them.
    """
    before = run.read(START)
    moved = [name for name in facts if before.get(name) != facts[name]]
    if moved and run.newest is not None:
        raise TrainingError(
            f"the {' and the '.join(moved)} changed since this run began",
            where=f"{run.path}, trained on {dataset.path}",
            fix="put it back as it was, or choose another run.output",
        )
    return not moved


def write_start(
    run: RunDirectory,
    recipe: Recipe | ImageRecipe,
    facts: Mapping[str, str],
    survey: Survey,
    accelerator: Accelerator,
) -> None:
    """Write recipe.yaml and start.json on the main process; the others wait."""
    if accelerator.is_main_process:
        write_atomically(run.path / "recipe.yaml", dump_yaml(recipe))
        run.write(START, {**facts, "survey": survey.as_json()})
    accelerator.wait_for_everyone()


def summary_of(
    dataset: Dataset[Any],
    survey: Survey,
    *,
    steps: int,
    reference: str,
    processes: int,
    packages: Sequence[str],
) -> dict[str, Any]:
    """What run.json will say."""
    return {
        "steps": steps,
        "dataset": dataset.manifest.content_hash,
        "rows": len(survey.rows),
        "dropped": {reason: len(ids) for reason, ids in survey.dropped.items()},
        "reference": reference,
        "processes": processes,
        "versions": {name: version(name) for name in packages},
    }
