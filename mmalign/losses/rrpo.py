"""RRPO: rewards on the phrases that differ, and a token-wise KL on the chosen response."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import NonNegativeFloat
from torch import Tensor

from mmalign.losses.base import Need, PairLoss, dpo_term
from mmalign.scores import PairTable, TokenScores


class RRPO(PairLoss):
    """Refined regularised preference optimisation (Sarkar & Etemad, arXiv 2504.12083).

    L = - log sigmoid(u) + alpha * D,
    u = beta * (sum of m_t over marked tokens of y_w - the same of y_l),
        m_t = log pi_theta(y_t | x, y_<t) - log pi_ref(y_t | x, y_<t),
    D = sum over all tokens of y_w of KL(pi_ref(. | x, y_<t) || pi_theta(. | x, y_<t)),
    forward KL over the whole vocabulary, in float32. Marked tokens lie in phrases that differ
    between the responses (Preference.chosen_spans, rejected_spans). Averaged over pairs.

    Since everything is summed, which phrase answers which does not matter, only which tokens are
    marked. beta multiplies the phrases' margin only, alpha the KL only. alpha = 0 and everything
    marked is DPO. sft_weight: see PairLoss; 0 in the method.
    Sign: the project page prints L = -E[log sigmoid(u) + alpha D], which would reward drifting
    away; the released code adds +alpha D to -log sigmoid(u), and so does this.
    Deviations from the released code: log-softmax in float32, where it takes log(softmax) in
    bfloat16 (0 * -inf where a reference probability underflows); response tokens only, where its
    Qwen labels also hold template tokens.
    """

    name: Literal["rrpo"] = "rrpo"
    alpha: NonNegativeFloat = 0.01
    own_needs: ClassVar[frozenset[Need]] = PairLoss.own_needs | {Need.SPANS}

    @property
    def needs(self) -> frozenset[Need]:
        """The KL only where it counts."""
        return self.own_needs | ({Need.KL} if self.alpha else set())

    def terms(self, policy: TokenScores, reference: TokenScores, table: PairTable) -> Tensor:
        """-log sigmoid(u), [P]."""
        return dpo_term(phrase_margins(policy, reference, table), self.beta)

    def extra(
        self, policy: TokenScores, reference: TokenScores, table: PairTable
    ) -> dict[str, tuple[float, Tensor]]:
        """alpha * D."""
        return {"kl": (self.alpha, chosen_kl(policy, table))} if self.alpha else {}

    def metrics(
        self, policy: TokenScores, reference: TokenScores, table: PairTable
    ) -> dict[str, Tensor]:
        """Margin and accuracy are those of the phrases; log-prob changes of whole responses."""
        margin = self.beta * phrase_margins(policy, reference, table).detach()
        return PairLoss.metrics(self, policy, reference, table) | {
            "margin": margin,
            "accuracy": (margin > 0).float(),
        }


class DPOWithKL(PairLoss):
    """DPO over whole responses plus RRPO's KL: RRPO without its phrases, for ablation.

    L = - log sigmoid(beta [l(y_w) - l(y_l)]) + alpha * D,  l as in DPO, D as in RRPO.
    """

    name: Literal["dpo_kl"] = "dpo_kl"
    alpha: NonNegativeFloat = 0.01
    own_needs: ClassVar[frozenset[Need]] = PairLoss.own_needs | {Need.KL}

    def extra(
        self, policy: TokenScores, reference: TokenScores, table: PairTable
    ) -> dict[str, tuple[float, Tensor]]:
        """alpha * D."""
        return {"kl": (self.alpha, chosen_kl(policy, table))}


def phrase_margins(policy: TokenScores, reference: TokenScores, table: PairTable) -> Tensor:
    """Log-ratio over marked tokens of chosen minus that of rejected, [P] nats."""
    assert policy.marked is not None
    assert table.rejected is not None
    # Both masks: a mark outside the response would add the log-ratio of a padding token.
    ratio = ((policy.logps - reference.logps) * (policy.marked & policy.mask)).sum(-1)
    return ratio[table.chosen] - ratio[table.rejected]


def chosen_kl(policy: TokenScores, table: PairTable) -> Tensor:
    """KL(reference || policy) summed over the tokens of each chosen response, [P] nats."""
    assert policy.kl is not None
    return (policy.kl * policy.mask).sum(-1)[table.chosen]
