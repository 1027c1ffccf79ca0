"""PyAV: the decoder that the others are held to."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any, NoReturn

from mmalign.decoders.base import (
    ClipInfo,
    ClipLimits,
    Recounted,
    Source,
    Timeline,
    check_count,
    check_pixels,
    num_threads,
    told,
    why_not_importable,
)
from mmalign.errors import MediaError

if TYPE_CHECKING:
    import numpy as np

# A seek empties the decoder's pipeline, which pays only where it skips many frames.
MIN_FRAMES_SKIPPED = 8
# Decoding several frames at once gains time from about this size on, and costs it below.
THREADED_PIXELS = 200_000
# Containers that hold an index of keyframes by presentation time.
SEEKABLE = ("mov,", "matroska,")


def why_not() -> str | None:
    """Why PyAV does not work here, or None."""
    return why_not_importable("av")


@contextmanager
def opened_by_pyav(source: Source) -> Iterator[tuple[Any, Any]]:
    """The container and its video stream, no cover picture of a sound file."""
    import av
    from av.stream import Disposition

    with av.open(source.opened(), metadata_errors="ignore") as container:
        cover = Disposition.attached_pic
        streams = [one for one in container.streams.video if not one.disposition & cover]
        if not streams:
            got = ", ".join(sorted(one.type for one in container.streams)) or "nothing"
            raise MediaError("has no video track", where=source.where, got=got, fix="drop the row")
        best: Any = container.streams.best("video")
        stream = best if best in streams else streams[0]
        if stream.codec_context is None:
            raise MediaError("is in a codec that PyAV does not know", where=source.where)
        yield container, stream


def to_rgb() -> Callable[[Any], np.ndarray]:
    """Converts frames of one clip to [H, W, 3] uint8, as they were encoded."""
    from av.video.reformatter import VideoReformatter

    # A frame's own to_ndarray prepares its conversion anew, and newer versions of PyAV start
    # threads for it: both take longer than the conversion itself.
    reformatter = VideoReformatter()
    alone = {"threads": 1} if "threads" in (VideoReformatter.reformat.__doc__ or "") else {}
    return lambda frame: reformatter.reformat(frame, format="rgb24", **alone).to_ndarray()


def display_matrix(frame: Any) -> tuple[int, int, int, int]:
    """a, b, c, d of (x, y) -> (a x + c y, b x + d y), which puts a decoded frame upright.

    A matrix that only mirrors top to bottom turns by no angle, and no decoder here heeds it.
    """
    import numpy as np

    # Read only where it must be: a frame whose side data was read lives until a collection.
    if not frame.rotation:
        return 1, 0, 0, 1
    data = frame.side_data["DISPLAYMATRIX"]
    a, b, _, c, d = np.frombuffer(bytes(data), np.int32)[:5].tolist()
    return a, b, c, d


def upright(frame: np.ndarray, matrix: tuple[int, int, int, int]) -> np.ndarray:
    """A frame turned by quarters and mirrored as its display matrix wants."""
    import numpy as np

    a, b, c, d = matrix
    if abs(b) > abs(a):
        frame, across, down = frame.transpose(1, 0, 2), c, b
    else:
        across, down = a, d
    return np.ascontiguousarray(frame[:: -1 if down < 0 else 1, :: -1 if across < 0 else 1])


def is_mirrored(source: Source) -> bool:
    """Whether the first frame must be mirrored, and not only turned, to be upright."""
    with opened_by_pyav(source) as (container, stream):
        frame = next(container.decode(stream), None)
    a, b, c, d = (1, 0, 0, 1) if frame is None else display_matrix(frame)
    return a * d - b * c < 0


def probe(source: Source, limits: ClipLimits) -> ClipInfo:
    """The header, and whether a first frame decodes."""
    with told(source.where, "PyAV"), opened_by_pyav(source) as (container, stream):
        check_pixels(stream.width, stream.height, limits, source.where)
        frames = list(islice(container.decode(stream), 1))
        check_count(len(frames), limits, source.where)
        frame = frames[0]
        shape = upright(to_rgb()(frame), display_matrix(frame)).shape
        length = stream.duration and float(stream.duration * stream.time_base)
        return ClipInfo(
            width=shape[1],
            height=shape[0],
            codec=stream.codec_context.name,
            header_fps=float(stream.average_rate) if stream.average_rate else None,
            header_num_frames=stream.frames or None,
            header_seconds=length or (container.duration and container.duration / 1e6) or None,
        )


class PyAV:
    """The decoder that the others are held to. It gives up on a clip with any broken frame."""

    def __init__(self, source: Source, limits: ClipLimits) -> None:
        self.source, self.limits = source, limits
        # Presentation times in the stream's own unit, which are exact; where `exact`, they name
        # the frames. And the numbers of the keyframes.
        self.ticks: list[int] = []
        self.exact = False
        self._keys: list[int] = []
        self._recounted = False
        with told(source.where, "PyAV"), opened_by_pyav(source) as (container, stream):
            check_pixels(stream.width, stream.height, limits, source.where)
            self.stream_index: int = stream.index
            self.seconds_per_tick = float(stream.time_base)
            self._rate = float(stream.average_rate or stream.guessed_rate or 0)
            self.timeline = self._count(container, stream)

    def frames(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        """Decode once, from the start or from the last keyframe before a frame far ahead."""
        where = self.source.where
        with told(where, "PyAV"), opened_by_pyav(self.source) as (container, stream):
            if stream.width * stream.height >= THREADED_PIXELS:
                stream.codec_context.thread_type = "AUTO"
                stream.codec_context.thread_count = num_threads()
            convert = to_rgb()
            for number, frame in self._walk(container, stream, indices):
                check_pixels(frame.width, frame.height, self.limits, where)
                if frame.is_corrupt:
                    raise MediaError("is damaged", where=where, got=f"a broken frame {number}")
                yield upright(convert(frame), display_matrix(frame))

    def _count(self, container: Any, stream: Any) -> Timeline:
        import numpy as np

        where = self.source.where
        # AVI stores no presentation times: those that its packets get are guesses.
        stored = container.format.name != "avi"
        ticks: list[int | None] = []
        keys: list[int | None] = []
        end = 0
        for packet in container.demux(stream):
            if packet.is_corrupt:
                raise MediaError(
                    "is truncated or damaged",
                    where=where,
                    got=f"{len(ticks)} whole frames, then a part of one",
                    fix="replace it or drop the row",
                )
            # Without data a packet only flushes the decoder; an edit list discards the unseen.
            if not packet.size or packet.is_discard:
                continue
            ticks.append(packet.pts if stored else packet.dts)
            if packet.is_keyframe:
                keys.append(ticks[-1])
            end = max(end, (ticks[-1] or 0) + (packet.duration or 0))
            if len(ticks) > self.limits.max_frames:
                break
        check_count(len(ticks), self.limits, where)
        known = sorted(tick for tick in ticks if tick is not None)
        if len(known) < len(ticks):
            return Timeline.even(len(ticks), rate=self._rate, where=where)
        self.ticks = known
        self.exact = stored and len(set(known)) == len(known)
        # VP8 has packets that show nothing, which only decoding from the start reveals.
        vp8 = stream.codec_context.name == "vp8"
        if self.exact and container.format.name.startswith(SEEKABLE) and not vp8:
            number = {tick: number for number, tick in enumerate(known)}
            self._keys = sorted(number[tick] for tick in keys if tick is not None)
        starts = np.array(known, np.float64) * self.seconds_per_tick
        end_seconds = end * self.seconds_per_tick
        return Timeline.of(starts, end_seconds, rate=self._rate, where=where)

    def _walk(
        self, container: Any, stream: Any, indices: Sequence[int]
    ) -> Iterator[tuple[int, Any]]:
        """Numbers and decoded frames of `indices`."""
        numbers = {tick: number for number, tick in enumerate(self.ticks)} if self.exact else {}
        decoded = container.decode(stream)
        following = 0  # the number that the next decoded frame should have
        sought = False
        for index in indices:
            key = self._keys[bisect_right(self._keys, index) - 1] if self._keys else 0
            if key - following >= MIN_FRAMES_SKIPPED:
                container.seek(self.ticks[key], stream=stream)
                decoded, sought = container.decode(stream), True
            number = -1
            while number != index:
                frame = next(decoded, None)
                if frame is None:
                    self._mend()
                number = numbers.get(frame.pts, index + 1) if self.exact else following
                if number > index or not (sought or number == following):
                    self._mend()
                following = number + 1
            yield number, frame

    def _mend(self) -> NoReturn:
        """Where frames are not as the packets said: without seeks, or counted by decoding."""
        if self._keys:
            self._keys = []
        elif not self._recounted:
            self._recount()
        else:
            raise MediaError("decodes to other frames each time", where=self.source.where)
        raise Recounted

    def _recount(self) -> None:
        import numpy as np

        where = self.source.where
        with opened_by_pyav(self.source) as (container, stream):
            ticks = [frame.pts for frame in container.decode(stream)]
        check_count(len(ticks), self.limits, where)
        self._recounted, self.exact = True, False
        if None in ticks or any(b <= a for a, b in pairwise(ticks)):
            self.timeline = Timeline.even(len(ticks), rate=self._rate, where=where)
        else:
            starts = np.array(ticks, np.float64) * self.seconds_per_tick
            self.timeline = Timeline.of(starts, 0.0, rate=self._rate, where=where)
