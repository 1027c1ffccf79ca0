"""`run.precision`: what the scorer's forward pass computes in."""

from __future__ import annotations

from typing import Literal, TypeVar

import torch
from torch import nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)

Precision = Literal["float32", "bf16"]


def in_precision(scorer: ModuleT, precision: Precision, device: torch.device) -> ModuleT:
    """The scorer, whose forward pass autocasts to bfloat16 where the precision is bf16.

    Done here and not by accelerate, whose bf16 is something else under each engine: autocast with
    DDP; 16-bit weights and outputs with FSDP2, scores among them; 16-bit weights with DeepSpeed.
    This is autocast under all of them: weights that train, their gradients, their sums over
    processes and the scores are float32.
    """
    if precision == "bf16":
        scorer.forward = torch.autocast(device.type, dtype=torch.bfloat16)(scorer.forward)
    return scorer
