"""Training an adapter on 4-bit weights: what learns, what stays, and what is refused."""

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
from mmalign.errors import ConfigError, TrainingError
from mmalign.models.load import ModelConfig, load_policy
from mmalign.models.quantization import num_bytes, scales
from mmalign.models.tiny import TinyModel
from mmalign.scoring.scorer import Scorer
from mmalign.store import open_dataset
from trainers.directory import RunDirectory
from trainers.loop import Saved, train
from trainers.reference import fingerprint
from trainers.reference_key import cache_folder
from trainers.setup import set_up

MODEL = {"quantization": {}, "lora": {"rank": 4, "alpha": 8}}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("qwen") / "model"
    return TinyModel(output=str(folder), family="qwen25vl", patch_size=4).build()


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("family", ["llava15", "qwen25vl"])
def test_an_adapter_learns_on_4_bit_weights_against_its_own_base(recipe, tmp_path, qwen, family):
    changes = MODEL | ({} if family == "llava15" else {"path": str(qwen)})
    changes["gradient_checkpointing"] = family == "qwen25vl"
    made = recipe(model=changes, loss={"name": "dpo"}, optim={"steps": 12, "lr": 1e-2})
    parts = set_up(made, open_dataset(made.data.path), RunDirectory(made))
    assert parts.summary["reference"] == "adapter_off"
    # No second copy: the 4-bit base is the reference's too.
    adapter = sum(p.nbytes for n, p in parts.policy.model.named_parameters() if "lora_" in n)
    base = load_policy(made.model.model_copy(update={"lora": None})).model
    assert num_bytes(parts.policy.model) == num_bytes(base) + adapter
    held = {id(p) for p in parts.policy.model.parameters()}
    assert {id(p) for p in parts.scorer.parameters()} == held

    batch = parts.rows.batch(parts.survey, [0, 1, 2])
    assert parts.reference is not None
    before = parts.reference(batch).logps
    with torch.no_grad():
        assert torch.equal(parts.scorer(batch.plan).logps, before)
    packed = fingerprint(base)
    for _ in train(made):
        pass
    found = metrics(tmp_path / "run")
    assert found[0]["train/margin"] == 0.0
    assert found[-1]["train/loss"] < 0.6 * found[0]["train/loss"]

    trained = load_policy(ModelConfig(path=str(tmp_path / "run" / "model")), merge=False)
    trained.model.train()
    scorer = Scorer(trained.model, trained.family, parts.scorer.attention)  # type: ignore[arg-type]
    with torch.no_grad():
        assert not torch.allclose(scorer(batch.plan).logps, before, atol=1e-2)
        with trained.model.disable_adapter():  # type: ignore[operator]
            assert torch.equal(scorer(batch.plan).logps, before)
    assert fingerprint(trained.model.unload()) == packed  # type: ignore[operator]


def test_a_stopped_run_ends_as_an_unbroken_one(recipe, tmp_path):
    sections = {"optim": {"steps": 5, "lr": 1e-2}, "model": MODEL}
    for _ in train(recipe(**sections, run={"output": str(tmp_path / "a")})):
        pass
    made = recipe(**sections, run={"output": str(tmp_path / "b"), "save_every_steps": 2})
    stored = {}
    for event in train(made):
        if isinstance(event, Saved):
            stored = load_file(event.path / "state" / "weights.safetensors")
            break
    assert stored
    assert not [name for name, tensor in stored.items() if tensor.dtype == torch.uint8]
    for _ in train(made):
        pass
    files = [tmp_path / run / "model" / "adapter_model.safetensors" for run in "ab"]
    assert files[0].read_bytes() == files[1].read_bytes()
    losses = [[line["train/loss"] for line in metrics(tmp_path / run)] for run in "ab"]
    assert losses[0] == losses[1]


def test_every_reference_is_the_4_bit_base(recipe, tmp_path):
    losses = {}
    for kind in ("adapter_off", "frozen_copy", "cached"):
        run = {"output": str(tmp_path / kind)}
        for _ in train(recipe(model=MODEL, reference=kind, optim={"steps": 3}, run=run)):
            pass
        losses[kind] = [line["train/loss"] for line in metrics(tmp_path / kind)]
    assert losses["frozen_copy"] == losses["adapter_off"] == losses["cached"]
    assert cache_folder(recipe(model=MODEL)) != cache_folder(recipe())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_16_bit_weights_beside_4_bit_ones(recipe, tmp_path, checkpointing):
    narrow = MODEL | {"dtype": "bfloat16", "gradient_checkpointing": checkpointing}
    made = recipe(model=narrow, optim={"lr": 1e-2}, run={"precision": "bf16"})
    for _ in train(made):
        pass
    found = metrics(tmp_path / "run")
    assert found[0]["train/margin"] == 0.0
    assert found[-1]["train/loss"] < 0.95 * found[0]["train/loss"]
    stored = load_file(tmp_path / "run" / "model" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}


def test_two_processes_share_the_adapters_gradient(recipe, tmp_path):
    made = recipe(
        model=MODEL,
        optim={"steps": 2, "micro_batch_size": 1, "epsilon": 1e-3},
        run={"output": str(tmp_path / "one")},
    )
    for _ in train(made):
        pass
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_yaml(made))
    launch = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1"
    launch += " --mixed_precision no --dynamo_backend no --main_process_port 0 -m trainers"
    done = subprocess.run(
        [sys.executable, *launch.split(), str(file), f"run.output={tmp_path / 'two'}"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    found = [load_file(tmp_path / n / "model/adapter_model.safetensors") for n in ("one", "two")]
    assert all(torch.allclose(found[0][n], found[1][n], atol=1e-6) for n in found[0])


def test_bases_that_differ_in_their_scales_alone_are_two(recipe):
    policy = load_policy(recipe(model=MODEL).model)
    before = fingerprint(policy.model)
    name, scale = next(scales(policy.model))
    assert name.endswith("absmax")
    scale[0] += 1
    assert fingerprint(policy.model) != before


def test_4_bit_weights_do_not_train_whole(recipe):
    with pytest.raises(ConfigError, match=r"cannot train themselves; set model\.lora"):
        recipe(model={"quantization": {}, "lora": None})


def test_4_bit_weights_are_not_spread_over_gpus(recipe, monkeypatch):
    from accelerate.utils import DistributedType

    monkeypatch.setattr("trainers.setup.WHOLE_POLICY", (DistributedType.MULTI_GPU,))
    made = recipe(model=MODEL)
    with pytest.raises(TrainingError, match=r"cannot be spread.*Use DDP"):
        set_up(made, open_dataset(made.data.path), RunDirectory(made))
