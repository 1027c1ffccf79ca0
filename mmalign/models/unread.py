"""Rows of a packed batch that nothing reads after the last layer: they are not computed there.

Of a prompt only the last token predicts a response's token. In the last layer its other tokens are
keys and values; what the output projection and the MLP would make of them goes nowhere. So both run
on the rows that are read, and give zeros for the rest: scores and gradients are the same but for
rounding. Other layers, whose every row the next one reads, are left alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MethodType
from typing import Any

from torch import Tensor, nn


@dataclass(slots=True)
class Read:
    """Which rows are read, [K] int64 into the flattened rows; None means all.

    Set by the layer's own attention, so that a checkpointed layer that runs again finds its own.
    """

    rows: Tensor | None = None


def skip_unread(decoder: Any) -> None:
    """Let a transformers language model's last layer skip unread rows; twice does it once.

    A layer made of other parts than `self_attn.o_proj` and `mlp` is left as it is.
    """
    layer = decoder.layers[-1]
    attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
    project = getattr(attention, "o_proj", None)
    if attention is None or mlp is None or project is None or hasattr(attention, "read"):
        return
    attention.read = Read()
    for part in (project, mlp):
        part.read, part.of_all = attention.read, part.forward
        # A method, not a closure: copies of the model must call their own weights.
        part.forward = MethodType(_of_read, part)


def _of_read(self: Any, x: Tensor) -> Tensor:
    """[..., H] to [..., H'], zeros for unread rows."""
    if self.read.rows is None:
        return self.of_all(x)
    made = self.of_all(x.reshape(1, -1, x.shape[-1])[:, self.read.rows])
    full = made.new_zeros(x.shape[:-1].numel(), made.shape[-1])
    return full.index_copy(0, self.read.rows, made[0]).view(*x.shape[:-1], -1)


def tell(attention: nn.Module, rows: Tensor | None) -> None:
    """Say which rows are read of the layer whose attention is being computed."""
    if (read := getattr(attention, "read", None)) is not None:
        read.rows = rows
