"""What several processes do as one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from mmalign.errors import MmalignError

T = TypeVar("T")


def from_first(accelerator: Accelerator, function: Callable[[], T]) -> T:
    """What `function` gives, or raises, on the first process: the same for all of them."""
    result: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            result[0] = function()
        except MmalignError as error:
            result[1] = error
    broadcast_object_list(result)
    if result[1] is not None:
        raise result[1]
    return result[0]


def summed(
    accelerator: Accelerator, counts: Mapping[str, float], dtype: torch.dtype = torch.float32
) -> dict[str, float]:
    """Each count's sum over all processes, which must have the same names."""
    names = sorted(counts)
    own = torch.tensor([counts[name] for name in names], dtype=dtype, device=accelerator.device)
    everywhere: Any = accelerator.reduce(own, "sum")
    return dict(zip(names, everywhere.tolist(), strict=True))
