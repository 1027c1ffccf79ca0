"""Pairs from the current policy: online BDHS, averaged and tossed pairs, annotated samples."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from mmalign.errors import ConfigError
from mmalign.generate.local import LocalGenerator
from mmalign.hallucinate import BiasItem, sample_negatives
from mmalign.losses import DPO
from mmalign.models.load import load_policy
from mmalign.records import Preference
from mmalign.similarity import TokenOverlap
from mmalign.store import open_dataset
from trainers.loop import Finished, Saved, Stepped, train
from trainers.objectives.base import RowPair, objective_for, table
from trainers.online import merged, online_pairs, without_weight

BDHS = {
    "name": "bdhs",
    "bias": {
        "tries": 2,
        "similarity": {"name": "token_overlap"},
        "corruption": {"name": "mask", "threshold": 0.5},
        "guidance": {"name": "guided", "sentence_tokens": 6},
        "drop_refusals": False,
    },
    "decoding": {"max_new_tokens": 6},
}
SAMPLES = {"name": "annotated", "decoding": {"max_new_tokens": 6}}


def online(source=BDHS, **use):
    return {"online": {"source": source, "use": use or {"name": "replace"}}}


def losses(recipe) -> list[float]:
    return [e.metrics["train/loss"] for e in train(recipe) if isinstance(e, Stepped)]


@pytest.fixture
def made(recipe, pairs):
    """OnlinePairs over the tiny policy, the dataset's records, and their prepared rows."""

    def make(config):
        whole = recipe(data=config, loss={"name": "dpo"})
        policy = load_policy(whole.model)
        dataset = open_dataset(pairs, Preference)
        objective = objective_for(DPO(), policy.preparer, dataset.media_root)
        records = [dataset[i] for i in range(4)]
        own = [objective.prepare(record) for record in records]
        assert whole.data.online is not None
        maker = online_pairs(whole.data.online, policy, objective, dataset.media_root, 0)
        # Untrained, the model never ends a turn: what the limit cuts counts as finished here.
        real = maker.generator.generate
        maker.generator.generate = lambda requests, sampling: [
            replace(reply, finished=True) for reply in real(requests, sampling)
        ]
        return maker, records, own

    return make


def texts(policy, rows):
    decode = policy.preparer.tokenizer.decode
    return [[decode(c.response_ids[:-1]) for c in row.candidates] for row in rows]


def test_at_the_first_step_the_negatives_are_the_builders(made):
    maker, records, own = made(online())
    rows = maker.rows(0, records, own)
    source = maker.config.source
    items = [BiasItem(id=r.id, prompt=r.prompt, images=r.images, chosen=r.chosen) for r in records]
    found = sample_negatives(
        items,
        maker.generator,
        similarity=TokenOverlap(),
        settings=source.bias,
        sampling=source.decoding.sampling(0),
    )
    assert any(negative.text for negative in found)
    for row, record, negative, old in zip(rows, records, found, own, strict=True):
        if negative.text is None:
            assert row.pairs[0].weight == 0
            assert row.candidates == old.candidates
        else:
            again = replace(record, rejected=negative.text)
            assert row.candidates == maker.objective.prepare(again).candidates
    # log-probabilities use the clean picture: conditions are the dataset's own
    assert [r.conditions[0].prompt_ids for r in rows] == [r.conditions[0].prompt_ids for r in own]


def test_steps_draw_anew_and_repeat_themselves(made):
    maker, records, own = made(online())
    one, again, other = (texts(maker.policy, maker.rows(s, records, own)) for s in (1, 1, 2))
    assert one == again
    assert one != other


def test_the_policy_of_the_moment_speaks(made):
    maker, records, own = made(online())
    maker.policy.model.train()
    before = texts(maker.policy, maker.rows(1, records, own))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in maker.policy.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=2.0)
    assert texts(maker.policy, maker.rows(1, records, own)) != before
    assert maker.policy.model.training  # as it was before


def test_average_holds_both_pairs_and_one_chosen(made):
    maker, records, own = made(online(name="average", gamma=0.75))
    rows = maker.rows(0, records, own)
    usable = [row for row in rows if row.pairs[1].weight]
    assert usable
    for row in usable:
        assert len(row.candidates) == 3
        assert row.pairs == (
            replace(row.pairs[0], chosen=0, rejected=1, weight=0.75),
            replace(row.pairs[1], chosen=0, rejected=2, weight=0.25),
        )
    made_table = table(rows)
    assert made_table.weight is not None
    assert len(made_table.chosen) == 2 * len(rows)


