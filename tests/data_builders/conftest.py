"""Fixtures of the builders' tests. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from mmalign.records import Media


@pytest.fixture(scope="session")
def write_clip() -> Callable[..., Media]:
    """A function that writes a clip of noise, without loss: (path, seed, num_frames=8)."""

    def write(path: Path, seed: int, num_frames: int = 8) -> Media:
        import av

        rng = np.random.RandomState(seed)
        with av.open(str(path), "w", format="matroska") as container:
            stream = container.add_stream("ffv1", rate=Fraction(4))
            stream.width, stream.height, stream.pix_fmt = 32, 32, "bgr0"
            for _ in range(num_frames):
                pixels = rng.randint(0, 256, (32, 32, 3), dtype=np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode())
        return Media(path=path.name)

    return write
