"""Responses sampled by two processes: the same ones, and the same training, as by one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mmalign.config import dump_yaml
from trainers.config import Recipe
from trainers.loop import train

WORKER = Path(__file__).parents[1] / "sharded_worker.py"
LAUNCH = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
LAUNCH += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
LAUNCH += ["--main_process_port", "0", str(WORKER)]

# Of responses that end by themselves, or not: what a real reward can tell apart at random.
REWARDS = {"functions": [{"name": "length", "max_tokens": 6, "buffer_tokens": 6}]}
DECODING = {"max_new_tokens": 6}


def lines(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def recipes(recipe: Callable[..., Recipe], prompts: Path, tmp_path: Path):
    """A run on rollouts, two steps from each batch of them, and one on pairs of rollouts."""

    def make(folder: str) -> dict[str, Recipe]:
        optim = {"batch_size": 4, "steps": 4, "micro_batch_size": 1, "epsilon": 1e-3}
        run: dict[str, Any] = {"save_every_steps": 1, "keep_last": 9}
        annotator = {"name": "rule", "rewards": REWARDS}
        return {
            "grpo": recipe(
                f"{folder}/grpo",
                data={"path": str(prompts), "online": None},
                loss={"name": "grpo"},
                rollouts={"group_size": 4, "steps": 2, "decoding": DECODING, "rewards": REWARDS},
                optim=optim,
                run=run,
            ),
            "pairs": recipe(
                f"{folder}/pairs",
                source={"annotator": annotator, "decoding": DECODING},
                optim=optim,
                run=run,
            ),
        }

    return make


def test_two_processes_sample_and_learn_what_one_does(recipes, tmp_path: Path):
    """The run on rollouts is left where half of a batch of them is used, and goes on from there."""
    for made in recipes("one").values():
        for _ in train(made):
            pass
    files = []
    for name, made in recipes("two").items():
        files.append(tmp_path / f"{name}.yaml")
        files[-1].write_text(dump_yaml(made))
    done = subprocess.run(
        [sys.executable, *LAUNCH, f"{files[0]}@3", str(files[1])],
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr

    for name, metrics in {
        "grpo": ("ratio", "old_kl", "uninformative"),
        "pairs": ("margin", "paired", "tied", "chosen_score", "rejected_score"),
    }.items():
        one, two = (tmp_path / folder / name for folder in ("one", "two"))
        assert [json.loads((run / "run.json").read_text())["processes"] for run in (one, two)] == [
            1,
            2,
        ]
        shared = ("loss", "grad_norm", "reward", "response_tokens", "finished")
        for alone, together in zip(lines(one), lines(two), strict=True):
            for metric in (f"train/{key}" for key in (*shared, *metrics)):
                assert abs(alone[metric] - together[metric]) < 1e-5, metric
        assert all(line["train/grad_norm"] > 1e-3 for line in lines(one))
        weights = [load_file(run / "model" / "model.safetensors") for run in (one, two)]
        assert all(torch.allclose(weights[0][n], weights[1][n], atol=1e-5) for n in weights[0])
        # The first process's share of what one process sampled, word by word.
        for file in sorted((two / "rollouts").iterdir()):
            whole = (one / "rollouts" / file.name).read_text().splitlines()
            said = file.read_text().splitlines()
            assert 0 < len(said) < len(whole)
            assert set(said) <= set(whole)
