"""MM-DPO: a temperature of its own for every pair, from a reward model's gap."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat
from torch import Tensor

from mmalign.errors import SchemaMismatch, TrainingError
from mmalign.losses.base import Need, PairLoss, dpo_term, margins
from mmalign.scores import PairTable, TokenScores


class MMDPO(PairLoss):
    """DPO with dynamic reward scaling as published (MM-RLHF, arXiv 2502.10391).

    L = - log sigmoid(beta(delta) * [l(y_w) - l(y_l)]),  l as in DPO,
    beta(delta) = beta * (1 + w * (1 - exp(-k * delta))),
    delta = score_gap, a reward model's score of y_w minus that of y_l: data, not differentiated.
    beta(0) = beta, rising to (1 + w) * beta: pairs of which the reward model is sure count more.

    k depends on the scale of the rewards: "fit" takes k = ln 2 / median of the positive gaps, at
        which the median pair gets half of the rise.
    gap_floor: smaller gaps count as this. At 0, a pair on which the reward model disagrees with
        the label is trained with beta; the formula itself would turn negative there (w 0.5, k 1,
        delta -5 gives -7.27 from 0.1).
    min_beta: the floor of the released code, which matters for a gap_floor below 0.
    Deviation from the released code: there a flag left on overwrites beta(delta) with a statistic
    of the batch; that variant is MMDPOBatch. w 0.1 in the released scripts, k not published.
    """

    name: Literal["mm_dpo"] = "mm_dpo"
    w: NonNegativeFloat = 0.5
    k: PositiveFloat | Literal["fit"] = 0.5
    gap_floor: float = 0.0
    min_beta: PositiveFloat = 1e-3
    own_needs: ClassVar[frozenset[Need]] = PairLoss.own_needs | {Need.SCORE_GAP}

    def fitted(self, gaps: Sequence[float]) -> Self:
        """The loss with k from the positive gaps, where k is "fit".

        Raises SchemaMismatch where no gap is positive.
        """
        if self.k != "fit":
            return self
        positive = [gap for gap in gaps if gap > 0]
        if not positive:
            raise SchemaMismatch(
                "loss.k: fit needs pairs with a positive score_gap, and there are none",
                fix="score the pairs with a reward model, or set loss.k",
            )
        return self.model_copy(update={"k": math.log(2) / statistics.median(positive)})

    def betas(self, gaps: Tensor) -> Tensor:
        """beta(delta) of each pair, [P] float32."""
        assert self.k != "fit", "fitted() comes first"
        rise = -torch.expm1(-self.k * gaps.detach().float().clamp_min(self.gap_floor))
        return (self.beta * (1 + self.w * rise)).clamp_min(self.min_beta)

    def terms(self, policy: TokenScores, reference: TokenScores, table: PairTable) -> Tensor:
        """-log sigmoid(beta(delta) * margin), [P]."""
        assert table.score_gap is not None
        return dpo_term(margins(policy, reference, table), self.betas(table.score_gap))

    def metrics(
        self, policy: TokenScores, reference: TokenScores, table: PairTable
    ) -> dict[str, Tensor]:
        """Rewards are logged at beta itself, so that runs with and without scaling compare."""
        assert table.score_gap is not None
        return PairLoss.metrics(self, policy, reference, table) | {
            "pair_beta": self.betas(table.score_gap)
        }


class MMDPOBatch(PairLoss):
    """What MM-RLHF's released trainer computes, kept for comparison only.

    L = - log sigmoid(b * z_i),  z_i = l(y_w) - l(y_l) of pair i, l as in DPO,
    b = max(min_beta, beta * (1 + w * (mean of z over a drawn subset - mean of z))),
    the subset drawn without replacement, floor(0.8 P) pairs, by weights
    exp(-0.5 ((z - mean) / std)^2), std with Bessel's correction; b is not differentiated.

    No reward model enters. The statistic is one micro-batch's: unlike every other loss here, this
    one depends on how a step is cut. The released code gathers z over processes, and draws anew on
    each; ours uses the process's own pairs and draws from `seed`. A batch of one pair, where the
    released code gives NaN, is refused.
    """

    name: Literal["mm_dpo_batch"] = "mm_dpo_batch"
    w: NonNegativeFloat = 0.1
    min_beta: PositiveFloat = 1e-3
    kept_share: float = Field(default=0.8, gt=0, le=1)
    seed: NonNegativeInt = 0

    def terms(self, policy: TokenScores, reference: TokenScores, table: PairTable) -> Tensor:
        """-log sigmoid(b * z), [P]. Raises TrainingError for fewer than two pairs."""
        z = margins(policy, reference, table)
        return dpo_term(z, self.batch_beta(z.detach()))

    def batch_beta(self, z: Tensor) -> Tensor:
        """b for margins z [P], a [] tensor."""
        if len(z) < 2:
            raise TrainingError(
                "loss mm_dpo_batch takes a statistic of the micro-batch, and one pair has none",
                fix="raise optim.micro_batch_size, or use loss.name=mm_dpo",
            )
        mean, std = z.mean(), z.std()
        weights = torch.exp(-0.5 * ((z - mean) / (std + 1e-7)) ** 2)
        generator = torch.Generator().manual_seed(self.seed)
        count = max(1, math.floor(self.kept_share * len(z)))
        kept = torch.multinomial(weights.cpu(), count, generator=generator).to(z.device)
        return (self.beta * (1 + self.w * (z[kept].mean() - mean))).clamp_min(self.min_beta)
