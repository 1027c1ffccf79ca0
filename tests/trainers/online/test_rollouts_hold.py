"""Rollouts and pairs of them: bad responses get their due, and order changes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mmalign.generate.local import LocalGenerator
from mmalign.records import Verifiable, user
from mmalign.store import open_dataset, write_dataset
from trainers.config import Recipe
from trainers.directory import RunDirectory
from trainers.loop import Stepped, train
from trainers.sampler import Sampler
from trainers.setup import set_up

FORM = "Answer as <think> </think> <answer> </answer>, such as <answer> 7 </answer>."
# A response, its reward for form and for being right, and why the latter cannot be told.
RESPONSES = [
    ("12", 0, 0, None),
    ("<think>a</think><think>b</think><answer>12</answer>", 0, 1, None),
    (FORM + " <think>a</think><answer>12</answer>", 0, 0, None),
    ("so \\boxed{12", 0, 0, None),
    ("<think>a</think><answer>9^{9^{9^{9}}}</answer>", 1, 0, "timeout"),
    ("<think>a</think><answer>" + "9" * 1_000_000 + "</answer>", 1, 0, "too_long"),
    ("<think>a</think><answer>\\boxed{12}</answer>", 1, 1, None),
]


@pytest.fixture
def either(recipe: Callable[..., Recipe], prompts: Path):
    """A recipe of GRPO, or of DPO on pairs of rollouts."""

    def make(kind: str, name: str, data: Path = prompts, **settings: Any) -> Recipe:
        size = settings.pop("group_size", 4)
        rewards = {"rewards": settings.pop("rewards", {})}
        decoding = {"max_new_tokens": 4}
        shared = {"optim": {"batch_size": 2, "steps": 2, "epsilon": 1e-3} | settings}
        if kind == "pairs":
            source = {"group_size": size, "annotator": {"name": "rule"} | rewards}
            source |= {"name": "rollouts", "decoding": decoding}
            return recipe(name, data={"path": str(data), "online": {"source": source}}, **shared)
        return recipe(
            name,
            data={"path": str(data), "online": None},
            loss={"name": "grpo"},
            rollouts={"group_size": size, "decoding": decoding} | rewards,
            **shared,
        )

    return make


def trained(recipe: Recipe) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    metrics = [event.metrics for event in train(recipe) if isinstance(event, Stepped)]
    return metrics, load_file(recipe.run.output / "model" / "model.safetensors")


@pytest.mark.parametrize("kind", ["grpo", "pairs"])
def test_bad_responses_cost_their_reward_and_the_run_goes_on(either, kind, tmp_path, monkeypatch):
    real = LocalGenerator.generate

    def generate(self: Any, requests: Any, sampling: Any) -> Any:
        made = real(self, requests, sampling)
        texts = [text for text, *_ in RESPONSES]
        return [replace(m, text=t, finished=True) for m, t in zip(made, texts, strict=True)]

    monkeypatch.setattr(LocalGenerator, "generate", generate)
    # The tiny model knows words, not the form: what it is asked is of no consequence here.
    asked = Verifiable(id="q", prompt=user("what is it ?"), answer="12", verifier="math")
    write_dataset(tmp_path / "maths", Verifiable, [asked])
    made = either(
        kind, "run", tmp_path / "maths", group_size=len(RESPONSES), batch_size=1, steps=1,
        rewards={"math_timeout_seconds": 1.0},
    )  # fmt: skip
    metrics, _ = trained(made)
    file = made.run.output / "rollouts" / "step-000001.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    # A reason stands in the place of what it leaves undecided.
    wanted = [(0.5 * form + right, form, why or right) for _, form, right, why in RESPONSES]
    assert [(line["reward"], line["format"], line["accuracy"]) for line in lines] == wanted
    assert metrics[0]["train/undecided"] == pytest.approx(2 / len(RESPONSES))
    assert 0 < metrics[0]["train/grad_norm"] < 1e3
    if kind == "pairs":
        sides = [line["pair"] for line in lines]
        assert sides == ["rejected", None, None, None, None, None, "chosen"]


@pytest.mark.parametrize("kind", ["grpo", "pairs"])
def test_the_order_of_prompts_and_of_a_groups_rollouts_changes_rounding_alone(
    either, kind, reward, monkeypatch
):
    # No two responses are worth the same, or the first of them would be in the pair.
    reward(lambda rollout: sum(ord(c) * (n % 97 + 1) for n, c in enumerate(rollout.text)) / 1e3)
    metrics, weights = trained(either(kind, "straight"))
    generate, batch = LocalGenerator.generate, Sampler.batch

    def turned(self: Any, requests: Any, sampling: Any) -> Any:
        made = generate(self, requests, sampling)
        return [one for start in range(0, len(made), 4) for one in made[start : start + 4][::-1]]

    monkeypatch.setattr(LocalGenerator, "generate", turned)
    monkeypatch.setattr(Sampler, "batch", lambda self, step: batch(self, step)[::-1])
    others, same = trained(either(kind, "turned"))
    for one, other in zip(metrics, others, strict=True):
        assert one["train/grad_norm"] > 1e-3
        for name in ("loss", "grad_norm", "reward", "response_tokens"):
            assert one[f"train/{name}"] == pytest.approx(other[f"train/{name}"], rel=1e-4, abs=1e-6)
    assert max(float((weights[n] - same[n]).abs().max()) for n in weights) < 1e-5


@pytest.mark.parametrize("kind", ["grpo", "pairs"])
def test_all_tokens_that_were_sampled_count_in_the_rate(either, kind, reward, monkeypatch):
    said: list[Any] = []
    real = LocalGenerator.generate

    def kept(self: Any, requests: Any, sampling: Any) -> Any:
        said.extend(real(self, requests, sampling))
        return said

    monkeypatch.setattr(LocalGenerator, "generate", kept)
    made = either(kind, "run")
    parts = set_up(made, open_dataset(made.data.path), RunDirectory(made))
    counts = parts.online_step(0)[2]
    assert len(said) == 2 * 4
    assert counts["sampled_tokens"] == sum(len(reply.token_ids) for reply in said)
