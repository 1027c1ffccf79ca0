"""What every objective over text shares: prepared rows, batches of them, and the dataset check."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence, Set
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from mmalign.errors import SchemaMismatch
from mmalign.losses import Loss
from mmalign.losses.base import Need
from mmalign.losses.rollout import RolloutLossConfig
from mmalign.prepare import Preparer, RowDropped
from mmalign.records import (
    Example,
    Preference,
    Ranking,
    Record,
    Verifiable,
    check,
    kind_name,
)
from mmalign.scores import PairTable
from mmalign.scoring.candidates import Candidate, CandidateBatch, Condition
from mmalign.store import Dataset

# The dataset columns that a loss can demand, and what makes each.
PAIR_BUILDER = "a pair builder, such as `mmalign build configs/build/realign_coco.yaml`"
CRITIQUE_BUILDER = "`mmalign build configs/build/critiques.yaml`, or an import of MM-RLHF"
COLUMNS = {
    Need.REJECTED: PAIR_BUILDER,
    Need.CONTRAST: "`mmalign build configs/build/realign_coco.yaml`",
    Need.SCORE_GAP: "`mmalign build configs/build/score_pairs.yaml`, or an importer that keeps "
    "annotators' scores",
    Need.SPANS: "`mmalign build configs/build/rrpo_video.yaml`, or another pair builder, which "
    "all mark the phrases that differ",
    Need.RATIONALE: CRITIQUE_BUILDER,
    Need.CRITIQUES: CRITIQUE_BUILDER,
}

# What a dataset's rows are where pairs are made during training: pairs of their own, which new
# ones replace or join, or prompts alone.
OnlineRows = Literal["pairs", "prompts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RowPair:
    """One pair of a row, by the places of its candidates in the row; as in PairTable."""

    chosen: int = 0
    rejected: int | None = None
    contrast: int | None = None
    rationale: int | None = None
    score_gap: float | None = None
    p_target: float = 1.0
    weight: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedRow:
    """One dataset row in tokens: its conditions, its candidates with the best one first, pairs.

    Rows may have any number of pairs, whose weights add up to the row's. One whose responses are
    sampled during training has none of either yet.
    """

    id: str
    conditions: tuple[Condition, ...]
    candidates: tuple[Candidate, ...]
    pairs: tuple[RowPair, ...] = (RowPair(),)

    @property
    def num_chosen_tokens(self) -> float:
        """Tokens of the chosen response; of several pairs, which weigh the same, the mean.

        What a token-averaged term divides by: a ranking's numerator is that mean too.
        """
        lengths = [len(self.candidates[pair.chosen].response_ids) for pair in self.pairs]
        return sum(lengths) / len(lengths) if lengths else 0.0

    @property
    def num_tokens(self) -> int:
        """Prompt tokens of each condition once, and every response."""
        prompts = sum(len(condition.prompt_ids) for condition in self.conditions)
        return prompts + sum(len(candidate.response_ids) for candidate in self.candidates)

    @property
    def digest(self) -> str:
        """Changes with any token, with who stands under which condition, and with media's sizes."""
        digest = hashlib.sha256()
        for condition in self.conditions:
            media = [one.num_tokens for one in condition.images + condition.videos]
            digest.update(f"{media} {condition.prompt_ids};".encode())
        for candidate in self.candidates:
            digest.update(f"{candidate.condition} {candidate.response_ids};".encode())
        return digest.hexdigest()

    @property
    def kind(self) -> str:
        """Which media its prompts hold: image, video, image+video, or text for none."""
        image = any(condition.images for condition in self.conditions)
        video = any(condition.videos for condition in self.conditions)
        return "+".join(["image"] * image + ["video"] * video) or "text"

    @property
    def num_bytes(self) -> int:
        """About what the row holds in memory; pictures are nearly all of it."""
        media = (
            one for condition in self.conditions for one in condition.images + condition.videos
        )
        tensors = (tensor for one in media for tensor in one.inputs.values())
        return 64 * self.num_tokens + sum(tensor.nbytes for tensor in tensors)


class Objective(Protocol):
    """Turns records into prepared rows.

    unit is what a row is to a reader of the log: "pairs", "rankings" or "examples".
    """

    unit: str

    def prepare(self, record: Any) -> PreparedRow:
        """Raises RowDropped or MediaError for a row that cannot be used."""
        ...


def objective_for(
    loss: Loss, preparer: Preparer, media_root: Path, *, kind: type[Record] = Preference
) -> Objective:
    """The objective whose batches hold what the loss reads, of records of this kind."""
    from trainers.objectives.pair import PairObjective
    from trainers.objectives.ranking import RankingObjective
    from trainers.objectives.reward import RewardObjective
    from trainers.objectives.rollout import RolloutObjective, RolloutPairObjective
    from trainers.objectives.sft import SFTObjective

    if kind is Ranking:
        return RankingObjective(preparer, media_root, needs=loss.needs)
    if Need.ROLLOUTS in loss.needs:
        return RolloutObjective(preparer, media_root)
    if kind is Verifiable:
        return RolloutPairObjective(preparer, media_root)
    if Need.REWARD_HEAD in loss.needs:
        return RewardObjective(preparer, media_root, critiques=Need.CRITIQUES in loss.needs)
    if Need.REJECTED not in loss.needs:
        return SFTObjective(preparer, media_root)
    return PairObjective(preparer, media_root, needs=loss.needs)


