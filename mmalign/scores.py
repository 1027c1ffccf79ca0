"""What a scorer returns and a loss receives. Torch only."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenScores:
    """Per-token scores of N candidates, of which the longest has T response tokens.

    logps: [N, T] float32, nats; log pi(y_t | x, y_<t) at response tokens, zero elsewhere.
    mask: [N, T] bool; true at response tokens, the end-of-turn token included.
    competitor_logps: [N, T] float32 or None; the log-probability of the likeliest token other
        than y_t, only where a loss asks for it (the released rDPO code's quantity).
    """

    logps: Tensor
    mask: Tensor
    competitor_logps: Tensor | None = None

    def sums(self) -> Tensor:
        """Summed log-probability of each response, [N] nats."""
        return (self.logps * self.mask).sum(-1)

    def lengths(self) -> Tensor:
        """Response tokens of each candidate, [N] int64."""
        return self.mask.sum(-1)


@dataclass(frozen=True, slots=True, kw_only=True)
class PairTable:
    """Which candidates of a batch form which pair: indices into the candidates, each [P] int64.

    contrast: the chosen response under the contrast image, where the pair has one.
    score_gap: [P] float32 from an outside annotator, where the pair has one.
    """

    chosen: Tensor
    rejected: Tensor | None = None
    contrast: Tensor | None = None
    score_gap: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """Denominators of the whole optimizer step, over all micro-batches and processes.

    A loss divides sums by these, so that cutting a batch into micro-batches or spreading it over
    processes changes nothing.
    """

    num_pairs: int
    num_chosen_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOutput:
    """loss: [] float32, this batch's share of the step's loss; per_item: [P] detached.

    metrics: sums over this batch's pairs by name, each a detached [] tensor; the loop divides
    them by the number of pairs.
    """

    loss: Tensor
    per_item: Tensor
    metrics: dict[str, Tensor]
