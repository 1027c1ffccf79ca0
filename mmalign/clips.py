"""Clips: find, check, count, decode. Every clip the library opens goes through open_clip.

ClipReader does the same in a child process under a time limit, for clips that nobody vouches for.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import PositiveFloat, PositiveInt, model_validator

from mmalign.config import Strict
from mmalign.decoders import BACKENDS, decord, pyav, why_not, working_backends
from mmalign.decoders.base import ClipInfo, ClipLimits, Source
from mmalign.decoders.reading import Plan, decode, find, gather
from mmalign.errors import MediaError, MissingExtra
from mmalign.guard import Channel, Crashed, Guarded, Hung, answer_of, end_after
from mmalign.media import media_key
from mmalign.records import Media

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "Backend",
    "Clip",
    "ClipInfo",
    "ClipLimits",
    "ClipReader",
    "FrameSampling",
    "open_clip",
    "probe_clip",
    "working_backends",
]

Backend = Literal["auto", "torchcodec", "pyav", "decord"]

# Containers round times to a millisecond; a frame that late is still the one shown at a time.
ROUNDING_SECONDS = 1e-3


class FrameSampling(Strict):
    """Which frames of a clip are kept: a count of them, or so many per second.

    num_frames: that many, from the start of equal bins: frame floor(i N / num_frames) of N, for
        i = 0, 1, … as RRPO's release takes them. A shorter clip repeats frames.
    fps: the frames shown at 0, 1/fps, 2/fps, … seconds after the first one.
    max_frames: where `fps` would give more, they are thinned evenly.
    """

    num_frames: PositiveInt | None = 16
    fps: PositiveFloat | None = None
    max_frames: PositiveInt = 768

    @model_validator(mode="before")
    @classmethod
    def _fps_takes_the_place_of_the_default(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and data.get("fps") is not None and "num_frames" not in data:
            return {**data, "num_frames": None}
        return data

    @model_validator(mode="after")
    def _exactly_one(self) -> FrameSampling:
        if self.num_frames is not None and self.fps is not None:
            raise ValueError("num_frames and fps exclude each other: give one of them")
        if self.num_frames is None and self.fps is None:
            raise ValueError("give num_frames or fps")
        return self

    def indices(self, seconds: np.ndarray, duration_seconds: float) -> tuple[int, ...]:
        """Numbers of the frames kept, ascending, of a clip whose frames are shown at `seconds`."""
        if self.fps is None:
            assert self.num_frames is not None
            return tuple(i * len(seconds) // self.num_frames for i in range(self.num_frames))
        import numpy as np

        num_times = max(1, math.ceil((duration_seconds - ROUNDING_SECONDS) * self.fps))
        num_kept = min(num_times, self.max_frames)
        times = np.array([i * num_times // num_kept for i in range(num_kept)]) / self.fps
        shown = np.searchsorted(seconds, times + ROUNDING_SECONDS, side="right") - 1
        return tuple(shown.tolist())


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Clip:
    """Frames of a clip: [F, H, W, 3] uint8 RGB, upright.

    `indices` are their numbers in the source, and `timestamps` their presentation times in seconds
    from its first frame, as the file stores them. `source_fps` is the number of frames in the
    source over its duration. Two clips with one `key` hold the same frames.
    """

    frames: np.ndarray
    indices: tuple[int, ...]
    timestamps: tuple[float, ...]
    source_fps: float
    num_source_frames: int
    duration_seconds: float
    key: str

    @property
    def sampled_fps(self) -> float:
        """Frames kept per second of the source, as transformers' VideoMetadata counts it."""
        return len(self.indices) / self.num_source_frames * self.source_fps


def open_clip(
    media: Media,
    root: Path | None,
    sampling: FrameSampling,
    *,
    backend: Backend = "auto",
    limits: ClipLimits = ClipLimits(),
    verify: bool = False,
) -> Clip:
    """Decode the frames that `sampling` keeps. It may hang on a malicious file: see ClipReader.

    With `auto`, PyAV has the last word on a clip that torchcodec cannot read. A named backend is
    used, or MissingExtra raised. With `verify`, the bytes must have the sha256 that the row
    declares, where it declares one. Raises MediaError for a file that is missing, empty, no clip,
    truncated, without frames, over the limits or has anything broken in the frames decoded.
    """
    import numpy as np

    parts = decode(find(media, root, limits, verify=verify), _usable(backend), sampling, limits)
    plan, frames = gather(parts, lambda shape: np.empty(shape, np.uint8))
    return _clip(plan, frames, _key(media, root, sampling))


def probe_clip(
    media: Media,
    root: Path | None,
    *,
    backend: Backend = "auto",
    limits: ClipLimits = ClipLimits(),
    verify: bool = False,
) -> ClipInfo:
    """Read the header and decode the first frame. Raises MediaError where either fails."""
    names = _usable(backend)
    return _probe(find(media, root, limits, verify=verify), names, limits)


