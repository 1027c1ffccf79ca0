"""Preference rows for a reward model: a critique of each response, under the critic's prompt."""

from __future__ import annotations

from pathlib import Path

from mmalign.errors import ModelError
from mmalign.losses.base import Need
from mmalign.models.reward_head import stored_config
from mmalign.prepare import Preparer, RowDropped
from mmalign.records import Preference
from mmalign.reward import critic_turn
from mmalign.scoring.candidates import Candidate, Condition
from trainers.objectives.base import PreparedRow, RowPair, check_row


class RewardObjective:
    """Rows are [critique of chosen], [critique of rejected], each under its own condition.

    A condition is the critic's prompt, which shows the question and one of the responses, with the
    row's pictures and clips. Without critiques, a candidate is the end of the turn alone. Ties are
    kept. The prompt is the one that the model's head remembers; inference takes it from there too.
    """

    unit = "pairs"

    def __init__(self, preparer: Preparer, media_root: Path, *, critiques: bool) -> None:
        self.preparer, self.media_root, self.critiques = preparer, media_root, critiques
        config = stored_config(preparer.config, "config.json")
        if config is None:
            raise ModelError(
                "the loss reads a reward head, and the model has none",
                fix="set model.reward_head={} for a fresh one, or train on from a reward model",
            )
        self.template = config.prompt

    def prepare(self, record: Preference) -> PreparedRow:
        """The row's two candidates. Raises RowDropped where it teaches no reward."""
        check_row(record, {Need.P_TARGET})
        if record.chosen == record.rejected:
            raise RowDropped("same_response", "both responses are one", where=record.id)
        texts = (record.chosen_critique, record.rejected_critique)
        if self.critiques and not all((text or "").strip() for text in texts):
            raise RowDropped("no_critiques", "a response has no critique", where=record.id)
        critiques = texts if self.critiques else (None, None)
        chosen, its = self._side(record, "chosen", record.chosen, critiques[0])
        rejected, others = self._side(record, "rejected", record.rejected, critiques[1])
        return PreparedRow(
            id=record.id,
            conditions=(chosen, rejected),
            candidates=(
                Candidate(condition=0, response_ids=its),
                Candidate(condition=1, response_ids=others),
            ),
            pairs=(RowPair(rejected=1, p_target=record.p_target, weight=record.weight),),
        )

    def _side(
        self, record: Preference, side: str, response: str, critique: str | None
    ) -> tuple[Condition, list[int]]:
        condition, (ids,) = self.preparer.fit(
            critic_turn(self.template, record.prompt, response),
            record.images,
            [critique],
            self.media_root,
            videos=record.videos,
            id=f"{record.id}/{side}",
        )
        return condition, ids
