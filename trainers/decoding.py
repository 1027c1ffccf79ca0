"""How the policy samples during training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import nn

from mmalign.config import Strict
from mmalign.generate.base import Sampling


class Decoding(Strict):
    """How the policy samples."""

    temperature: NonNegativeFloat = 1.0
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_new_tokens: PositiveInt = 256
    batch_size: PositiveInt = 16

    def sampling(self, seed: int) -> Sampling:
        """With this seed."""
        return Sampling(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=seed,
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model as it is when it does not train, and afterwards as it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
