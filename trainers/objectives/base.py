"""What every objective over text shares: prepared rows, batches of them, and the dataset check."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mmalign.errors import SchemaMismatch
from mmalign.losses.base import LossConfig, Need
from mmalign.prepare import Preparer, RowDropped
from mmalign.records import Example, Preference, check, kind_name
from mmalign.scores import PairTable
from mmalign.scoring.candidates import Candidate, CandidateBatch, Condition
from mmalign.store import Dataset

# The dataset columns that a loss can demand, and the builder that makes each.
COLUMNS = {
    Need.REJECTED: (
        "rejected",
        "a pair builder, such as `mmalign build configs/build/realign_coco.yaml`",
    ),
    Need.CONTRAST: ("contrast_images", "`mmalign build configs/build/realign_coco.yaml`"),
    Need.SCORE_GAP: ("score_gap", "an importer that keeps annotators' scores"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedRow:
    """One dataset row in tokens: its conditions, and its candidates with the chosen one first."""

    id: str
    conditions: tuple[Condition, ...]
    candidates: tuple[Candidate, ...]
    score_gap: float | None = None

    @property
    def num_chosen_tokens(self) -> int:
        """Tokens of the chosen response."""
        return len(self.candidates[0].response_ids)

    @property
    def num_tokens(self) -> int:
        """Prompt tokens of each condition once, and every response."""
        prompts = sum(len(condition.prompt_ids) for condition in self.conditions)
        return prompts + sum(len(candidate.response_ids) for candidate in self.candidates)

    @property
    def num_bytes(self) -> int:
        """About what the row holds in memory; pictures are nearly all of it."""
        images = (image for condition in self.conditions for image in condition.images)
        tensors = (tensor for image in images for tensor in image.inputs.values())
        return 64 * self.num_tokens + sum(tensor.nbytes for tensor in tensors)


class Objective(Protocol):
    """Turns records into prepared rows, and prepared rows into the pairs of a batch.

    unit is what a row is to a reader of the log: "pairs" or "examples".
    """

    unit: str

    def prepare(self, record: Any) -> PreparedRow:
        """Raises RowDropped or MediaError for a row that cannot be used."""
        ...

    def table(self, rows: Sequence[PreparedRow]) -> PairTable:
        """Which candidates of `collate(rows)` form the pairs."""
        ...


def objective_for(loss: LossConfig, preparer: Preparer, media_root: Path) -> Objective:
    """The objective whose batches hold what the loss reads."""
    from trainers.objectives.pair import PairObjective
    from trainers.objectives.sft import SFTObjective

    if Need.REJECTED not in loss.needs:
        return SFTObjective(preparer, media_root)
    return PairObjective(preparer, media_root, needs=loss.needs)


def check_row(record: Example | Preference) -> None:
    """Raise RowDropped for a row that no objective may use.

    One check for all of them, so that a supervised control sees the rows of the comparison it
    belongs to. A preference is taken as certain: ties and reversed ones (p_target of at most 0.5)
    are dropped, and so is what has no weight.
    """
    if record.videos or (isinstance(record, Preference) and record.contrast_videos):
        raise RowDropped("holds_clips", "clips cannot be trained on yet", where=record.id)
    if isinstance(record, Preference) and record.p_target <= 0.5:
        raise RowDropped("tie_or_reversed", "p_target is at most 0.5", where=record.id)
    if isinstance(record, Preference) and record.weight == 0:
        raise RowDropped("no_weight", "its weight is 0", where=record.id)
    for problem in check(record):
        raise RowDropped(f"bad_{problem.column}", problem.what, where=record.id)


def collate(rows: Sequence[PreparedRow]) -> CandidateBatch:
    """All candidates of the rows in order, under conditions that appear once each."""
    places: dict[object, int] = {}
    conditions: list[Condition] = []
    candidates: list[Candidate] = []
    for row in rows:
        local = []
        for condition in row.conditions:
            key = (tuple(condition.prompt_ids), tuple(image.key for image in condition.images))
            if key not in places:
                places[key] = len(conditions)
                conditions.append(condition)
            local.append(places[key])
        candidates += [
            Candidate(condition=local[c.condition], response_ids=c.response_ids)
            for c in row.candidates
        ]
    return CandidateBatch(conditions=conditions, candidates=candidates)


def check_dataset(dataset: Dataset[Any], loss: LossConfig) -> None:
    """Raise SchemaMismatch where no row has what the loss needs, or rows weigh unequally.

    Runs before a model is loaded.
    """
    name = getattr(loss, "name", type(loss).__name__)
    kinds = (Preference,) if Need.REJECTED in loss.needs else (Example, Preference)
    if dataset.kind not in kinds:
        raise SchemaMismatch(
            f"loss {name!r} cannot train on {dataset.manifest.kind} records",
            where=str(dataset.path),
            wanted=" or ".join(kind_name(kind) for kind in kinds),
            fix=f"build it with {COLUMNS[Need.REJECTED][1]}, or choose another loss",
        )
    weights = set(dataset.column("weight")) if dataset.kind is Preference else set()
    # Null reads as 1; rows of weight 0 are dropped and counted.
    if others := sorted(weights - {None, 0.0, 1.0}):
        raise SchemaMismatch(
            "no loss reads the column weight, and rows of other weights would count as 1",
            where=str(dataset.path),
            got=f"{others[0]:g}",
            wanted="1, or 0 for a row to leave out",
            fix="set the column to 1",
        )
    for need in sorted(loss.needs & COLUMNS.keys()):
        column, builder = COLUMNS[need]
        # None and the empty list mean "not given"; a score gap of 0.0 is given.
        if not any(value not in (None, []) for value in dataset.column(column)):
            raise SchemaMismatch(
                f"loss {name!r} needs the column {column}, which is empty in every row",
                where=str(dataset.path),
                fix=f"build the dataset with {builder}, or choose a loss that does not need it",
            )
