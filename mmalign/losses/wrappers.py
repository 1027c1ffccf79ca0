"""Losses over a pair loss: labels that are uncertain, or known to be noisy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import Field
from torch import Tensor

from mmalign.losses.base import LossConfig, Need
from mmalign.losses.dpo import DPO, IPO, Hinge, RationaleDPO
from mmalign.losses.mm_dpo import MMDPO, MMDPOBatch
from mmalign.losses.rdpo import MDPO, RDPO, RDPOCompetitor
from mmalign.losses.rrpo import RRPO, DPOWithKL
from mmalign.scores import LossOutput, PairTable, TokenScores, Totals

AnyPairLoss = Annotated[
    DPO | IPO | Hinge | RationaleDPO | RDPO | RDPOCompetitor | MDPO | RRPO | DPOWithKL | MMDPO
    | MMDPOBatch,
    Field(discriminator="name"),
]  # fmt: skip


class SoftLabels(LossConfig):
    """Any pair loss under labels that are probabilities.

    L = p * l(chosen over rejected) + (1 - p) * l(rejected over chosen),  p = p_target,
    l the pair loss `of`. For DPO that is DPO + (1 - p) * beta * margin: p = 1 is DPO itself, and
    p = 0.5 has its minimum at margin 0. What does not depend on the label (KL, SFT, visual) stays.
    Conservative DPO (arXiv 2307.15217's note), CREAM and self-annotation differ only in where p
    comes from.
    """

    name: Literal["soft_labels"] = "soft_labels"
    of: AnyPairLoss = DPO()

    @property
    def needs(self) -> frozenset[Need]:
        """The inner loss's, and the column p_target."""
        return self.of.needs | {Need.P_TARGET}

    def fitted(self, gaps: Sequence[float]) -> Self:
        """With the inner loss fitted."""
        return self.model_copy(update={"of": self.of.fitted(gaps)})

    def __call__(
        self,
        policy: TokenScores,
        reference: TokenScores | None,
        table: PairTable,
        totals: Totals,
    ) -> LossOutput:
        """The batch's share of the step's loss."""
        assert reference is not None
        if table.p_target is None:  # All are certain.
            return self.of(policy, reference, table, totals)
        right, wrong = _both_sides(self.of, policy, reference, table)
        terms = table.p_target * right + (1 - table.p_target) * wrong
        return self.of.finish(terms, policy, reference, table, totals)


class Robust(LossConfig):
    """Any pair loss, unbiased under labels that are flipped with a known rate.

    L = [(1 - e) * l(chosen over rejected) - e * l(rejected over chosen)] / (1 - 2 e),
    e = flip_rate (Chowdhury et al., "Provably Robust DPO", arXiv 2403.00409, where l is DPO).
    Its expectation over flips at rate e is l on the true labels. Unbounded below: for DPO it is
    DPO - e / (1 - 2 e) * beta * margin, so watch the margin. e = 0 is the loss itself.
    """

    name: Literal["robust"] = "robust"
    flip_rate: float = Field(default=0.1, ge=0, lt=0.5)
    of: AnyPairLoss = DPO()

    @property
    def needs(self) -> frozenset[Need]:
        """The inner loss's."""
        return self.of.needs

    def fitted(self, gaps: Sequence[float]) -> Self:
        """With the inner loss fitted."""
        return self.model_copy(update={"of": self.of.fitted(gaps)})

    def __call__(
        self,
        policy: TokenScores,
        reference: TokenScores | None,
        table: PairTable,
        totals: Totals,
    ) -> LossOutput:
        """The batch's share of the step's loss."""
        assert reference is not None
        right, wrong = _both_sides(self.of, policy, reference, table)
        terms = ((1 - self.flip_rate) * right - self.flip_rate * wrong) / (1 - 2 * self.flip_rate)
        return self.of.finish(terms, policy, reference, table, totals)


def _both_sides(
    loss: AnyPairLoss, policy: TokenScores, reference: TokenScores, table: PairTable
) -> tuple[Tensor, Tensor]:
    return (
        loss.terms(policy, reference, table),
        loss.terms(policy, reference, table.swapped()),
    )
