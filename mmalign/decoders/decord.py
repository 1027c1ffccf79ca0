"""decord, led from the start of a file towards its end."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from mmalign.decoders import pyav
from mmalign.decoders.base import (
    CannotDecode,
    ClipInfo,
    ClipLimits,
    Source,
    Timeline,
    check_count,
    check_pixels,
    num_threads,
    told,
    why_not_importable,
)

if TYPE_CHECKING:
    import numpy as np


def why_not() -> str | None:
    """Why decord does not work here, or None."""
    return why_not_importable("decord")


def probe(source: Source, limits: ClipLimits) -> ClipInfo:
    """What can be told without PyAV: the frames are counted, and the first one decodes."""
    decoder = Decord(source, limits)
    height, width, _ = next(iter(decoder.frames([0]))).shape
    num_frames, duration = len(decoder.timeline.seconds), decoder.timeline.duration_seconds
    return ClipInfo(
        width=width,
        height=height,
        codec=None,
        header_fps=num_frames / duration,
        header_num_frames=num_frames,
        header_seconds=duration,
    )


class Decord:
    """decord, led from the start of a file towards its end, once."""

    def __init__(self, source: Source, limits: ClipLimits) -> None:
        self.source, self.limits = source, limits
        head = source.head()
        mp4 = head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")
        if not mp4 and not head.startswith((b"RIFF", b"\x1aE\xdf\xa3", b"FLV")):
            raise self._refusal("it is trusted with MP4, AVI, Matroska and FLV only")
        with told(source.where, "decord", CannotDecode):
            # Where PyAV is there, it refuses what decord passes over or ends its process at.
            counted = pyav.PyAV(source, limits).timeline if pyav.why_not() is None else None
            if counted is not None and pyav.is_mirrored(source):
                raise self._refusal("it does not mirror a mirrored clip")
            self._reader = self._opened()
            self.timeline = self._count(mp4=mp4)
            if counted is not None:
                if len(counted.seconds) != len(self.timeline.seconds):
                    raise self._refusal("it counts other frames than PyAV")
                self.timeline = counted  # in double precision

    def frames(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        """Decode every frame up to the last that is wanted, skipping the conversion of others."""
        with told(self.source.where, "decord", CannotDecode):
            at = 0
            for index in indices:
                while at < index:
                    at += self._step(at, index)
                yield self._next()
                at += 1

    def _opened(self) -> Any:
        import decord

        # It says on stderr what it raises as well.
        decord.logging.set_level(decord.logging.QUIET)
        # Without fault_tol, decord hands out a neighbour of each frame that it cannot decode.
        fault_tol: Any = 1e-9
        return decord.VideoReader(
            self.source.opened(), num_threads=num_threads(), fault_tol=fault_tol
        )

    def _count(self, *, mp4: bool) -> Timeline:
        import numpy as np

        where, num_frames = self.source.where, len(self._reader)
        check_count(num_frames, self.limits, where)
        starts, ends = self._reader.get_frame_timestamp(range(num_frames)).astype(np.float64).T
        self._keys = sorted(self._reader.get_key_indices())
        rate = float(self._reader.get_avg_fps())
        # Where packets have no times, it makes them up from FFmpeg's mark for none.
        timed = bool((np.abs(starts) < 1e9).all())
        # It counts also what the edit list of an MP4 hides, by times before zero.
        shown = starts > -1e-4 if mp4 and timed else starts == starts
        self._skips = timed and bool(shown.all())
        check_count(int(shown.sum()), self.limits, where)
        if not timed:
            return Timeline.even(num_frames, rate=rate, where=where)
        return Timeline.of(starts[shown], float(ends.max()), rate=rate, where=where)

    def _step(self, at: int, target: int) -> int:
        """Go over frames that are not wanted; how many.

        skip_frames seeks when it meets a keyframe, by the number of its packet, and loses frames
        that have no times. Such frames are decoded instead.
        """
        key = bisect_right(self._keys, at)
        end = min([target, *[number - 1 for number in self._keys[key : key + 1]]])
        if self._skips and end > at:
            self._reader.skip_frames(end - at)
            return end - at
        self._next()
        return 1

    def _next(self) -> np.ndarray:
        try:
            pixels = self._reader.next().asnumpy()
        except StopIteration:
            raise self._refusal("it ends before the last frame") from None
        height, width = pixels.shape[:2]
        check_pixels(width, height, self.limits, self.source.where)
        # Where rows are padded, it takes the padding for a fourth channel.
        return pixels.reshape(height, -1)[:, : 3 * width].reshape(height, width, 3)

    def _refusal(self, why: str) -> CannotDecode:
        return CannotDecode(
            f"decord cannot read it faithfully: {why}",
            where=self.source.where,
            fix="use the backend auto or pyav",
        )
