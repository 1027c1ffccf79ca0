"""Which attention runs here: chosen by trying, refused with the reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mmalign.attention import AttentionName
from mmalign.attention.flex import flex_call
from mmalign.attention.interface import Packed, TreeCall
from mmalign.attention.kernels import CpuFlash, CudaFlash, Xformers
from mmalign.attention.tree import Tree, make_tree
from mmalign.errors import ModelError
from mmalign.models.families import Family

# What needs no mask, in the order in which `auto` tries it.
PACKING: dict[str, tuple[str, ...]] = {"cpu": ("flash",), "cuda": ("flash", "flex", "xformers")}
# A trial's output and gradients against SDPA in float32, relative to the largest.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """How a scorer attends. packed: what it makes of a tree; None where rows get masks."""

    name: str
    packed: Callable[[Tree], Packed] | None

    @property
    def packs(self) -> bool:
        """Whether prompts of a batch share one row without padding."""
        return self.packed is not None


MASKED = Attention(name="sdpa", packed=None)


@dataclass(frozen=True, slots=True)
class Heads:
    """The shape of a model's attention: query heads, key heads, width of one."""

    queries: int
    keys: int
    width: int


def choose(
    asked: AttentionName, family: Family, text_config: Any, device: str, dtype: torch.dtype
) -> Attention:
    """The attention asked for, or for `auto` the first that works here.

    device: "cpu" or "cuda". dtype: what attention is computed in.
    Raises ModelError with the reason where what was asked for cannot run: nothing is replaced.
    """
    if asked in ("sdpa", "eager"):
        return Attention(name=asked, packed=None)
    reason = needs_masks(family, text_config)
    heads = heads_of(text_config)
    names = PACKING.get(device, ()) if asked == "auto" else (asked,)
    for name in names:
        found = reason or trial(name, device, dtype, heads)
        if found is None:
            return Attention(name=name, packed=_PACKED[name](device))
        if asked != "auto":
            raise ModelError(
                f"attention {asked!r} cannot be used here: {found}",
                got=f"{device}, {str(dtype).removeprefix('torch.')}, heads {heads.width} wide",
                fix="use model.attention=auto, or look at `mmalign doctor`",
            )
    return MASKED


def needs_masks(family: Family, text_config: Any) -> str | None:
    """Why a family's attention is more than a tree of prompts and responses; None if it is not."""
    if family.prompt_attention == "picture_blocks":
        return f"in {family.name}, tokens of a picture see each other both ways, which takes a mask"
    if sliding_window(text_config) is not None:
        return "this model has layers with a sliding window, which take a mask"
    if getattr(text_config, "attn_logit_softcapping", None) is not None:
        return "this model caps its attention scores, which only model.attention=eager does"
    return None


def sliding_window(text_config: Any) -> int | None:
    """Tokens that a layer with a sliding window sees; None where no layer has one."""
    kinds = getattr(text_config, "layer_types", None) or ()
    return text_config.sliding_window if "sliding_attention" in kinds else None


def heads_of(text_config: Any) -> Heads:
    """A transformers text config's heads."""
    count = text_config.num_attention_heads
    width = getattr(text_config, "head_dim", None) or text_config.hidden_size // count
    return Heads(count, getattr(text_config, "num_key_value_heads", None) or count, width)


@cache
def trial(name: str, device: str, dtype: torch.dtype, heads: Heads) -> str | None:
    """Why attention `name` does not work here, or None: it ran, and its numbers are SDPA's."""
    if device == "cpu" and name != "flash":
        needs = {"xformers": "its kernels need CUDA", "flex": "it has no backward pass on the CPU"}
        return needs.get(name, "there is no such attention")
    if name == "flash" and device == "cuda" and dtype == torch.float32:
        return "it computes in 16 bits: set run.precision=bf16"
    try:
        error = _largest_error(_PACKED[name](device), device, dtype, heads)
    except Exception as problem:
        return refusal(problem)
    if not error <= TOLERANCE[dtype]:
        return f"its numbers are wrong: {error:.1e} from SDPA's"
    return None


def refusal(problem: Exception) -> str:
    """What a foreign kernel raised, in a line; of xformers' list, the first kernel's objections."""
    told = str(problem) or type(problem).__name__
    objections = told.partition("not supported because:")[2].partition("\n`")[0]
    if objections.strip():
        told = f"its kernels refuse: {objections}"
    return " ".join(told.split())[:300]


def _largest_error(
    packed: Callable[[Tree], Packed], device: str, dtype: torch.dtype, heads: Heads
) -> float:
    """Of output and gradients on a small tree, against SDPA under a mask, in float32."""
    from torch.nn.functional import scaled_dot_product_attention

    tree = make_tree([5, 70], [[3, 1], [2, 33, 4]], two_way=False).to(device)
    generator = torch.Generator().manual_seed(0)
    counts = (heads.queries, heads.keys, heads.keys, heads.queries)
    *values, grad = (
        torch.randn(len(tree.prompt), count, heads.width, generator=generator).to(device, dtype)
        for count in counts
    )
    results: list[list[Tensor]] = []
    for exact in (False, True):
        q, k, v = (x.detach().clone().float() if exact else x.detach().clone() for x in values)
        for leaf in (q, k, v):
            leaf.requires_grad_()
        if exact:
            q4, k4, v4 = (x.transpose(0, 1)[None] for x in (q, k, v))
            out = scaled_dot_product_attention(
                q4, k4, v4, attn_mask=tree.mask(), enable_gqa=heads.keys < heads.queries
            )[0].transpose(0, 1)
        else:
            out = packed(tree)(q, k, v, heads.width**-0.5)
        out.backward(grad.to(out.dtype))
        made = [out.detach(), q.grad, k.grad, v.grad]
        results.append([x.float() for x in made if x is not None])
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*results, strict=True))


def _flash(device: str) -> Callable[[Tree], Packed]:
    kernel = CudaFlash() if device == "cuda" else CpuFlash()
    return lambda tree: TreeCall(tree=tree, kernel=kernel)


def _xformers(device: str) -> Callable[[Tree], Packed]:
    return lambda tree: TreeCall(tree=tree, kernel=Xformers())


_PACKED: dict[str, Callable[[str], Callable[[Tree], Packed]]] = {
    "flash": _flash,
    "flex": lambda device: flex_call,
    "xformers": _xformers,
}
