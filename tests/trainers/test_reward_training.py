"""A reward model from the recipe to the rewards: training, saving, loading, judging."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForImageTextToText

from data_builders.score import Score
from mmalign.config import validate
from mmalign.errors import ConfigError, DataError, ModelError
from mmalign.models.load import ModelConfig, load_policy
from mmalign.records import Example, Preference, RankedResponse, Ranking, user
from mmalign.reward import Critics, Judgement, RewardModel
from mmalign.scoring.candidates import Candidate, CandidateBatch
from mmalign.scoring.plan import make_plan
from mmalign.scoring.scorer import Scorer
from mmalign.store import open_dataset, write_dataset
from trainers.loop import Stepped, train

HEAD = {"prompt": "{question} {response}"}


@pytest.fixture(scope="module")
def judged(tmp_path_factory, preference):
    """Pairs in which the better response is told by one word."""
    path = tmp_path_factory.mktemp("judged")
    rows = [
        preference(
            n,
            chosen=f"yes {n}",
            rejected=f"no {n}",
            chosen_critique="good",
            rejected_critique="bad",
            p_target=0.5 if n == 3 else 1.0,
        )
        for n in range(8)
    ]
    write_dataset(path, Preference, rows, builder="test")
    return path


def run(recipe, judged, tmp_path, name, *, lora=None, loss="critique_reward", **optim):
    made = recipe(
        model={"reward_head": HEAD, "lora": lora},
        data={"path": str(judged)},
        loss={"name": loss},
        optim={"lr": 3e-3, "batch_size": 4, "steps": 40} | optim,
        run={"output": str(tmp_path / name)},
    )
    metrics = [e.metrics for e in train(made) if isinstance(e, Stepped)]
    return metrics, tmp_path / name / "model"


def items(judged, critique=None):
    dataset = open_dataset(judged, Preference)
    return [
        Judgement(
            id=f"{row.id}/{side}",
            prompt=row.prompt,
            response=getattr(row, side),
            images=row.images,
            media_root=dataset.media_root,
            critique=critique and getattr(row, f"{side}_critique"),
        )
        for row in dataset
        for side in ("chosen", "rejected")
    ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_model, judged):
    """A plain reward model, trained whole until it tells the word."""
    from trainers.config import Recipe

    out = tmp_path_factory.mktemp("trained")
    made = validate(
        {
            "model": {"path": str(tiny_model), "reward_head": HEAD},
            "data": {"path": str(judged)},
            "loss": {"name": "reward"},
            "optim": {"lr": 3e-3, "batch_size": 8, "steps": 60},
            "run": {"output": str(out / "run"), "log_every_steps": 10},
        },
        Recipe,
        "test",
    )
    steps = [e.metrics for e in train(made) if isinstance(e, Stepped)]
    return steps, out / "run" / "model"


def test_training_learns_to_tell_and_the_saved_model_judges(trained, judged):
    steps, folder = trained
    assert steps[-1]["train/loss"] < steps[0]["train/loss"]
    model = RewardModel.from_checkpoint(str(folder))
    rewards = [j.reward for j in model.judge(items(judged), Critics(critiques="none"))]
    right = [a > b for a, b in zip(rewards[::2], rewards[1::2], strict=True)]
    assert sum(right) >= 7
    alone = RewardModel.from_checkpoint(str(folder), batch_size=1)
    again = [j.reward for j in alone.judge(items(judged)[:3], Critics(critiques="none"))]
    assert again == pytest.approx(rewards[:3], abs=1e-5)


def test_plain_transformers_loads_the_language_model_of_the_same_folder(trained):
    _, folder = trained
    assert "reward_head" in json.loads((folder / "config.json").read_text())
    plain = AutoModelForImageTextToText.from_pretrained(folder)
    ours = load_policy(ModelConfig(path=str(folder))).model
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[name]), name
    assert any(name.startswith("reward_head.") for name in ours.state_dict())


def test_a_lora_reward_model_comes_back_to_the_bit(recipe, judged, tmp_path):
    lora = {"rank": 4, "alpha": 8}
    metrics, folder = run(recipe, judged, tmp_path, "lora", lora=lora, steps=4)
    assert (folder / "adapter_model.safetensors").exists()
    first, second = (
        [
            j.reward
            for j in RewardModel.from_checkpoint(str(folder)).judge(
                items(judged, critique=True), Critics(critiques="given")
            )
        ]
        for _ in range(2)
    )
    assert first == second
    assert len(set(first)) > 1
    assert metrics[-1]["train/critique_nll"] < metrics[0]["train/critique_nll"]


def test_micro_batches_and_layouts_change_nothing(recipe, judged, tmp_path):
    whole, _ = run(recipe, judged, tmp_path, "whole", steps=3)
    cut, _ = run(recipe, judged, tmp_path, "cut", steps=3, micro_batch_size=1)
    for one, other in zip(whole, cut, strict=True):
        assert one["train/loss"] == pytest.approx(other["train/loss"], abs=2e-5)
        assert one["train/reward_margin"] == pytest.approx(other["train/reward_margin"], abs=2e-5)


def test_both_layouts_read_one_reward(trained):
    _, folder = trained
    policy = load_policy(ModelConfig(path=str(folder)))
    texts = ["one", "another, much longer one", "x"]
    conditions = [policy.preparer.condition(user(text), [], None) for text in texts]
    candidates = [
        Candidate(condition=i, response_ids=policy.preparer.response(user(text), "fine " * (i + 1)))
        for i, text in enumerate(texts)
    ]
    batch = CandidateBatch(conditions=conditions, candidates=candidates)
    found = []
    for layout in ("padded", "shared_prefix"):
        plan = make_plan(
            batch,
            policy.family,
            layout,
            image_token_id=policy.preparer.image_token_id,
            video_token_id=policy.preparer.video_token_id,
            pad_token_id=policy.preparer.pad_token_id,
        )
        found.append(Scorer(policy.model, policy.family)(plan, rewards=True).rewards)
    assert torch.allclose(*found, atol=1e-5)


def test_rewards_are_written_into_pairs_and_rankings(trained, judged, tmp_path):
    _, folder = trained
    config = {
        "source": judged,
        "output": tmp_path / "scored",
        "model": {"path": str(folder)},
        "critics": {"critiques": "none"},
        "shard_rows": 3,
    }
    made = open_dataset(Score(**config).build(), Preference)
    assert [row.id for row in made] == [row.id for row in open_dataset(judged, Preference)]
    assert sum(row.score_gap > 0 for row in made) >= 7
    assert made[0].chosen_critique == "good"

    rows = [
        Ranking(
            id="r",
            prompt=user("What is it?"),
            responses=(RankedResponse(text="yes 1", rank=0), RankedResponse(text="no 1", rank=1)),
        )
    ]
    write_dataset(tmp_path / "rankings", Ranking, rows, builder="test")
    config |= {"source": tmp_path / "rankings", "output": tmp_path / "scored_rankings"}
    (ranking,) = open_dataset(Score(**config).build(), Ranking)
    assert ranking.responses[0].score is not None
    assert ranking.responses[0].score != ranking.responses[1].score


def test_what_cannot_be_is_refused(recipe, judged, tiny_model, tmp_path):
    with pytest.raises(ConfigError, match="does not read"):
        recipe(model={"reward_head": HEAD, "lora": None}, loss={"name": "dpo"})
    headless = recipe(
        model={"lora": None},
        data={"path": str(judged)},
        loss={"name": "reward"},
        run={"output": str(tmp_path / "headless")},
    )
    with pytest.raises(ModelError, match="reward head"):
        list(train(headless))
    with pytest.raises(ModelError, match="has no reward head"):
        RewardModel.from_checkpoint(str(tiny_model))
    examples = [Example(id="e", prompt=user("Hi"), answer="Ho")]
    write_dataset(tmp_path / "none", Example, examples, builder="test")
    score = Score(
        source=tmp_path / "none", output=tmp_path / "x", model=ModelConfig(path="anywhere")
    )
    with pytest.raises(DataError, match="nothing to score"):
        score.build()


def test_a_critique_that_is_missing_is_told(trained, judged):
    _, folder = trained
    model = RewardModel.from_checkpoint(str(folder))
    with pytest.raises(DataError, match="no critique is given"):
        model.judge(items(judged), Critics(critiques="given"))


def test_own_critiques_are_written_cut_and_averaged(trained, judged):
    _, folder = trained
    model = RewardModel.from_checkpoint(str(folder))
    (one,) = model.judge(items(judged)[:1], Critics(critiques="self", max_new_tokens=3))
    assert len(one.critiques) == 1
    assert one.num_cut in (0, 1)
    (three,) = model.judge(
        items(judged)[:1], Critics(critiques="self", max_new_tokens=3, num_critics=3)
    )
    assert len(three.critiques) == 3
