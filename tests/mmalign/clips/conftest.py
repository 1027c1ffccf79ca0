"""Clips that tests write with PyAV."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmalign.decoders import pyav

Write = Callable[..., Path]


def picture(index: int, width: int, height: int) -> np.ndarray:
    """A frame that tells its number and which way is up: four corners, and a bar that moves."""
    pixels = np.full((height, width, 3), 10 + 5 * index % 240, np.uint8)
    pixels[: height // 3, : width // 3] = (220, 30, 30)
    pixels[: height // 3, -width // 3 :] = (30, 200, 30)
    pixels[-height // 3 :, : width // 3] = (30, 30, 210)
    bar = 2 * index % height
    pixels[bar : bar + 4, width // 3 : -width // 3] = 250
    return pixels


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a clip and returns its path.

    `times_ms` gives the frames times of their own, `shift_frames` shifts them by frames, and
    `matrix` is the display matrix of an MP4: a, b, c, d.
    """
    av = pytest.importorskip("av")

    def write_clip(
        name: str,
        *,
        codec: str = "libx264",
        frames: int = 40,
        size: tuple[int, int] = (64, 48),
        rate: int = 25,
        keyframe_every: int = 12,
        pixels: str = "yuv420p",
        times_ms: Sequence[int] | None = None,
        format: str | None = None,
        codec_options: dict[str, str] | None = None,
        options: dict[str, str] | None = None,
        shift_frames: int = 0,
        matrix: tuple[int, int, int, int] | None = None,
        noisy: bool = False,
    ) -> Path:
        path = tmp_path / name
        rng = np.random.default_rng(0)
        with av.open(str(path), "w", format=format, options=options or {}) as file:
            stream: Any = file.add_stream(codec, rate=rate, options=codec_options or {})
            stream.width, stream.height = size
            stream.pix_fmt, stream.gop_size = pixels, keyframe_every
            if times_ms:
                stream.codec_context.time_base = Fraction(1, 1000)
            for index in range(frames):
                image = picture(index, *size)
                if noisy:
                    image = rng.integers(0, 255, image.shape, np.uint8)
                frame = av.VideoFrame.from_ndarray(image, format="rgb24")
                if times_ms:
                    frame.pts, frame.time_base = times_ms[index], Fraction(1, 1000)
                _mux(file, stream.encode(frame), shift_frames)
            if not frames:
                file.start_encoding()  # else not even a header is written
            _mux(file, stream.encode(), shift_frames)
        if matrix is not None:
            _turn(path, matrix)
        return path

    return write_clip


def _mux(file: Any, packets: Sequence[Any], shift_frames: int) -> None:
    for packet in packets:
        if shift_frames:
            packet.pts += shift_frames
            packet.dts += shift_frames
        file.mux(packet)


def _turn(path: Path, matrix: tuple[int, int, int, int]) -> None:
    """Write a display matrix into the track header of an MP4."""
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 4 + 40
    a, b, c, d = matrix
    numbers = [a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30]
    data[start : start + 36] = b"".join(
        number.to_bytes(4, "big", signed=True) for number in numbers
    )
    path.write_bytes(data)


@pytest.fixture
def decoded() -> Callable[[Path], np.ndarray]:
    """Every frame of a clip by a bare loop over PyAV, lying as it was encoded."""
    av = pytest.importorskip("av")

    def decode(path: Path) -> np.ndarray:
        with av.open(str(path)) as file:
            return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])

    return decode


@pytest.fixture
def num_decoded(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many frames PyAV has handed out since it was asked last."""

    seen = []
    real = pyav.opened_by_pyav

    class Counting:
        def __init__(self, container):
            self.container = container

        def __getattr__(self, name):
            return getattr(self.container, name)

        def decode(self, stream):
            for frame in self.container.decode(stream):
                seen.append(frame.pts)
                yield frame

    @contextmanager
    def opened_by_pyav(source):
        with real(source) as (container, stream):
            yield Counting(container), stream

    monkeypatch.setattr(pyav, "opened_by_pyav", opened_by_pyav)

    def count() -> int:
        number = len(seen)
        seen.clear()
        return number

    return count
