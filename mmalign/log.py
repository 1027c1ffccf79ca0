"""Log lines and progress: one formatter, rank 0 only, plain lines when not a terminal."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def is_main_process() -> bool:
    """True on the process that may print: rank 0, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def configure(level: int = logging.INFO) -> None:
    """Set up the one handler. Called by the command line, never on import."""
    logger = logging.getLogger("mmalign")
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
    logger.setLevel(level if is_main_process() else logging.ERROR)
    logger.propagate = False
    # On import it warns of a kernel for 4-bit weights on CPUs, whatever the command is about.
    logging.getLogger("bitsandbytes.backends.cpu").setLevel(logging.ERROR)


def get_logger(name: str) -> logging.Logger:
    """The logger of one module, a child of `mmalign`."""
    return logging.getLogger(f"mmalign.{name}")


def quiet_libraries() -> None:
    """Leave transformers' own progress bars to terminals; in a file they are noise."""
    if not sys.stderr.isatty():
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()


def progress(items: Iterable[T], *, label: str, total: int | None = None) -> Iterator[T]:
    """Yield `items` under a progress bar; off a terminal, under about ten plain lines."""
    if not is_main_process():
        yield from items
        return
    if total is None and hasattr(items, "__len__"):
        total = len(items)  # type: ignore[arg-type]
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import track

        yield from track(items, description=label, total=total, console=Console(stderr=True))
        return
    logger = get_logger("progress")
    every = max(1, -(-(total or 0) // 10))
    for count, item in enumerate(items, start=1):
        yield item
        if total and total >= 10 and count % every == 0:
            logger.info("%s %d/%d", label, count, total)
