"""`run.precision`: what the scorer's forward pass computes in, and what float16 takes beside it."""

from __future__ import annotations

import math
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mmalign.errors import TrainingError
from mmalign.log import get_logger
from trainers.config import Precision

logger = get_logger("trainers.precision")

ModuleT = TypeVar("ModuleT", bound=nn.Module)

# What is autocast to; float32 is not.
AUTOCAST: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}

MOST_SKIPPED = 25  # Steps in a row; by then the scale has been halved as often.


def in_precision(scorer: ModuleT, precision: Precision, device: torch.device) -> ModuleT:
    """The scorer, whose forward pass autocasts to 16 bits where the precision says so.

    Done here and not by accelerate, whose bf16 is something else under each engine: autocast with
    DDP; 16-bit weights and outputs with FSDP2, scores among them; 16-bit weights with DeepSpeed.
    This is autocast under all of them: weights that train, their gradients, their sums over
    processes and the scores are float32.
    """
    if precision in AUTOCAST:
        scorer.forward = torch.autocast(device.type, dtype=AUTOCAST[precision])(scorer.forward)
    return scorer


def check_precision(accelerator: Accelerator, precision: Precision, *, whole: bool) -> None:
    """Raise TrainingError for fp16 where processes do not hold the whole policy each."""
    if precision == "fp16" and not whole:
        raise TrainingError(
            "run.precision=fp16 scales losses and skips steps by itself, which FSDP and DeepSpeed "
            "would each have to do their own way",
            got=f"{accelerator.distributed_type.value}",
            fix="use run.precision=bf16, or DDP",
        )


class LossScale:
    """With fp16, a factor on the loss that keeps small gradients above float16's smallest number.

    A step whose gradients overflow is skipped and the factor halved; after 2000 steps without, it
    is doubled (torch.amp.GradScaler). With other precisions nothing is scaled.
    """

    def __init__(self, precision: Precision, device: torch.device) -> None:
        self._scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self._in_a_row = 0

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss to descend, times the factor."""
        return self._scaler.scale(loss)

    def unscale(self, optimizer: Any) -> None:
        """Divide all gradients by the factor, before they are clipped."""
        self._scaler.unscale_(optimizer)

    def overflows(self, grad_norm: float, step: int) -> bool:
        """Whether this step, counted from 1, is to be skipped; grad_norm: of what it would take.

        Raises TrainingError after MOST_SKIPPED steps in a row.
        """
        if not self._scaler.is_enabled() or math.isfinite(grad_norm):
            self._in_a_row = 0
            return False
        self._in_a_row += 1
        scale = self._scaler.get_scale()
        if self._in_a_row >= MOST_SKIPPED:
            raise TrainingError(
                f"gradients overflow float16 in {self._in_a_row} steps in a row",
                where=f"step {step}",
                got=f"loss scale {scale:g}",
                fix="use run.precision=bf16, or a lower optim.lr",
            )
        logger.info("step %d is skipped: gradients overflow at loss scale %g", step, scale)
        return True

    def step(self, optimizer: Any) -> None:
        """Take the optimizer's step, or none where `overflows` said so, and fit the factor."""
        if not self._in_a_row:
            self._scaler.step(optimizer)
        self._scaler.update()

    @property
    def counts(self) -> dict[str, float]:
        """What the log counts of a step: whether it was skipped; nothing unless that can be."""
        return {"skipped_steps": float(self._in_a_row > 0)} if self._scaler.is_enabled() else {}

    def state(self) -> dict[str, float]:
        """For a checkpoint; empty unless there is a factor."""
        state = self._scaler.state_dict()
        return {**state, "in_a_row": self._in_a_row} if state else {}

    def restore(self, state: dict[str, float]) -> None:
        """Go on from what `state` gave."""
        if state:
            self._in_a_row = int(state["in_a_row"])
            self._scaler.load_state_dict({k: v for k, v in state.items() if k != "in_a_row"})
