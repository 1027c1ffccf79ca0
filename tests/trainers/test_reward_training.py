"""Reward models from the recipe to the rewards: training, resuming, processes, the command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmalign.cli import run
from mmalign.config import dump_yaml
from mmalign.losses import DPO, Reward
from mmalign.models.load import ModelConfig, load_policy, load_processor, part_table
from mmalign.models.reward_head import RewardHeadConfig
from mmalign.records import Preference
from mmalign.reward import Critics, Judgement, RewardModel
from mmalign.store import open_dataset, write_dataset
from trainers.estimate import estimate
from trainers.loop import Saved, Stepped, train
from trainers.setup import freeze_unread

HEAD = {"prompt": "{question} {response} ?"}
LORA = {"rank": 4, "alpha": 8}
LAUNCH = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
LAUNCH += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
LAUNCH += ["--main_process_port", "0", "-m", "trainers"]


@pytest.fixture(scope="module")
def judged(tmp_path_factory, preference) -> Path:
    """Sixteen pairs; one word tells which response is better, one is a tie."""
    path = tmp_path_factory.mktemp("judged")
    rows = [
        preference(
            n,
            chosen=f"yes {n}",
            rejected=f"no {n}",
            chosen_critique="good",
            rejected_critique="bad",
            contrast_images=(),
            p_target=0.5 if n == 16 else 1.0,
        )
        for n in range(17)
    ]
    write_dataset(path, Preference, rows, builder="test")
    return path


@pytest.fixture
def made(recipe, judged, tmp_path):
    """A recipe of a reward model; `lora`, `loss` and a folder's name, and the optimizer's keys."""

    def make(name="run", *, lora=None, loss="critique_reward", run=None, **optim):
        return recipe(
            model={"reward_head": HEAD, "lora": lora},
            data={"path": str(judged)},
            loss={"name": loss},
            optim={"lr": 3e-3, "batch_size": 4} | optim,
            run={"output": str(tmp_path / name)} | (run or {}),
        )

    return make


def metrics_of(recipe) -> list[dict[str, float]]:
    return [event.metrics for event in train(recipe) if isinstance(event, Stepped)]


def accuracy(model: RewardModel, judged: Path, critics: Critics) -> float:
    items = [
        Judgement(
            id=f"{row.id}/{side}",
            prompt=row.prompt,
            response=getattr(row, side),
            images=row.images,
            critique=getattr(row, f"{side}_critique"),
        )
        for row in list(open_dataset(judged, Preference))[:16]
        for side in ("chosen", "rejected")
    ]
    found = [one.reward for one in model.judge(items, critics)]
    return sum(a > b for a, b in zip(found[::2], found[1::2], strict=True)) / 16


@pytest.mark.parametrize(
    ("loss", "lora", "critiques"),
    [
        ("critique_reward", None, "given"),
        ("critique_reward", LORA, "given"),
        ("reward", None, "none"),
    ],
)
def test_training_tells_separable_pairs_apart(made, judged, tmp_path, loss, lora, critiques):
    steps = metrics_of(made(loss=loss, lora=lora, steps=40, batch_size=8))
    assert steps[-1]["train/loss"] < 0.8 * steps[0]["train/loss"]
    assert steps[-1]["train/reward_margin"] > 1.0
    if loss == "critique_reward":
        assert steps[-1]["train/critique_nll"] < steps[0]["train/critique_nll"]
    model = RewardModel.from_checkpoint(str(tmp_path / "run" / "model"))
    assert model.config == RewardHeadConfig(**HEAD)
    assert accuracy(model, judged, Critics(critiques=critiques)) > 0.9


def test_micro_batches_and_layouts_change_nothing(made):
    settings = {"steps": 3, "epsilon": 1e-3}
    whole = metrics_of(made("whole", **settings))
    cut = metrics_of(made("cut", micro_batch_size=1, **settings))
    padded = made("padded", **settings)
    scorer = padded.scorer.model_copy(update={"layout": "padded"})
    padded = metrics_of(padded.model_copy(update={"scorer": scorer}))
    for one, *others in zip(whole, cut, padded, strict=True):
        for other in others:
            for name in ("loss", "reward_margin", "critique_nll", "accuracy", "grad_norm"):
                assert one[f"train/{name}"] == pytest.approx(
                    other[f"train/{name}"], rel=2e-6, abs=5e-5
                )


@pytest.mark.parametrize("lora", [None, LORA])
def test_a_stopped_run_ends_as_if_nothing_had_happened(made, tmp_path, lora):
    often = {"save_every_steps": 2}
    metrics_of(made("whole", lora=lora, run=often))
    stopped = made("stopped", lora=lora, run=often)
    for event in train(stopped):
        if isinstance(event, Saved):
            break
    assert not (tmp_path / "stopped" / "model").exists()
    metrics_of(stopped)
    weights = [next((tmp_path / n / "model").glob("*.safetensors")) for n in ("whole", "stopped")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert any("reward_head" in name for name in load_file(weights[0]))


def test_a_reward_model_trains_on_from_its_own_head(made, recipe, judged, tmp_path):
    metrics_of(made("first", steps=30))
    first = tmp_path / "first" / "model"
    on = recipe(
        model={"path": str(first), "lora": None},
        data={"path": str(judged)},
        loss={"name": "critique_reward"},
        optim={"lr": 1e-6, "steps": 1, "batch_size": 16},
        run={"output": str(tmp_path / "on")},
    )
    (step,) = metrics_of(on)
    assert step["train/accuracy"] > 0.9


def test_what_a_loss_does_not_read_stays(tiny_model):
    def trained(loss) -> set[str]:
        head = RewardHeadConfig(**HEAD)
        policy = load_policy(ModelConfig(path=str(tiny_model), reward_head=head))
        freeze_unread(policy, loss.needs)
        return {n.partition(".")[0] for n, p in policy.model.named_parameters() if p.requires_grad}

    assert trained(Reward()) == {"model", "reward_head"}
    assert trained(DPO()) == {"model", "lm_head"}


@pytest.mark.slow
@pytest.mark.parametrize(("loss", "lora"), [("reward", None), ("critique_reward", LORA)])
def test_two_processes_equal_one(made, tmp_path, loss, lora):
    settings = {"steps": 3, "micro_batch_size": 1, "epsilon": 1e-3}
    one = made("one", loss=loss, lora=lora, **settings)
    metrics_of(one)
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_yaml(one))
    done = subprocess.run(
        [sys.executable, *LAUNCH, str(file), f"run.output={tmp_path / 'two'}"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    found = [
        load_file(next((tmp_path / name / "model").glob("*.safetensors")))
        for name in ("one", "two")
    ]
    assert found[0].keys() == found[1].keys()
    for name, tensor in found[0].items():
        assert torch.allclose(tensor, found[1][name], atol=1e-5), name


@pytest.mark.parametrize("lora", [None, LORA])
def test_the_estimate_counts_the_head(made, lora):
    recipe = made(lora=lora)
    parts = {part.name: part for part in part_table(load_policy(recipe.model))}
    text = estimate(recipe)
    language = parts["language_model"]
    line = next(line for line in text.splitlines() if line.startswith("language_model"))
    assert line.split()[1:3] == [f"{language.num_parameters:,}", f"{language.num_trainable:,}"]
    assert "17 rows" in text
    assert not hasattr(load_processor(recipe.model.path).config, "reward_head")


def test_the_command_trains_from_a_yaml_and_says_mistakes(made, tmp_path, capsys):
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_yaml(made(steps=1)))
    assert run(["train", str(file)]) == 0
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert config["reward_head"]["prompt"] == HEAD["prompt"]
    elsewhere = f"run.output={tmp_path / 'elsewhere'}"
    assert run(["train", str(file), "model.reward_head=null", elsewhere]) == 2
    assert "Set model.reward_head={} for a fresh one" in capsys.readouterr().err
    assert run(["train", str(file), "model.reward_head.promt=x", elsewhere]) == 2
    assert "did you mean model.reward_head.prompt?" in capsys.readouterr().err
