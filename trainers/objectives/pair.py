"""Preference rows: chosen and rejected under one condition, and chosen under a contrast image."""

from __future__ import annotations

from collections.abc import Sequence, Set
from pathlib import Path

import torch

from mmalign.losses.base import Need
from mmalign.prepare import Preparer, RowDropped
from mmalign.records import Preference
from mmalign.scores import PairTable
from mmalign.scoring.candidates import Candidate
from trainers.objectives.base import PreparedRow, check_row


class PairObjective:
    """Every row is [chosen, rejected], or [chosen, rejected, contrast] where the loss needs it."""

    unit = "pairs"

    def __init__(self, preparer: Preparer, media_root: Path, *, needs: Set[Need]) -> None:
        self.preparer, self.media_root, self.needs = preparer, media_root, needs
        self.row_candidates = 3 if Need.CONTRAST in needs else 2

    def prepare(self, record: Preference) -> PreparedRow:
        """The row's candidates. Chosen holds the same tokens under both conditions."""
        self._check(record)
        condition, (chosen, rejected) = self.preparer.fit(
            record.prompt,
            record.images,
            [record.chosen, record.rejected],
            self.media_root,
            id=record.id,
        )
        if Need.CONTRAST not in self.needs:
            return PreparedRow(
                id=record.id,
                conditions=(condition,),
                candidates=_candidates((0, chosen), (0, rejected)),
                score_gap=record.score_gap,
            )
        contrast, (again,) = self.preparer.fit(
            record.prompt,
            record.contrast_images,
            [record.chosen],
            self.media_root,
            id=f"{record.id}/contrast",
        )
        # The token limit may cut more under the larger image; the visual pair compares one
        # response, so it is cut alike under both.
        chosen = chosen[: len(again)]
        return PreparedRow(
            id=record.id,
            conditions=(condition, contrast),
            candidates=_candidates((0, chosen), (0, rejected), (1, again[: len(chosen)])),
            score_gap=record.score_gap,
        )

    def table(self, rows: Sequence[PreparedRow]) -> PairTable:
        """Row i holds the candidates from i * row_candidates on."""
        first = torch.arange(len(rows)) * self.row_candidates
        gaps = [row.score_gap for row in rows if row.score_gap is not None]
        return PairTable(
            chosen=first,
            rejected=first + 1,
            contrast=first + 2 if Need.CONTRAST in self.needs else None,
            score_gap=torch.tensor(gaps) if Need.SCORE_GAP in self.needs else None,
        )

    def _check(self, record: Preference) -> None:
        check_row(record)
        if Need.CONTRAST in self.needs and not record.contrast_images:
            raise RowDropped("no_contrast_images", "the row has none", where=record.id)
        if Need.SCORE_GAP in self.needs and record.score_gap is None:
            raise RowDropped("no_score_gap", "the row has none", where=record.id)


def _candidates(*pairs: tuple[int, list[int]]) -> tuple[Candidate, ...]:
    return tuple(Candidate(condition=place, response_ids=ids) for place, ids in pairs)
