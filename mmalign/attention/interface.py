"""Our attention among transformers': what a layer calls, and how a model comes to call it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmalign.attention.tree import Kernel, Tree, tree_attention
from mmalign.models.unread import tell

# As it stands in transformers' table of attention functions.
NAME = "mmalign"

# Attention of one packed row: q [S, H, D], k and v [S, Hk, D], scale; returns [S, H, D].
Packed = Callable[[Tensor, Tensor, Tensor, float], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeCall:
    """Attention of one packed row by a flash kernel."""

    tree: Tree
    kernel: Kernel

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """See Packed."""
        return tree_attention(q, k, v, self.tree, self.kernel, scale)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    packed: Packed | None = None,
    read: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What a layer calls: `packed` where the scorer gave one, else transformers' SDPA.

    query: [1, H, S, D] of one packed row; key, value: [1, Hk, S, D]. Returns [1, S, H, D].
    read: [K], the rows that are read after the last layer (`mmalign.models.unread`).
    Both travel as keywords through the model, so that a checkpointed layer that runs again in the
    backward pass runs as it did before.
    """
    tell(module, read)
    if packed is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **others
        )
    kind = query.device.type
    if torch.is_autocast_enabled(kind):
        # Rotary positions leave autocast's precision; SDPA would be cast back by autocast itself.
        dtype = torch.get_autocast_dtype(kind)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    q, k, v = (heads[0].transpose(0, 1) for heads in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return packed(q, k, v, scale)[None], None


def install(decoder: Any) -> None:
    """Let the layers of a transformers language model call `attend`; done twice, it is done once.

    Without `packed` nothing changes: masks and kernels stay those of SDPA.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    decoder.config._attn_implementation = NAME
