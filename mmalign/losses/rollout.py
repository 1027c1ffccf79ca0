"""Losses over rollouts with rewards: GRPO, Dr.GRPO, DAPO, GSPO.

Throughout, o_i is rollout i with |o_i| response tokens, A_i its advantage, and
r_it = pi_theta(o_it) / pi_old(o_it) the ratio of its token t to the policy that sampled it.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat
from torch import Tensor

from mmalign.errors import ConfigError, TrainingError
from mmalign.losses.base import Need
from mmalign.scores import LossOutput, RolloutTable, RolloutTotals, TokenScores

# Nats beyond which a log-ratio counts as this, as in EasyR1 and verl: e^20 is still a float32.
LOG_RATIO_LIMIT = 20.0
# Keeps a group whose rewards hardly differ from having huge advantages; EasyR1's.
STD_EPS = 1e-6


def centred_rewards(rewards: Tensor) -> Tensor:
    """Each reward minus its group's mean, [G, n] float32 of [G, n], float64 of float64.

    Exactly zero where a group's rewards are equal. Raises TrainingError on a group of one, whose
    mean says nothing, and on a reward that is not finite.
    """
    if rewards.shape[-1] < 2:
        raise TrainingError(
            "a group of one rollout has no advantage",
            got=f"{rewards.shape[-1]} rollouts for each prompt",
            wanted="2 or more",
            fix="sample more responses to each prompt",
        )
    bad = (~rewards.isfinite()).nonzero().tolist()
    if bad:
        group, rollout = bad[0]
        raise TrainingError(
            "a reward is not finite",
            where=f"group {group}, rollout {rollout} of the step",
            got=f"{rewards[group, rollout].item()} ({len(bad)} such rewards in all)",
            wanted="a finite number",
            fix="mend the reward function",
        )
    rewards = rewards if rewards.dtype == torch.float64 else rewards.float()
    # From the least first: the mean of equal numbers need not be that number.
    rewards = rewards - rewards.amin(-1, keepdim=True)
    return rewards - rewards.mean(-1, keepdim=True)


def group_advantages(rewards: Tensor) -> Tensor:
    """(r - mean) / (std + 1e-6) of each group, std with n - 1, [G, n] of [G, n].

    Raises what `centred_rewards` raises.
    """
    centred = centred_rewards(rewards)
    return centred / (centred.std(-1, keepdim=True) + STD_EPS)


def informative(rewards: Tensor) -> Tensor:
    """Whether a group's rewards [G, n] are not all equal, [G] bool: DAPO's dynamic sampling.

    A group of equal rewards has no advantage and no gradient. Give it accuracies: with a reward
    for format inside, a group of wrong answers passes.
    """
    return (rewards != rewards[:, :1]).any(-1)


def overlong_penalty(lengths: Tensor, max_tokens: int, buffer: int) -> Tensor:
    """DAPO's soft overlong punishment (equation 13), to be added to rewards; [N] float32 of [N].

    0 up to max_tokens - buffer response tokens, from there linear to -1 at max_tokens, and -1
    beyond. Raises ConfigError unless 0 < buffer <= max_tokens.
    """
    if not 0 < buffer <= max_tokens:
        raise ConfigError(
            "the overlong penalty has no room to rise in",
            got=f"buffer {buffer}",
            wanted=f"1 to {max_tokens} tokens, the longest that a response may be",
        )
    return ((max_tokens - buffer - lengths) / buffer).clamp(-1, 0)


def ratios(log_ratio: Tensor) -> Tensor:
    """e^log_ratio, elementwise, of a log-ratio held within 20 nats of 0.

    Beyond, the ratio has no gradient, so that none is infinite.
    """
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def clipped_surrogate(
    log_ratio: Tensor, advantages: Tensor, *, low: float, high: float, dual_clip: float | None
) -> Tensor:
    """PPO's loss -min(r A, clip(r, 1 - low, 1 + high) A), elementwise, r = e^log_ratio.

    No gradient where A > 0 and r > 1 + high, nor where A < 0 and r < 1 - low. dual_clip = c bounds
    it by -c A where A < 0 (arXiv 1912.09729), with no gradient where r > c.
    """
    ratio = ratios(log_ratio)
    loss = -torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
    if dual_clip is None:
        return loss
    return torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)


def k3(logps: Tensor, others: Tensor) -> Tensor:
    """Schulman's estimate of KL(p || q) from samples of p, elementwise: e^u - u - 1, nats.

    logps and others are log p and log q of the tokens, u = log q - log p held within 20 nats of 0.
    Never below zero; zero with zero gradient where both are equal. EasyR1 holds the estimate itself
    below 10, so that a token with u > 2.6 has no gradient; here it has one up to u = 20.
    """
    u = (others - logps).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    # Not exp(u) - u - 1, whose digits are lost near zero, and its sign with them.
    return u.expm1() - u


def masked_sums(values: Tensor, mask: Tensor) -> Tensor:
    """Sum of a row's values where the mask [N, T] is true, [N]."""
    return torch.where(mask, values, 0.0).sum(-1)