def check_row(
    record: Example | Preference | Ranking | Verifiable, needs: Set[Need] = frozenset()
) -> None:
    """Raise RowDropped for a row that no objective may use.

    One check for all of them, so that a supervised control sees the rows of the comparison it
    belongs to. Unless the loss reads p_target, a preference is taken as certain: ties and reversed
    ones (p_target of at most 0.5) are dropped; and so is what has no weight.
    """
    if isinstance(record, Preference):
        if record.p_target <= 0.5 and Need.P_TARGET not in needs:
            raise RowDropped("tie_or_reversed", "p_target is at most 0.5", where=record.id)
        if record.weight == 0:
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
            media = condition.images + condition.videos
            key = (tuple(condition.prompt_ids), tuple(one.key for one in media))
            if key not in places:
                places[key] = len(conditions)
                conditions.append(condition)
            local.append(places[key])
        candidates += [
            replace(candidate, condition=local[candidate.condition]) for candidate in row.candidates
        ]
    return CandidateBatch(conditions=conditions, candidates=candidates)


def table(rows: Sequence[PreparedRow]) -> PairTable:
    """The pairs of `collate(rows)`, row after row. A column that no pair has is None."""
    columns: dict[str, list[Any]] = {f.name: [] for f in fields(RowPair)}
    start = 0
    for row in rows:
        for pair in row.pairs:
            for name, values in columns.items():
                value = getattr(pair, name)
                place = name in ("chosen", "rejected", "contrast", "rationale")
                values.append(value + start if place and value is not None else value)
        start += len(row.candidates)
    return PairTable(
        **{
            name: torch.tensor(values)
            for name, values in columns.items()
            if None not in values and (name not in ("p_target", "weight") or set(values) != {1.0})
        }
    )


def check_dataset(dataset: Dataset[Any], loss: Loss, *, online: OnlineRows | None = None) -> None:
    """Raise SchemaMismatch where no row has what the loss needs. Runs before a model is loaded.

    online: what rows are to the pairs that are made during training, if any are.
    """
    from trainers.objectives.ranking import check_rankings

    if dataset.kind is Ranking:
        check_rankings(dataset, loss, online=online is not None)
        return
    prompts = online == "prompts" or Need.ROLLOUTS in loss.needs
    kinds: tuple[type[Any], ...] = (Example, Preference)
    if prompts:
        kinds = (Verifiable,)
    elif Need.REJECTED in loss.needs:
        kinds = (Preference,)
    if dataset.kind not in kinds:
        raise SchemaMismatch(
            f"loss {loss.name!r} cannot train on {dataset.manifest.kind} records"
            + " by pairs of rollouts" * (online == "prompts"),
            where=str(dataset.path),
            wanted=" or ".join(kind_name(kind) for kind in kinds),
            fix=_other_kind(loss, dataset.kind, prompts=prompts),
        )
    if prompts:
        return
    for need in sorted(loss.needs & COLUMNS.keys()):
        # None and the empty list mean "not given"; a score gap of 0.0 is given. A phrase may be
        # on one side only.
        columns = ["chosen_spans", "rejected_spans"] if need is Need.SPANS else [need.value]
        if all(value in (None, []) for column in columns for value in dataset.column(column)):
            raise SchemaMismatch(
                f"loss {loss.name!r} needs the column {need.value}, which is empty in every row",
                where=str(dataset.path),
                fix=f"build the dataset with {COLUMNS[need]}, or choose a loss that does not "
                "need it",
            )


def _other_kind(loss: Loss, kind: type[Any], *, prompts: bool) -> str:
    """What to do about a dataset of another kind than the loss trains on."""
    if Need.ROLLOUTS in loss.needs:
        return "import prompts with answers that a program can check, or choose another loss"
    if prompts:
        return (
            "import prompts with answers that a program can check, or sample on this dataset's own "
            "prompts: data.online.source.name=annotated"
        )
    if kind is Verifiable and Need.REJECTED in loss.needs:
        return "make pairs of rollouts: data.online.source.name=rollouts; or choose another loss"
    return f"build it with {COLUMNS[Need.REJECTED]}, or choose another loss"


def fitted(loss: Loss, dataset: Dataset[Any]) -> Loss:
    """The loss with what it derives from the dataset, such as MM-DPO's k, filled in."""
    if isinstance(loss, RolloutLossConfig) or Need.SCORE_GAP not in loss.needs:
        return loss
    if dataset.kind is Ranking:
        from trainers.objectives.ranking import score_gaps

        return loss.fitted(list(score_gaps(dataset)))
    return loss.fitted([gap for gap in dataset.column("score_gap") if gap is not None])
