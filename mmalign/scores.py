"""What a scorer returns and a loss receives. Torch only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Distributions:
    """Next-token distributions not yet projected to the vocabulary, so that they stay small.

    states: [K, H], the last hidden state that predicts each of a plan's K response tokens.
    head: the vocabulary projection, [K, H] to [K, V] logits; None means the scorer's own.
    """

    states: Tensor
    head: Callable[[Tensor], Tensor] | None


# No slots: DeepSpeed's ZeRO-3 looks for tensors in the attributes of what a model returns.
@dataclass(frozen=True, kw_only=True)
class TokenScores:
    """Per-token scores of N candidates, of which the longest has T response tokens.

    logps: [N, T] float32, nats; log pi(y_t | x, y_<t) at response tokens, zero elsewhere.
    mask: [N, T] bool; true at response tokens, the end-of-turn token included.
    The rest is there only where a loss asks for it:
    competitor_logps: [N, T] float32; the log-probability of the likeliest token other than y_t
        (the released rDPO code's quantity).
    marked: [N, T] bool; response tokens inside a phrase that differs between the responses.
    kl: [N, T] float32, nats; KL(reference || policy) over the vocabulary at each response token
        of the chosen candidates, zero elsewhere.
    rewards: [N] float32; a reward model's score of each candidate.
    distributions: what another scorer needs to measure `kl` against this one.
    """

    logps: Tensor
    mask: Tensor
    competitor_logps: Tensor | None = None
    marked: Tensor | None = None
    kl: Tensor | None = None
    rewards: Tensor | None = None
    distributions: Distributions | None = None

    def sums(self) -> Tensor:
        """Summed log-probability of each response, [N] nats."""
        return (self.logps * self.mask).sum(-1)

    def lengths(self) -> Tensor:
        """Response tokens of each candidate, [N] int64."""
        return self.mask.sum(-1)


# No slots: see TokenScores.
@dataclass(frozen=True, kw_only=True)
class DenoiseScores:
    """How well N noised images were denoised.

    errors: [N] float32; mean squared error of the prediction over a latent's channels and places,
        times the weight of its timestep where one was asked for. The images of a pair share
        timestep and noise, and so do policy and reference.
    """

    errors: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class PairTable:
    """Which candidates of a batch form which pair: indices into the candidates, each [P] int64.

    contrast: the chosen response under the contrast image, where the pair has one.
    rationale: the text that says why chosen is better, under a prompt that shows both.
    score_gap: [P] float32 from an outside annotator, where the pair has one.
    p_target: [P] float32, the probability that chosen is the better one; None means 1.
    weight: [P] float32, what the pair's loss is multiplied by; None means 1.
    """

    chosen: Tensor
    rejected: Tensor | None = None
    contrast: Tensor | None = None
    rationale: Tensor | None = None
    score_gap: Tensor | None = None
    p_target: Tensor | None = None
    weight: Tensor | None = None

    def swapped(self) -> PairTable:
        """The same pairs with chosen and rejected exchanged, as if labelled the other way."""
        assert self.rejected is not None
        gap = None if self.score_gap is None else -self.score_gap
        return replace(self, chosen=self.rejected, rejected=self.chosen, score_gap=gap)


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """Denominators of the whole optimizer step, over all micro-batches and processes.

    A loss divides sums by these, so that cutting a batch into micro-batches or spreading it over
    processes changes nothing. num_pairs counts rows: the weights of a row's pairs add up to its
    weight. num_chosen_tokens counts a row's chosen response, or the mean over its pairs' ones.
    """

    num_pairs: int
    num_chosen_tokens: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutTable:
    """What was sampled: a rollout is a candidate, and a group all rollouts of one prompt.

    advantages: [N] float32; how much better a rollout's reward is than its group's, as the loss
        has it (`loss.advantages`). Taken over whole groups, so a micro-batch may cut a group.
    old_logps: [N, T] float32, nats; log-probabilities under the policy that sampled, at response
        tokens, zero elsewhere; detached. None where the policy is still the one that sampled.
    group: [N] int64; which prompt of the step a rollout belongs to.
    """

    advantages: Tensor
    old_logps: Tensor | None
    group: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutTotals:
    """Denominators of the whole optimizer step, over all micro-batches and processes.

    A loss divides sums by these, so that cutting a batch into micro-batches or spreading it over
    processes changes nothing. num_tokens counts the response tokens of all rollouts of the step;
    max_tokens is the longest that a response may be, however long these are.
    """

    num_rollouts: int
    num_tokens: float
    max_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOutput:
    """loss: [] float32, this batch's share of the step's loss; per_item: [P] detached.

    metrics: sums over this batch's pairs by name, each a detached [] tensor; the loop divides
    them by the number of pairs. Over rollouts, read rollout for pair, N for P.
    """

    loss: Tensor
    per_item: Tensor
    metrics: dict[str, Tensor]
