"""Two pieces of a language model's layer, written so that they keep less for the backward pass.

    norm:   weight * x / rms(x)            keeps x and 1 / rms(x), not the normalised x
    gate:   silu(gate) * up                keeps gate and up, not silu(gate)

Both are what transformers computes, to the last bit forward and to rounding backward; what is not
kept is one elementwise pass away. transformers writes the same two pieces out in most of its
language models, under other class names, so they are known by their parts and tried before use.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn


class RootMeanSquareNorm(torch.autograd.Function):
    """weight * (x * rsqrt(mean(x^2) + eps)), in float32, weight last in x's own precision.

    x: [..., H]; weight: [H]. With n = x / rms(x) and g the gradient times weight, dx is
    (g - n * mean(g * n)) / rms(x), dweight the sum of grad * n (arXiv 1910.07467, equation 4).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See the class."""
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        return weight * (wide * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """See the class."""
        x, weight, scale = ctx.saved_tensors
        (grad,) = grads
        normed = x.float() * scale
        trained = None
        if ctx.needs_input_grad[1]:
            trained = (grad * normed.to(x.dtype)).flatten(0, -2).sum(0).to(weight.dtype)
        inner = (grad * weight).float()
        along = torch.linalg.vecdot(inner, normed).div_(x.shape[-1])[..., None]
        dx = inner.addcmul_(normed, along, value=-1).mul_(scale)
        return dx.to(x.dtype), trained, None


class SiluGate(torch.autograd.Function):
    """silu(gate) * up, both [..., M] (arXiv 2002.05202, SwiGLU without its projections)."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        """See the class."""
        ctx.save_for_backward(gate, up)
        return torch.nn.functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """See the class."""
        gate, up = ctx.saved_tensors
        (grad,) = grads
        dgate = torch.ops.aten.silu_backward(grad * up, gate)
        return dgate, torch.nn.functional.silu(gate).mul_(grad)


def make_lean(decoder: nn.Module) -> None:
    """Let a transformers language model's norms and gated layers keep less; twice does it once.

    A module whose own forward pass gives other numbers than these is left as it is.
    """
    alike: dict[type, bool] = {}
    for module in decoder.modules():
        forward = _forward_of(module)
        if forward is None:
            continue
        kind = type(module)
        if kind not in alike:
            alike[kind] = _same(module, forward)
        if alike[kind]:
            module.forward = MethodType(forward, module)


def _forward_of(module: Any) -> Any:
    """The leaner forward of a module made of the right parts, or None."""
    if isinstance(getattr(module, "variance_epsilon", None), float) and _named(module) == set():
        return _norm
    if _named(module) == {"gate_proj", "up_proj", "down_proj", "act_fn"}:
        gated = (
            isinstance(module.act_fn, nn.SiLU) or type(module.act_fn).__name__ == "SiLUActivation"
        )
        return _gated if gated else None
    return None


def _named(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}


def _norm(self: Any, hidden_states: Tensor) -> Tensor:
    return RootMeanSquareNorm.apply(hidden_states, self.weight, self.variance_epsilon)  # type: ignore[return-value]


def _gated(self: Any, x: Tensor) -> Tensor:
    return self.down_proj(SiluGate.apply(self.gate_proj(x), self.up_proj(x)))


def _same(module: Any, forward: Any) -> bool:
    """Whether the module's own forward pass gives the same numbers on a few random rows."""
    first = next(module.parameters(), None)
    if first is None:
        return False
    width = module.weight.shape[0] if hasattr(module, "weight") else _width(module)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, width, generator=generator).to(first.device)
    x = x.to(first.dtype if first.is_floating_point() else torch.float32)
    with torch.no_grad():
        own, ours = type(module).forward(module, x), forward(module, x)
    return torch.allclose(own.float(), ours.float(), rtol=1e-3, atol=1e-6)


def _width(module: Any) -> int:
    """What goes into a gated layer: adapters and quantised weights keep it under this name."""
    return module.gate_proj.in_features
