"""Preference rows: chosen and rejected under one condition, and what else a loss compares."""

from __future__ import annotations

from collections.abc import Sequence, Set
from pathlib import Path

from mmalign.losses.base import Need
from mmalign.prepare import Preparer, RowDropped
from mmalign.records import Preference, Span, prompt_text, user
from mmalign.scoring.candidates import Candidate, Condition
from trainers.objectives.base import PreparedRow, RowPair, check_row

RATIONALE_PROMPT = """\
Below are a question about the image and two responses to it. Say why response A is better.

Question: {question}
Response A: {chosen}
Response B: {rejected}"""


class PairObjective:
    """Rows are [chosen, rejected], then, where the loss needs them, [contrast], [rationale]."""

    unit = "pairs"

    def __init__(self, preparer: Preparer, media_root: Path, *, needs: Set[Need]) -> None:
        self.preparer, self.media_root, self.needs = preparer, media_root, needs

    def prepare(self, record: Preference) -> PreparedRow:
        """The row's candidates. Chosen holds the same tokens under both conditions."""
        self._check(record)
        condition, (chosen, rejected) = self.preparer.fit(
            record.prompt,
            record.images,
            [record.chosen, record.rejected],
            self.media_root,
            videos=record.videos,
            id=record.id,
        )
        conditions = [condition]
        further: list[Candidate] = []
        places: dict[str, int] = {}
        if Need.CONTRAST in self.needs:
            contrast, again = self._contrast(record)
            # The token limit may cut more under the larger image; the visual pair compares one
            # response, so it is cut alike under both.
            chosen, again = chosen[: len(again)], again[: len(chosen)]
            places["contrast"] = 2 + len(further)
            further.append(Candidate(condition=len(conditions), response_ids=again))
            conditions.append(contrast)
        if Need.RATIONALE in self.needs:
            shown, rationale = self._rationale(record)
            places["rationale"] = 2 + len(further)
            further.append(Candidate(condition=len(conditions), response_ids=rationale))
            conditions.append(shown)
        pair = RowPair(
            rejected=1,
            score_gap=record.score_gap,
            p_target=record.p_target if Need.P_TARGET in self.needs else 1.0,
            weight=record.weight,
            **places,
        )
        sides = ((chosen, record.chosen, record.chosen_spans),)
        sides += ((rejected, record.rejected, record.rejected_spans),)
        own = [self._candidate(record, *side) for side in sides]
        if Need.SPANS in self.needs and not any(any(side.marked or ()) for side in own):
            raise RowDropped("spans_cut", "no token of a phrase is left", where=record.id)
        return PreparedRow(
            id=record.id,
            conditions=tuple(conditions),
            candidates=(*own, *further),
            pairs=(pair,),
        )

    def _candidate(
        self, record: Preference, ids: list[int], text: str, spans: Sequence[Span]
    ) -> Candidate:
        if Need.SPANS not in self.needs:
            return Candidate(condition=0, response_ids=ids)
        # The limit on tokens cuts the end off, and marks with it.
        marked = self.preparer.marked(record.prompt, text, spans)[: len(ids)]
        return Candidate(condition=0, response_ids=ids, marked=marked)

    def _contrast(self, record: Preference) -> tuple[Condition, list[int]]:
        condition, (again,) = self.preparer.fit(
            record.prompt,
            record.contrast_images,
            [record.chosen],
            self.media_root,
            id=f"{record.id}/contrast",
        )
        return condition, again

    def _rationale(self, record: Preference) -> tuple[Condition, list[int]]:
        text = RATIONALE_PROMPT.format(
            question=prompt_text(record.prompt), chosen=record.chosen, rejected=record.rejected
        )
        condition, (rationale,) = self.preparer.fit(
            user(text, images=len(record.images), videos=len(record.videos)),
            record.images,
            [record.chosen_critique or ""],
            self.media_root,
            videos=record.videos,
            id=f"{record.id}/rationale",
        )
        return condition, rationale

    def _check(self, record: Preference) -> None:
        check_row(record, self.needs)
        missing = {
            Need.CONTRAST: not record.contrast_images,
            Need.SCORE_GAP: record.score_gap is None,
            Need.SPANS: not (record.chosen_spans or record.rejected_spans),
            Need.RATIONALE: not (record.chosen_critique or "").strip(),
        }
        for need in sorted(self.needs & missing.keys()):
            if missing[need]:
                raise RowDropped(f"no_{need.value}", "the row has none", where=record.id)
