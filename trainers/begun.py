"""What a run began from: facts that may not change while it is resumed, and what run.json says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from accelerate import Accelerator

from mmalign.config import dump_yaml
from mmalign.errors import TrainingError
from mmalign.models.load import Policy
from mmalign.store import Dataset, write_atomically
from trainers.config import Recipe
from trainers.directory import RunDirectory, damaged
from trainers.images.config import ImageRecipe
from trainers.origin import origin_of
from trainers.reference import fingerprint
from trainers.rows import Rows, Survey

START = "start.json"
# Where start.json and run.json name the weights that a run began from.
ORIGIN = "weights"


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


def started_from(
    recipe: Recipe,
    run: RunDirectory,
    dataset: Dataset[Any],
    policy: Policy,
    rows: Rows,
    accelerator: Accelerator,
) -> Survey:
    """The rows that can be used; what the run began from is written down.

    A resumed run takes them from start.json. Raises TrainingError where dataset, pictures or
    initial policy are no longer the ones its checkpoints were trained from, and where the policy
    is not the one that `recipe.start_from` asks for.
    """
    facts = {
        "dataset": dataset.manifest.content_hash,
        "media": rows.media(accelerator),
        "policy": fingerprint(policy.model),
        "recipe": run.recipe_hash,
    }
    if check_unmoved(run, dataset, facts):
        survey = _read_survey(run, run.read(START))
        if survey is not None:
            return survey
    weights = origin_of(recipe, policy, accelerator)
    survey = rows.survey(accelerator)
    write_start(run, recipe, {**facts, ORIGIN: weights}, survey, accelerator)
    return survey


def _read_survey(run: RunDirectory, started: Mapping[str, Any]) -> Survey | None:
    """The survey of an earlier start; None where it has to be made again and still may be.

    Raises TrainingError where checkpoints hang on a survey that is damaged, or of a version that
    did not look at media.
    """
    try:
        return Survey(**started["survey"])
    except (KeyError, TypeError):
        if run.newest is None:
            return None
        if "kinds" not in started.get("survey", {"kinds"}):
            raise TrainingError(
                "was begun by a version that dealt rows to micro-batches without regard to media",
                where=str(run.path),
                fix="finish it with that version, or choose another run.output",
            ) from None
        raise damaged(run.path / "start.json", "the survey of its rows is incomplete") from None
