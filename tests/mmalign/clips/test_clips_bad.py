"""Every clip that cannot be used is refused in a sentence."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest

from mmalign.clips import ClipLimits, FrameSampling, open_clip, probe_clip, working_backends
from mmalign.errors import MediaError
from mmalign.records import Media

BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(reason is not None, reason=f"{reason}"))
    for name, reason in working_backends().items()
]


def opened(path: Path, **options):
    sampling = options.pop("sampling", FrameSampling(num_frames=4))
    return open_clip(Media(path=path.name), path.parent, sampling, **options)


def sound(path: Path, *, cover: bool = False) -> Path:
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as file:
        stream = file.add_stream("aac", rate=16_000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16_000), np.float32), "fltp", "mono")
        frame.sample_rate = 16_000
        picture = file.add_stream("mjpeg", rate=1) if cover else None
        if picture is not None:
            picture.width, picture.height, picture.pix_fmt = 32, 32, "yuvj420p"
            picture.disposition = av.stream.Disposition.attached_pic
            still = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), "rgb24")
            file.mux(picture.encode(still.reformat(format="yuvj420p")))
        for packet in [*stream.encode(frame), *stream.encode()]:
            file.mux(packet)
    return path


# --- no clip ----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cover", [False, True])
def test_a_file_of_sound_has_no_video_track(tmp_path, backend, cover):
    path = sound(tmp_path / "a.mp4", cover=cover)
    found = "audio, video" if cover else "audio"
    with pytest.raises(MediaError, match=f"has no video track; got {found}. Drop the row"):
        opened(path, backend=backend)
    with pytest.raises(MediaError, match="no video track"):
        probe_clip(Media(path=path.name), tmp_path)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_clip_without_frames(write, backend):
    path = write("a.avi", codec="mpeg4", frames=0)
    for read in (opened, lambda path, backend: probe_clip(Media(path=path.name), path.parent)):
        with pytest.raises(MediaError, match="has no frames"):
            read(path, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("a.mp4", "libx264", {}),  # its index comes last, and is cut off
        ("a.mp4", "libx264", {"movflags": "faststart"}),
        ("a.avi", "mpeg4", {}),
        ("a.flv", "flv1", {}),
    ],
)
def test_a_truncated_clip(write, backend, name, codec, options):
    path = write(name, codec=codec, options=options, noisy=True)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 6 // 10])
    with pytest.raises(MediaError, match=r"truncated|cannot decode"):
        opened(path, backend=backend)
    with pytest.raises(MediaError, match=r"truncated|cannot decode"):
        open_clip(
            Media(bytes=path.read_bytes()), None, FrameSampling(num_frames=4), backend=backend
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_garbage(tmp_path, backend):
    data = np.random.default_rng(0).integers(0, 255, 9_000, np.uint8).tobytes()
    with pytest.raises(MediaError, match=r"cannot decode|no video track|is trusted with"):
        open_clip(Media(bytes=data), None, FrameSampling(), backend=backend)
    # The beginning of an MP4, and nothing of use after it.
    with pytest.raises(MediaError, match="cannot decode"):
        open_clip(Media(bytes=b"\0\0\0\x18ftypisom" + data), None, FrameSampling(), backend=backend)


def test_broken_data_between_good(write):
    path = write("a.mp4", noisy=True, keyframe_every=1)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 20_000] = bytes(20_000)
    path.write_bytes(data)
    with pytest.raises(MediaError, match=r"is damaged|cannot decode"):
        opened(path, sampling=FrameSampling(num_frames=40))


def test_a_broken_frame_among_the_kept_ones(write):
    """A transport stream has no index that would tell that its end is missing."""
    path = write("a.ts", codec="mpeg2video", noisy=True)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 6 // 10])
    with pytest.raises(MediaError, match=r"is damaged; got a broken frame \d+"):
        opened(path, sampling=FrameSampling(fps=25))


def test_an_empty_file_and_empty_bytes(tmp_path):
    (tmp_path / "a.mp4").touch()
    for media in (Media(path="a.mp4"), Media(path="a.mp4", bytes=b"")):
        with pytest.raises(MediaError, match="is empty; got 0 bytes"):
            open_clip(media, tmp_path, FrameSampling())


def test_a_page_saved_in_a_clips_place(tmp_path):
    (tmp_path / "a.mp4").write_text("<!DOCTYPE html><title>404</title>" + " " * 2000)
    with pytest.raises(MediaError, match=r"is text, no clip; got bytes that begin b'<!DOCTYPE ht'"):
        opened(tmp_path / "a.mp4")


def test_a_playlist_does_not_lead_out_of_the_root(write, tmp_path):
    """FFmpeg follows it, so that it would be read, as the first lines show."""
    av = pytest.importorskip("av")
    secret = write("secret.ts", codec="mpeg2video")
    root = tmp_path / "root"
    root.mkdir()
    text = f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:1.6,\n{secret}\n#EXT-X-ENDLIST\n"
    (root / "a.m3u8").write_text(text)
    with av.open(str(root / "a.m3u8")) as file:
        assert next(file.decode(video=0)).width == 64
    for data in (text.encode(), b"\xef\xbb\xbf" + text.encode(), text.encode() + bytes(9)):
        (root / "a.mp4").write_bytes(data)
        with pytest.raises(MediaError, match="is text, no clip"):
            opened(root / "a.mp4")


def test_a_clip_whose_frames_change_size(write):
    """Two streams end to end, the second one larger."""
    parts = [write(f"{side}.h264", format="h264", size=(side, 48), frames=5) for side in (64, 96)]
    path = parts[0].with_name("both.h264")
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    with pytest.raises(MediaError, match="changes its size; got 64x48, then 96x48"):
        opened(path, sampling=FrameSampling(num_frames=10))


# --- the file ---------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["../secret.mp4", "x/../../secret.mp4", "/etc/hostname", "link"])
def test_paths_that_climb_out_of_the_root(write, tmp_path, path):
    secret = write("secret.mp4")
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(secret)
    for read in (probe_clip, lambda media, root: open_clip(media, root, FrameSampling())):
        with pytest.raises(MediaError, match="climbs out of the media root"):
            read(Media(path=path), root)


def test_what_is_no_file(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")  # Opening it would wait for a writer for ever.
    for name in ("folder", "pipe"):
        with pytest.raises(MediaError, match="is not a file; wanted a clip"):
            opened(tmp_path / name)
    with pytest.raises(MediaError, match=r"cannot be read \(No such file or directory\)"):
        opened(tmp_path / "missing.mp4")
    with pytest.raises(MediaError, match="declares no media root"):
        open_clip(Media(path="a.mp4"), None, FrameSampling())
    with pytest.raises(MediaError, match="neither a path nor bytes"):
        open_clip(Media(), tmp_path, FrameSampling())


def test_a_changed_clip_is_refused_only_on_request(write):
    path = write("a.mp4")
    data = path.read_bytes()
    right, wrong = hashlib.sha256(data).hexdigest(), "0" * 64
    for place in ({"path": path.name}, {"bytes": data}):
        changed = Media(**place, sha256=wrong)
        assert open_clip(changed, path.parent, FrameSampling()).num_source_frames == 40
        with pytest.raises(MediaError, match="has changed since the row was written"):
            open_clip(changed, path.parent, FrameSampling(), verify=True)
        open_clip(Media(**place, sha256=right), path.parent, FrameSampling(), verify=True)


# --- limits -----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (ClipLimits(max_bytes=100), "file is too large.*wanted at most 100"),
        (ClipLimits(max_pixels=64 * 48 - 1), "too many pixels in a frame; got 64x48"),
        (ClipLimits(max_frames=39), "too many frames; wanted at most 39"),
        (ClipLimits(max_seconds=1.5), "is too long; got 2 seconds"),
        (ClipLimits(max_clip_bytes=4 * 64 * 48 * 3 - 1), "too much memory; got 36864 bytes for 4"),
    ],
)
def test_limits(write, backend, limits, message):
    path = write("a.mp4")
    with pytest.raises(MediaError, match=message):
        opened(path, backend=backend, limits=limits)
    just = ClipLimits(
        max_bytes=path.stat().st_size,
        max_pixels=64 * 48,
        max_frames=40,
        max_seconds=1.61,
        max_clip_bytes=4 * 64 * 48 * 3,
    )
    assert opened(path, backend=backend, limits=just).num_source_frames == 40
