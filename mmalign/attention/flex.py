"""FlexAttention over a tree: one compiled kernel that is told what sees what. Needs CUDA."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mmalign.attention.tree import Tree


@dataclass(frozen=True, slots=True, kw_only=True)
class FlexCall:
    """Attention of one packed row; the block mask is made once and serves every layer."""

    block_mask: Any

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """q: [S, H, D]; k, v: [S, Hk, D]. Returns [S, H, D]."""
        heads = (rows.transpose(0, 1)[None] for rows in (q, k, v))
        out: Any = _compiled()(
            *heads, block_mask=self.block_mask, scale=scale, enable_gqa=k.shape[1] < q.shape[1]
        )
        return out[0].transpose(0, 1)


def flex_call(tree: Tree) -> FlexCall:
    """What attends over this tree."""
    from torch.nn.attention.flex_attention import create_block_mask

    size = len(tree.prompt)

    def mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return tree.sees(query, key)

    made = create_block_mask(mask, None, None, size, size, device=tree.prompt.device)
    return FlexCall(block_mask=made)


@cache
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)
