from __future__ import annotations

import re

import pytest

from mmalign.models.load import load_policy, load_processor, part_table
from mmalign.models.quantization import num_bytes
from trainers.estimate import count_parts, estimate, row_tokens
from trainers.memory import memory_of, model_sizes


@pytest.mark.parametrize(
    "changes",
    [
        {"lora": None},
        {"lora": None, "train": {"vision": True, "projector": True, "language_model": False}},
        {"lora": {"rank": 4, "alpha": 8}},
        {"lora": {"rank": 4, "alpha": 8}, "quantization": {}},
        {"lora": {"rank": 4, "alpha": 8, "targets": ["q_proj", "v_proj"]}},
    ],
)
def test_counts_are_those_of_the_loaded_model(recipe, changes):
    from accelerate import init_empty_weights
    from transformers import AutoModelForImageTextToText

    config = recipe(model=changes).model
    loaded = load_processor(config.path)
    with init_empty_weights():
        empty = AutoModelForImageTextToText.from_config(loaded.config)
    assert count_parts(empty, loaded.family, config) == part_table(load_policy(config))


def test_tokens_are_measured_where_there_is_a_dataset(recipe, tmp_path):
    made = recipe()
    loaded = load_processor(made.model.path)
    found = row_tokens(made, loaded)
    assert found.source.startswith("10 rows")
    assert 0 < found.mean < found.longest
    missing = row_tokens(recipe(data={"path": str(tmp_path / "none"), "max_tokens": 500}), loaded)
    assert missing.longest == 1000
    assert "not there yet" in missing.source


def test_memory_adds_up(recipe):
    made = recipe(model={"lora": None}, optim={"micro_batch_size": 2})
    policy = load_policy(made.model)
    parts = part_table(policy)
    every = sum(part.num_parameters for part in parts)
    sizes = model_sizes(policy.model, policy.family, parts)
    found = memory_of(made, sizes, tokens=2 * 100)
    assert found.weights == found.reference == 4 * every
    assert found.optimizer == 2 * found.gradients
    assert found.activations == 2 * 100 * 2 * 32 * 34 * 2
    saving = recipe(
        model={"lora": None, "gradient_checkpointing": True}, optim={"micro_batch_size": 2}
    )
    saved = memory_of(saving, sizes, tokens=2 * 100)
    assert saved.activations == 2 * 100 * 32 * (34 + 2 * 2) * 2


@pytest.mark.parametrize("double", [True, False])
def test_4_bit_weights_are_counted_as_loaded(recipe, double):
    lora = {"rank": 4, "alpha": 8}
    made = recipe(model={"lora": lora, "quantization": {"double_quant": double}})
    policy = load_policy(made.model)
    sizes = model_sizes(policy.model, policy.family, part_table(policy))
    assert sizes.num_linear == 2 * (4 * 32 * 32 + 3 * 32 * 32)
    weights = memory_of(made, sizes, tokens=0).weights
    # Each layer is 1,024 weights here, and so its scale of scales is of 16 blocks and not of 256.
    assert weights == pytest.approx(num_bytes(policy.model), rel=1e-3)
    whole = recipe(model={"lora": lora})
    saved = memory_of(whole, sizes, tokens=0).weights - weights
    assert saved == pytest.approx(sizes.num_linear * (3.4841 if double else 3.4375), rel=1e-4)
    assert "14,336 weights in 4 bits (nf4)" in estimate(made)


def test_the_text_says_what_trains_and_what_it_takes(recipe):
    text = estimate(recipe())
    assert re.search(r"^language_model +[\d,]+ +3,584$", text, re.MULTILINE)
    assert "memory of one process" in text
    assert re.search(r"^reference copy +0\.00$", text, re.MULTILINE)
