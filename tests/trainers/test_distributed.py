from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmalign.config import dump_yaml
from trainers.loop import train
from trainers.reference_store import ReferenceCache

# With ACCELERATE_USE_CPU the launcher of many GPUs starts CPU processes, which speak gloo;
# `accelerate launch --cpu` would start one, or several through MPI.
LAUNCH = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
LAUNCH += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
LAUNCH += ["--main_process_port", "0", "-m", "trainers"]


def reference_scores(run: Path) -> dict[str, torch.Tensor]:
    """Every stored row of a run that kept its reference scores in its own folder."""
    (folder,) = (run / "reference").iterdir()
    stored = ReferenceCache(folder, key={}, about={}).read()
    return {name: row.logps for name, row in stored.items()}


def stored_features(run: Path) -> dict[str, torch.Tensor]:
    """All tensors of a run that kept its pictures' features in its own folder, and how many."""
    found = [load_file(file) for file in (run / "features").glob("*/pictures-*.safetensors")]
    together = {name: tensor for file in found for name, tensor in file.items()}
    assert len(together) == sum(map(len, found))
    return together


@pytest.mark.parametrize("rows", [9, 1])
def test_two_processes_equal_one(recipe, tmp_path: Path, rows: int):
    """Where a pass over all rows gives one process more of them, or another none.

    Both train from stored features, each made by one process. The command is the one of
    docs/train.md; the shipped configs are run by test_sharded.py.
    """
    sections = {
        "data": {"limit": rows},
        "reference": "cached",
        "features": {"cap_gb": 1, "folder": str(tmp_path / "one" / "features")},
        "optim": {"steps": 4, "micro_batch_size": 1, "epsilon": 1e-3},
        "run": {"output": str(tmp_path / "one"), "save_every_steps": 2, "log_every_steps": 1},
    }
    one = recipe(**sections)
    for _ in train(one):
        pass
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_yaml(one))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    folder = tmp_path / "two"
    overrides = [f"run.output={folder}", f"reference_cache={folder / 'reference'}"]
    overrides.append(f"features.folder={folder / 'features'}")
    done = subprocess.run(
        [sys.executable, *LAUNCH, str(file), *overrides],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    # Said once, by one process: rows, what trains, the shape of a step.
    assert done.stderr.count(f"{rows} rows used, 0 dropped") == 1
    assert done.stderr.count("2 processes x 2 micro-batches of 1") == 1

    found = [tmp_path / name for name in ("one", "two")]
    stored = [reference_scores(folder) for folder in found]
    assert list(stored[0]) == list(stored[1])
    assert len(stored[0]) == rows
    assert all(torch.allclose(stored[0][n], stored[1][n], atol=1e-5) for n in stored[0])
    features = [stored_features(folder) for folder in found]
    assert len(features[0]) == 2 * rows
    assert features[0].keys() == features[1].keys()
    assert all(torch.equal(features[0][n], features[1][n]) for n in features[0])
    metrics = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in found
    ]
    for alone, together in zip(*metrics, strict=True):
        for name in ("step", "train/loss", "train/grad_norm", "train/margin", "train/nll"):
            assert abs(alone[name] - together[name]) < 1e-5
    weights = [load_file(folder / "model" / "adapter_model.safetensors") for folder in found]
    assert all(torch.allclose(weights[0][n], weights[1][n], atol=1e-6) for n in weights[0])
