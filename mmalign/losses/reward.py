"""Reward models: a number for each response, learned from pairs, with or without critiques.

Equations of MM-RLHF (arXiv 2502.10391) and its released trainer. Where we differ from that:

- The released score is read at the last position, which its template makes the line break after the
  end of the turn; ours is read at the end-of-turn token itself.
- Its `tie_weight` is never defined, so that a batch with a tie stops it; here it is a setting, and
  1 by default. It averages ties and other pairs apart, in each micro-batch; here every row weighs
  the same in its step, however that is cut.
- Without critiques it trains on the bare answer and tests under the critic's prompt; here the
  prompt is the critic's in both.
- Labels may be probabilities, of which 0.5 is a tie.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat
from torch import Tensor

from mmalign.losses.base import LossConfig, Need
from mmalign.scores import LossOutput, PairTable, TokenScores, Totals


class CritiqueReward(LossConfig):
    """MM-RLHF's critique-based reward model: the score's loss, and the critiques' likelihood.

    L = score_loss + center (r_c + r_r)^2 + critique_weight (CE_c + CE_r), averaged over rows.
    score_loss is Bradley-Terry's, -log sigmoid(r_c - r_r), or tie_weight (r_c - r_r)^2 for a tie.
    CE is the mean negative log-likelihood of a critique's tokens, the end of its turn included,
    under the prompt, the pictures and the response it judges.

    r: policy.rewards, [N], read at the end of each critique; gradients of both parts run through
    the whole model. The candidates are the critiques, not the responses.
    """

    name: Literal["critique_reward"] = "critique_reward"
    tie_weight: NonNegativeFloat = 1.0
    center: NonNegativeFloat = 0.01
    critique_weight: NonNegativeFloat = 1.0
    own_needs: ClassVar[frozenset[Need]] = frozenset(
        {Need.REJECTED, Need.P_TARGET, Need.REWARD_HEAD, Need.CRITIQUES}
    )

    def __call__(
        self,
        policy: TokenScores,
        reference: TokenScores | None,
        table: PairTable,
        totals: Totals,
    ) -> LossOutput:
        """The batch's share of the step's loss; `reference` is not used."""
        assert table.rejected is not None
        terms = reward_terms(policy, table, tie_weight=self.tie_weight, center=self.center)
        nll = -policy.sums() / policy.lengths()
        critique_nll = nll[table.chosen] + nll[table.rejected]
        metrics = reward_metrics(policy, table) | {"critique_nll": critique_nll.detach() / 2}
        return _shared(terms + self.critique_weight * critique_nll, metrics, table, totals)


class Reward(LossConfig):
    """A plain reward model: Bradley-Terry on the score of a response, without critiques.

    L = -log sigmoid(r_c - r_r) + center (r_c + r_r)^2, averaged over rows, with tie_weight
    (r_c - r_r)^2 in the first term's place for a tie. r is read at the end-of-turn token that
    follows the critic's prompt.
    """

    name: Literal["reward"] = "reward"
    tie_weight: NonNegativeFloat = 1.0
    center: NonNegativeFloat = 0.01
    own_needs: ClassVar[frozenset[Need]] = frozenset(
        {Need.REJECTED, Need.P_TARGET, Need.REWARD_HEAD}
    )

    def __call__(
        self,
        policy: TokenScores,
        reference: TokenScores | None,
        table: PairTable,
        totals: Totals,
    ) -> LossOutput:
        """The batch's share of the step's loss; `reference` is not used."""
        terms = reward_terms(policy, table, tie_weight=self.tie_weight, center=self.center)
        return _shared(terms, reward_metrics(policy, table), table, totals)


def reward_terms(
    policy: TokenScores, table: PairTable, *, tie_weight: float, center: float
) -> Tensor:
    """Each pair's score loss and centring, [P].

    p (-log sigmoid(d)) + (1 - p) (-log sigmoid(-d)), d = r_c - r_r, p = p_target; at p = 0.5, which
    means a tie, tie_weight d^2 instead; and center (r_c + r_r)^2. Adding a constant to all rewards
    changes the last alone.
    """
    chosen, rejected, target = _sides(policy, table)
    gap = chosen - rejected
    decided = -target * F.logsigmoid(gap) - (1 - target) * F.logsigmoid(-gap)
    scored = torch.where(target == 0.5, tie_weight * gap.square(), decided)
    return scored + center * (chosen + rejected).square()


def reward_metrics(policy: TokenScores, table: PairTable) -> dict[str, Tensor]:
    """What a reader of the run wants to see of each pair, [P] by name, detached.

    accuracy: whether the better response has the higher reward; a tie counts one half.
    """
    chosen, rejected, target = (column.detach() for column in _sides(policy, table))
    right = ((chosen - rejected) * (target - 0.5) > 0).float()
    return {
        "accuracy": torch.where(target == 0.5, 0.5, right),
        "reward_margin": chosen - rejected,
        "reward_chosen": chosen,
        "reward_rejected": rejected,
    }


def _sides(policy: TokenScores, table: PairTable) -> tuple[Tensor, Tensor, Tensor]:
    """Chosen reward, rejected reward and p_target, [P] each."""
    assert policy.rewards is not None
    assert table.rejected is not None
    chosen, rejected = policy.rewards[table.chosen], policy.rewards[table.rejected]
    target = torch.ones_like(chosen) if table.p_target is None else table.p_target
    return chosen, rejected, target


def _shared(
    terms: Tensor, metrics: dict[str, Tensor], table: PairTable, totals: Totals
) -> LossOutput:
    weight = 1.0 if table.weight is None else table.weight
    return LossOutput(
        loss=(weight * terms).sum() / totals.num_pairs,
        per_item=terms.detach(),
        metrics={name: (weight * values).sum() for name, values in metrics.items()},
    )
