"""Training on rollouts: what is sampled, how it is cut, resumed in the middle, and bad input."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mmalign.config import dump_yaml, validate
from mmalign.errors import ConfigError, RewardError, SchemaMismatch
from mmalign.media import embed
from mmalign.records import Verifiable, user
from mmalign.rewards import RewardsConfig, Rollout, Scored
from mmalign.store import write_dataset
from trainers.config import Recipe
from trainers.loop import Finished, Saved, Stepped, train
from trainers.recipes import load_text_recipe

SIZE = 3


def row(number: int, **changes: Any) -> Verifiable:
    pixels = np.random.default_rng(number).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    values = {
        "id": f"row-{number}",
        "prompt": user(f"What is it? {number}", images=1),
        "images": (embed(Image.fromarray(pixels)),),
        "answer": str(number),
        "verifier": "number",
    }
    return Verifiable(**(values | changes))


def by_letters(rollout: Rollout) -> float:
    """A worth that differs between random texts."""
    return float(sum(map(ord, rollout.text)) % 7)


class FakeRewards:
    """Rollouts are worth what a function says."""

    def __init__(self, worth: Callable[[Rollout], float]) -> None:
        self.worth = worth

    def score(self, items: Sequence[Rollout]) -> list[Scored]:
        values = [self.worth(item) for item in items]
        return [Scored(total=v, parts={"accuracy": v}, reasons={}) for v in values]

    def close(self) -> None:
        pass


@pytest.fixture
def reward(monkeypatch):
    """Lets a test say what a rollout is worth."""

    def worth(function: Callable[[Rollout], float]) -> None:
        monkeypatch.setattr(RewardsConfig, "load", lambda self: FakeRewards(function))

    worth(by_letters)
    return worth


@pytest.fixture
def prompts(tmp_path) -> Path:
    write_dataset(tmp_path / "prompts", Verifiable, [row(n) for n in range(6)])
    return tmp_path / "prompts"


@pytest.fixture
def recipe(tiny_model: Path, prompts: Path, tmp_path: Path) -> Callable[..., Recipe]:
    def make(name: str = "run", **sections: Any) -> Recipe:
        values: dict[str, Any] = {
            "model": {"path": str(tiny_model)},
            "data": {"path": str(prompts)},
            "loss": {"name": "grpo"},
            "rollouts": {"group_size": SIZE, "decoding": {"max_new_tokens": 5}},
            "optim": {"lr": 1e-2, "batch_size": 2, "steps": 3, "schedule": "constant"},
            "run": {"output": str(tmp_path / name), "log_every_steps": 1},
        }
        for key, value in sections.items():
            old = values.get(key)
            merged = isinstance(old, dict) and isinstance(value, dict) and key != "loss"
            values[key] = old | value if merged else value
        return validate(values, Recipe, "test")

    return make


def trained(recipe: Recipe) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    metrics = [event.metrics for event in train(recipe) if isinstance(event, Stepped)]
    return metrics, load_file(recipe.run.output / "model" / "model.safetensors")


def largest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "dapo", "gspo"])
def test_the_policy_that_sampled_has_ratio_one_and_learns(recipe, reward, loss):
    made = recipe(loss={"name": loss})
    metrics, _ = trained(made)
    assert len(metrics) == 3
    for line in metrics:
        assert line["train/ratio"] == 1
        assert line["train/clipped_low"] == line["train/clipped_high"] == 0
        assert line["train/old_kl"] == 0
        assert 0 <= line["train/reward"] <= 6
        assert 1 <= line["train/response_tokens"] <= 5
        assert line["train/rollouts_per_second"] > 0
    assert metrics[0]["train/grad_norm"] > 0
    lines = (made.run.output / "rollouts" / "step-000001.jsonl").read_text().splitlines()
    assert len(lines) == 2 * SIZE
    assert set(json.loads(lines[0])) == {"step", "id", "response", "reward", "accuracy"}


def test_cutting_a_step_into_micro_batches_changes_rounding_alone(recipe, reward):
    whole, weights = trained(recipe("whole"))
    cut, pieces = trained(recipe("cut", optim={"micro_batch_size": 1}))
    for one, other in zip(whole, cut, strict=True):
        for name in ("loss", "reward", "grad_norm", "response_tokens"):
            assert one[f"train/{name}"] == pytest.approx(other[f"train/{name}"], rel=1e-4, abs=1e-6)
    assert largest(weights, pieces) < 1e-4


def test_one_row_for_each_rollout_gives_the_same_gradient(recipe, reward):
    """Groups share their prompt; the layout with a row each is what that is tested against."""
    shared, weights = trained(recipe("shared", optim={"steps": 1}))
    padded, rows = trained(recipe("padded", optim={"steps": 1}, scorer={"layout": "padded"}))
    assert shared[0]["train/grad_norm"] == pytest.approx(padded[0]["train/grad_norm"], rel=1e-4)
    assert largest(weights, rows) < 1e-4


def test_later_steps_of_a_batch_are_off_the_policy_that_sampled(recipe, reward):
    metrics, _ = trained(recipe(rollouts={"steps": 2}, optim={"steps": 4}))
    ratios = [line["train/ratio"] for line in metrics]
    assert ratios[0] == ratios[2] == 1
    assert ratios[1] != 1
    assert metrics[1]["train/old_kl"] > 0


def test_a_run_killed_in_the_middle_of_a_batch_of_rollouts_ends_in_the_same_bits(recipe, reward):
    sections: dict[str, Any] = {
        "rollouts": {"steps": 3},
        "optim": {"steps": 4, "micro_batch_size": 1},
        "run": {"save_every_steps": 1},
    }
    whole, weights = trained(recipe("whole", **sections))
    killed = recipe("killed", **sections)
    events = train(killed)
    for event in events:
        if isinstance(event, Saved) and event.step == 2:
            break
    events.close()
    metrics, again = trained(killed)
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert metrics[-1]["train/loss"] == whole[-1]["train/loss"]


def test_rollouts_that_are_all_worth_the_same_teach_nothing_and_it_is_said(
    recipe, reward, tiny_model, caplog
):
    reward(lambda rollout: 1.0)
    with caplog.at_level(logging.WARNING):
        metrics, weights = trained(recipe())
    assert "nothing is learnt" in caplog.text
    assert metrics[0]["train/loss"] == metrics[0]["train/grad_norm"] == 0
    assert metrics[0]["train/uninformative"] == 1
    assert largest(weights, load_file(tiny_model / "model.safetensors")) == 0


def test_prompts_that_teach_nothing_are_replaced_by_others(recipe, reward):
    """Only the odd rows' answers differ in worth: with redraws, more of them are seen."""

    def worth(rollout: Rollout) -> float:
        return by_letters(rollout) if int(rollout.row.answer) % 2 else 0.0

    reward(worth)
    seen = {}
    for redraw in (0, 4):
        metrics, _ = trained(recipe(f"redraw{redraw}", rollouts={"redraw": redraw}))
        seen[redraw] = sum(line["train/uninformative"] for line in metrics)
    assert seen[4] < seen[0]


