"""The benchmarks' own arithmetic: tables, floors, and a baseline that does the same work."""

from __future__ import annotations

import importlib
import random
import sys
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest

NAMES = ("gpu", "gpu_cells", "floor", "steps", "builders", "common")


@pytest.fixture
def bench(repo_root) -> Iterator[Callable[[str], ModuleType]]:
    """Imports a script of scripts/bench, which reads its neighbours as they run: by bare names."""
    sys.path.insert(0, str(repo_root / "scripts/bench"))
    try:
        yield importlib.import_module
    finally:
        sys.path.pop(0)
        for name in NAMES:
            sys.modules.pop(name, None)


KNOWN = {
    "floors": {"576": {"step": 4e12, "cached": 3e12}},
    "tokens": {"576": 1000.0},
    "gemm": 8e12,
}


def run(seconds: float, peak: float = 100.0) -> dict:
    return {"seconds": [seconds, seconds], "losses": [0.5, 0.25], "peak_mb": peak}


def test_gpu_table_reads_ratios_and_shares_of_the_right_runs(bench):
    gpu = bench("gpu")
    found = {
        "trl": [{"576 step": run(2.0, 300)}, {"576 step": run(4.0, 300)}],
        "flash": [
            {"576 step": run(1.0), "576 cached": run(0.5)},
            {"576 step": run(1.0), "576 cached": run(0.5)},
        ],
    }
    header, rows, notes = gpu.table("576", found, KNOWN, 16e12)
    assert header[-2:] == ["throughput / trl", "trl / peak"]
    assert notes == []
    assert [row[:3] + row[4:] for row in rows] == [
        ["trl", "step", "3.000", "333", "300", "17%", "8%", "1.00x", "1.00"],
        ["flash", "step", "1.000", "1000", "100", "50%", "25%", "3.00x", "3.00"],
        ["flash", "cached", "0.500", "2000", "100", "75%", "38%", "6.00x", "3.00"],
    ]


def test_gpu_table_names_what_was_refused_and_goes_on(bench):
    gpu = bench("gpu")
    found = {
        "trl": [{"576 step": {"refused": "a part of TRL is missing here"}}],
        "padded": [{"576 step": run(2.0), "576 cached": {"refused": "out of memory"}}],
        "flash": [{"576 step": run(1.0), "576 cached": run(1.0)}],
    }
    header, rows, notes = gpu.table("576", found, KNOWN, None)
    assert header[-2] == "throughput / padded"
    assert [row[:2] for row in rows] == [["padded", "step"], ["flash", "step"], ["flash", "cached"]]
    assert [row[7] for row in rows] == ["unknown"] * 3
    assert notes == [
        "trl, reference step: a part of TRL is missing here",
        "padded, reference cached: out of memory",
    ]
    assert gpu.table("576", {"trl": found["trl"]}, KNOWN, None)[:2] == ([], [])


def test_stated_peaks_by_the_cards_name(bench):
    gpu = bench("gpu")
    assert gpu.stated_peak("NVIDIA H100 80GB HBM3, torch") == 989e12
    assert gpu.stated_peak("NVIDIA H100 PCIe, torch") == 756e12
    assert gpu.stated_peak("2 threads of a processor") is None


@pytest.mark.parametrize("rank", [None, 2])
def test_the_floor_is_what_a_packed_step_counts(bench, tmp_path, rank):
    """torch's own count, of a full step and of one under an adapter."""
    from mmalign.models.load import ModelConfig, load_policy
    from mmalign.models.lora import Lora
    from mmalign.models.tiny import TinyModel, Tower

    steps, floor = bench("steps"), bench("floor")
    text = Tower(hidden=64, layers=8, heads=4, mlp=128)
    words = tuple(f"w{i}" for i in range(2000))
    path = TinyModel(output=str(tmp_path / "model"), words=words, text=text).build()
    lora = None if rank is None else Lora(rank=rank, alpha=2)
    policy = load_policy(ModelConfig(path=str(path), lora=lora))
    batch = steps.make_batch(policy, 30, (24, 40), 2, 2, True, side=32)
    done = steps.counted(lambda: steps.steps_of(policy)["packed"](batch))
    assert done == pytest.approx(floor.floor_of(policy, batch), rel=0.06)
    assert floor.floor_of(policy, batch, reference=True) > 1.2 * floor.floor_of(policy, batch)


def test_the_builders_baseline_writes_the_same_texts(bench, tmp_path):
    from mmalign.generate.base import MaskImageTokens, Request, Sampling
    from mmalign.generate.local import LocalGenerator
    from mmalign.media import embed
    from mmalign.models.tiny import TinyModel
    from mmalign.records import user

    builders, common = bench("builders"), bench("common")
    words = tuple(f"w{i}" for i in range(300))
    path = TinyModel(output=str(tmp_path / "model"), words=words).build()
    ours = LocalGenerator.from_checkpoint(str(path), device="cpu")
    rng = random.Random(0)
    requests = [
        Request(
            id=str(number),
            prompt=user(common.words(rng, 3 + number, 300), images=1),
            images=(embed(picture),),
            prefill=common.words(rng, number, 300),
            corruption=MaskImageTokens(threshold=0.5, key=str(number)),
        )
        for number, picture in enumerate(common.pictures(4, 32))
    ]
    naive = builders.OneByOne(ours, "cpu").generate(requests, Sampling(max_new_tokens=8))
    made = ours.generate(requests, Sampling(max_new_tokens=8))
    assert [one.text.split() for one in naive] == [one.text.split() for one in made]
    assert any(len(one.text.split()) == 8 for one in made)


@pytest.mark.slow
def test_the_gpu_benchmark_runs_at_toy_size_on_the_cpu(bench, capsys):
    bench("gpu").main(["--tiny", "--works", "576", "--cells", "padded", "flash", "--batch", "2"])
    told = capsys.readouterr().out
    cells = [line.split("|")[1:3] for line in told.splitlines() if line.startswith("| ")][1:]
    assert [" ".join(cell).split() for cell in cells] == [
        [cell, reference] for cell in ("padded", "flash") for reference in ("step", "cached")
    ]
    lines = told.split("losses of the first round:\n")[1].splitlines()[:4]
    losses = [[float(loss) for loss in line.split()[2:]] for line in lines]
    assert all(own == pytest.approx(losses[0], abs=1e-4) for own in losses)
    assert "refused: xformers: its kernels need CUDA" in told
