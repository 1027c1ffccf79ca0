"""Supervised rows: one prompt, one right response."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from mmalign.prepare import Preparer, RowDropped
from mmalign.records import Example, Preference
from mmalign.scores import PairTable
from mmalign.scoring.candidates import Candidate
from trainers.objectives.base import PreparedRow, check_row


class SFTObjective:
    """The answer of an Example, or the chosen response of a Preference."""

    unit = "examples"

    def __init__(self, preparer: Preparer, media_root: Path) -> None:
        self.preparer, self.media_root = preparer, media_root

    def prepare(self, record: Example | Preference) -> PreparedRow:
        """One condition, one candidate."""
        text = record.chosen if isinstance(record, Preference) else record.answer
        check_row(record)
        if text is None:
            raise RowDropped("no_answer", "the row has no answer", where=record.id)
        condition, (response,) = self.preparer.fit(
            record.prompt, record.images, [text], self.media_root, id=record.id
        )
        candidate = Candidate(condition=0, response_ids=response)
        return PreparedRow(id=record.id, conditions=(condition,), candidates=(candidate,))

    def table(self, rows: Sequence[PreparedRow]) -> PairTable:
        """Candidate i is row i."""
        return PairTable(chosen=torch.arange(len(rows)))
