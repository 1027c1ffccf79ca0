"""The optimizer, and its learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from mmalign.errors import MissingExtra, TrainingError
from trainers.config import OptimConfig


def lr_at(step: int, *, total_steps: int, config: OptimConfig) -> float:
    """The learning rate of step `step`, counted from 0.

    Linear warm-up to `lr` over ceil(warmup_fraction * total_steps) steps, the first step above
    zero; then constant, or half a cosine down to min_lr_fraction * lr.
    """
    warmup = math.ceil(config.warmup_fraction * total_steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    progress = (step - warmup) / max(1, total_steps - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr * (config.min_lr_fraction + (1 - config.min_lr_fraction) * cosine)


def build_optimizer(
    parameters: Iterable[nn.Parameter], config: OptimConfig
) -> torch.optim.Optimizer:
    """AdamW over the parameters that train. Raises TrainingError where their updates would be lost.

    adamw_8bit keeps its moments in 8 bits (bitsandbytes, CUDA only).
    """
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    if not trainable:
        raise TrainingError("nothing trains", fix="set model.lora or a part of model.train")
    narrow = {str(p.dtype) for p in trainable if p.dtype != torch.float32}
    if narrow:
        raise TrainingError(
            "the weights that train must be float32, or small updates are rounded away",
            got=", ".join(sorted(narrow)),
            fix="use model.dtype=float32 with run.precision=bf16, or train LoRA adapters alone",
        )
    kwargs = {
        "lr": config.lr,
        "betas": config.betas,
        "eps": config.epsilon,
        "weight_decay": config.weight_decay,
    }
    if config.optimizer == "adamw":
        # Fused: one pass over all tensors; the default loops over them, on the CPU too.
        return torch.optim.AdamW(trainable, fused=True, **kwargs)
    check_8bit()
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(trainable, **kwargs)


def check_8bit() -> None:
    """Raise where the 8-bit optimizer cannot run on this machine."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise MissingExtra(
            "optim.optimizer=adamw_8bit needs bitsandbytes", fix="pip install 'mmalign[cuda]'"
        ) from None
    if not torch.cuda.is_available():
        raise TrainingError(
            "optim.optimizer=adamw_8bit needs a CUDA GPU, and this machine has none",
            fix="use optim.optimizer=adamw",
        )
