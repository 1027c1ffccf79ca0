"""What the decoders of clips have in common."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from mmalign.errors import MediaError

if TYPE_CHECKING:
    import numpy as np


class CannotDecode(MediaError):
    """This decoder cannot read a clip faithfully; another one may."""


class Recounted(Exception):
    """Packets and frames did not match: the decoder's timeline is now another, plan again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipLimits:
    """What a clip may be before it is refused; `max_clip_bytes` is of the frames kept, decoded."""

    max_bytes: int = 2 * 2**30
    max_pixels: int = 36_000_000
    max_frames: int = 500_000
    max_seconds: float = 6 * 3600.0
    max_clip_bytes: int = 8 * 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipInfo:
    """What the header of a clip says, and the size of its first frame, which decodes.

    Headers err: nothing here is counted. What one leaves out is None.
    """

    width: int
    height: int
    codec: str | None
    header_fps: float | None
    header_num_frames: int | None
    header_seconds: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """An encoded clip, a file or bytes. `where` names it to people."""

    where: str
    path: str | None = None
    data: bytes | None = None

    def opened(self) -> Any:
        """What PyAV and decord open: a path, or a file in memory."""
        return self.path if self.data is None else io.BytesIO(self.data)

    def head(self, size: int = 1024) -> bytes:
        """Its first bytes."""
        if self.data is not None:
            return self.data[:size]
        assert self.path is not None
        with open(self.path, "rb") as file:
            return file.read(size)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Timeline:
    """When each frame is shown, [N] float64 seconds ascending from 0, and when the last ends."""

    seconds: np.ndarray
    duration_seconds: float

    @classmethod
    def of(cls, starts: np.ndarray, end: float, *, rate: float, where: str) -> Timeline:
        """From presentation times. A last frame of untold length stays as long as the average."""
        seconds = starts - starts[0]
        last, duration = float(seconds[-1]), float(end - starts[0])
        if duration <= last:
            gap = last / (len(seconds) - 1) if last > 0 else 1 / rate if rate > 0 else 0.0
            duration = last + gap
        if duration <= 0:
            raise MediaError("tells neither times nor a frame rate", where=where)
        return cls(seconds=seconds, duration_seconds=duration)

    @classmethod
    def even(cls, num_frames: int, *, rate: float, where: str) -> Timeline:
        """For a file that stores no times."""
        import numpy as np

        if rate <= 0:
            raise MediaError("tells neither times nor a frame rate", where=where)
        return cls.of(np.arange(num_frames) / rate, num_frames / rate, rate=rate, where=where)


class Decoder(Protocol):
    """One clip, its frames counted."""

    timeline: Timeline

    def frames(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        """Frames [H, W, 3] uint8 RGB, upright, of ascending distinct numbers, one at a time.

        Raises Recounted where the timeline turns out wrong; ask again then, by the new one.
        """
        ...


@contextmanager
def told(where: str, name: str, kind: type[MediaError] = MediaError) -> Iterator[None]:
    """Turn whatever a foreign decoder raises into a MediaError."""
    try:
        yield
    except (MediaError, Recounted):
        raise
    except Exception as error:
        # Decoders raise whatever they like on a broken file; each means the same here.
        reason = f"{name} cannot decode it ({first_line(error)})"
        raise kind(reason, where=where, fix="replace the clip or drop the row") from None


def first_line(error: Exception) -> str:
    """What an error says, in one line of moderate length."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    # decord puts the time and a line of its source in front.
    return re.sub(r"^\[[\d:]+\] \S+:\d+: ", "", text.strip()).splitlines()[0][:200]


def check_pixels(width: int, height: int, limits: ClipLimits, where: str) -> None:
    """Refuse frames that are too large."""
    if width * height > limits.max_pixels:
        raise MediaError(
            "has too many pixels in a frame",
            where=where,
            got=f"{width}x{height}",
            wanted=f"at most {limits.max_pixels}",
            fix="make it smaller or drop the row",
        )


def check_count(num_frames: int, limits: ClipLimits, where: str) -> None:
    """Refuse a clip without frames, or with too many."""
    if num_frames == 0:
        raise MediaError("has no frames", where=where, fix="replace it or drop the row")
    if num_frames > limits.max_frames:
        raise MediaError("has too many frames", where=where, wanted=f"at most {limits.max_frames}")


def num_threads() -> int:
    """Threads for one decoder: enough to be quick, few enough to run several side by side."""
    return min(4, os.cpu_count() or 1)


def why_not_importable(module: str) -> str | None:
    """Why a module cannot be used here, or None."""
    try:
        __import__(module)
    except ModuleNotFoundError as error:
        return "is not installed" if error.name == module else f"needs {error.name}"
    except Exception as error:
        # A binary that does not match raises whatever it likes.
        return f"does not load ({first_line(error)})"
    return None
