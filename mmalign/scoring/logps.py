"""Log-probabilities of chosen tokens, without ever holding the logits of a whole batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Logits of one chunk, in elements: 2^25 float32 values are 128 MiB.
CHUNK_ELEMENTS = 2**25

Head = Callable[[Tensor], Tensor]


def token_logps(
    head: Head,
    hidden: Tensor,
    targets: Tensor,
    *,
    vocab_size: int,
    competitor: bool = False,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> tuple[Tensor, Tensor | None]:
    """log softmax(head(hidden))[target], in float32, a chunk of positions at a time.

    hidden: [K, H], the states that predict; targets: [K] int64.
    Returns logps [K] float32 nats, and with `competitor` the log-probability of the likeliest
    token other than the target, [K], else None.
    """

    def score(states: Tensor, chosen: Tensor) -> Tensor:
        logits = head(states).float()
        if not competitor:
            return chosen_logps(logits, chosen)[None]
        normaliser = logits.logsumexp(-1)
        others = logits.scatter(-1, chosen[:, None], float("-inf"))
        logps = logits.gather(-1, chosen[:, None]).squeeze(-1) - normaliser
        return torch.stack([logps, others.max(-1).values - normaliser])

    scores = _in_chunks(score, (hidden, targets), max(1, chunk_elements // vocab_size))
    return scores[0], scores[1] if competitor else None


def token_logps_and_kl(
    head: Head,
    hidden: Tensor,
    targets: Tensor,
    *,
    reference_head: Head,
    reference_hidden: Tensor,
    vocab_size: int,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> tuple[Tensor, Tensor]:
    """token_logps, and KL(reference || policy) over the whole vocabulary at each position.

    KL_k = sum_v q_v (log q_v - log p_v),  q = softmax(reference_head(reference_hidden[k])),
    p = softmax(head(hidden[k])), forward KL in float32; its gradient with respect to the policy's
    logits is p - q. No gradient reaches the reference.
    hidden, reference_hidden: [K, H]. Returns logps [K] and kl [K], float32 nats.
    Written with log-normalisers instead of log q, so that a probability that underflows gives 0
    and not 0 * -inf.
    """

    def score(states: Tensor, chosen: Tensor, theirs: Tensor) -> Tensor:
        logits = head(states).float()
        normaliser = logits.logsumexp(-1)
        logps = logits.gather(-1, chosen[:, None]).squeeze(-1) - normaliser
        with torch.no_grad():
            other = reference_head(theirs).float()
            other_normaliser = other.logsumexp(-1, keepdim=True)
            q = (other - other_normaliser).exp_()
            constant = torch.linalg.vecdot(q, other) - other_normaliser.squeeze(-1)
            del other
        kl = constant - torch.linalg.vecdot(q, logits) + normaliser
        return torch.stack([logps, kl])

    # Two sets of logits at once: half as many positions keep a chunk as small as without the KL.
    rows = max(1, chunk_elements // (2 * vocab_size))
    scores = _in_chunks(score, (hidden, targets, reference_hidden), rows)
    return scores[0], scores[1]


def chosen_logps(logits: Tensor, targets: Tensor) -> Tensor:
    """log softmax(logits)[target]. logits: [K, V] float32, given away; targets: [K]. Returns [K].

    The gradient, grad * (onehot - softmax), is written over the logits, which saves three passes
    over tensors of their size and the room for two. So logits must have no other use.
    """
    return _ChosenLogps.apply(logits, targets)  # type: ignore[return-value]


class _ChosenLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        normaliser = logits.logsumexp(-1)
        ctx.save_for_backward(logits, targets, normaliser)
        ctx.spent = False
        return logits.gather(-1, targets[:, None]).squeeze(-1) - normaliser

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        assert not ctx.spent, "the logits were overwritten by an earlier backward pass"
        ctx.spent = True
        logits, targets, normaliser = ctx.saved_tensors
        grad = grads[0][:, None]
        result = logits.sub_(normaliser[:, None]).exp_().mul_(-grad)
        return result.scatter_add_(-1, targets[:, None], grad), None


def _in_chunks(score: Callable[..., Tensor], inputs: tuple[Tensor, ...], rows: int) -> Tensor:
    """score(*inputs), [R, K], of `rows` positions at a time.

    Each chunk's logits are made again in the backward pass instead of kept, except where one chunk
    holds everything: then they are small enough to keep, which saves the second projection.
    """
    if len(inputs[0]) <= rows:
        return score(*inputs)
    pieces = [
        checkpoint(score, *chunk, use_reentrant=False) if torch.is_grad_enabled() else score(*chunk)
        for chunk in zip(*(tensor.split(rows) for tensor in inputs), strict=True)
    ]
    return torch.cat(pieces, dim=1)  # type: ignore[arg-type]
