"""torchcodec, where each frame can be checked by its presentation time."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator, Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

from mmalign.decoders import pyav
from mmalign.decoders.base import (
    CannotDecode,
    ClipLimits,
    Source,
    first_line,
    num_threads,
    told,
)

if TYPE_CHECKING:
    import numpy as np

# What FFmpeg 4 to 11 call libavutil; torchcodec is built for some of them.
AVUTIL_VERSIONS = range(56, 64)


def why_not() -> str | None:
    """Why torchcodec does not work here, or None."""
    if find_spec("torchcodec") is None:
        return "is not installed"
    if pyav.why_not() is not None:
        return "needs PyAV, which counts the frames for it"
    return _why_it_does_not_load()


@lru_cache(maxsize=1)
def _why_it_does_not_load() -> str | None:
    # Looked for first, because torchcodec imports torch before it looks.
    if sys.platform == "linux" and not any(_loads(f"libavutil.so.{n}") for n in AVUTIL_VERSIONS):
        return (
            "finds no shared libraries of FFmpeg (libavutil.so.56 or later): install FFmpeg, as by "
            "apt install ffmpeg or conda install ffmpeg"
        )
    try:
        from torchcodec.decoders import VideoDecoder

        VideoDecoder(b"no clip")
    except (ImportError, OSError) as error:
        return f"does not load ({first_line(error)})"
    except Exception as error:
        # It must complain of the clip; before that, it complains of its libraries.
        if "libtorchcodec" in str(error):
            return f"does not load ({first_line(error)})"
    return None


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


class Torchcodec:
    """torchcodec, where each frame can be checked by its presentation time."""

    def __init__(self, source: Source, limits: ClipLimits) -> None:
        self.source = source
        self._counted = pyav.PyAV(source, limits)
        self.timeline = self._counted.timeline
        if not self._counted.exact:
            raise self._refusal("its file stores no presentation times to find frames by")
        with told(source.where, "PyAV"):
            if pyav.is_mirrored(source):
                raise self._refusal("it does not mirror a mirrored clip")

    def frames(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        """Decode frame by frame; torchcodec goes on from where it is, or seeks."""
        from torchcodec.decoders import VideoDecoder

        counted = self._counted
        start = counted.ticks[0] * counted.seconds_per_tick
        with told(self.source.where, "torchcodec", CannotDecode):
            decoder = VideoDecoder(
                self.source.path or self.source.data or b"",
                stream_index=counted.stream_index,
                dimension_order="NHWC",
                num_ffmpeg_threads=num_threads(),
            )
            if len(decoder) != len(self.timeline.seconds):
                raise self._refusal("it counts other frames than PyAV")
            for index in indices:
                frame = decoder.get_frame_at(index)
                wanted = start + self.timeline.seconds[index]
                if abs(frame.pts_seconds - wanted) > counted.seconds_per_tick / 2:
                    raise self._refusal(f"it gives another frame than number {index}")
                yield frame.data.contiguous().numpy()

    def _refusal(self, why: str) -> CannotDecode:
        return CannotDecode(
            f"torchcodec cannot read it faithfully: {why}",
            where=self.source.where,
            fix="use the backend auto or pyav",
        )
