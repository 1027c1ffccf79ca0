"""Re-Align's dual preference: over two responses, and over two images for the chosen response."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import NonNegativeFloat, PositiveFloat

from mmalign.losses.base import LossConfig, Need, dpo_term, logratios, pair_metrics
from mmalign.losses.dpo import with_sft
from mmalign.scores import LossOutput, PairTable, TokenScores, Totals


class RDPO(LossConfig):
    """Retrieval-augmented DPO as published (Re-Align, arXiv 2502.13146).

    L = - log sigmoid(beta [l(y_w|v) - l(y_l|v)]) - w_v log sigmoid(beta [l(y_w|v) - l(y_w|v_l)]),
    l(y|v) = log pi_theta(y|x,v) - log pi_ref(y|x,v) summed over tokens, v_l the retrieved image.
    The rejected response never meets v_l. Averaged over pairs.

    visual_weight: w_v, 1 in the method. sft_weight: as in DPO; 0 in the method.
    Deviation from the released code: that code gathers, for the second and third term, the
    log-probability of the strongest *competitor* of each label instead of the label's own. Ours
    gathers the label's; the released quantity is RDPOCompetitor.
    """

    name: Literal["rdpo"] = "rdpo"
    beta: PositiveFloat = 0.1
    visual_weight: NonNegativeFloat = 1.0
    sft_weight: NonNegativeFloat = 0.0
    needs: ClassVar[frozenset[Need]] = frozenset({Need.REJECTED, Need.REFERENCE, Need.CONTRAST})

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
        assert table.contrast is not None
        ratio = logratios(policy, reference)
        chosen = ratio[table.chosen]
        visual_margin = chosen - ratio[table.contrast]
        terms = dpo_term(chosen - ratio[table.rejected], self.beta)
        terms = terms + self.visual_weight * dpo_term(visual_margin, self.beta)
        metrics = pair_metrics(policy, reference, table, self.beta) | {
            "visual_margin": self.beta * visual_margin.detach().sum(),
            "visual_accuracy": (visual_margin.detach() > 0).float().sum(),
        }
        return with_sft(terms, metrics, policy, table, totals, self.sft_weight)


class RDPOCompetitor(LossConfig):
    """The quantity that Re-Align's released code descends, kept for comparison only.

    As RDPO, but l(y_l|v) and l(y_w|v_l) are replaced by sums over the positions of y of
    log pi(a_t | y_<t) with a_t the likeliest token other than y_t, for policy and reference each
    by its own choice of a_t. The rejected response's own likelihood never enters, and a retrieved
    image equal to the original still gives a gradient. Found by reading the released trainer; the
    published checkpoints may come from either.
    """

    name: Literal["rdpo_competitor"] = "rdpo_competitor"
    beta: PositiveFloat = 0.1
    visual_weight: NonNegativeFloat = 1.0
    needs: ClassVar[frozenset[Need]] = frozenset(
        {Need.REJECTED, Need.REFERENCE, Need.CONTRAST, Need.COMPETITOR}
    )

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
        assert table.contrast is not None
        assert policy.competitor_logps is not None
        assert reference.competitor_logps is not None
        chosen = logratios(policy, reference)[table.chosen]
        rivals = policy.competitor_logps - reference.competitor_logps
        rival = (rivals * policy.mask).sum(-1)
        visual_margin = chosen - rival[table.contrast]
        terms = dpo_term(chosen - rival[table.rejected], self.beta)
        terms = terms + self.visual_weight * dpo_term(visual_margin, self.beta)
        metrics = pair_metrics(policy, reference, table, self.beta) | {
            "visual_margin": self.beta * visual_margin.detach().sum(),
        }
        return with_sft(terms, metrics, policy, table, totals, sft_weight=0.0)