def test_average_with_equal_negatives_is_the_pair_itself(made):
    _, _, own = made(online())
    row = merged(own[0], own[0], 0.3)
    assert [pair.weight for pair in row.pairs] == pytest.approx([0.3, 0.7])
    first, second = (row.candidates[pair.rejected or 0] for pair in row.pairs)
    assert first.response_ids == second.response_ids
    lost = merged(own[0], None, 0.3)
    assert [pair.weight for pair in lost.pairs] == [0.3, 0.0]
    assert without_weight(own[0]).pairs == (RowPair(rejected=1, weight=0.0),)


def test_another_chosen_response_is_a_candidate_of_its_own(made):
    maker, records, own = made(online())
    other = maker.objective.prepare(replace(records[0], chosen="Not that."))
    row = merged(own[0], other, 0.5)
    assert len(row.candidates) == 4
    assert (row.pairs[1].chosen, row.pairs[1].rejected) == (2, 3)
    assert row.candidates[2].response_ids == other.candidates[0].response_ids


def test_a_coin_of_one_keeps_every_pair_and_a_fair_one_about_half(made):
    maker, records, own = made(online(name="coin", p=1.0))
    assert maker.rows(3, records, own) == own
    fair, _, _ = made(online(name="coin", p=0.5))
    tossed = [fair._tossed(step, f"row-{i}", 0.5) for step in range(40) for i in range(50)]
    assert abs(sum(tossed) / 2000 - 0.5) < 4 * math.sqrt(0.25 / 2000)


def test_annotated_samples_are_ordered_by_the_answer(made):
    maker, records, own = made(online(SAMPLES))
    rows = maker.rows(0, records, own)
    measure = TokenOverlap()
    ordered = [
        (record.chosen, *written)
        for record, row, written in zip(records, rows, texts(maker.policy, rows), strict=True)
        if row.pairs[0].weight
    ]
    for answer, chosen, rejected in ordered:
        assert measure([answer], [chosen]) > measure([answer], [rejected])


def test_gamma_one_is_plain_training_and_the_first_loss_is_log_two(recipe, tmp_path):
    plain = losses(recipe(loss={"name": "dpo"}, run={"output": str(tmp_path / "plain")}))
    same = losses(
        recipe(
            data=online(name="average", gamma=1.0),
            loss={"name": "dpo"},
            run={"output": str(tmp_path / "same")},
        )
    )
    assert same == pytest.approx(plain, abs=1e-6)
    assert same[0] == pytest.approx(math.log(2), abs=1e-6)


def test_a_stopped_online_run_ends_as_an_unbroken_one(recipe, tmp_path):
    def run(name, stop):
        made = recipe(
            data=online(name="average", gamma=0.5),
            loss={"name": "dpo", "sft_weight": 0.5},
            run={"output": str(tmp_path / name), "save_every_steps": 3},
        )
        for event in train(made):
            if stop and isinstance(event, Saved):
                return made
            if isinstance(event, Finished):
                return (event.path / "adapter_model.safetensors").read_bytes()
        raise AssertionError

    whole = run("whole", stop=False)
    run("stopped", stop=True)
    assert run("stopped", stop=False) == whole
    written = [
        json.loads(line)["train/loss"]
        for line in (tmp_path / "stopped" / "metrics.jsonl").read_text().splitlines()
    ]
    assert len(written) == 6


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"loss": {"name": "sft"}}, "'sft' has no use for"),
        ({"loss": {"name": "dpo"}, "reference": "cached"}, "reference=cached could not have"),
        ({"loss": {"name": "mm_dpo"}}, "reads score_gap"),
    ],
)
def test_what_does_not_go_together_is_refused(recipe, sections, told):
    with pytest.raises(ConfigError, match=told):
        recipe(data=online(), **sections)


def test_workers_cannot_make_online_pairs(recipe):
    with pytest.raises(ConfigError, match=r"data\.workers=0"):
        recipe(data=online() | {"workers": 2}, loss={"name": "dpo"})


def test_the_generator_is_the_policys_own(made):
    maker, _, _ = made(online())
    assert isinstance(maker.generator, LocalGenerator)
    assert maker.generator.policy is maker.policy
