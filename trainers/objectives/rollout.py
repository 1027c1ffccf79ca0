"""Prompts whose responses are sampled during training."""

from __future__ import annotations

from pathlib import Path

from mmalign.prepare import Preparer, RowDropped
from mmalign.records import Verifiable
from mmalign.verify import truth_problem
from trainers.objectives.base import PreparedRow, check_row


class RolloutObjective:
    """Rows are a prompt alone; see trainers/rollouts.py for its responses."""

    unit = "rollouts"

    def __init__(self, preparer: Preparer, media_root: Path) -> None:
        self.preparer, self.media_root = preparer, media_root

    def prepare(self, record: Verifiable) -> PreparedRow:
        """One condition. Raises RowDropped where its own answer cannot be read by its verifier."""
        check_row(record)
        if (problem := truth_problem(record)) is not None:
            raise RowDropped("unreadable_truth", problem, where=record.id)
        # The end of a turn alone stands for the responses, for which there must be some room.
        condition, _ = self.preparer.fit(
            record.prompt,
            record.images,
            [None],
            self.media_root,
            videos=record.videos,
            id=record.id,
        )
        return PreparedRow(id=record.id, conditions=(condition,), candidates=(), pairs=())


class RolloutPairObjective(RolloutObjective):
    """The same prompts, where two of the responses become a pair; see trainers/rollout_pairs.py."""

    unit = "pairs"
