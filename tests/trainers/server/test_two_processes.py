"""Two processes ask one server, which the first keeps in step: what one process does by itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from mmalign.config import dump_yaml
from mmalign.models.tiny import TinyModel, Tower
from mmalign.rewards import RewardsConfig
from trainers.loop import train

LAUNCH = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
LAUNCH += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
LAUNCH += ["--main_process_port", "0", "-m", "trainers"]
# Responses that end by themselves are worth more: of few words, some do.
REWARDS = {"functions": [{"name": "length", "max_tokens": 6, "buffer_tokens": 6}]}
WORDS = ("What", "is", "it", "?", "0", "1", "2", "3", "4", "5")


def lines(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_learn_what_one_does(recipe, fake_vllm, monkeypatch, tmp_path: Path):
    """With overlap and two steps from each batch. Real rewards: the launch loads its own."""
    monkeypatch.setattr(RewardsConfig, "load", fake_vllm.real_rewards)
    small = Tower(hidden=32, layers=2, heads=4, mlp=32)
    model = TinyModel(
        output=str(tmp_path / "model"), image_size=16, vision=small, text=small, words=WORDS
    ).build()
    sections: dict[str, Any] = {
        "lora": {"rank": 4, "alpha": 8},
        "model": {"path": str(model)},
        "rollouts": {
            "steps": 2, "group_size": 4, "decoding": {"max_new_tokens": 6}, "rewards": REWARDS,
        },
        "optim": {"batch_size": 4, "steps": 6, "micro_batch_size": 1, "epsilon": 1e-3},
        "run": {"save_every_steps": 3},
    }  # fmt: skip
    with fake_vllm.kind(model) as server:
        generator = {"base_url": server.url, "overlap": True}
        for _ in train(recipe("one", generator=generator, **sections)):
            pass
        asked = len(server.asked)
        file = tmp_path / "two.yaml"
        file.write_text(dump_yaml(recipe("two", generator=generator, **sections)))
        done = subprocess.run(
            [sys.executable, *LAUNCH, str(file)],
            env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr
        seeds = [body["seed"] for body in server.asked]
        # A row that two passes put into one step may be asked for by both.
        assert set(seeds[:asked]) == set(seeds[asked:])
        # The first process alone has the weights loaded: twice in each run.
        assert server.calls["/v1/load_lora_adapter"] == 4
    shown = ("loss", "grad_norm", "reward", "ratio", "old_kl", "off_policy_steps", "sampler_gap")
    for alone, together in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        for name in shown:
            assert abs(alone[f"train/{name}"] - together[f"train/{name}"]) < 1e-4, name
        assert alone["train/uninformative"] < 1
    weights = [
        load_file(tmp_path / run / "model" / "adapter_model.safetensors") for run in ("one", "two")
    ]
    assert all(torch.allclose(weights[0][n], weights[1][n], atol=1e-5) for n in weights[0])
    assert len(list((tmp_path / "two" / "checkpoints").glob("*/state/rollouts-1.pt"))) == 1
