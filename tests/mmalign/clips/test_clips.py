"""Good clips, odd ones and lying headers: all backends give the frames that a bare loop gives."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from mmalign.clips import FrameSampling, open_clip, probe_clip, working_backends
from mmalign.decoders import BACKENDS
from mmalign.decoders.base import CannotDecode
from mmalign.records import Media

EVERY = FrameSampling(fps=1000, max_frames=10_000)


def backend(name: str):
    reason = working_backends()[name]
    return pytest.param(name, marks=pytest.mark.skipif(reason is not None, reason=f"{reason}"))


ALL = [backend(name) for name in BACKENDS]
# torchcodec finds frames by presentation times, which AVI does not store.
WITHOUT_TIMES = [backend("pyav"), backend("decord")]


def opened(path: Path, sampling: FrameSampling = FrameSampling(num_frames=7), **options):
    return open_clip(Media(path=path.name), path.parent, sampling, **options)


def assert_frames(clip, every: np.ndarray) -> None:
    assert clip.num_source_frames == len(every)
    np.testing.assert_array_equal(clip.frames, every[list(clip.indices)])


# --- the same frames --------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.mp4", "mpeg4"), ("a.webm", "libvpx-vp9")],
)
def test_frames_and_times_from_files_and_bytes(write, decoded, backend, name, codec):
    path = write(name, codec=codec)
    every = decoded(path)
    for sampling in (FrameSampling(num_frames=7), FrameSampling(fps=3), FrameSampling(fps=25)):
        clip = opened(path, sampling, backend=backend)
        assert_frames(clip, every)
        assert clip.timestamps == pytest.approx([index / 25 for index in clip.indices], abs=1e-3)
        assert (clip.num_source_frames, clip.source_fps) == (40, pytest.approx(25))
        assert clip.duration_seconds == pytest.approx(1.6)
        embedded = open_clip(Media(bytes=path.read_bytes()), None, sampling, backend=backend)
        np.testing.assert_array_equal(embedded.frames, clip.frames)
        assert embedded.timestamps == clip.timestamps


@pytest.mark.parametrize("backend", WITHOUT_TIMES)
@pytest.mark.parametrize("codec", ["mpeg4", "libx264"])
@pytest.mark.parametrize("count", [3, 16, 40])
def test_an_avi(write, decoded, backend, codec, count):
    path = write("a.avi", codec=codec)
    clip = opened(path, FrameSampling(num_frames=count), backend=backend)
    assert_frames(clip, decoded(path))
    assert clip.timestamps == pytest.approx([index / 25 for index in clip.indices])


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize(
    ("codec", "parameters"),
    [
        ("libx264", {"x264-params": "open-gop=1:bframes=3"}),
        ("libx264", {"x264-params": "intra-refresh=1:bframes=0"}),
        ("libx265", {"x265-params": "open-gop=1:bframes=3:log-level=none"}),
    ],
)
def test_frames_far_apart_are_found_across_keyframes(write, decoded, backend, codec, parameters):
    """Frames before a keyframe that refer to it, and keyframes that are none."""
    path = write("a.mp4", codec=codec, codec_options=parameters, frames=150, keyframe_every=20)
    every = decoded(path)
    for count in (2, 5, 9):
        try:
            clip = opened(path, FrameSampling(num_frames=count), backend=backend)
        except CannotDecode:
            assert backend == "torchcodec"
        else:
            assert_frames(clip, every)


def test_seeking_decodes_less_and_nothing_twice(write, num_decoded):
    path = write("a.mp4", frames=200, keyframe_every=20)
    opened(path, FrameSampling(num_frames=200), backend="pyav")
    assert num_decoded() == 200
    opened(path, FrameSampling(num_frames=2), backend="pyav")
    assert num_decoded() <= 3


@pytest.mark.parametrize("backend", ALL)
def test_variable_frame_rate_has_its_true_times(write, decoded, backend):
    times = [0, 20, 60, 100, 500, 540, 1540, 1560, 1600, 3000]
    path = write("a.mp4", frames=10, times_ms=times)
    clip = opened(path, FrameSampling(num_frames=10), backend=backend)
    assert clip.timestamps == pytest.approx([time / 1000 for time in times], abs=1e-4)
    assert_frames(clip, decoded(path))
    # At 0, 0.5, 1, 1.5, 2, 2.5, 3 seconds; what is shown at 1.5 s came at 0.54 s.
    by_rate = opened(path, FrameSampling(fps=2), backend=backend)
    assert by_rate.indices[:7] == (0, 4, 5, 5, 8, 8, 9)
    assert_frames(by_rate, decoded(path))


@pytest.mark.parametrize("backend", ALL)
def test_a_clip_that_begins_late_is_timed_from_its_first_frame(write, backend):
    path = write("a.mp4", frames=5, times_ms=[1000, 1040, 1080, 1120, 1160])
    clip = opened(path, FrameSampling(num_frames=5), backend=backend)
    assert clip.timestamps == pytest.approx([0, 0.04, 0.08, 0.12, 0.16])
    assert clip.duration_seconds == pytest.approx(0.2)


@pytest.mark.parametrize("backend", ALL)
def test_an_edit_list_hides_frames(write, decoded, backend):
    options = {"avoid_negative_ts": "disabled", "use_editlist": "1"}
    # Five frames before zero.
    path = write("a.mp4", options=options, shift_frames=-5)
    clip = opened(path, EVERY, backend=backend)
    assert (clip.num_source_frames, clip.timestamps[0]) == (35, 0.0)
    assert_frames(clip, decoded(path))


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("size", [(63, 47), (33, 16), (16, 30), (48, 64)])
def test_odd_sizes(write, decoded, backend, size):
    clip = opened(write("a.mp4", size=size, pixels="yuv444p", frames=6), EVERY, backend=backend)
    assert clip.frames.shape[1:] == (size[1], size[0], 3)
    # Odd sides in 4:2:0 too; there decoders place the chroma of an edge differently.
    path = write("b.mp4", size=size, codec="mpeg4", frames=6)
    clip = opened(path, FrameSampling(num_frames=6), backend=backend)
    difference = np.abs(clip.frames.astype(int) - decoded(path))
    assert difference.mean() < 2
    assert (difference > 60).mean() < 0.01


@pytest.mark.parametrize("backend", ALL)
def test_one_frame_alone(write, decoded, backend):
    path = write("a.mp4", frames=1)
    clip = opened(path, FrameSampling(num_frames=4), backend=backend)
    assert (clip.indices, clip.timestamps) == ((0, 0, 0, 0), (0.0, 0.0, 0.0, 0.0))
    assert clip.source_fps == pytest.approx(25)
    assert_frames(clip, decoded(path))


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize(
    ("matrix", "turns"), [((0, 1, -1, 0), -1), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 1)]
)
def test_a_rotated_clip_stands_upright(write, decoded, backend, matrix, turns):
    path = write("a.mp4", frames=4, matrix=matrix)
    clip = opened(path, FrameSampling(num_frames=4), backend=backend)
    np.testing.assert_array_equal(clip.frames, np.rot90(decoded(path), turns, axes=(1, 2)))
    info = probe_clip(Media(path=path.name), path.parent)
    assert (info.height, info.width) == clip.frames.shape[1:3]


def test_a_mirrored_clip_is_mirrored_or_refused(write, decoded):
    path = write("a.mp4", frames=4, matrix=(-1, 0, 0, 1))
    clip = opened(path, FrameSampling(num_frames=4))
    np.testing.assert_array_equal(clip.frames, decoded(path)[:, :, ::-1])
    if working_backends()["decord"] is None:
        with pytest.raises(CannotDecode, match="does not mirror"):
            opened(path, backend="decord")


# --- headers that err -------------------------------------------------------------------------


@pytest.mark.parametrize("backend", WITHOUT_TIMES)
@pytest.mark.parametrize("codec", ["mpeg4", "libx264"])
@pytest.mark.parametrize("claimed", [400, 10, 0])
def test_an_avi_that_counts_its_frames_wrongly(write, decoded, backend, codec, claimed):
    path = write("a.avi", codec=codec)
    every = decoded(path)
    data = bytearray(path.read_bytes())
    struct.pack_into("<I", data, data.index(b"avih") + 8 + 16, claimed)
    struct.pack_into("<I", data, data.index(b"strh") + 8 + 32, claimed)
    path.write_bytes(data)
    if backend == "decord" and not claimed:
        # It refuses to open such a file, and says so.
        with pytest.raises(CannotDecode, match="broken metadata"):
            opened(path, backend=backend)
        return
    assert_frames(opened(path, backend=backend), every)
    assert probe_clip(Media(path=path.name), path.parent).header_num_frames in (claimed, None, 40)


@pytest.mark.parametrize("backend", ALL)
def test_an_mp4_that_gives_its_duration_wrongly(write, decoded, backend):
    path = write("a.mp4")
    data = bytearray(path.read_bytes())
    for box in (b"mvhd", b"mdhd"):
        start = data.index(box) + 4 + 16
        struct.pack_into(">I", data, start, 10 * struct.unpack_from(">I", data, start)[0])
    path.write_bytes(data)
    clip = opened(path, FrameSampling(fps=5), backend=backend)
    assert (clip.duration_seconds, clip.source_fps) == (pytest.approx(1.6), pytest.approx(25))
    assert_frames(clip, decoded(path))


def test_packets_that_become_no_frames_are_not_counted(write, decoded):
    """A broadcast that is joined in the middle: nothing shows before the first keyframe."""
    whole = write("whole.ts", codec="mpeg2video", frames=40, keyframe_every=15)
    num_packets = len(whole.read_bytes()) // 188
    path = whole.with_name("joined.ts")
    path.write_bytes(whole.read_bytes()[188 * (num_packets // 4) :])
    every = decoded(path)
    assert len(every) < 40
    clip = opened(path, FrameSampling(num_frames=len(every)))
    assert_frames(clip, every)
    assert clip.timestamps[1] == pytest.approx(0.04)


def test_a_packet_that_shows_nothing_is_not_counted(write, decoded):
    """VP8 keeps pictures to refer to in packets of their own; here, one is made of a shown one."""
    av = pytest.importorskip("av")
    plain = write("plain.webm", codec="libvpx")
    path = plain.with_name("hidden.webm")
    with av.open(str(plain)) as source, av.open(str(path), "w") as file:
        stream = file.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(source.demux(video=0)):
            data = bytearray(bytes(packet))
            if not data:
                continue
            if number == 10:
                data[0] &= ~0x10
            copy = av.Packet(bytes(data))
            copy.pts, copy.dts, copy.time_base = packet.pts, packet.dts, packet.time_base
            copy.is_keyframe, copy.stream = packet.is_keyframe, stream
            file.mux(copy)
    every = decoded(path)
    assert len(every) == 39
    for count in (2, 5, 39):
        assert_frames(opened(path, FrameSampling(num_frames=count), backend="pyav"), every)


def test_an_avi_with_reordered_frames_is_decoded_once(write, num_decoded):
    path = write("a.avi")
    opened(path, FrameSampling(num_frames=40))
    assert num_decoded() == 40


# --- keys, rates, headers ---------------------------------------------------------------------


def test_keys_tell_frames_apart(write):
    path = write("a.mp4")
    same = opened(path)
    assert same.key == opened(path).key
    assert same.key != opened(path, FrameSampling(num_frames=8)).key
    data = path.read_bytes()
    embedded = [open_clip(Media(path=p, bytes=data), None, EVERY).key for p in ("x", "y")]
    assert embedded[0] == embedded[1] != same.key
    other = path.parent / "other"
    other.mkdir()
    (other / "a.mp4").write_bytes(data)
    assert opened(other / "a.mp4").key != same.key


def test_the_sampled_rate_is_what_transformers_reckons(write):
    metadata = pytest.importorskip("transformers.video_utils")
    clip = opened(write("a.mp4"), FrameSampling(num_frames=10))
    assert clip.sampled_fps == pytest.approx(10 / 1.6)
    theirs = metadata.VideoMetadata(
        total_num_frames=clip.num_source_frames,
        fps=clip.source_fps,
        frames_indices=list(clip.indices),
    )
    assert theirs.sampled_fps == pytest.approx(clip.sampled_fps)


@pytest.mark.parametrize("backend", ["auto", "decord"])
def test_a_probe_reads_the_header_and_one_frame(write, num_decoded, backend):
    if backend == "decord" and working_backends()["decord"] is not None:
        pytest.skip("decord does not work here")
    path = write("a.mp4", size=(96, 64))
    info = probe_clip(Media(path=path.name), path.parent, backend=backend)
    assert (info.width, info.height, info.header_num_frames) == (96, 64, 40)
    assert info.header_fps == pytest.approx(25)
    assert info.header_seconds == pytest.approx(1.6)
    assert info.codec == (None if backend == "decord" else "h264")
    assert num_decoded() <= 1


# --- real clips -------------------------------------------------------------------------------


@pytest.mark.real
@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize(
    ("name", "num_frames", "seconds", "shape"),
    [
        ("1.mp4", 243, 9.72, (360, 640)),
        ("2.avi", 270, 270 * 12 / 359, (240, 320)),
        ("3.mp4", 146, 146 * 1001 / 24000, (360, 640)),
    ],
)
def test_real_clips(real, decoded, backend, name, num_frames, seconds, shape):
    path = real / "videos" / name
    if backend == "torchcodec" and name.endswith("avi"):
        with pytest.raises(CannotDecode, match="no presentation times"):
            opened(path, backend=backend)
        return
    clip = opened(path, FrameSampling(num_frames=11), backend=backend)
    assert clip.num_source_frames == num_frames
    assert clip.duration_seconds == pytest.approx(seconds)
    assert clip.frames.shape == (11, *shape, 3)
    assert_frames(clip, decoded(path))
