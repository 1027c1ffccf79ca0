"""Which decoder is used, and what each may be trusted with."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from mmalign.clips import FrameSampling, open_clip, probe_clip, working_backends
from mmalign.decoders import BACKENDS, pyav
from mmalign.decoders.base import CannotDecode
from mmalign.errors import MediaError, MissingExtra
from mmalign.records import Media


def opened(path: Path, sampling: FrameSampling = FrameSampling(num_frames=7), **options):
    return open_clip(Media(path=path.name), path.parent, sampling, **options)


def assert_frames(clip, every: np.ndarray) -> None:
    assert clip.num_source_frames == len(every)
    np.testing.assert_array_equal(clip.frames, every[list(clip.indices)])


def test_pyav_stands_in_where_torchcodec_cannot_and_only_for_auto(write, decoded, monkeypatch):
    class Partial(pyav.PyAV):
        def frames(self, indices):
            yield next(super().frames(indices))
            raise CannotDecode("this is not my clip")

    monkeypatch.setitem(BACKENDS, "torchcodec", (lambda: None, Partial))
    path = write("a.mp4")
    assert_frames(opened(path), decoded(path))
    with pytest.raises(CannotDecode, match="not my clip"):
        opened(path, backend="torchcodec")


def test_what_pyav_refuses_is_not_tried_with_decord(write, monkeypatch):
    monkeypatch.setitem(BACKENDS, "decord", (lambda: None, lambda *_: pytest.fail("was tried")))
    path = write("a.mp4")
    path.write_bytes(path.read_bytes()[:-900])
    with pytest.raises(MediaError):
        opened(path)


def test_a_named_backend_that_is_missing_is_refused_and_auto_goes_on(write, decoded, monkeypatch):
    path = write("a.mp4")
    every = decoded(path)
    if working_backends()["decord"] is not None:
        pytest.skip("decord does not work here")
    monkeypatch.setitem(sys.modules, "av", None)
    for name in ("pyav", "torchcodec"):
        with pytest.raises(MissingExtra, match=r"(not installed|PyAV).*pip install 'mmalign"):
            opened(path, backend=name)
    clip = opened(path)
    assert_frames(clip, every)
    assert clip.duration_seconds == pytest.approx(1.6)
    assert probe_clip(Media(path=path.name), path.parent).width == 64
    monkeypatch.setitem(sys.modules, "decord", None)
    with pytest.raises(MissingExtra, match="decord is not installed"):
        opened(path)


def test_decord_alone_counts_and_times_as_pyav_does(write, decoded, monkeypatch):
    if working_backends()["decord"] is not None:
        pytest.skip("decord does not work here")
    options = {"avoid_negative_ts": "disabled", "use_editlist": "1"}
    paths = [
        write("a.mp4", times_ms=[40 * index + (index > 20) * 500 for index in range(40)]),
        write("b.avi"),
        write("c.mp4", options=options, shift_frames=-5),
    ]
    every = [decoded(path) for path in paths]
    wanted = [opened(path, FrameSampling(fps=10)) for path in paths]
    monkeypatch.setitem(sys.modules, "av", None)
    for path, frames, by_pyav in zip(paths, every, wanted, strict=True):
        clip = opened(path, FrameSampling(fps=10), backend="decord")
        assert_frames(clip, frames)
        assert clip.indices == by_pyav.indices
        assert clip.timestamps == pytest.approx(by_pyav.timestamps, abs=1e-5)
        # How long a last frame stays is a guess where frames are reordered and times vary.
        assert clip.duration_seconds == pytest.approx(by_pyav.duration_seconds, abs=0.04)


def test_decord_skips_only_where_it_loses_nothing(write, monkeypatch):
    """skip_frames seeks by packet numbers, and takes frames without a time for skipped ones."""
    if working_backends()["decord"] is not None:
        pytest.skip("decord does not work here")
    import decord

    skipped: list[int] = []
    real = decord.VideoReader.skip_frames
    monkeypatch.setattr(
        decord.VideoReader,
        "skip_frames",
        lambda self, count: (skipped.append(count), real(self, count))[1],
    )
    opened(write("a.avi"), FrameSampling(num_frames=3), backend="decord")
    options = {"avoid_negative_ts": "disabled", "use_editlist": "1"}
    edited = write("b.mp4", options=options, shift_frames=-5)
    opened(edited, FrameSampling(num_frames=3), backend="decord")
    assert skipped == []
    # Frames 0, 13 and 26; it stops before the keyframes, 12 and 24.
    plain = write("c.mp4", codec="mpeg4")
    opened(plain, FrameSampling(num_frames=3), backend="decord")
    assert skipped == [10, 1, 9, 2]


def test_reasons_are_one_line():
    reasons = working_backends()
    assert list(reasons) == ["torchcodec", "pyav", "decord"]
    for reason in reasons.values():
        assert reason is None or ("\n" not in reason and len(reason) < 250)
