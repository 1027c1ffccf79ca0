"""Log-probabilities of chosen tokens, without ever holding the logits of a whole batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Logits of one chunk, in elements: 2^25 float32 values are 128 MiB.
CHUNK_ELEMENTS = 2**25


def token_logps(
    head: Callable[[Tensor], Tensor],
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
    Each chunk's logits are made again in the backward pass instead of kept, except where one chunk
    holds everything: then they are small enough to keep, which saves the second projection.
    """

    def score(states: Tensor, chosen: Tensor) -> Tensor:
        logits = head(states).float()
        normaliser = logits.logsumexp(-1)
        result = [logits.gather(-1, chosen[:, None]).squeeze(-1) - normaliser]
        if competitor:
            others = logits.scatter(-1, chosen[:, None], float("-inf"))
            result.append(others.max(-1).values - normaliser)
        return torch.stack(result)

    rows = max(1, chunk_elements // vocab_size)
    if len(hidden) <= rows:
        scores = score(hidden, targets)
    else:
        pieces = [
            checkpoint(score, states, chosen, use_reentrant=False)
            if torch.is_grad_enabled()
            else score(states, chosen)
            for states, chosen in zip(hidden.split(rows), targets.split(rows), strict=True)
        ]
        scores = torch.cat(pieces, dim=1)  # type: ignore[arg-type]
    return scores[0], scores[1] if competitor else None
