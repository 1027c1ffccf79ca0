"""`ema`: a running average of the weights that train, which is what a run saves and shows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


class Average:
    """average <- d average + (1 - d) weights after each optimizer step, in float32.

    d = min(decay, (1 + n) / (10 + n)) after n earlier updates, so that the initial weights do not
    linger. Kept by the main process alone, which is the one that saves and draws.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.num_updates = decay, 0
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._kept = {name: p.detach().clone() for name, p in self._trained.items()}
        # What trains is float32 (see build_optimizer); in_place exchanges tensors.
        assert all(tensor.dtype == torch.float32 for tensor in self._kept.values())

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are now."""
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        weights = [parameter.detach() for parameter in self._trained.values()]
        torch._foreach_lerp_(list(self._kept.values()), weights, 1 - decay)
        self.num_updates += 1

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The averaged weights in the model, for as long as the context lasts."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def save(self, file: Path) -> None:
        """Write the average, for a checkpoint's state."""
        tensors = {name: tensor.cpu() for name, tensor in self._kept.items()}
        save_file(tensors, file, metadata={"num_updates": str(self.num_updates)})

    def restore(self, file: Path) -> None:
        """Go on from what `save` wrote."""
        with safe_open(file, "pt") as stored:
            self.num_updates = int(stored.metadata()["num_updates"])
            for name, tensor in self._kept.items():
                tensor.copy_(stored.get_tensor(name))

    def _exchange(self) -> None:
        for name, parameter in self._trained.items():
            tensor: Tensor = self._kept[name]
            # The storages change places, so nothing is copied and no bit can change.
            parameter.data, self._kept[name] = tensor, parameter.data
