"""From a record's clip to the frames that are kept, whatever decodes them."""

from __future__ import annotations

import hashlib
import math
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from mmalign.decoders import BACKENDS
from mmalign.decoders.base import CannotDecode, ClipLimits, Recounted, Source, first_line
from mmalign.errors import MediaError
from mmalign.media import resolve
from mmalign.records import Media

if TYPE_CHECKING:
    import numpy as np

# How files begin in which FFmpeg finds the names of other files, which it would open.
_PLAYLISTS = (b"#EXTM3U", b"ffconcat", b"<")


class Sampling(Protocol):
    """What decides which frames are kept."""

    def indices(self, seconds: np.ndarray, duration_seconds: float) -> tuple[int, ...]:
        """Ascending numbers of frames, some of them maybe twice."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything about a clip that is being decoded, but its frames; `shape` is H, W, 3."""

    shape: tuple[int, ...]
    indices: tuple[int, ...]
    timestamps: tuple[float, ...]
    num_source_frames: int
    duration_seconds: float

    @property
    def frames_shape(self) -> tuple[int, ...]:
        """F, H, W, 3."""
        return (len(self.indices), *self.shape)


def find(media: Media, root: Path | None, limits: ClipLimits, *, verify: bool) -> Source:
    """The encoded clip that a row means. Raises MediaError for one that must not be decoded."""
    where = media.path or f"embedded clip {(media.sha256 or '')[:12]}".strip()
    if media.bytes is not None:
        source, num_bytes = Source(where=where, data=media.bytes), len(media.bytes)
    else:
        path = resolve(media, root)
        where = str(path)
        try:
            status = path.stat()
        except OSError as error:
            raise _unreadable(where, error) from None
        if not stat.S_ISREG(status.st_mode):
            raise MediaError("is not a file", where=where, wanted="a clip")
        source, num_bytes = Source(where=where, path=where), status.st_size
    if not num_bytes:
        raise MediaError("is empty", where=where, got="0 bytes", fix="replace it or drop the row")
    if num_bytes > limits.max_bytes:
        got, wanted = f"{num_bytes} bytes", f"at most {limits.max_bytes}"
        raise MediaError("file is too large", where=where, got=got, wanted=wanted)
    try:
        _refuse_text(source.head(), where)
        if verify and media.sha256:
            _check_hash(source, media.sha256)
    except OSError as error:
        raise _unreadable(where, error) from None
    return source


def decode(
    source: Source, names: Sequence[str], sampling: Sampling, limits: ClipLimits
) -> Iterator[Plan | np.ndarray]:
    """A plan, then a frame [H, W, 3] for each distinct number of its indices, in order.

    Another plan means to begin again. The decoders are tried in order; only CannotDecode leads from
    one to the next.
    """
    for name in names:
        try:
            yield from _decode_by(name, source, sampling, limits)
            return
        except CannotDecode:
            if name == names[-1]:
                raise


def gather(
    parts: Iterator[Plan | np.ndarray], allocate: Callable[[tuple[int, ...]], np.ndarray]
) -> tuple[Plan, np.ndarray]:
    """The last plan and its frames [F, H, W, 3], in an array that `allocate` makes for a shape."""
    plan, frames, at = None, None, 0
    for part in parts:
        if isinstance(part, Plan):
            plan, frames, at = part, allocate(part.frames_shape), 0
            continue
        assert plan is not None
        assert frames is not None
        same = plan.indices.count(plan.indices[at])
        frames[at : at + same] = part
        at += same
    assert plan is not None
    assert frames is not None
    assert at == len(frames)
    return plan, frames


def _decode_by(
    name: str, source: Source, sampling: Sampling, limits: ClipLimits
) -> Iterator[Plan | np.ndarray]:
    decoder = BACKENDS[name][1](source, limits)
    planned = None
    while planned is None:
        timeline = decoder.timeline
        if timeline.duration_seconds > limits.max_seconds:
            raise MediaError(
                "is too long",
                where=source.where,
                got=f"{timeline.duration_seconds:.0f} seconds",
                wanted=f"at most {limits.max_seconds:.0f}",
            )
        indices = sampling.indices(timeline.seconds, timeline.duration_seconds)
        try:
            for frame in decoder.frames(sorted(set(indices))):
                if planned is None:
                    planned = Plan(
                        shape=frame.shape,
                        indices=indices,
                        timestamps=tuple(timeline.seconds[list(indices)].tolist()),
                        num_source_frames=len(timeline.seconds),
                        duration_seconds=timeline.duration_seconds,
                    )
                    _check_memory(planned, limits, source.where)
                    yield planned
                elif frame.shape != planned.shape:
                    was, now = (f"{shape[1]}x{shape[0]}" for shape in (planned.shape, frame.shape))
                    raise MediaError(
                        "changes its size", where=source.where, got=f"{was}, then {now}"
                    )
                yield frame
        except Recounted:
            planned = None


def _check_memory(plan: Plan, limits: ClipLimits, where: str) -> None:
    num_bytes = math.prod(plan.frames_shape)
    if num_bytes > limits.max_clip_bytes:
        raise MediaError(
            "needs too much memory",
            where=where,
            got=f"{num_bytes} bytes for {len(plan.indices)} frames",
            wanted=f"at most {limits.max_clip_bytes}",
            fix="keep fewer frames, or make the clip smaller",
        )


def _refuse_text(head: bytes, where: str) -> None:
    """A page that was saved in a clip's place, or a playlist, with which FFmpeg leaves the root."""
    control = set(head) & {*range(0x09), *range(0x0E, 0x20)}
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(_PLAYLISTS) or not control:
        got = f"bytes that begin {head[:12]!r}"
        raise MediaError("is text, no clip", where=where, got=got, fix="drop the row")


def _check_hash(source: Source, wanted: str) -> None:
    if source.path is None:
        got = hashlib.sha256(source.data or b"").hexdigest()
    else:
        with open(source.path, "rb") as file:
            got = hashlib.file_digest(file, "sha256").hexdigest()
    if got != wanted:
        raise MediaError(
            "has changed since the row was written",
            where=source.where,
            got=f"sha256 {got}",
            wanted=wanted,
            fix="restore the file or build the dataset again",
        )


def _unreadable(where: str, error: OSError) -> MediaError:
    return MediaError(
        f"cannot be read ({first_line(error)})",
        where=where,
        fix="correct the path or the media root, or drop the row",
    )
