"""Direct preference optimisation over text responses."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor

from mmalign.losses.base import (
    LossConfig,
    Need,
    chosen_nll,
    dpo_term,
    logratios,
    pair_metrics,
)
from mmalign.scores import LossOutput, PairTable, TokenScores, Totals


class DPO(LossConfig):
    """Direct preference optimisation (Rafailov et al., arXiv 2305.18290, equation 7).

    L = - log sigmoid(beta * [l(y_w) - l(y_l)]),  l(y) = log pi_theta(y|x) - log pi_ref(y|x),
    log-probabilities summed over response tokens, averaged over pairs.

    sft_weight: adds sft_weight times the token-averaged negative log-likelihood of the chosen
        responses (the SFT term of RPO, arXiv 2404.19733), which keeps chosen from falling too.
    Raises nothing of its own: the objective has checked that pairs and a reference are there.
    """

    name: Literal["dpo"] = "dpo"
    beta: PositiveFloat = 0.1
    sft_weight: NonNegativeFloat = 0.0
    needs: ClassVar[frozenset[Need]] = frozenset({Need.REJECTED, Need.REFERENCE})

    def __call__(
        self,
        policy: TokenScores,
        reference: TokenScores | None,
        table: PairTable,
        totals: Totals,
    ) -> LossOutput:
        """The batch's share of the step's loss."""
        assert reference is not None
        assert table.rejected is not None
        ratio = logratios(policy, reference)
        terms = dpo_term(ratio[table.chosen] - ratio[table.rejected], self.beta)
        metrics = pair_metrics(policy, reference, table, self.beta)
        return with_sft(terms, metrics, policy, table, totals, self.sft_weight)


def with_sft(
    terms: Tensor,
    metrics: dict[str, Tensor],
    policy: TokenScores,
    table: PairTable,
    totals: Totals,
    sft_weight: float,
) -> LossOutput:
    """Average pair terms [P] over the step's pairs and add the weighted SFT term."""
    nll = chosen_nll(policy, table)
    loss = terms.sum() / totals.num_pairs
    if sft_weight:
        loss = loss + sft_weight * nll.sum() / totals.num_chosen_tokens
    tokens = policy.lengths()[table.chosen]
    metrics = {**metrics, "nll": (nll / tokens).detach().sum()}
    return LossOutput(loss=loss, per_item=terms.detach(), metrics=metrics)
