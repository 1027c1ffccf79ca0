"""Reading clips against a bare decode loop: time, and memory above a fresh process.

    python scripts/bench/clips.py [--clips 20] [--seconds 8] [--codec libx264] [--rounds 5]

Clips are made with PyAV, 320x240 at 30 frames per second, a keyframe every 2 seconds. `bare` opens
each file with PyAV and decodes every frame, converting and keeping none. The others give the frames
of `--frames` (or `--fps`) as RGB arrays. Rounds are interleaved, and medians are printed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

WIDTH, HEIGHT, RATE = 320, 240, 30


def make_clip(path: Path, *, seconds: int, codec: str, seed: int) -> None:
    """A textured picture that moves, so that the decoder has motion and detail to decode."""
    import av
    import numpy as np

    rng = np.random.default_rng(seed)
    num_frames = seconds * RATE
    coarse = rng.integers(0, 255, ((HEIGHT + num_frames) // 8 + 1, WIDTH // 8 + 40, 3), np.uint8)
    ground = coarse.repeat(8, 0).repeat(8, 1)
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=RATE)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.gop_size = 2 * RATE
        for index in range(num_frames):
            across = int(40 * (1 + np.sin(index / 20)))
            picture = ground[index : index + HEIGHT, across : across + WIDTH]
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            file.mux(stream.encode(frame))
        file.mux(stream.encode())


def decode_bare(path: Path) -> None:
    import av

    with av.open(str(path)) as container:
        for _ in container.decode(video=0):
            pass


@contextmanager
def reading(mode: str, arguments: argparse.Namespace) -> Iterator[Callable[[Path], object]]:
    from mmalign.clips import ClipReader, FrameSampling, open_clip
    from mmalign.records import Media

    given = {"fps": arguments.fps} if arguments.fps else {"num_frames": arguments.frames}
    sampling = FrameSampling(**given)
    backend = arguments.backend
    if mode == "bare":
        yield decode_bare
    elif mode == "open_clip":
        yield lambda path: open_clip(Media(path=path.name), path.parent, sampling, backend=backend)
    else:
        with ClipReader(sampling=sampling, backend=backend) as reader:
            yield lambda path: reader.open(Media(path=path.name), path.parent)


def memory(name: str, pid: int | str = "self") -> float:
    """A line of /proc/PID/status in MiB: VmRSS now, VmHWM at the highest."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) / 1024
    raise SystemExit(f"/proc/{pid}/status has no {name}: memory is measured on Linux only")


def measure_memory(mode: str, paths: list[Path], arguments: argparse.Namespace) -> None:
    """Print how far memory rises over a process before its first clip, and over the first one."""
    with reading(mode, arguments) as read:
        before = memory("VmRSS")
        read(paths[0])
        first = memory("VmHWM")
        for path in paths[1:]:
            read(path)
        found = {"above imports": memory("VmHWM") - before, "after first": memory("VmHWM") - first}
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        if children:
            found["child, its imports included"] = memory("VmHWM", children[0])
        print(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--clips", type=int, default=20)
    parser.add_argument("--seconds", type=int, default=8)
    parser.add_argument("--codec", default="libx264", help="libx264 or mpeg4")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--fps", type=float)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", nargs=2, metavar=("MODE", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        mode, folder = arguments.memory
        measure_memory(mode, sorted(Path(folder).glob("*.mp4")), arguments)
        return
    modes = ("bare", "open_clip", "ClipReader")
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{index:03d}.mp4" for index in range(arguments.clips)]
        for seed, path in enumerate(paths):
            make_clip(path, seconds=arguments.seconds, codec=arguments.codec, seed=seed)
        times = measure_times(modes, paths, arguments)
        kept = f"fps {arguments.fps}" if arguments.fps else f"{arguments.frames} frames"
        print(f"{len(paths)} clips of {arguments.seconds} s, {arguments.codec}, {kept}")
        bare = statistics.median(times["bare"])
        for mode in modes:
            took = statistics.median(times[mode])
            ratios = [one / other for one, other in zip(times[mode], times["bare"], strict=True)]
            spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
            print(
                f"{mode:10}  {1000 * took / len(paths):7.2f} ms a clip  {took / bare:5.2f} of bare"
                f"  ({spread} by round)"
            )
        one_clip = arguments.seconds * RATE * WIDTH * HEIGHT * 3 / 2**20
        print(f"memory in MiB (all frames of one clip as RGB would be {one_clip:.0f})")
        for mode in modes:
            command = [sys.executable, __file__, *sys.argv[1:], "--memory", mode, folder]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found = json.loads(done.stdout)
            print(
                f"{mode:10}  " + ", ".join(f"{name} {value:.0f}" for name, value in found.items())
            )


def measure_times(
    modes: tuple[str, ...], paths: list[Path], arguments: argparse.Namespace
) -> dict[str, list[float]]:
    """Seconds for all the clips, by mode, one number a round; the order changes with each clip."""
    times: dict[str, list[float]] = {mode: [] for mode in modes}
    with (
        reading("bare", arguments) as bare,
        reading("open_clip", arguments) as opened,
        reading("ClipReader", arguments) as guarded,
    ):
        readers = dict(zip(modes, (bare, opened, guarded), strict=True))
        for read in readers.values():
            read(paths[0])  # imports, and the child
        for _ in range(arguments.rounds):
            total = dict.fromkeys(modes, 0.0)
            for index, path in enumerate(paths):
                for turn in range(len(modes)):
                    mode = modes[(index + turn) % len(modes)]
                    start = time.perf_counter()
                    readers[mode](path)
                    total[mode] += time.perf_counter() - start
            for mode in modes:
                times[mode].append(total[mode])
    return times


if __name__ == "__main__":
    main()
