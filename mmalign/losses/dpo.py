"""Direct preference optimisation over text responses, and its nearest relatives."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from mmalign.losses.base import Need, PairLoss, margins
from mmalign.scores import PairTable, TokenScores


class DPO(PairLoss):
    """Direct preference optimisation (Rafailov et al., arXiv 2305.18290, equation 7).

    L = - log sigmoid(beta * [l(y_w) - l(y_l)]),  l(y) = log pi_theta(y|x) - log pi_ref(y|x),
    log-probabilities summed over response tokens, averaged over pairs.

    sft_weight: adds the SFT term described at PairLoss.
    Raises nothing of its own: the objective has checked that pairs and a reference are there.
    """

    name: Literal["dpo"] = "dpo"


class IPO(PairLoss):
    """Identity preference optimisation (Azar et al., arXiv 2310.12036, equation 17).

    L = (h - 1 / (2 beta))^2,  h = l(y_w) - l(y_l) with l as in DPO, in nats, summed over tokens.
    The minimum is at h = 1 / (2 beta): a margin to reach, not to grow without end.

    Deviation from TRL's `ipo`: TRL averages log-probabilities over tokens before h is formed; the
    paper's pi(y) is the probability of the whole response, and so is ours.
    """

    name: Literal["ipo"] = "ipo"

    def terms(self, policy: TokenScores, reference: TokenScores, table: PairTable) -> Tensor:
        """Squared distance of the margin from its target, [P]."""
        return (margins(policy, reference, table) - 1 / (2 * self.beta)) ** 2


class Hinge(PairLoss):
    """Hinge loss on the DPO margin (SLiC-HF's calibration loss, arXiv 2305.10425, in RSO's form).

    L = max(0, 1 - beta * [l(y_w) - l(y_l)]),  l as in DPO (RSO, arXiv 2309.06657, "hinge-norm").
    SLiC-HF itself has no reference inside the margin and adds a cross-entropy term: set
    sft_weight for the latter. At the reference L = 1; no gradient once beta * margin passes 1.
    """

    name: Literal["hinge"] = "hinge"

    def terms(self, policy: TokenScores, reference: TokenScores, table: PairTable) -> Tensor:
        """max(0, 1 - beta * margin), [P]."""
        return (1 - self.beta * margins(policy, reference, table)).clamp_min(0)


class RationaleDPO(PairLoss):
    """DPO that also learns to say why (Just et al., "Data-Centric Human Preference Optimization
    with Rationales", arXiv 2407.14477).

    L = DPO + rationale_weight * NLL(r | x, y_w, y_l) / |r|,
    r the rationale (the pair's chosen_critique) in answer to a prompt that shows both responses.

    Deviation from the released code, which adds -log sigmoid(gamma * log pi(r)) with the summed
    log-probability, so that gamma depends on length: ours is the paper's likelihood term, averaged
    over the rationale's tokens.
    """

    name: Literal["rationale_dpo"] = "rationale_dpo"
    rationale_weight: float = 1.0
    own_needs: ClassVar[frozenset[Need]] = PairLoss.own_needs | {Need.RATIONALE}

    def extra(
        self, policy: TokenScores, reference: TokenScores, table: PairTable
    ) -> dict[str, tuple[float, Tensor]]:
        """The rationale's token-averaged negative log-likelihood."""
        assert table.rationale is not None
        nll = -policy.sums()[table.rationale] / policy.lengths()[table.rationale]
        return {"rationale_nll": (self.rationale_weight, nll)}
