"""The benchmarks' own arithmetic: tables, floors, and a baseline that does the same work."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import random
import sys
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest

NAMES = (
    "gpu", "gpu_cells", "gpu_images", "images", "sdxl", "floor", "steps", "builders", "common",
    "rollouts", "evaluation",
)  # fmt: skip


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


def test_the_evaluations_baseline_writes_the_same_tokens(bench, tmp_path):
    from mmalign.models.tiny import TinyModel

    evaluation = bench("evaluation")
    vocabulary = tuple(f"w{i}" for i in range(300))
    model = TinyModel(output=str(tmp_path / "model"), words=vocabulary).build()
    pope = evaluation.write_pope(tmp_path, 12, 3, 8, 300, 32)
    assert [request.images[0].path for request in pope.requests()[3:5]] == ["0.png", "1.png"]
    args = argparse.Namespace(batch_size=8, device="cpu", rounds=1)
    found, same = evaluation.measure(pope, model, tmp_path, args)
    assert same == [True] * 12
    assert found.keys() == {"naive", "ours"}
    results = json.loads((tmp_path / "run-1/results.json").read_text())
    assert results["suites"][0]["num_items"] == 12


def test_the_small_sdxl_is_sdxl_with_narrower_layers(bench):
    """Parameters of SDXL's own checkpoint, and operations in nearly its proportions."""
    sdxl = bench("sdxl")
    own, small = sdxl.costs(sdxl.REAL, 1024), sdxl.costs(sdxl.SMALL, 256)
    assert {name: size for name, (size, _) in own.items()} == {
        "unet": 2_567_463_684,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
    }
    assert own.keys() == small.keys()
    for name, (size, _) in small.items():
        assert size == pytest.approx(own[name][0] / 16, rel=0.02), name
    beside = [
        (its["vae"][1] + (its["text_encoder"][1] + its["text_encoder_2"][1]) / 2) / its["unet"][1]
        for its in (own, small)
    ]
    assert beside[1] == pytest.approx(beside[0], rel=0.05)


def test_a_step_with_encoders_in_it_is_the_step_from_stored_latents(bench, tmp_path):
    images = bench("images")
    setting = images.Setting(folder=tmp_path, model="tiny", side=32, batch=2, steps=2)
    once = images.prepare(setting, 3)
    assert once["rows"] == 3
    assert once["store_mb"] > 0
    found = {run: [images.measure(setting, run)] for run in ("live", "encoded", "diffusion_dpo")}
    live, encoded, dpo = (its[0] for its in found.values())
    assert live["losses"] == pytest.approx(encoded["losses"], rel=1e-4)
    assert len(set(encoded["losses"])) == 2
    assert dpo["losses"][0] == pytest.approx(math.log(2), rel=1e-6)
    assert all(len(its[0]["seconds"]) == 1 for its in found.values())
    made = {"live": [run(3.0, 200)], "encoded": [run(2.0, 150)]}
    for its in made.values():
        its[0]["static_mb"] = 10.0
    header, rows = images.table(("live", "encoded"), made)
    assert header[3:] == ["throughput / live", "static MB", "peak MB", "peak / live"]
    assert rows[1] == ["encoded", "2.00", "2.00 to 2.00", "1.50x", "10", "150", "0.75"]


def test_gpu_images_grow_until_memory_ends_and_compare_equal_batches(bench):
    gpu_images = bench("gpu_images")
    found, end = gpu_images.until_memory_ends(
        lambda size: run(float(size)) if size < 4 else "…\nTrainingError: memory ran out", 64
    )
    assert list(found) == [1, 2]
    assert end == "batch 4: … TrainingError: memory ran out"
    assert list(gpu_images.batches(6)) == [1, 2, 4]
    rows = gpu_images.rows_of(
        "lora",
        "sdpa",
        {
            "diffusion_dpo": {1: run(2.0, 200)},
            "mapo_released": {1: run(1.5, 150), 2: run(2.5, 180)},
            "live": {},
        },
    )
    assert [row[2:] for row in rows] == [
        ["1", "diffusion_dpo", "2.000", "0.50", "200", "-", "-"],
        ["1", "mapo_released", "1.500", "0.67", "150", "25.0%", "25.0%"],
        ["2", "mapo_released", "2.500", "0.80", "180", "-", "-"],
    ]


@pytest.mark.slow
def test_gpu_images_run_at_toy_size_on_the_cpu(bench, capsys):
    mine = ["--tiny", "--attention", "sdpa", "--most", "2", "--steps", "2"]
    bench("gpu_images").main(mine)
    lines = [line.split("|")[1:5] for line in capsys.readouterr().out.splitlines()]
    told = [" ".join("".join(line).split()) for line in lines if line]
    assert told[2:] == [
        f"{train} sdpa {batch} {run}"
        for train in ("lora", "full")
        for batch in (1, 2)
        for run in ("diffusion_dpo", "mapo_released", "live")
    ]


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


def test_a_step_of_grpo_is_that_of_trls_trainer(bench, tmp_path, monkeypatch):
    from mmalign.models.tiny import TinyModel, Tower

    rollouts = bench("rollouts")
    monkeypatch.setattr(rollouts, "VOCAB", 400)
    monkeypatch.setattr(rollouts, "SIDE", 28)
    folder = TinyModel(
        output=str(tmp_path / "model"),
        words=tuple(f"w{i}" for i in range(400)),
        image_size=28,
        patch_size=14,
        vision=Tower(hidden=16, layers=1, heads=2, mlp=32),
        text=Tower(hidden=16, layers=2, heads=2, mlp=32),
    ).build()
    work = rollouts.Work(given=True, steps=3, batch=2, group=4, shortest=3, longest=9)
    theirs = rollouts.run_trl(work, folder)
    for mode in ("padded", "shared"):
        ours = rollouts.run_ours(work, folder, mode)
        # TRL adds 1e-4 to the standard deviation, we 1e-6.
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-3), mode
        assert ours["norms"] == pytest.approx(theirs["norms"], rel=1e-3), mode
    assert all(abs(loss) > 1e-3 for loss in theirs["losses"])
