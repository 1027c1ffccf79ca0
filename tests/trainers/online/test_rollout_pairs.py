"""Online DPO on prompts: the pairs of rollouts, what trains on them, and what is refused."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mmalign.config import dump_yaml
from mmalign.errors import ConfigError, RewardError, SchemaMismatch
from mmalign.models.load import ModelConfig, load_policy
from mmalign.records import Verifiable
from mmalign.rewards import Rollout
from mmalign.scoring.candidates import Candidate
from mmalign.scoring.plan import make_plan
from mmalign.scoring.scorer import Scorer
from mmalign.store import open_dataset
from trainers.config import Recipe
from trainers.loop import Saved, Stepped, train
from trainers.objectives.base import PreparedRow, collate
from trainers.recipes import load_text_recipe

SIZE = 4
BY_JUDGE = {"annotator": {"name": "judge", "server": {"model": "m", "base_url": "http://h/v1"}}}


def trained(recipe: Recipe) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    metrics = [event.metrics for event in train(recipe) if isinstance(event, Stepped)]
    return metrics, load_file(recipe.run.output / "model" / "model.safetensors")


def largest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def written(recipe: Recipe, step: int = 1) -> list[dict[str, Any]]:
    file = recipe.run.output / "rollouts" / f"step-{step:06d}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


def groups_of(lines: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    return [list(lines[start : start + SIZE]) for start in range(0, len(lines), SIZE)]


def first_words(model: Path, row: Verifiable, words: Sequence[str]) -> dict[str, float]:
    """The probability of each word as the first of a response."""
    policy = load_policy(ModelConfig(path=str(model)))
    preparer = policy.preparer
    condition, _ = preparer.fit(row.prompt, row.images, [None], None, id=row.id)
    ids_of = [preparer.tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
    assert all(len(ids) == 1 for ids in ids_of)
    candidates = tuple(Candidate(condition=0, response_ids=ids) for ids in ids_of)
    batch = collate([PreparedRow(id="x", conditions=(condition,), candidates=candidates)])
    plan = make_plan(
        batch, policy.family, "padded", image_token_id=preparer.image_token_id,
        video_token_id=preparer.video_token_id, pad_token_id=preparer.pad_token_id,
    )  # fmt: skip
    with torch.no_grad():
        logps = Scorer(policy.model, policy.family).eval()(plan).logps[:, 0]
    return dict(zip(words, logps.exp().tolist(), strict=True))


def test_a_reward_for_one_word_makes_it_likelier(recipe, reward, wordy, prompts):
    reward(lambda rollout: float(rollout.text.split()[:1] == ["yes"]))
    made = recipe(
        source={"group_size": 8, "decoding": {"max_new_tokens": 1}},
        optim={"lr": 3e-3, "batch_size": 6, "steps": 12},
    )
    metrics, _ = trained(made)
    asked = open_dataset(prompts, Verifiable)[2]
    before, after = (
        first_words(m, asked, ["yes"])["yes"] for m in (wordy, made.run.output / "model")
    )
    assert before < 0.2
    assert after > 0.8
    assert metrics[-1]["train/reward"] > metrics[0]["train/reward"] + 0.5
    # Pairs are few where the word is rare, and again where nothing else is said.
    assert metrics[0]["train/loss"] == pytest.approx(
        math.log(2) * metrics[0]["train/paired"], abs=1e-6
    )
    assert metrics[-1]["train/tied"] > 0


def test_the_first_steps_rollouts_are_those_of_grpo(recipe, reward, prompts):
    pairs = recipe("pairs", optim={"steps": 1})
    trained(pairs)
    group = recipe(
        "group", data={"path": str(prompts), "online": None}, loss={"name": "grpo"},
        rollouts={"group_size": SIZE, "decoding": {"max_new_tokens": 4}}, optim={"steps": 1},
    )  # fmt: skip
    trained(group)
    found = written(pairs)
    for one in groups_of(found):
        worth = {line["pair"]: line["reward"] for line in one}
        assert worth["chosen"] == max(line["reward"] for line in one)
        assert worth["rejected"] == min(line["reward"] for line in one)
    assert [{k: v for k, v in line.items() if k != "pair"} for line in found] == written(group)


def test_a_pair_is_two_rollouts_as_they_were_sampled_behind_one_prompt(set_up_as, reward):
    parts, said = set_up_as(optim={"micro_batch_size": 1})
    made = []
    real = parts.rows.batch_of
    parts.rows.batch_of = lambda places, rows: made.extend(rows) or real(places, rows)
    batches, totals, counts = parts.online_step(0)
    assert len(batches) == 2
    assert len(said) == 1
    sampled = [said[0][:SIZE], said[0][SIZE:]]
    for prepared, group, batch in zip(made, sampled, batches, strict=True):
        worth = [sum(map(ord, reply.text)) % 7 for reply in group]
        pair = [group[worth.index(max(worth))].token_ids, group[worth.index(min(worth))].token_ids]
        assert len(prepared.conditions) == 1
        assert [c.condition for c in prepared.candidates] == [0, 0]
        assert [tuple(c.response_ids) for c in prepared.candidates] == pair
        num_prompt_tokens = len(prepared.conditions[0].prompt_ids)
        assert batch.plan.input_ids.numel() == num_prompt_tokens + sum(map(len, pair))
    lengths = [len(one.candidates[0].response_ids) for one in made]
    assert totals.num_pairs == 2
    assert totals.num_chosen_tokens == sum(lengths)
    assert counts["sampled_tokens"] == sum(len(reply.token_ids) for reply in said[0])


def test_rows_that_tie_weigh_nothing_and_are_counted(set_up_as, recipe, reward):
    """The loss is that of the other rows, still divided by all of them."""

    def worth(rollout: Rollout) -> float:
        return float(len(rollout.text)) if rollout.row.id == "row-0" else 1.0

    reward(worth)
    parts, _ = set_up_as(optim={"batch_size": 6})
    batches, totals, counts = parts.online_step(0)
    (batch,) = batches
    numbers = [parts.survey.rows[place] for place in batch.places]
    assert batch.table.weight.tolist() == [float(number == 0) for number in numbers]
    assert (totals.num_pairs, counts["paired"], counts["tied"]) == (6, 1, 5)
    (chosen,) = (batch.sizes[place][0] for place, n in enumerate(numbers) if n == 0)
    assert totals.num_chosen_tokens == chosen
    metrics, _ = trained(recipe("tied", optim={"batch_size": 6, "steps": 1}))
    assert metrics[0]["train/tied"] == pytest.approx(5 / 6)
    assert metrics[0]["train/paired"] == pytest.approx(1 / 6)
    assert metrics[0]["train/loss"] == pytest.approx(math.log(2) / 6, abs=1e-6)
    assert metrics[0]["train/grad_norm"] > 0


def test_a_step_of_ties_alone_teaches_nothing_and_says_so(recipe, reward, wordy, caplog):
    reward(lambda rollout: 1.0)
    with caplog.at_level(logging.WARNING):
        metrics, weights = trained(recipe(loss={"name": "dpo", "sft_weight": 1.0}))
    assert "no prompt gave a pair: nothing is learnt" in caplog.text
    assert metrics[0]["train/loss"] == metrics[0]["train/grad_norm"] == 0
    assert largest(weights, load_file(wordy / "model.safetensors")) == 0


@pytest.mark.parametrize("name", ["dpo", "ipo", "hinge", "dpo_kl", "robust"])
def test_losses_over_pairs_train_on_them(recipe, reward, wordy, name):
    lora = {"rank": 2, "alpha": 4} if name == "ipo" else None
    made = recipe(loss={"name": name}, model={"lora": lora}, optim={"steps": 1})
    (line,) = [event.metrics for event in train(made) if isinstance(event, Stepped)]
    assert line["train/grad_norm"] > 0
    assert line["train/margin"] == pytest.approx(0, abs=1e-6)


def test_cutting_a_step_and_its_layout_change_rounding_alone(recipe, reward):
    loss = {"name": "dpo", "sft_weight": 0.5}
    whole, weights = trained(recipe("whole", loss=loss))
    for name, sections in {
        "cut": {"optim": {"micro_batch_size": 1}},
        "padded": {"scorer": {"layout": "padded"}},
    }.items():
        metrics, other = trained(recipe(name, loss=loss, **sections))
        for one, same in zip(whole, metrics, strict=True):
            for key in ("loss", "reward", "grad_norm", "nll", "chosen_score", "paired"):
                assert one[f"train/{key}"] == pytest.approx(same[f"train/{key}"], rel=1e-4)
        assert largest(weights, other) < 1e-4


def test_a_stopped_run_ends_in_the_same_bits(recipe, reward):
    sections: dict[str, Any] = {"optim": {"steps": 4}, "run": {"save_every_steps": 1}}
    whole, weights = trained(recipe("whole", **sections))
    killed = recipe("killed", **sections)
    events = train(killed)
    for event in events:
        if isinstance(event, Saved) and event.step == 2:
            break
    events.close()
    _, again = trained(killed)
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    file = killed.run.output / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["train/loss"] for line in lines] == [line["train/loss"] for line in whole]


def test_a_reward_that_raises_stops_the_run_and_names_the_row(recipe, reward):
    def broken(rollout: Rollout) -> float:
        raise ZeroDivisionError("no such thing")

    reward(broken)
    with pytest.raises(RewardError, match=r"row row-\d, rollout 0: the reward accuracy failed"):
        list(train(recipe()))


def test_real_rewards_are_those_of_the_recipe(recipe):
    rewards = {"functions": [{"name": "length", "max_tokens": 4, "buffer_tokens": 4}]}
    made = recipe(source={"annotator": {"name": "rule", "rewards": rewards}}, optim={"steps": 1})
    metrics, _ = trained(made)
    assert metrics[0]["train/reward/length"] == metrics[0]["train/reward"] < 0


# What does not go together


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"source": {"group_size": 1}}, "greater than or equal to 2"),
        ({"source": {"annotator": {"name": "answer"}}}, "one of"),
        ({"loss": {"name": "rrpo"}}, "reads chosen_spans"),
        ({"loss": {"name": "rdpo"}}, "reads contrast_images"),
        ({"loss": {"name": "mm_dpo"}}, "reads score_gap"),
        ({"loss": {"name": "sft"}}, "has no use for"),
        ({"loss": {"name": "soft_labels"}}, "annotator=rule does not say"),
        ({"loss": {"name": "soft_labels"}, "source": BY_JUDGE}, "annotator=judge does not say"),
        ({"loss": {"name": "grpo"}}, "has no use for"),
        ({"reference": "cached"}, "reference=cached could not have"),
    ],
)
def test_recipes_that_cannot_be_are_refused(recipe, sections, told):
    with pytest.raises(ConfigError, match=told):
        recipe(**sections)


def test_prompts_have_no_pair_to_average_with(recipe, prompts):
    online = {"source": {"name": "rollouts"}, "use": {"name": "average"}}
    with pytest.raises(ConfigError, match="needs a pair of the dataset's own"):
        recipe(data={"path": str(prompts), "online": online})


def test_a_dataset_of_another_kind_is_refused_before_a_model_is_loaded(recipe, pairs, prompts):
    nowhere = {"path": "no/such/model"}
    with pytest.raises(SchemaMismatch, match=r"wanted verifiable.*source\.name=annotated"):
        list(train(recipe(data={"path": str(pairs)}, model=nowhere)))
    plain = recipe(data={"path": str(prompts), "online": None}, model=nowhere)
    with pytest.raises(SchemaMismatch, match=r"source\.name=rollouts"):
        list(train(plain))


def test_estimate_and_precompute_refuse_prompts(recipe, tmp_path):
    (tmp_path / "recipe.yaml").write_text(dump_yaml(recipe()))
    with pytest.raises(ConfigError, match=r"got data\.online\.source\.name=rollouts"):
        load_text_recipe(tmp_path / "recipe.yaml")
