"""Supervised rows: one prompt, one right response."""

from __future__ import annotations

from pathlib import Path

from mmalign.prepare import Preparer, RowDropped
from mmalign.records import Example, Preference
from mmalign.scoring.candidates import Candidate
from trainers.objectives.base import PreparedRow, RowPair, check_row


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
            record.prompt,
            record.images,
            [text],
            self.media_root,
            videos=record.videos,
            id=record.id,
        )
        candidate = Candidate(condition=0, response_ids=response)
        weight = record.weight if isinstance(record, Preference) else 1.0
        return PreparedRow(
            id=record.id,
            conditions=(condition,),
            candidates=(candidate,),
            pairs=(RowPair(weight=weight),),
        )
