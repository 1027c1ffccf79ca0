"""The guarded reader: decoders that hang or crash, and processes that come and go."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from mmalign.clips import ClipLimits, ClipReader, FrameSampling, open_clip, probe_clip
from mmalign.errors import MediaError, MissingExtra
from mmalign.records import Media

pytest.importorskip("av")
SAMPLING = FrameSampling(num_frames=5)

# Stands in the place of decord, and passes to PyAV whatever is not called after a disaster.
FAKE_DECORD = """
import os, signal, time
from types import SimpleNamespace
import numpy as np

class logging:
    QUIET = 0
    set_level = staticmethod(lambda level: None)

class VideoReader:
    def __init__(self, path, **_):
        if path.endswith("/hang.mp4"):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            while True:
                time.sleep(1000)
        if path.endswith("/crash.mp4"):
            os.kill(os.getpid(), signal.SIGSEGV)
        import av
        with av.open(path) as file:
            self.frames = [f.to_ndarray(format="rgb24") for f in file.decode(video=0)]
        self.at = 0
    def __len__(self):
        return len(self.frames)
    def get_frame_timestamp(self, indices):
        return np.array([[i / 25, (i + 1) / 25] for i in indices])
    def get_key_indices(self):
        return [0]
    def get_avg_fps(self):
        return 25.0
    def skip_frames(self, count):
        self.at += count
    def next(self):
        self.at += 1
        return SimpleNamespace(asnumpy=lambda: self.frames[self.at - 1])
