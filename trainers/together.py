"""What several processes do as one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

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
