"""RRPO from the dataset to the weights: marks, KL, references, layouts and cuts of a batch."""

from __future__ import annotations

import math

import pytest
import torch

from mmalign.errors import ConfigError
from mmalign.losses import RRPO
from mmalign.prepare import RowDropped
from mmalign.records import Preference, Span
from mmalign.spans import differing_spans
from mmalign.store import write_dataset
from trainers.loop import Stepped, train
from trainers.objectives.base import objective_for

LOSS = {"name": "rrpo", "alpha": 0.1, "beta": 0.3, "sft_weight": 0.1}


@pytest.fixture(scope="module")
def marked(tmp_path_factory, preference):
    """The tiny pairs with the phrases that differ marked."""
    path = tmp_path_factory.mktemp("marked")
    rows = []
    for number in range(8):
        chosen, rejected = f"It is a red {number} there.", f"It is a dark red {number + 1} there."
        ours, theirs = differing_spans(chosen, rejected)
        rows.append(
            preference(
                number, chosen=chosen, rejected=rejected, chosen_spans=ours, rejected_spans=theirs
            )
        )
    write_dataset(path, Preference, rows, builder="test")
    return path


def metrics(recipe) -> list[dict[str, float]]:
    return [event.metrics for event in train(recipe) if isinstance(event, Stepped)]


def run(recipe, marked, tmp_path, name, **changes):
    sections = {"data": {"path": str(marked)}, "loss": LOSS, "reference": "auto"} | changes
    sections["run"] = {"output": str(tmp_path / name)}
    return metrics(recipe(**sections))


def same(one, other, tolerance=2e-5):
    for a, b in zip(one, other, strict=True):
        for key in ("train/loss", "train/kl", "train/margin", "train/grad_norm"):
            assert a[key] == pytest.approx(b[key], abs=tolerance, rel=1e-4), key


def test_it_starts_at_log_two_without_a_kl_and_learns(recipe, marked, tmp_path):
    loss = LOSS | {"sft_weight": 0.0}
    made = run(recipe, marked, tmp_path, "run", loss=loss)
    assert made[0]["train/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert made[0]["train/kl"] == pytest.approx(0, abs=1e-6)
    assert made[-1]["train/loss"] < made[0]["train/loss"]
    assert made[-1]["train/kl"] > 0


def test_references_layouts_and_cuts_give_one_training(recipe, marked, tmp_path):
    whole = run(recipe, marked, tmp_path, "whole")
    same(whole, run(recipe, marked, tmp_path, "copy", reference="frozen_copy"))
    same(whole, run(recipe, marked, tmp_path, "padded", scorer={"layout": "padded"}))
    cut = {"lr": 1e-3, "batch_size": 4, "steps": 6, "micro_batch_size": 1}
    same(whole, run(recipe, marked, tmp_path, "cut", optim=cut))


def test_everything_marked_and_no_kl_is_dpo(recipe, marked, tmp_path, preference):
    rows = []
    for number in range(8):
        row = preference(number)
        rows.append(
            preference(
                number,
                chosen_spans=(Span(start=0, end=len(row.chosen), phrase=1),),
                rejected_spans=(Span(start=0, end=len(row.rejected), phrase=1),),
            )
        )
    write_dataset(tmp_path / "data", Preference, rows, builder="test")
    losses = [
        [m["train/loss"] for m in run(recipe, tmp_path / "data", tmp_path, name, loss=loss)]
        for name, loss in (
            ("rrpo", {"name": "rrpo", "alpha": 0.0}),
            ("dpo", {"name": "dpo"}),
        )
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_a_head_that_lora_adapts_is_compared_as_it_was(recipe, marked, tmp_path):
    """The reference's head is the one below the adapter, or the KL would miss what it learns."""
    lora = {"rank": 4, "alpha": 8, "targets": r"(.*language_model.*\.q_proj|.*lm_head)"}
    sections = {"model": {"lora": lora}}
    by_adapter = run(recipe, marked, tmp_path, "adapter", **sections)
    by_copy = run(recipe, marked, tmp_path, "copy", reference="frozen_copy", **sections)
    same(by_adapter, by_copy)
    assert by_adapter[-1]["train/kl"] > 0


def test_rows_without_a_phrase_are_dropped(recipe, marked, tmp_path, preference):
    from mmalign.models.load import load_policy

    policy = load_policy(recipe(data={"path": str(marked)}, loss=LOSS).model)
    objective = objective_for(RRPO(), policy.preparer, tmp_path)
    with pytest.raises(RowDropped) as drop:
        objective.prepare(preference(0))
    assert drop.value.reason == "no_chosen_spans"
    objective.preparer.limits = objective.preparer.limits.model_copy(update={"max_tokens": 60})
    far = preference(0, chosen="a" * 200, chosen_spans=(Span(start=190, end=200, phrase=1),))
    with pytest.raises(RowDropped) as drop:
        objective.prepare(far)
    assert drop.value.reason == "spans_cut"


def test_a_reference_that_keeps_no_distributions_is_refused(recipe, marked):
    with pytest.raises(ConfigError, match="compares whole distributions"):
        recipe(data={"path": str(marked)}, loss=LOSS, reference="cached")


def test_marks_are_the_tokens_of_the_phrase(recipe, marked, tmp_path):
    from mmalign.models.load import load_policy
    from mmalign.store import open_dataset

    policy = load_policy(recipe(data={"path": str(marked)}, loss=LOSS).model)
    dataset = open_dataset(marked, Preference)
    row = objective_for(RRPO(), policy.preparer, dataset.media_root).prepare(dataset[3])
    decode = policy.preparer.tokenizer.decode
    told = [
        decode([t for t, mark in zip(c.response_ids, c.marked or (), strict=True) if mark])
        for c in row.candidates
    ]
    assert told == ["3", "dark4"]
    assert torch.tensor(row.candidates[0].marked).sum() == 1