@pytest.mark.parametrize("lora", [None, {"rank": 2, "alpha": 4}])
def test_a_kl_to_the_reference_starts_at_zero_and_then_grows(recipe, reward, lora):
    made = recipe(loss={"name": "grpo", "kl_weight": 0.1}, model={"lora": lora})
    metrics = [event.metrics for event in train(made) if isinstance(event, Stepped)]
    assert metrics[0]["train/kl"] == pytest.approx(0, abs=1e-9)
    assert metrics[-1]["train/kl"] > 0


def test_a_reward_that_raises_stops_the_run_and_names_the_row(recipe, monkeypatch):
    from mmalign.rewards import AccuracyReward

    def broken(self: Any, rollout: Rollout, verifiers: Any) -> float:
        raise ZeroDivisionError("no such thing")

    monkeypatch.setattr(AccuracyReward, "__call__", broken)
    with pytest.raises(RewardError, match=r"row row-\d, rollout \d: the reward accuracy failed"):
        list(train(recipe()))


def test_real_rewards_of_a_model_that_knows_nothing_are_zero(recipe):
    metrics, _ = trained(recipe(optim={"steps": 1}))
    assert metrics[0]["train/reward"] == metrics[0]["train/reward/format"] == 0


def test_rows_whose_own_answer_cannot_be_read_are_left_out(recipe, reward, tmp_path):
    rows = [row(n, **({"answer": "a cat"} if n == 1 else {})) for n in range(4)]
    write_dataset(tmp_path / "bad", Verifiable, rows)
    made = recipe(data={"path": str(tmp_path / "bad")}, optim={"steps": 1})
    assert isinstance(list(train(made))[-1], Finished)
    survey = json.loads((made.run.output / "start.json").read_text())["survey"]
    assert survey["dropped"] == {"unreadable_truth": ["row-1"]}


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"rollouts": None}, "give rollouts"),
        ({"loss": {"name": "dpo"}}, "takes no rollouts"),
        ({"reference": "cached"}, "reference=cached"),
        ({"rollouts": {"group_size": 1}}, "greater than or equal to 2"),
    ],
)
def test_recipes_that_cannot_be_are_refused(recipe, sections, told):
    with pytest.raises(ConfigError, match=told):
        recipe(**sections)


def test_estimate_and_precompute_refuse_recipes_over_rollouts(recipe, tmp_path):
    (tmp_path / "recipe.yaml").write_text(dump_yaml(recipe()))
    with pytest.raises(ConfigError, match="rollouts are not"):
        load_text_recipe(tmp_path / "recipe.yaml")


def test_a_dataset_of_pairs_is_refused(recipe, pairs):
    with pytest.raises(SchemaMismatch, match="verifiable"):
        list(train(recipe(data={"path": str(pairs)})))