"""


def child_of(reader: ClipReader) -> int:
    assert reader._guarded.child is not None
    return reader._guarded.child._process.pid


def gone(pid: int, within_seconds: float = 20) -> bool:
    """Whether a process ends in time; a zombie has ended."""
    end = time.monotonic() + within_seconds
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False


def assert_same(clip, other) -> None:
    np.testing.assert_array_equal(clip.frames, other.frames)
    for field in ("indices", "timestamps", "source_fps", "num_source_frames", "key"):
        assert getattr(clip, field) == getattr(other, field)


@pytest.fixture
def fake_decord(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "fake"
    folder.mkdir()
    (folder / "decord.py").write_text(FAKE_DECORD)
    monkeypatch.syspath_prepend(str(folder))


# --- what it gives ----------------------------------------------------------------------------


def test_it_gives_what_open_clip_gives_and_outlives_bad_files(write):
    good, other = write("a.mp4"), write("b.avi", codec="mpeg4", size=(80, 50))
    good.with_name("bad.mp4").write_bytes(good.read_bytes()[:900])
    root = good.parent
    with ClipReader(sampling=SAMPLING) as reader:
        first = reader.open(Media(path="a.mp4"), root)
        pid = child_of(reader)
        for name, message in (("bad.mp4", "cannot decode"), ("../x", "climbs out")):
            with pytest.raises(MediaError, match=message):
                reader.open(Media(path=name), root)
        second = reader.open(Media(path="b.avi"), root)
        embedded = reader.open(Media(bytes=good.read_bytes()), None)
        assert reader.probe(Media(path="b.avi"), root) == probe_clip(Media(path="b.avi"), root)
        assert child_of(reader) == pid
    assert_same(first, open_clip(Media(path="a.mp4"), root, SAMPLING))
    assert_same(second, open_clip(Media(path=other.name), root, SAMPLING))
    assert_same(embedded, open_clip(Media(bytes=good.read_bytes()), None, SAMPLING))


def test_a_clip_is_its_own_memory_and_a_large_one_is_given_back(write):
    """80 frames of 640x480 are more than is kept between clips."""
    write("a.mp4")
    root = write("large.mp4", size=(640, 480), frames=2).parent
    sampling = FrameSampling(num_frames=80)
    with ClipReader(sampling=sampling) as reader:
        small = reader.open(Media(path="a.mp4"), root)
        kept = small.frames.copy()
        for _ in range(2):
            large = reader.open(Media(path="large.mp4"), root)
            assert_same(large, open_clip(Media(path="large.mp4"), root, sampling))
            assert os.fstat(reader._guarded.child.channel._shared_file).st_size == 0  # type: ignore[union-attr]
        reader.open(Media(path="a.mp4"), root)
        np.testing.assert_array_equal(small.frames, kept)
        small.frames[:] = 0  # writable, and nobody else's
        assert_same(reader.open(Media(path="large.mp4"), root), large)


def test_limits_and_hashes_hold_in_the_child(write):
    path = write("a.mp4")
    with (
        ClipReader(sampling=SAMPLING, limits=ClipLimits(max_frames=3), verify=True) as reader,
    ):
        with pytest.raises(MediaError, match="too many frames"):
            reader.open(Media(path=path.name), path.parent)
        with pytest.raises(MediaError, match="has changed"):
            reader.open(Media(path=path.name, sha256="0" * 64), path.parent)


# --- what goes wrong --------------------------------------------------------------------------


def test_a_decoder_that_hangs_is_stopped_and_the_next_clip_read(write, fake_decord):
    root = write("hang.mp4").parent
    good = write("good.mp4")
    limit = 3.0
    with ClipReader(sampling=SAMPLING, backend="decord", timeout_seconds=limit) as reader:
        reader.open(Media(path="good.mp4"), root)
        pid = child_of(reader)
        start = time.monotonic()
        with pytest.raises(MediaError, match=r"hang.mp4: decoder hung: not done within 3 seconds"):
            reader.open(Media(path="hang.mp4"), root)
        assert limit <= time.monotonic() - start < limit + 2
        assert gone(pid)
        clip = reader.open(Media(path="good.mp4"), root)
        assert child_of(reader) != pid
    expected = open_clip(Media(path=good.name), root, SAMPLING, backend="pyav")
    np.testing.assert_array_equal(clip.frames, expected.frames)


def test_a_decoder_that_crashes_costs_its_clip_alone(write, fake_decord):
    root = write("crash.mp4").parent
    write("good.mp4")
    with ClipReader(sampling=SAMPLING, backend="decord") as reader:
        with pytest.raises(MediaError, match=r"crash.mp4: its decoder crashed .killed by SIGSEGV"):
            reader.open(Media(path="crash.mp4"), root)
        assert reader.open(Media(path="good.mp4"), root).num_source_frames == 40


def test_a_child_that_was_ended_between_clips_is_not_the_next_clips_fault(write):
    path = write("a.mp4")
    with ClipReader(sampling=SAMPLING) as reader:
        reader.open(Media(path=path.name), path.parent)
        os.kill(child_of(reader), signal.SIGKILL)
        assert gone(child_of(reader))
        assert reader.open(Media(path=path.name), path.parent).num_source_frames == 40


def test_a_pipe_is_refused_without_waiting_for_its_writer(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    with (
        ClipReader(sampling=SAMPLING, timeout_seconds=60) as reader,
        pytest.raises(MediaError, match="is not a file"),
    ):
        reader.open(Media(path="pipe.mp4"), tmp_path)


def test_a_missing_backend_is_told_before_any_clip(tmp_path, monkeypatch):
    (tmp_path / "decord.py").write_text("raise OSError('libdecord.so: wrong machine')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with (
        ClipReader(sampling=SAMPLING, backend="decord") as reader,
        pytest.raises(
            MissingExtra, match=r"does not load \(libdecord.so: wrong machine\).*pip inst"
        ),
    ):
        reader.open(Media(path="a.mp4"), tmp_path)


def test_a_child_that_cannot_start_is_no_fault_of_the_clip(write, monkeypatch):
    path = write("a.mp4")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    from mmalign.errors import MmalignError

    with ClipReader(sampling=SAMPLING) as reader:
        with pytest.raises(MmalignError, match=r"did not start \(exit code 1\)") as caught:
            reader.open(Media(path=path.name), path.parent)
        assert not isinstance(caught.value, MediaError)


# --- processes --------------------------------------------------------------------------------


def test_closing_ends_the_child_and_a_closed_reader_starts_another(write):
    path = write("a.mp4")
    reader = ClipReader(sampling=SAMPLING)
    reader.close()
    reader.open(Media(path=path.name), path.parent)
    pid = child_of(reader)
    reader.close()
    assert gone(pid)
    reader.open(Media(path=path.name), path.parent)
    pid = child_of(reader)
    del reader
    assert gone(pid)


def test_the_child_imports_no_torch(write):
    path = write("a.mp4")
    with ClipReader(sampling=SAMPLING, backend="pyav") as reader:
        reader.open(Media(path=path.name), path.parent)
        mapped = Path(f"/proc/{child_of(reader)}/maps").read_text()
    assert "libavcodec" in mapped
    assert "libtorch" not in mapped


def test_threads_may_share_a_reader(write):
    paths = [write(f"{index}.mp4", frames=10 + index) for index in range(4)]
    root = paths[0].parent
    found: dict[int, list[int]] = {}
    with ClipReader(sampling=SAMPLING) as reader:

        def read(index: int) -> None:
            media = Media(path=paths[index].name)
            found[index] = [reader.open(media, root).num_source_frames for _ in range(5)]

        threads = [threading.Thread(target=read, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == {index: [10 + index] * 5 for index in range(4)}


# No `if __name__ == "__main__"`, and a fork: both undo children that multiprocessing makes.
SCRIPT = """
import os, sys, time
from pathlib import Path
from mmalign.clips import ClipReader, FrameSampling
from mmalign.records import Media

reader = ClipReader(sampling=FrameSampling(num_frames=3), timeout_seconds=60)
read = lambda: reader.open(Media(path=sys.argv[1]), Path(sys.argv[2])).num_source_frames
assert read() == 40
print(reader._guarded.child._process.pid, flush=True)
if os.fork() == 0:
    assert read() == 40
    print(reader._guarded.child._process.pid, flush=True)
    reader.close()
    os._exit(0)
assert os.wait()[1] == 0
assert read() == 40
print(reader._guarded.child._process.pid, flush=True)
time.sleep(600)
"""


def test_a_bare_script_its_fork_and_its_violent_end(write, tmp_path):
    path = write("a.mp4")
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py"), path.name, str(path.parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        try:
            pids = [int(parent.stdout.readline()) for _ in range(3)]
        finally:
            parent.kill()
    assert pids[0] == pids[2] != pids[1]
    assert gone(pids[0])
    assert gone(pids[1])
