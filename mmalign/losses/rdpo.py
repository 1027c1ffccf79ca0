"""Preferences over images too: Re-Align's dual preference, and mDPO's with an anchor."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, NonNegativeFloat
from torch import Tensor

from mmalign.losses.base import Need, PairLoss, dpo_term, logratios, pair_metrics
from mmalign.scores import PairTable, TokenScores

Addends = dict[str, tuple[float, Tensor]]


class RDPO(PairLoss):
    """Retrieval-augmented DPO as published (Re-Align, arXiv 2502.13146).

    L = - log sigmoid(beta [l(y_w|v) - l(y_l|v)]) - w_v log sigmoid(beta [l(y_w|v) - l(y_w|v_l)]),
    l(y|v) = log pi_theta(y|x,v) - log pi_ref(y|x,v) summed over tokens, v_l the retrieved image.
    The rejected response never meets v_l. Averaged over pairs.

    visual_weight: w_v, 1 in the method. sft_weight: see PairLoss; 0 in the method.
    Deviation from the released code: that code gathers, for the second and third term, the
    log-probability of the strongest *competitor* of each label instead of the label's own. Ours
    gathers the label's; the released quantity is RDPOCompetitor.
    """

    name: Literal["rdpo"] = "rdpo"
    visual_weight: NonNegativeFloat = 1.0
    own_needs: ClassVar[frozenset[Need]] = PairLoss.own_needs | {Need.CONTRAST}

    def extra(self, policy: TokenScores, reference: TokenScores, table: PairTable) -> Addends:
        """The visual preference."""
        margin = visual_margins(policy, reference, table)
        return {"visual_loss": (self.visual_weight, dpo_term(margin, self.beta))}

    def metrics(
        self, policy: TokenScores, reference: TokenScores, table: PairTable
    ) -> dict[str, Tensor]:
        """Of both preferences."""
        return dual_metrics(policy, reference, table, self.beta)


class RDPOCompetitor(PairLoss):
    """The quantity that Re-Align's released code descends, kept for comparison only.

    As RDPO, but l(y_l|v) and l(y_w|v_l) are replaced by sums over the positions of y of
    log pi(a_t | y_<t) with a_t the likeliest token other than y_t, for policy and reference each
    by its own choice of a_t. The rejected response's own likelihood never enters, and a retrieved
    image equal to the original still gives a gradient. Found by reading the released trainer; the
    published checkpoints may come from either.
    """

    name: Literal["rdpo_competitor"] = "rdpo_competitor"
    visual_weight: NonNegativeFloat = 1.0
    sft_weight: NonNegativeFloat = Field(default=0.0, le=0)  # the released code has no such term
    own_needs: ClassVar[frozenset[Need]] = RDPO.own_needs | {Need.COMPETITOR}

    def terms(self, policy: TokenScores, reference: TokenScores, table: PairTable) -> Tensor:
        """Chosen against the rejected response's competitors, [P]."""
        chosen = logratios(policy, reference)[table.chosen]
        return dpo_term(chosen - _rivals(policy, reference)[table.rejected], self.beta)

    def extra(self, policy: TokenScores, reference: TokenScores, table: PairTable) -> Addends:
        """Chosen against the competitors under the contrast image."""
        chosen = logratios(policy, reference)[table.chosen]
        margin = chosen - _rivals(policy, reference)[table.contrast]
        return {"visual_loss": (self.visual_weight, dpo_term(margin, self.beta))}


class MDPO(PairLoss):
    """Conditional preference optimisation with an anchor (mDPO, Wang et al., arXiv 2406.11839).

    L = - log sigmoid(beta [l(y_w|v) - l(y_l|v)]) - log sigmoid(beta [l(y_w|v) - l(y_w|v_l)])
        - log sigmoid(beta l(y_w|v) - delta),
    l as in RDPO, v_l an image that holds less of what the answer speaks of (the paper crops 0 to
    20 % of v), delta = `anchor` the least reward a chosen response shall have. Averaged over pairs.

    conditional_weight and anchor_weight are 1 in the method; both 0 give DPO. The first two terms
    are RDPO's; what sets the methods apart is where v_l comes from, and the anchor.
    """

    name: Literal["mdpo"] = "mdpo"
    conditional_weight: NonNegativeFloat = 1.0
    anchor_weight: NonNegativeFloat = 1.0
    anchor: float = 0.0
    own_needs: ClassVar[frozenset[Need]] = RDPO.own_needs

    def extra(self, policy: TokenScores, reference: TokenScores, table: PairTable) -> Addends:
        """The conditional preference and the anchor."""
        margin = visual_margins(policy, reference, table)
        chosen = logratios(policy, reference)[table.chosen]
        return {
            "visual_loss": (self.conditional_weight, dpo_term(margin, self.beta)),
            "anchor_loss": (self.anchor_weight, dpo_term(self.beta * chosen - self.anchor, 1.0)),
        }

    def metrics(
        self, policy: TokenScores, reference: TokenScores, table: PairTable
    ) -> dict[str, Tensor]:
        """Of both preferences."""
        return dual_metrics(policy, reference, table, self.beta)


def visual_margins(policy: TokenScores, reference: TokenScores, table: PairTable) -> Tensor:
    """Log-ratio of chosen under its image minus that under the contrast image, [P] nats."""
    assert table.contrast is not None
    ratio = logratios(policy, reference)
    return ratio[table.chosen] - ratio[table.contrast]


def dual_metrics(
    policy: TokenScores, reference: TokenScores, table: PairTable, beta: float
) -> dict[str, Tensor]:
    """What a run shows of the preferences over responses and over images, [P] by name, detached."""
    margin = visual_margins(policy, reference, table).detach()
    return pair_metrics(policy, reference, table, beta) | {
        "visual_margin": beta * margin,
        "visual_accuracy": (margin > 0).float(),
    }


def _rivals(policy: TokenScores, reference: TokenScores) -> Tensor:
    assert policy.competitor_logps is not None
    assert reference.competitor_logps is not None
    return ((policy.competitor_logps - reference.competitor_logps) * policy.mask).sum(-1)