class ClipReader:
    """open_clip in a child process, with a time limit for each file.

    The child starts with the first clip and serves until `close`, or until it must be killed: then
    the clip at fault raises MediaError, and the next one gets a new child. Frames come through
    memory that both processes share. Threads may share a reader; they take turns.
    """

    def __init__(
        self,
        *,
        sampling: FrameSampling,
        backend: Backend = "auto",
        timeout_seconds: float = 30.0,
        limits: ClipLimits = ClipLimits(),
        verify: bool = False,
    ) -> None:
        self.sampling, self.timeout_seconds = sampling, timeout_seconds
        settings = _Settings(
            sampling=sampling,
            backend=backend,
            limits=limits,
            verify=verify,
            # The parent ends a child that hangs; this is for a child whose parent was ended first.
            end_after_seconds=2 * timeout_seconds + 5,
        )
        self._guarded = Guarded("mmalign.clips:serve", settings, what="decodes clips")

    def __enter__(self) -> ClipReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(self, media: Media, root: Path | None) -> Clip:
        """What open_clip returns. Raises MediaError also where the decoder hangs or crashes."""
        plan, frames = self._ask("open", media, root, _receive_clip)
        return _clip(plan, frames, _key(media, root, self.sampling))

    def probe(self, media: Media, root: Path | None) -> ClipInfo:
        """What probe_clip returns, under the same guard."""
        return self._ask("probe", media, root, answer_of)

    def close(self) -> None:
        """End the child. A reader that is used again starts another one."""
        self._guarded.close()

    def _ask(
        self,
        task: Literal["open", "probe"],
        media: Media,
        root: Path | None,
        receive: Callable[[Channel, float], Any],
    ) -> Any:
        try:
            return self._guarded.ask((task, media, root), self.timeout_seconds, receive)
        except Hung:
            problem = f"decoder hung: not done within {self.timeout_seconds:g} seconds"
            fix = "drop the row, or allow more seconds on a slow machine"
        except Crashed as crash:
            problem, fix = f"its decoder crashed ({crash})", "drop the row"
        raise MediaError(problem, where=media.path or "embedded clip", fix=fix)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Settings:
    """What a child is started with."""

    sampling: FrameSampling
    backend: Backend
    limits: ClipLimits
    verify: bool
    end_after_seconds: float


def serve(channel: Channel) -> None:
    """What a ClipReader's child runs: one clip after the other, until the channel closes."""
    settings: _Settings = channel.receive()
    try:
        names = _usable(settings.backend)
    except MissingExtra as error:
        channel.send(error)
        return
    channel.send(None)
    while True:
        task, media, root = channel.receive()
        end_after(settings.end_after_seconds)
        try:
            answer = _answer(channel, settings, names, task, media, root)
        except MediaError as error:
            answer = error
        channel.give_back_shared(truncate=False)
        channel.send(answer)
        end_after(0)


def _answer(
    channel: Channel,
    settings: _Settings,
    names: list[str],
    task: Literal["open", "probe"],
    media: Media,
    root: Path | None,
) -> ClipInfo | Plan:
    source = find(media, root, settings.limits, verify=settings.verify)
    if task == "probe":
        return _probe(source, names, settings.limits)
    parts = decode(source, names, settings.sampling, settings.limits)
    return gather(parts, partial(_shared, channel))[0]


def _receive_clip(channel: Channel, deadline: float) -> tuple[Plan, np.ndarray]:
    plan: Plan = answer_of(channel, deadline)
    return plan, _shared(channel, plan.frames_shape).copy()


def _shared(channel: Channel, shape: tuple[int, ...]) -> np.ndarray:
    import numpy as np

    return np.frombuffer(channel.shared(math.prod(shape)), np.uint8).reshape(shape)


def _clip(plan: Plan, frames: np.ndarray, key: str) -> Clip:
    return Clip(
        frames=frames,
        indices=plan.indices,
        timestamps=plan.timestamps,
        source_fps=plan.num_source_frames / plan.duration_seconds,
        num_source_frames=plan.num_source_frames,
        duration_seconds=plan.duration_seconds,
        key=key,
    )


def _key(media: Media, root: Path | None, sampling: FrameSampling) -> str:
    # A path names a clip only together with its root; a hash names it anywhere.
    place = "" if media.sha256 or media.bytes is not None else str(root)
    name = (place + media_key(media), sampling.model_dump_json())
    return hashlib.sha256(f"{name}".encode()).hexdigest()


def _usable(backend: Backend) -> list[str]:
    """The decoders to try, in order. Raises MissingExtra where there is none."""
    reasons: dict[str, str | None] = {}
    for name in BACKENDS if backend == "auto" else [backend]:
        reasons[name] = why_not(name)
        if name == "pyav" and reasons[name] is None:
            break  # What PyAV refuses is refused.
    names = [name for name, reason in reasons.items() if reason is None]
    if not names:
        found = "; ".join(f"{name} {reason}" for name, reason in reasons.items())
        raise MissingExtra(
            f"no clip can be decoded with the backend {backend}: {found}",
            fix="install the decoders: pip install 'mmalign[video]'",
        )
    return names


def _probe(source: Source, names: list[str], limits: ClipLimits) -> ClipInfo:
    # PyAV counts the frames for torchcodec, so it is there; only decord does without it.
    return decord.probe(source, limits) if names == ["decord"] else pyav.probe(source, limits)
