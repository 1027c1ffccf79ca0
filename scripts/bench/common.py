"""What the benchmarks share: a random LLaVA, rows of words, memory, cells in processes, tables."""

from __future__ import annotations

import gc
import json
import os
import platform
import random
import statistics
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

VOCAB = 32_000
# Large blocks go back to the system when freed, so that resident memory is what is in use.
HONEST_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}


def words(rng: random.Random, count: int, vocabulary: int = VOCAB) -> str:
    return " ".join(f"w{rng.randrange(vocabulary - 100)}" for _ in range(count))


def pictures(count: int, side: int, seed: int = 0) -> list[Any]:
    import numpy as np
    from PIL import Image

    pixels = np.random.RandomState(seed)
    return [
        Image.fromarray(pixels.randint(0, 255, (side, side, 3), dtype=np.uint8))
        for _ in range(count)
    ]


def make_model(folder: Path, image_size: int = 224) -> Path:
    """CLIP 6 layers x 256, Llama 8 layers x 384, vocabulary 32,000; (image_size / 14)^2 tokens."""
    from mmalign.models.tiny import TinyModel, Tower

    return TinyModel(
        output=str(folder),
        words=tuple(f"w{i}" for i in range(VOCAB - 8)),
        image_size=image_size,
        patch_size=14,
        vision=Tower(hidden=256, layers=6, heads=4, mlp=1024),
        text=Tower(hidden=384, layers=8, heads=6, mlp=1024),
    ).build()


class Memory:
    """Growth of the peak resident memory since `reset`, in MB (CUDA: peak allocated)."""

    def __init__(self, device: str) -> None:
        self.device = device

    def reset(self) -> None:
        gc.collect()
        if self.device == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")
            self.start = self._read("VmRSS")

    def forget_peak(self) -> float:
        """Let the peak begin anew with what is held now; growth up to now, counted from `reset`."""
        start = self.start
        self.reset()
        held, self.start = self.start, start
        return (held - start) / (2**20 if self.device == "cuda" else 1024)

    def growth(self) -> float:
        if self.device == "cuda":
            import torch

            return (torch.cuda.max_memory_allocated() - self.start) / 2**20
        return (self._read("VmHWM") - self.start) / 1024

    @staticmethod
    def _read(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(name)).split()[1])


def gemm_rate(threads: int, size: int = 2048, rounds: int = 8) -> float:
    """Operations a second of a square float32 matrix product here, the best of some rounds."""
    import time

    import torch

    torch.set_num_threads(threads)
    a, b = torch.randn(size, size), torch.randn(size, size)
    best = float("inf")
    for _ in range(rounds):
        started = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def attempt_cell(script: str, arguments: Sequence[str]) -> dict | str:
    """One cell in a process of its own: `script --cell …` prints CELL and its result as JSON.

    The result, or the end of what a process that gave none wrote to its standard error.
    """
    done = subprocess.run(
        [sys.executable, script, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | HONEST_MEMORY,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("CELL ")]
    return json.loads(lines[-1][5:]) if lines else done.stderr[-3000:]


def run_cell(script: str, arguments: Sequence[str]) -> dict:
    """The result of a cell that must not fail."""
    found = attempt_cell(script, arguments)
    if isinstance(found, str):
        sys.exit(f"{' '.join(arguments)} failed:\n{found}")
    return found


def print_cell(result: dict) -> None:
    print("CELL " + json.dumps(result), flush=True)


def interleaved(script: str, cells: dict[str, list[str]], rounds: int) -> dict[str, list[dict]]:
    """Every cell once in each round (a, b, c, a, b, c, …): its results by name."""
    found: dict[str, list[dict]] = {name: [] for name in cells}
    for number in range(rounds):
        for name, arguments in cells.items():
            print(f"round {number + 1} of {rounds}: {name}", file=sys.stderr, flush=True)
            found[name].append(run_cell(script, arguments))
    return found


def median_seconds(results: Sequence[dict]) -> float:
    return statistics.median(second for one in results for second in one["seconds"])


def median_of(results: Sequence[dict], name: str) -> float:
    return statistics.median(one[name] for one in results)


def spread(results: Sequence[dict]) -> str:
    seconds = sorted(second for one in results for second in one["seconds"])
    return f"{seconds[0]:.2f} to {seconds[-1]:.2f}"


def need_cuda(device: str) -> None:
    """End here where `device` is cuda and there is none."""
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            sys.exit("there is no CUDA here; --tiny runs everything at toy size on the CPU")


def machine(device: str, threads: int, precision: str = "float32") -> str:
    """One line for the docs: what this ran on."""
    names = ("torch", "transformers", "trl")
    versions = ", ".join(_version(name) for name in names)
    if device == "cuda":
        import torch

        return f"{torch.cuda.get_device_name()}, {versions}"
    cpu = platform.processor() or "cpu"
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        cpu = next((x.split(": ")[1] for x in lines if x.startswith("model name")), cpu)
    return f"{threads} threads of {cpu} ({os.cpu_count()} cores), {versions}, {precision}"


def _version(name: str) -> str:
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return f"no {name}"


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print("| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)
