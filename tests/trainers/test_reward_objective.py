"""Rows for reward models: one critique under each response, ties kept, the head's own prompt."""

from __future__ import annotations

import pytest

from mmalign.errors import ConfigError, ModelError, SchemaMismatch
from mmalign.losses import DPO, CritiqueReward, Reward
from mmalign.models.load import load_processor
from mmalign.prepare import Preparer, RowDropped, TokenLimits
from mmalign.records import Example, Preference, user
from mmalign.reward import critic_turn
from mmalign.store import open_dataset, write_dataset
from trainers.objectives.base import check_dataset, collate, objective_for
from trainers.objectives.base import table as make_table

TEMPLATE = "{question} / {response} ?"
CRITIQUES = {"chosen_critique": "It is good.", "rejected_critique": "It is bad, very bad."}


@pytest.fixture(scope="module")
def preparer(tiny_model) -> Preparer:
    made = load_processor(str(tiny_model))
    made.config.reward_head = {"prompt": TEMPLATE, "seed": 0}
    return made


def prepared(loss, preparer, tmp_path, record):
    return objective_for(loss, preparer, tmp_path).prepare(record)


def test_candidates_are_critiques_under_the_responses_they_judge(preparer, tmp_path, preference):
    record = preference(1, **CRITIQUES)
    row = prepared(CritiqueReward(), preparer, tmp_path, record)
    texts = [preparer.tokenizer.decode(c.prompt_ids) for c in row.conditions]
    assert "What is it? 1 / It is 1! ?" in texts[0]
    assert "What is it? 1 / A cat, very red. ?" in texts[1]
    assert [len(c.images) for c in row.conditions] == [1, 1]
    assert row.conditions[0].images[0].key == row.conditions[1].images[0].key
    wanted = [
        preparer.response(critic_turn(TEMPLATE, record.prompt, response), critique)
        for response, critique in (
            (record.chosen, record.chosen_critique),
            (record.rejected, record.rejected_critique),
        )
    ]
    assert [c.response_ids for c in row.candidates] == wanted
    assert [c.response_ids[-1] for c in row.candidates] == [preparer.tokenizer.eos_token_id] * 2
    batch, table = collate([row, row]), make_table([row, row])
    assert [c.condition for c in batch.candidates] == [0, 1, 0, 1]
    assert (table.chosen.tolist(), table.rejected.tolist()) == ([0, 2], [1, 3])


def test_without_critiques_the_end_of_the_turn_is_the_candidate(preparer, tmp_path, preference):
    row = prepared(Reward(), preparer, tmp_path, preference(0, **CRITIQUES))
    end = preparer.tokenizer.eos_token_id
    assert [c.response_ids for c in row.candidates] == [[end], [end]]
    with_them = prepared(CritiqueReward(), preparer, tmp_path, preference(0, **CRITIQUES))
    assert [c.prompt_ids for c in row.conditions] == [c.prompt_ids for c in with_them.conditions]


def test_ties_and_weights_reach_the_loss(preparer, tmp_path, preference):
    changes = [{"p_target": 0.5}, {"weight": 0.25}, {"p_target": 0.2}]
    rows = [
        prepared(CritiqueReward(), preparer, tmp_path, preference(n, **CRITIQUES, **change))
        for n, change in enumerate(changes)
    ]
    table = make_table(rows)
    assert table.p_target.tolist() == pytest.approx([0.5, 1.0, 0.2])
    assert table.weight.tolist() == [1.0, 0.25, 1.0]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rejected_critique": None}, "no_critiques"),
        ({"chosen_critique": " "}, "no_critiques"),
        ({"chosen": "one", "rejected": "one"}, "same_response"),
        ({"weight": 0.0}, "no_weight"),
        ({"rejected": " "}, "bad_rejected"),
    ],
)
def test_rows_that_teach_no_reward_say_why(preparer, tmp_path, preference, changes, reason):
    record = preference(0, **(CRITIQUES | changes))
    with pytest.raises(RowDropped) as drop:
        prepared(CritiqueReward(), preparer, tmp_path, record)
    assert drop.value.reason == reason
    if reason == "no_critiques":
        prepared(Reward(), preparer, tmp_path, record)


def test_a_critique_over_the_limit_is_cut_and_a_prompt_over_it_dropped(
    preparer, tmp_path, preference
):
    whole = prepared(CritiqueReward(), preparer, tmp_path, preference(0, **CRITIQUES))

    def limited(most: int) -> Preparer:
        limits = TokenLimits(max_tokens=most)
        return Preparer(preparer.processor, preparer.config, preparer.family, limits)

    room = len(whole.conditions[1].prompt_ids) + 5
    cut = prepared(CritiqueReward(), limited(room), tmp_path, preference(0, **CRITIQUES))
    assert cut.candidates[1].response_ids == whole.candidates[1].response_ids[:5]
    with pytest.raises(RowDropped) as drop:
        prepared(Reward(), limited(20), tmp_path, preference(0))
    assert drop.value.reason == "too_long"


def test_a_model_without_a_head_is_refused(tiny_model, tmp_path):
    with pytest.raises(ModelError, match=r"has none\. Set model\.reward_head=\{\}"):
        objective_for(Reward(), load_processor(str(tiny_model)), tmp_path)


def test_a_dataset_without_critiques_is_refused_before_a_model_is_loaded(tmp_path, preference):
    write_dataset(tmp_path / "bare", Preference, [preference(0)])
    bare = open_dataset(tmp_path / "bare")
    check_dataset(bare, Reward())
    with pytest.raises(SchemaMismatch, match=r"the column rejected_critique.*critiques"):
        check_dataset(bare, CritiqueReward())
    write_dataset(tmp_path / "examples", Example, [Example(id="e", prompt=user("Hi"))])
    with pytest.raises(SchemaMismatch, match="'reward' cannot train on example records"):
        check_dataset(open_dataset(tmp_path / "examples"), Reward())


def test_a_head_that_no_loss_reads_is_refused(recipe):
    assert "reward_head" not in DPO().needs
    with pytest.raises(ConfigError, match="which loss 'rdpo' does not read"):
        recipe(model={"reward_head": {}})
    recipe(model={"reward_head": {}}, loss={"name": "reward"})
