"""What every loss is made of: its needs, and the sums that all pair losses share."""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar, Protocol

import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from mmalign.scores import LossOutput, PairTable, TokenScores, Totals


class Need(StrEnum):
    """What a loss cannot do without; checked against the dataset before a model is loaded."""

    REJECTED = "rejected"
    REFERENCE = "reference"
    CONTRAST = "contrast_images"
    COMPETITOR = "competitor_logps"
    SCORE_GAP = "score_gap"


class LossConfig(BaseModel):
    """Base of every loss: a frozen config that is itself callable."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    needs: ClassVar[frozenset[Need]] = frozenset()


class PairLoss(Protocol):
    """The form of every loss over text responses."""

    def __call__(
        self,
        policy: TokenScores,
        reference: TokenScores | None,
        table: PairTable,
        totals: Totals,
    ) -> LossOutput:
        """This batch's share of the step's loss."""
        ...


def totals_of(scores: TokenScores, table: PairTable) -> Totals:
    """The denominators of a batch that is a whole step by itself."""
    return Totals(
        num_pairs=len(table.chosen),
        num_chosen_tokens=int(scores.mask[table.chosen].sum()),
    )


def logratios(policy: TokenScores, reference: TokenScores) -> Tensor:
    """log pi_theta(y|x) - log pi_ref(y|x) of every candidate, summed over its tokens, [N] nats.

    Sum, not mean: length normalisation would change what beta means.
    """
    return policy.sums() - reference.sums()


def chosen_nll(policy: TokenScores, table: PairTable) -> Tensor:
    """Negative log-likelihood of each chosen response, summed over its tokens, [P] nats."""
    return -policy.sums()[table.chosen]


def pair_metrics(
    policy: TokenScores, reference: TokenScores, table: PairTable, beta: float
) -> dict[str, Tensor]:
    """Sums over pairs of what a reader of a preference run wants to see, all detached.

    chosen and rejected log-prob changes stand apart because a margin can grow while both fall.
    """
    assert table.rejected is not None
    ratio = logratios(policy, reference).detach()
    chosen, rejected = ratio[table.chosen], ratio[table.rejected]
    margin = beta * (chosen - rejected)
    return {
        "chosen_logp_change": chosen.sum(),
        "rejected_logp_change": rejected.sum(),
        "margin": margin.sum(),
        "accuracy": (margin > 0).float().sum(),
    }


def dpo_term(margin: Tensor, beta: float) -> Tensor:
    """-log sigmoid(beta * margin), elementwise; `margin` in nats."""
    return -F.logsigmoid(beta * margin)
