from __future__ import annotations

from dataclasses import replace

import pytest

from mmalign.errors import MediaError, SchemaMismatch
from mmalign.losses import DPO, RDPO, SFT
from mmalign.models.load import load_processor
from mmalign.prepare import Preparer, RowDropped, TokenLimits
from mmalign.records import Example, Media, Preference, user
from mmalign.store import open_dataset, write_dataset
from trainers.objectives.base import check_dataset, collate, objective_for
from trainers.objectives.base import table as make_table


@pytest.fixture(scope="module")
def preparer(tiny_model) -> Preparer:
    return load_processor(str(tiny_model))


def limited(preparer: Preparer, max_tokens: int) -> Preparer:
    limits = TokenLimits(max_tokens=max_tokens)
    return Preparer(preparer.processor, preparer.config, preparer.family, limits)


def objective(loss, preparer, tmp_path):
    return objective_for(loss, preparer, tmp_path)


def test_rdpo_rows_hold_chosen_rejected_and_chosen_again_under_the_contrast(
    preparer, tmp_path, preference
):
    pair = objective(RDPO(), preparer, tmp_path)
    rows = [pair.prepare(preference(n)) for n in (0, 1)]
    batch, table = collate(rows), make_table(rows)
    assert table.chosen.tolist() == [0, 3]
    assert table.rejected.tolist() == [1, 4]
    assert table.contrast.tolist() == [2, 5]
    assert len(batch.conditions) == 4
    for row in (0, 3):
        chosen, rejected, contrast = batch.candidates[row : row + 3]
        assert chosen.condition == rejected.condition != contrast.condition
        assert chosen.response_ids == contrast.response_ids != rejected.response_ids
        own, other = (batch.conditions[c.condition] for c in (chosen, contrast))
        assert own.images[0].key != other.images[0].key


def test_rows_of_one_prompt_and_picture_share_a_condition(preparer, tmp_path, preference):
    pair = objective(DPO(), preparer, tmp_path)
    rows = [pair.prepare(preference(0)), pair.prepare(preference(0, id="again", chosen="Other."))]
    batch = collate(rows)
    assert len(batch.conditions) == 1
    assert [c.condition for c in batch.candidates] == [0, 0, 0, 0]


def test_a_contrast_equal_to_the_picture_shares_its_condition(preparer, tmp_path, preference):
    same = preference(0)
    row = objective(RDPO(), preparer, tmp_path).prepare(replace(same, contrast_images=same.images))
    assert len(collate([row]).conditions) == 1


def test_counts_are_those_of_the_candidates(preparer, tmp_path, preference):
    row = objective(RDPO(), preparer, tmp_path).prepare(preference(3))
    lengths = [len(candidate.response_ids) for candidate in row.candidates]
    # One token per byte, the template's space first, and one that ends the turn.
    assert row.num_chosen_tokens == lengths[0] == len(" It is 3!!!") + 1
    assert row.num_tokens == sum(lengths) + sum(len(c.prompt_ids) for c in row.conditions)
    assert row.num_bytes > 2 * 16 * 16 * 3 * 4


def test_a_cut_response_is_cut_alike_under_both_pictures(preparer, tmp_path, preference):
    whole = objective(RDPO(), preparer, tmp_path).prepare(preference(0))
    room = len(whole.conditions[0].prompt_ids) + 4
    row = objective(RDPO(), limited(preparer, room), tmp_path).prepare(preference(0))
    assert [len(candidate.response_ids) for candidate in row.candidates] == [4, 4, 4]
    assert row.candidates[0].response_ids == whole.candidates[0].response_ids[:4]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"contrast_images": ()}, "no_contrast_images"),
        ({"p_target": 0.5}, "tie_or_reversed"),
        ({"weight": 0.0}, "no_weight"),
        ({"rejected": " "}, "bad_rejected"),
        ({"images": ()}, "bad_images"),
    ],
)
def test_rows_that_cannot_be_used_say_why(preparer, tmp_path, preference, changes, reason):
    losses = [RDPO()] if "contrast_images" in changes else [RDPO(), DPO(), SFT()]
    for loss in losses:  # A supervised control must see the rows of its comparison.
        with pytest.raises(RowDropped) as drop:
            objective(loss, preparer, tmp_path).prepare(preference(0, **changes))
        assert drop.value.reason == reason


def test_a_missing_picture_is_a_media_error(preparer, tmp_path, preference):
    lost = preference(0, images=(Media(path="lost.png"),))
    with pytest.raises(MediaError, match=r"lost\.png"):
        objective(DPO(), preparer, tmp_path).prepare(lost)


def test_sft_learns_answers_and_chosen_responses(preparer, tmp_path, preference):
    sft = objective(SFT(), preparer, tmp_path)
    example = Example(id="e", prompt=user("Name a digit."), answer="It is 0")
    rows = [sft.prepare(example), sft.prepare(preference(0))]
    assert make_table(rows).chosen.tolist() == [0, 1]
    assert make_table(rows).rejected is None
    assert rows[0].candidates[0].response_ids == rows[1].candidates[0].response_ids
    with pytest.raises(RowDropped, match="no answer"):
        sft.prepare(replace(example, answer=None))


def test_a_dataset_without_the_column_is_refused_with_the_builder_that_makes_it(
    tmp_path, preference
):
    write_dataset(tmp_path, Preference, [preference(n, contrast_images=()) for n in range(3)])
    dataset = open_dataset(tmp_path)
    check_dataset(dataset, DPO())
    with pytest.raises(SchemaMismatch, match=r"'rdpo' needs the column contrast_images.*realign"):
        check_dataset(dataset, RDPO())


def test_weights_multiply_each_rows_share(preparer, tmp_path, preference):
    pair = objective(DPO(), preparer, tmp_path)
    rows = [pair.prepare(preference(0, weight=0.5)), pair.prepare(preference(1))]
    assert make_table(rows).weight.tolist() == [0.5, 1.0]
    assert make_table(rows[1:]).weight is None
    with pytest.raises(RowDropped, match=r"is -1\.0"):
        pair.prepare(preference(0, weight=-1.0))


def test_examples_cannot_be_compared(tmp_path):
    write_dataset(tmp_path, Example, [Example(id="e", prompt=user("Hi"), answer="Ho")])
    dataset = open_dataset(tmp_path)
    check_dataset(dataset, SFT())
    with pytest.raises(SchemaMismatch, match="'dpo' cannot train on example records"):
        check_dataset(dataset, DPO())
