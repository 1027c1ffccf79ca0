"""From batches to plans: the layout asked for, or for each batch the one that costs less."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mmalign.attention.choose import MASKED, Attention, sliding_window
from mmalign.models.families import Family
from mmalign.models.load import Policy, base_model
from mmalign.scoring.candidates import CandidateBatch
from mmalign.scoring.cost import ModelCost, model_cost, padded_cost, shared_cost
from mmalign.scoring.plan import Layout, Plan, make_plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Planner:
    """Lays batches of one model out; made once, and handed to the processes that make batches."""

    family: Family
    layout: Literal["auto"] | Layout
    packed: bool
    window: int | None
    cost: ModelCost
    image_token_id: int
    video_token_id: int | None
    pad_token_id: int

    def __call__(self, batch: CandidateBatch) -> Plan:
        """The batch's plan. Raises DataError as make_plan does."""
        return make_plan(
            batch,
            self.family,
            self.layout_of(batch),
            image_token_id=self.image_token_id,
            video_token_id=self.video_token_id,
            pad_token_id=self.pad_token_id,
            packed=self.packed,
            window=self.window,
        )

    def layout_of(self, batch: CandidateBatch) -> Layout:
        """The layout asked for; with `auto`, the one whose estimated step is cheaper."""
        if self.layout != "auto":
            return self.layout
        two_way = self.family.prompt_attention == "bidirectional"
        shared = shared_cost(batch, self.cost, packed=self.packed, two_way=two_way)
        return "shared_prefix" if shared <= padded_cost(batch, self.cost) else "padded"


def planner_of(
    policy: Policy, layout: Literal["auto"] | Layout = "auto", attention: Attention = MASKED
) -> Planner:
    """The planner of a loaded policy whose scorer attends like this."""
    preparer = policy.preparer
    return Planner(
        family=policy.family,
        layout=layout,
        packed=attention.packs,
        window=sliding_window(base_model(policy.model).config.get_text_config()),
        cost=model_cost(policy.model, policy.family),
        image_token_id=preparer.image_token_id,
        video_token_id=preparer.video_token_id,
        pad_token_id=preparer.pad_token_id,
    )