def token_means(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of a row's values where the mask [N, T] is true, [N]; 0 where it never is."""
    return masked_sums(values, mask) / mask.sum(-1).clamp_min(1)


def sampled_logps(policy: TokenScores, table: RolloutTable) -> Tensor:
    """Log-probabilities under the policy that sampled, [N, T] nats; the policy's own, if it did."""
    return policy.logps.detach() if table.old_logps is None else table.old_logps


class RolloutLossConfig(BaseModel):
    """Base of a loss over rollouts: a frozen config that is callable.

    L = mean over the step's rollouts of reduced(sum over t of [surrogate_it + kl_weight * k3_it]),
    with the parts of GRPO unless a loss has its own:

    advantages: from rewards. Taken once, when a step's rollouts are all there.
    log_ratios: what the surrogate clips.
    reduced: how a rollout's sum over tokens enters the mean over rollouts.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    clip_low: Annotated[float, Field(gt=0, le=1)] = 0.2
    clip_high: PositiveFloat = 0.2
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    kl_weight: NonNegativeFloat = 0.0

    @property
    def needs(self) -> frozenset[Need]:
        """Rollouts, and the reference if there is a KL to it."""
        return frozenset({Need.ROLLOUTS, *([Need.REFERENCE] if self.kl_weight else [])})

    def advantages(self, rewards: Tensor) -> Tensor:
        """A of each rollout from the rewards of whole groups, [G, n] of [G, n].

        Raises TrainingError on a group of one and on a reward that is not finite.
        """
        return group_advantages(rewards)

    def log_ratios(self, policy: TokenScores, table: RolloutTable) -> Tensor:
        """log r of every response token, [N, T] nats; zero elsewhere."""
        return policy.logps - sampled_logps(policy, table)

    def reduced(self, sums: Tensor, lengths: Tensor, totals: RolloutTotals) -> Tensor:
        """The mean over a rollout's tokens, [N], of their sums and lengths, each [N]."""
        return sums / lengths.clamp_min(1)

    def __call__(
        self,
        policy: TokenScores,
        reference: TokenScores | None,
        table: RolloutTable,
        totals: RolloutTotals,
    ) -> LossOutput:
        """This batch's share of the step's loss. `reference` is read only for the KL to it.

        metrics, each the sum over rollouts of a rollout's token mean: ratio; clipped_low and
        clipped_high, the shares of tokens that a clip leaves without gradient, and clipped_dual
        where there is one; old_kl, the k3 of KL(sampling policy || policy), whose samples these
        are; kl, the k3 of KL(policy || reference), exact in expectation only where the policy is
        still the one that sampled.
        """
        mask, advantages = policy.mask, table.advantages[:, None]
        log_ratio = self.log_ratios(policy, table)
        terms = clipped_surrogate(
            log_ratio, advantages, low=self.clip_low, high=self.clip_high, dual_clip=self.dual_clip
        )
        ratio = ratios(log_ratio.detach())
        metrics = {
            "ratio": ratio,
            "clipped_low": (advantages < 0) & (ratio < 1 - self.clip_low),
            "clipped_high": (advantages > 0) & (ratio > 1 + self.clip_high),
            "old_kl": k3(sampled_logps(policy, table), policy.logps.detach()),
        }
        if self.dual_clip is not None:
            metrics["clipped_dual"] = (advantages < 0) & (ratio > self.dual_clip)
        if self.kl_weight:
            assert reference is not None
            kl = k3(policy.logps, reference.logps)
            terms = terms + self.kl_weight * kl
            metrics["kl"] = kl.detach()
        per_item = self.reduced(masked_sums(terms, mask), policy.lengths(), totals)
        return LossOutput(
            loss=per_item.sum() / totals.num_rollouts,
            per_item=per_item.detach(),
            metrics={name: token_means(values, mask).sum() for name, values in metrics.items()},
        )


class GRPO(RolloutLossConfig):
    """Group relative policy optimisation (Shao et al., arXiv 2402.03300, equation 3).

    L = mean_i (1 / |o_i|) sum_t [-min(r_it A_i, clip(r_it) A_i) + kl_weight * k3_it],
    A_i = (R_i - mean R) / (std R + 1e-6) over the rollouts of one prompt.

    The paper has kl_weight 0.04; off here. Its 1 / |o_i| is kind to long wrong answers, and its
    std weighs up prompts that are nearly always or never solved: see DrGRPO.
    """

    name: Literal["grpo"] = "grpo"


class DrGRPO(RolloutLossConfig):
    """GRPO done right: without its two biases (Liu et al., arXiv 2503.20783).

    L = mean_i (1 / max_tokens) sum_t [as GRPO],  A_i = R_i - mean R.

    The paper's equation has no divisor; its released code has the longest length that is
    generated, which scales the loss and nothing else.
    """

    name: Literal["dr_grpo"] = "dr_grpo"

    def advantages(self, rewards: Tensor) -> Tensor:
        """R - mean R, [G, n]; raises what GRPO's raises."""
        return centred_rewards(rewards)

    def reduced(self, sums: Tensor, lengths: Tensor, totals: RolloutTotals) -> Tensor:
        """The sum over a rollout's tokens by the longest a response may be, [N]."""
        return sums / totals.max_tokens


class DAPO(RolloutLossConfig):
    """Decoupled clip and dynamic sampling (Yu et al., arXiv 2503.14476, equation 8).

    L = (1 / sum_i |o_i|) sum_i sum_t [as GRPO], with more room above (0.28) than below (0.2), so
    that unlikely tokens can rise. All tokens of the step weigh the same; the paper's equation
    averages over each prompt's tokens, its released code over those of a mini-batch.

    The rest of the method is not the loss's: `informative` for dynamic sampling,
    `overlong_penalty` for rewards.
    """

    name: Literal["dapo"] = "dapo"
    clip_high: PositiveFloat = 0.28

    def reduced(self, sums: Tensor, lengths: Tensor, totals: RolloutTotals) -> Tensor:
        """The sum over a rollout's tokens by the mean length of the step's rollouts, [N]."""
        return sums * (totals.num_rollouts / totals.num_tokens)


class GSPO(RolloutLossConfig):
    """Group sequence policy optimisation (Zheng et al., arXiv 2507.18071, equations 5 to 7).

    L = mean_i [-min(s_i A_i, clip(s_i) A_i)],  s_i = exp(mean over t of log r_it),  A_i as GRPO.

    One ratio a rollout, with its gradient, and clips of its size. A KL enters as in GRPO.
    """

    name: Literal["gspo"] = "gspo"
    clip_low: Annotated[float, Field(gt=0, le=1)] = 3e-4
    clip_high: PositiveFloat = 4e-4

    def log_ratios(self, policy: TokenScores, table: RolloutTable) -> Tensor:
        """log s of a rollout at every place of it, [N, T] nats."""
        means = token_means(policy.logps - sampled_logps(policy, table), policy.mask)
        return means[:, None].expand_as(policy.mask)


RolloutLoss = Annotated[GRPO | DrGRPO | DAPO | GSPO, Field(discriminator="name")]
