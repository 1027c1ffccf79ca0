"""Supervised fine-tuning: the control that every preference method is shown beside."""

from __future__ import annotations

from typing import Literal

from mmalign.losses.base import LossConfig, chosen_nll
from mmalign.scores import LossOutput, PairTable, TokenScores, Totals


class SFT(LossConfig):
    """Negative log-likelihood of the chosen responses, averaged over tokens.

    L = - sum_i sum_t log pi(y_it | x_i, y_i<t) / (number of response tokens in the step).

    policy.logps: [N, T] nats. `loss` is this batch's share, so shares add up to the step's mean.
    """

    name: Literal["sft"] = "sft"

    def __call__(
        self,
        policy: TokenScores,
        reference: TokenScores | None,
        table: PairTable,
        totals: Totals,
    ) -> LossOutput:
        """The batch's share of the token mean; `reference` is not used."""
        weight = 1.0 if table.weight is None else table.weight
        nll = weight * chosen_nll(policy, table)
        tokens = policy.lengths()[table.chosen]
        return LossOutput(
            loss=nll.sum() / totals.num_chosen_tokens,
            per_item=(nll / tokens).detach(),
            metrics={"nll": (nll / tokens).detach().sum()},
        )
