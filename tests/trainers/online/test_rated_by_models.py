"""Groups of rollouts that a reward model or a judge rates."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mmalign.generate.base import Generation, Sampling
from mmalign.generate.server import ServerConfig
from mmalign.models.load import ModelConfig, load_policy
from mmalign.models.reward_head import RewardHeadConfig
from mmalign.records import Verifiable, prompt_text
from mmalign.reward import Judgement, RewardModel
from mmalign.store import open_dataset
from trainers.config import Recipe
from trainers.loop import Stepped, train

SIZE = 4


def ran(recipe: Recipe) -> tuple[dict[str, float], list[list[dict[str, Any]]]]:
    """Metrics of a run's only step, and its groups as they were written out."""
    (metrics,) = [event.metrics for event in train(recipe) if isinstance(event, Stepped)]
    file = recipe.run.output / "rollouts" / "step-000001.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return metrics, [lines[start : start + SIZE] for start in range(0, len(lines), SIZE)]


# A reward model


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory, wordy) -> Path:
    """A tiny reward model's own folder, its head as it was drawn."""
    path = tmp_path_factory.mktemp("reward")
    config = ModelConfig(
        path=str(wordy), reward_head=RewardHeadConfig(prompt="{question} {response} ?")
    )
    torch.manual_seed(1)
    policy = load_policy(config)
    policy.model.save_pretrained(path)
    policy.preparer.processor.save_pretrained(path)
    return path


def by_model(path: Path) -> dict[str, Any]:
    return {"annotator": {"name": "reward", "model": {"path": str(path)}}}


def test_a_reward_model_orders_a_group(recipe, finishing, reward_model, prompts):
    made = recipe(source=by_model(reward_model), optim={"steps": 1})
    metrics, groups = ran(made)
    model = RewardModel.from_checkpoint(str(reward_model))
    rows = {record.id: record for record in open_dataset(prompts, Verifiable)}
    gaps = []
    for group in groups:
        record = rows[group[0]["id"]]
        items = [
            Judgement(id=str(n), prompt=record.prompt, images=record.images, response=text)
            for n, text in enumerate(line["response"] for line in group)
        ]
        worth = [judged.reward for judged in model.judge(items)]
        side = {line["pair"]: one for line, one in zip(group, worth, strict=True)}
        assert side["chosen"] == pytest.approx(max(worth), abs=1e-5)
        assert side["rejected"] == pytest.approx(min(worth), abs=1e-5)
        gaps.append(max(worth) - min(worth))
    told = metrics["train/chosen_score"] - metrics["train/rejected_score"]
    assert told == pytest.approx(sum(gaps) / len(gaps), abs=1e-5)


def test_soft_labels_are_what_the_reward_model_makes_of_a_pair(set_up_as, finishing, reward_model):
    parts, _ = set_up_as(source=by_model(reward_model), loss={"name": "soft_labels"})
    (batch,), _, counts = parts.online_step(0)
    gap = counts["chosen_score"] - counts["rejected_score"]
    targets = batch.table.p_target
    assert ((targets > 0.5) & (targets < 1)).all()
    assert torch.logit(targets).sum().item() == pytest.approx(gap, abs=1e-4)


def test_what_was_cut_or_said_twice_is_in_no_pair(set_up_as, reward_model):
    parts, _ = set_up_as(source=by_model(reward_model))
    real = parts.online.generator.generate

    def generate(requests, sampling):
        made = real(requests, sampling)
        texts = ["yes", "yes", "no", "red", "yes", "yes", "no", ""]
        ends = [True, True, True, False, True, True, False, True]
        return [replace(m, text=t, finished=e) for m, t, e in zip(made, texts, ends, strict=True)]

    parts.online.generator.generate = generate
    (batch,), _, counts = parts.online_step(0)
    assert (counts["paired"], counts["too_few"]) == (1, 1)
    assert batch.table.weight.tolist() == [1.0, 0.0]


# A judge


class Ranker:
    """A judge's model: prefers the text that holds more letters, or says what it is told to."""

    name = "ranker"

    def __init__(self, says: str | None = None) -> None:
        self.says, self.shown = says, list[list[str]]()

    def generate(self, requests, sampling: Sampling) -> list[Generation]:
        return [self._reply(request) for request in requests]

    def _reply(self, request) -> Generation:
        prompt = prompt_text(request.prompt)
        code = re.findall(r'"code": "([0-9a-f]{16})"', prompt)[-1]
        texts = re.findall(rf"\[BEGIN response \d+ {code}\]\n(.*?)\n\[END", prompt, re.S)
        self.shown.append(texts)
        levels = sorted({len(text) for text in texts}, reverse=True)
        told = [[str(i + 1) for i, t in enumerate(texts) if len(t) == n] for n in levels]
        reply = {
            "code": code,
            "critiques": ["so so"] * len(texts),
            "scores": [5 - levels.index(len(text)) for text in texts],
            "rank": ">".join("=".join(group) for group in told),
        }
        text = json.dumps(reply) if self.says is None else self.says
        return Generation(id=request.id, text=text, num_tokens=1, finished=True)


BY_JUDGE = {"annotator": {"name": "judge", "server": {"model": "m", "base_url": "http://h/v1"}}}


@pytest.fixture
def ranker(monkeypatch):
    def make(says: str | None = None) -> Ranker:
        made = Ranker(says)
        monkeypatch.setattr(ServerConfig, "load", lambda self: made)
        return made

    return make


def test_a_judge_orders_a_group(recipe, finishing, ranker):
    judge = ranker()
    metrics, groups = ran(recipe(source=BY_JUDGE, optim={"steps": 1}))
    for group, shown in zip(groups, judge.shown, strict=True):
        texts = [line["response"] for line in group if line["response"]]
        assert shown == list(dict.fromkeys(texts))
        sides = {line["pair"]: len(line["response"]) for line in group}
        assert sides["chosen"] == max(map(len, texts)) > sides["rejected"] == min(map(len, texts))
    assert metrics["train/paired"] == 1


def test_a_judge_without_a_verdict_gives_no_pair(recipe, finishing, ranker):
    judge = ranker("I like them all.")
    metrics, _ = ran(recipe(source=BY_JUDGE, optim={"steps": 1}))
    assert len(judge.shown) == 3 * 2  # asked again, twice
    assert metrics["train/no_verdict"] == 1
    assert metrics["train/paired"] == metrics["train/grad_norm"] == 0
