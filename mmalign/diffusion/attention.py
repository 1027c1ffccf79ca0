"""Which attention a backbone runs, tried where it will run before it is used.

sdpa      torch's own choice of kernel, as diffusers leaves it
flash     SDPA held to torch's flash kernel, also where a checkpointed layer runs again
xformers  its memory-efficient attention, by diffusers' own switch; CUDA alone
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from mmalign.attention.choose import TOLERANCE, refusal
from mmalign.diffusion.config import BackboneAttention
from mmalign.errors import ModelError

# What `auto` tries before it stays with SDPA.
AUTO: dict[str, tuple[str, ...]] = {"cuda": ("flash", "xformers")}
# Of the trial: patches, and the tokens of a prompt, which are no multiple of a kernel's tile.
_QUERIES, _KEYS = 64, 77


class FlashOnly:
    """A processor of diffusers in which SDPA may run its flash kernel and no other."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **others: Any,
    ) -> Any:
        """See diffusers. Raises RuntimeError where the kernel cannot run."""
        # Here and not around the backbone, so that it also holds in the backward pass, where
        # gradient checkpointing runs a layer again.
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return self.inner(
                attn,
                hidden_states,
                encoder_hidden_states=encoder_hidden_states,
                attention_mask=attention_mask,
                **others,
            )


def use_attention(
    model: Any, asked: BackboneAttention, device: torch.device, dtype: torch.dtype
) -> str:
    """Let a diffusers model attend as asked; returns the name of what it does now.

    dtype: what attention is computed in. `auto` takes the first that works, on the CPU SDPA.
    Raises ModelError with the reason where what was asked for cannot run: nothing is replaced.
    """
    if asked == "sdpa":
        return asked
    widths = head_widths(model)
    for name in AUTO.get(device.type, ()) if asked == "auto" else (asked,):
        found = {width: trial(name, device.type, dtype, width) for width in widths}
        refused = {width: reason for width, reason in found.items() if reason is not None}
        if not refused:
            _SWITCH[name](model)
            return name
        if asked != "auto":
            width, reason = next(iter(refused.items()))
            raise ModelError(
                f"attention {asked!r} cannot be used here: {reason}",
                got=f"{device.type}, {str(dtype).removeprefix('torch.')}, heads {width} wide",
                fix="use model.attention=auto, or look at `mmalign doctor`",
            )
    return "sdpa"


def head_widths(model: nn.Module) -> list[int]:
    """Widths of one attention head, over all layers of a diffusers model."""
    from diffusers.models.attention_processor import Attention

    layers = [module for module in model.modules() if isinstance(module, Attention)]
    return sorted({layer.inner_dim // layer.heads for layer in layers})


@cache
def trial(name: str, device: str, dtype: torch.dtype, width: int) -> str | None:
    """Why attention `name` does not work here, or None: it ran, and its numbers are SDPA's."""
    if name == "xformers" and device == "cpu":
        return "its kernels need CUDA"
    if name == "flash" and device == "cuda" and dtype == torch.float32:
        return "it computes in 16 bits: set run.precision=bf16, or to sample the dtype"
    with warnings.catch_warnings(record=True) as heard:
        # Torch says there why it takes no kernel, and raises without a reason.
        warnings.simplefilter("always")
        try:
            error = _largest_error(_CALL[name], device, dtype, width)
        except Exception as problem:
            reasons = [str(warning.message).partition(" (Triggered")[0] for warning in heard]
            return " ".join([refusal(problem), *reasons])[:300]
    if not error <= TOLERANCE[dtype]:
        return f"its numbers are wrong: {error:.1e} from SDPA's"
    return None


def _largest_error(
    call: Callable[[Tensor, Tensor, Tensor], Tensor], device: str, dtype: torch.dtype, width: int
) -> float:
    """Of output and gradients of two heads, [1, 2, S, D], against SDPA in float32."""
    generator = torch.Generator().manual_seed(0)
    *values, grad = (
        torch.randn(1, 2, length, width, generator=generator).to(device, dtype)
        for length in (_QUERIES, _KEYS, _KEYS, _QUERIES)
    )
    results: list[list[Tensor]] = []
    for exact in (False, True):
        q, k, v = (x.detach().clone().float() if exact else x.detach().clone() for x in values)
        for leaf in (q, k, v):
            leaf.requires_grad_()
        if exact:
            with sdpa_kernel(SDPBackend.MATH):
                out = scaled_dot_product_attention(q, k, v)
        else:
            out = call(q, k, v)
        out.backward(grad.to(out.dtype))
        made = [out.detach(), q.grad, k.grad, v.grad]
        results.append([x.float() for x in made if x is not None])
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*results, strict=True))


def _flash(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return scaled_dot_product_attention(query, key, value)


def _xformers(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    from xformers.ops import memory_efficient_attention  # type: ignore[import-not-found]

    # Heads as a batch, as diffusers hands them over.
    q, k, v = (x[0].contiguous() for x in (query, key, value))
    return memory_efficient_attention(q, k, v)[None]


def _switch_to_flash(model: Any) -> None:
    processors = model.attn_processors
    model.set_attn_processor({name: FlashOnly(inner) for name, inner in processors.items()})


def _switch_to_xformers(model: Any) -> None:
    model.enable_xformers_memory_efficient_attention()


_CALL: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "flash": _flash,
    "xformers": _xformers,
}
_SWITCH: dict[str, Callable[[Any], None]] = {
    "flash": _switch_to_flash,
    "xformers": _switch_to_xformers,
}
