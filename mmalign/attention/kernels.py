"""Flash kernels as blocks of a tree: torch's on the CPU, torch's on CUDA, xformers'."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from mmalign.attention.tree import Block


@dataclass(frozen=True, slots=True)
class CpuFlash:
    """The tiled CPU kernel behind torch's SDPA, asked for its log-sum-exp; segment by segment."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, block: Block, scale: float
    ) -> tuple[Tensor, Tensor]:
        """See Kernel."""
        k, v = _every_head(k, q.shape[1]), _every_head(v, q.shape[1])
        out, lse = torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
        for here, there in _segments(block):
            made, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                _heads(q[here]), _heads(k[there]), _heads(v[there]), 0.0, block.causal, scale=scale
            )
            out[here], lse[:, here] = made[0].transpose(0, 1), sums[0]
        return out, lse

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        block: Block,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See Kernel."""
        shared = k.shape[1]
        k, v = _every_head(k, q.shape[1]), _every_head(v, q.shape[1])
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for here, there in _segments(block):
            parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                _heads(grad[here]),
                _heads(q[here]),
                _heads(k[there]),
                _heads(v[there]),
                _heads(out[here]),
                # The kernel reads it in the layout in which it writes it: heads innermost.
                lse[None, :, here].transpose(1, 2).contiguous().transpose(1, 2),
                0.0,
                block.causal,
                scale=scale,
            )
            for whole, place, part in zip((dq, dk, dv), (here, there, there), parts, strict=True):
                whole[place] = part[0].transpose(0, 1)
        return dq, _summed(dk, shared), _summed(dv, shared)


@dataclass(frozen=True, slots=True)
class CudaFlash:
    """FlashAttention-2 as torch carries it, in its form for packed segments."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, block: Block, scale: float
    ) -> tuple[Tensor, Tensor]:
        """See Kernel."""
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q,
            k,
            v,
            block.query_bounds_tensor,
            block.key_bounds_tensor,
            block.longest_query,
            block.longest_key,
            0.0,
            block.causal,
            False,
            scale=scale,
        )
        return out, lse

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        block: Block,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See Kernel."""
        # Without dropout the kernel reads neither the random state nor its offset.
        unused = torch.empty(2, dtype=torch.int64, device=q.device)
        return torch.ops.aten._flash_attention_backward(
            grad,
            q,
            k,
            v,
            out,
            lse.contiguous(),
            block.query_bounds_tensor,
            block.key_bounds_tensor,
            block.longest_query,
            block.longest_key,
            0.0,
            block.causal,
            unused,
            unused,
            scale=scale,
        )


@dataclass(frozen=True, slots=True)
class Xformers:
    """xformers' memory-efficient attention under its block-diagonal biases."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, block: Block, scale: float
    ) -> tuple[Tensor, Tensor]:
        """See Kernel."""
        from xformers.ops import fmha  # type: ignore[import-not-found]

        k, v = _every_head(k, q.shape[1]), _every_head(v, q.shape[1])
        out, lse = fmha.memory_efficient_attention_forward_requires_grad(
            q[None], k[None], v[None], attn_bias=_bias(block), scale=scale
        )
        if len(lse) != 1:
            # The kernel for float32 and for older cards; blocks are merged token by token.
            raise NotImplementedError("the kernel for this precision keeps log-sum-exps by segment")
        # Some kernels pad the log-sum-exp to a multiple of their tile.
        return out[0], lse[0, :, : q.shape[0]].float()

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        block: Block,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See Kernel."""
        from xformers.ops import fmha  # type: ignore[import-not-found]

        shared = k.shape[1]
        k, v = _every_head(k, q.shape[1]), _every_head(v, q.shape[1])
        dq, dk, dv = fmha.memory_efficient_attention_backward(
            grad[None],
            out[None],
            lse[None].contiguous(),
            q[None],
            k[None],
            v[None],
            attn_bias=_bias(block),
            scale=scale,
        )
        return dq[0], _summed(dk[0], shared), _summed(dv[0], shared)


def _bias(block: Block) -> Any:
    from xformers.ops.fmha import attn_bias  # type: ignore[import-not-found]

    lengths = [[b - a for a, b in pairwise(x)] for x in (block.query_bounds, block.key_bounds)]
    kind = attn_bias.BlockDiagonalCausalMask if block.causal else attn_bias.BlockDiagonalMask
    return kind.from_seqlens(*lengths, device=block.query_bounds_tensor.device)


def _segments(block: Block) -> list[tuple[slice, slice]]:
    """Places of each query segment that has tokens, and of its keys."""
    return [
        (slice(*query), slice(*key))
        for query, key in zip(pairwise(block.query_bounds), pairwise(block.key_bounds), strict=True)
        if query[0] < query[1]
    ]


def _heads(rows: Tensor) -> Tensor:
    """[S, H, D] as [1, H, S, D], without a copy."""
    return rows.transpose(0, 1)[None]


def _every_head(rows: Tensor, num_heads: int) -> Tensor:
    """[S, Hk, D] to [S, H, D], each repeated for the query heads that share it."""
    return (
        rows
        if rows.shape[1] == num_heads
        else rows.repeat_interleave(num_heads // rows.shape[1], dim=1)
    )


def _summed(grad: Tensor, num_heads: int) -> Tensor:
    """The gradient of rows that `_every_head` repeated: [S, H, D] to [S, Hk, D]."""
    if grad.shape[1] == num_heads:
        return grad
    return grad.view(grad.shape[0], num_heads, -1, grad.shape[2]).sum(2)
