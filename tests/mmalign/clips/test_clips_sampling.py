"""Which frames are kept, by hand."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from mmalign.clips import FrameSampling
from mmalign.config import validate
from mmalign.errors import ConfigError


def kept(sampling: FrameSampling, seconds: list[float], duration: float) -> tuple[int, ...]:
    return sampling.indices(np.array(seconds), duration)


def even(num_frames: int, fps: float) -> list[float]:
    return [index / fps for index in range(num_frames)]


@pytest.mark.parametrize(
    ("num_source", "num_frames", "expected"),
    [(10, 4, (0, 2, 5, 7)), (3, 5, (0, 0, 1, 1, 2)), (1, 3, (0, 0, 0)), (16, 16, tuple(range(16)))],
)
def test_a_count_takes_the_start_of_equal_bins(num_source, num_frames, expected):
    sampling = FrameSampling(num_frames=num_frames)
    assert kept(sampling, even(num_source, 25), num_source / 25) == expected


def test_a_rate_takes_the_frame_that_is_shown_at_each_time():
    # Shown at 0, 0.5, 1, 1.5 and 2 seconds; the clip ends at 2.5, where the next would be.
    assert kept(FrameSampling(fps=2), [0, 0.1, 0.5, 0.6, 2.0], 2.5) == (0, 2, 3, 3, 4)


def test_times_that_a_container_rounded_to_milliseconds_are_still_met():
    # Frame 20 of 30 per second belongs to 2/3 s, and is stored at 0.667 s.
    seconds = [round(time, 3) for time in even(40, 30)]
    assert kept(FrameSampling(fps=3), seconds, 40 / 30) == (0, 10, 20, 30)


def test_a_rate_above_the_sources_repeats_frames():
    assert kept(FrameSampling(fps=4), even(2, 2), 1.0) == (0, 0, 1, 1)


def test_a_clip_shorter_than_a_step_gives_its_first_frame():
    assert kept(FrameSampling(fps=0.1), even(3, 25), 0.12) == (0,)


def test_max_frames_thins_evenly():
    # 100 times at 10 per second; of these 0, 25, 50 and 75.
    sampling = FrameSampling(fps=10, max_frames=4)
    assert kept(sampling, even(100, 10), 10.0) == (0, 25, 50, 75)


def test_an_absurd_rate_is_thinned_before_it_is_laid_out():
    assert kept(FrameSampling(fps=1e12, max_frames=3), even(9, 3), 3.0) == (0, 3, 6)


def test_a_rate_takes_the_place_of_the_default_count():
    assert FrameSampling().num_frames == 16
    assert FrameSampling(fps=2).num_frames is None
    dumped = FrameSampling(fps=2).model_dump()
    assert FrameSampling.model_validate(dumped) == FrameSampling(fps=2)


def test_both_or_neither_is_refused_in_words():
    with pytest.raises(ValidationError, match="exclude each other"):
        FrameSampling(fps=2, num_frames=8)
    with pytest.raises(ConfigError, match="num_frames and fps exclude each other: give one"):
        validate({"fps": 2, "num_frames": 8}, FrameSampling, "x.yaml")
    with pytest.raises(ValidationError, match="give num_frames or fps"):
        FrameSampling(num_frames=None)
    with pytest.raises(ValidationError):
        FrameSampling(fps=0)
