"""What every loss is made of: its needs, and the sums that all pair losses share."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import ClassVar, Literal, Self

import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, NonNegativeFloat, PositiveFloat
from torch import Tensor

from mmalign.scores import LossOutput, PairTable, TokenScores, Totals


class Need(StrEnum):
    """What a loss cannot do without; checked against the dataset before a model is loaded."""

    REJECTED = "rejected"
    REFERENCE = "reference"
    CONTRAST = "contrast_images"
    COMPETITOR = "competitor_logps"
    SCORE_GAP = "score_gap"
    SPANS = "chosen_spans"
    KL = "kl"
    RATIONALE = "chosen_critique"
    P_TARGET = "p_target"
    REWARD_HEAD = "reward_head"
    # Responses sampled from the policy during training, with rewards.
    ROLLOUTS = "rollouts"
    # Of both responses; that of chosen alone has its own name.
    CRITIQUES = "rejected_critique"


class LossConfig(BaseModel):
    """Base of a loss: a frozen config that is itself callable."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    own_needs: ClassVar[frozenset[Need]] = frozenset()

    @property
    def needs(self) -> frozenset[Need]:
        """What the loss cannot do without."""
        return self.own_needs

    def fitted(self, gaps: Sequence[float]) -> Self:
        """The loss with what it derives from the dataset's score gaps filled in."""
        return self


class PairLoss(BaseModel):
    """Base of a loss over pairs, in parts, so that a wrapper can look at a pair from both sides.

    terms: the preference itself, also asked for with chosen and rejected exchanged; DPO's, unless
        a loss has its own.
    extra: what does not depend on the label, such as a KL term or an anchor.
    finish: weighs both, averages over the step's rows, and adds

        sft_weight * (averaged negative log-likelihood of the chosen responses),

    the SFT term of RPO (arXiv 2404.19733), which keeps chosen from falling too.

    sft_mean: what it is averaged over.
        tokens: all chosen tokens of the step, so that a long response counts more.
        responses: over each response's tokens first, then over pairs, so that all count alike
            (SPECS, arXiv 2510.25801; LLaMA-Factory's `pref_ftx`).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    own_needs: ClassVar[frozenset[Need]] = frozenset({Need.REJECTED, Need.REFERENCE})
    beta: PositiveFloat = 0.1
    sft_weight: NonNegativeFloat = 0.0
    sft_mean: Literal["tokens", "responses"] = "tokens"

    @property
    def needs(self) -> frozenset[Need]:
        """What the loss cannot do without."""
        return self.own_needs

    def fitted(self, gaps: Sequence[float]) -> Self:
        """The loss with what it derives from the dataset's score gaps filled in."""
        return self

    def terms(self, policy: TokenScores, reference: TokenScores, table: PairTable) -> Tensor:
        """Each pair's preference loss, [P]: -log sigmoid(beta * margin)."""
        return dpo_term(margins(policy, reference, table), self.beta)

    def extra(
        self, policy: TokenScores, reference: TokenScores, table: PairTable
    ) -> dict[str, tuple[float, Tensor]]:
        """Further addends of each pair's loss: (coefficient, [P]) by the name to log it under."""
        return {}

    def metrics(
        self, policy: TokenScores, reference: TokenScores, table: PairTable
    ) -> dict[str, Tensor]:
        """What a reader of the run wants to see of each pair, [P] by name, detached."""
        return pair_metrics(policy, reference, table, self.beta)

    def __call__(
        self,
        policy: TokenScores,
        reference: TokenScores | None,
        table: PairTable,
        totals: Totals,
    ) -> LossOutput:
        """This batch's share of the step's loss."""
        assert reference is not None
        return self.finish(self.terms(policy, reference, table), policy, reference, table, totals)

    def finish(
        self,
        terms: Tensor,
        policy: TokenScores,
        reference: TokenScores,
        table: PairTable,
        totals: Totals,
    ) -> LossOutput:
        """This batch's share of the step's loss, from its pairs' terms."""
        metrics = self.metrics(policy, reference, table)
        for name, (coefficient, values) in self.extra(policy, reference, table).items():
            terms = terms + coefficient * values
            metrics[name] = values.detach()
        weight = 1.0 if table.weight is None else table.weight
        nll = chosen_nll(policy, table)
        per_token = nll / policy.lengths()[table.chosen]
        metrics["nll"] = per_token.detach()
        loss = (weight * terms).sum() / totals.num_pairs
        if self.sft_weight:
            if self.sft_mean == "responses":
                sft = (weight * per_token).sum() / totals.num_pairs
            else:
                sft = (weight * nll).sum() / totals.num_chosen_tokens
            loss = loss + self.sft_weight * sft
        return LossOutput(
            loss=loss,
            per_item=terms.detach(),
            metrics={name: (weight * values).sum() for name, values in metrics.items()},
        )


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


def margins(policy: TokenScores, reference: TokenScores, table: PairTable) -> Tensor:
    """Log-ratio of chosen minus that of rejected, [P] nats."""
    assert table.rejected is not None
    ratio = logratios(policy, reference)
    return ratio[table.chosen] - ratio[table.rejected]


def chosen_nll(policy: TokenScores, table: PairTable) -> Tensor:
    """Negative log-likelihood of each chosen response, summed over its tokens, [P] nats."""
    return -policy.sums()[table.chosen]


def pair_metrics(
    policy: TokenScores, reference: TokenScores, table: PairTable, beta: float
) -> dict[str, Tensor]:
    """What every preference run shows of each pair, [P] by name, all detached.

    chosen and rejected log-prob changes stand apart because a margin can grow while both fall.
    """
    assert table.rejected is not None
    ratio = logratios(policy, reference).detach()
    chosen, rejected = ratio[table.chosen], ratio[table.rejected]
    margin = beta * (chosen - rejected)
    return {
        "chosen_logp_change": chosen,
        "rejected_logp_change": rejected,
        "margin": margin,
        "accuracy": (margin > 0).float(),
    }


def dpo_term(margin: Tensor, beta: float | Tensor) -> Tensor:
    """-log sigmoid(beta * margin), elementwise; `margin` in nats."""
    return -F.logsigmoid(beta * margin)
