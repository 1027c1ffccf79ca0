"""What the error says where memory runs out: by hand, and against runs that it then lets finish."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from mmalign.config import apply_overrides, validate
from mmalign.errors import TrainingError
from mmalign.scoring.scorer import Scorer
from mmalign.store import open_dataset
from trainers import advice as module
from trainers.advice import Change, Held, advice, as_text
from trainers.config import Recipe
from trainers.directory import RunDirectory
from trainers.loop import Finished, train
from trainers.memory import ConditionSize, ModelSizes, memory_of, row_tokens
from trainers.setup import set_up

# In 16 bits with LoRA: 18 MB frozen, 4 MB of adapter, 4 MB of gradients, 8 MB of moments, which is
# 34 MB that stand; and 100 x 10 x 34 = 34,000 bytes for each token.
SIZES = ModelSizes(
    num_parameters=10_000_000, num_trainable=1_000_000, num_linear=8_000_000, layers=10, width=100
)
ROW = (ConditionSize(text=40, images=(160,), clips=(), responses=(30, 20)),)
# Four rows of two candidates, each as long as the longest: 4 x 2 x 230.
PADDED = Held(rows=(ROW,) * 4, layout="padded", packed=True, tokens=1840)
MB = 1_000_000


@pytest.fixture
def narrow(recipe):
    return recipe(model={"dtype": "bfloat16"}, loss={"name": "dpo"})


def values(changes: list[Change]) -> dict[str, str | None]:
    return {change.setting: change.value for change in changes}


def test_sizes_of_a_row_are_those_of_its_plan(recipe):
    made = recipe(optim={"micro_batch_size": 4})
    run = RunDirectory(made)
    parts = set_up(made, open_dataset(made.data.path), run)
    run.release()
    for layout in ("padded", "shared_prefix"):
        planner = replace(parts.rows.planner, layout=layout)
        parts.rows.planner = planner
        batch = parts.rows.batch(parts.survey, [0, 3, 5])
        tokens = row_tokens(batch.tokens, layout, packed=planner.packed)
        assert tokens == batch.plan.input_ids.numel()


def test_tokens_of_both_layouts():
    short = (ConditionSize(text=40, images=(), clips=(), responses=(30, 20)),)
    rows = (*PADDED.rows, short)
    assert row_tokens(rows, "padded", packed=True) == 5 * 2 * 230
    assert row_tokens(rows, "shared_prefix", packed=False) == 5 * 250
    assert row_tokens(rows, "shared_prefix", packed=True) == 4 * 250 + 90


def test_each_setting_by_itself(narrow):
    """80 MB, a tenth of it left free: 72 - 34 = 38 MB, which are 1,117 tokens."""
    assert memory_of(narrow, SIZES, 1840).standing == 34 * MB
    found = advice(narrow, SIZES, PADDED, 80 * MB, token_pixels=784)
    assert values(found) == {
        "optim.micro_batch_size": "2",  # 920 tokens; 3 rows would not divide the batch of 4
        "model.max_pixels": str(69 * 784),  # 8 x (40 + 69 + 30) = 1,112
        "data.max_tokens": "139",  # the same, by the limit that shrinks pictures
        "scorer.layout": "shared_prefix",  # 1,000 tokens
        "model.gradient_checkpointing": "true",  # 5,400 bytes for each token
        "model.quantization": None,  # saves 12 MB, and 34 + 63 - 12 = 85
    }
    assert found[0].total == 34 * MB + 920 * 34_000
    assert found[-1].total == pytest.approx(84.7 * MB, rel=1e-3)


def test_where_a_pictures_size_does_not_matter_the_prompt_stays(narrow):
    """LLaVA-1.5: 200 prompt tokens are left, 8 x 201 = 1,608 at the least."""
    found = values(advice(narrow, SIZES, PADDED, 80 * MB, token_pixels=None))
    assert "model.max_pixels" not in found
    assert found["data.max_tokens"] is None
    # Prompts of 140 and responses of up to 90: 90 MB allow (81 - 34) / 0.034 = 1,382 tokens.
    row = (ConditionSize(text=40, images=(100,), clips=(), responses=(90, 20)),)
    held = replace(PADDED, rows=(row,) * 4)
    found = values(advice(narrow, SIZES, held, 90 * MB, token_pixels=None))
    assert found["data.max_tokens"] == str(1382 // 8)


def test_an_estimate_that_was_too_low_is_raised_to_what_was_needed(narrow):
    """120 MB ran out although 34 + 62.6 were reckoned: activations count 1.375 times."""
    found = {c.setting: c for c in advice(narrow, SIZES, PADDED, 120 * MB, token_pixels=None)}
    factor = (120 - 34) / 62.56
    assert found["optim.micro_batch_size"].value == "2"
    assert found["optim.micro_batch_size"].total == pytest.approx((34 + factor * 31.28) * MB)
    assert found["scorer.layout"].total == pytest.approx((34 + factor * 34) * MB)
    # Where nothing but the activations' error is known, it is never a matter of a few tokens.
    assert found["data.max_tokens"].value is None


def test_what_stands_beside_the_batch_can_be_too_much_by_itself(narrow):
    found = values(advice(narrow, SIZES, PADDED, 30 * MB, token_pixels=784))
    assert set(found.values()) == {None}
    text = as_text(advice(narrow, SIZES, PADDED, 30 * MB, token_pixels=784))
    assert text.startswith("by the estimate none of these suffices alone, so combine them: optim.")
    packed = values(advice(narrow, SIZES, PADDED, 94 * MB, token_pixels=784))
    assert packed["model.quantization"] is None
    assert values(advice(narrow, SIZES, PADDED, 95 * MB, token_pixels=784))["model.quantization"]


def test_clips_are_given_fewer_frames_and_shared_rows_no_other_layout(recipe):
    """16 frames of 100 tokens: 34 + 34 x 1.65 = 90 MB; 60 MB are 588 tokens, 8 x 50 + 50."""
    row = (ConditionSize(text=20, images=(), clips=(1600,), responses=(20, 10)),)
    held = Held(rows=(row,), layout="shared_prefix", packed=False, tokens=1650)
    made = recipe(model={"dtype": "bfloat16", "gradient_checkpointing": True})
    wide = recipe(model={"dtype": "bfloat16"})
    assert values(advice(wide, SIZES, held, 60 * MB, token_pixels=784)) == {
        "model.frames.num_frames": "4",  # 450 tokens; 6 frames would be 650
        "data.max_tokens": None,  # a clip is not cut by a token here
        "model.gradient_checkpointing": "true",
        "model.quantization": None,
    }
    assert "model.gradient_checkpointing" not in values(
        advice(made, SIZES, held, 30 * MB, token_pixels=784)
    )


def test_a_reference_copy_can_be_cached_unless_distributions_are_compared(recipe):
    whole = recipe(model={"lora": None}, loss={"name": "dpo"})
    assert "reference" in values(advice(whole, SIZES, PADDED, 80 * MB, token_pixels=None))
    kl = recipe(model={"lora": None}, loss={"name": "dpo_kl"})
    assert "reference" not in values(advice(kl, SIZES, PADDED, 80 * MB, token_pixels=None))


@pytest.mark.parametrize("mb", [50, 60, 70, 80, 90, 96])
def test_the_advised_micro_batch_is_estimated_below_the_limit(narrow, mb):
    (found,) = [
        change
        for change in advice(narrow, SIZES, PADDED, mb * MB, token_pixels=None)
        if change.setting == "optim.micro_batch_size"
    ]
    if found.value is not None:
        tokens = PADDED.tokens_of(PADDED.rows[: int(found.value)])
        assert memory_of(narrow, SIZES, tokens).total < mb * MB
    assert (found.value is None) == (0.9 * mb < 34 + 0.034 * 460)


@pytest.mark.parametrize(
    ("setting", "rows"), [("optim.micro_batch_size", 2.5), ("scorer.layout", 3.5)]
)
def test_a_run_that_follows_the_advice_finishes(recipe, monkeypatch, setting, rows):
    """A device that holds exactly what the estimate says, on a tiny model."""
    sections = {
        "loss": {"name": "dpo"},
        "scorer": {"layout": "padded"},
        "optim": {"steps": 2, "micro_batch_size": 4},
    }
    made = recipe(**sections)
    run = RunDirectory(made)
    parts = set_up(made, open_dataset(made.data.path), run)
    run.release()
    tokens = min(parts.rows.batch(parts.survey, [n]).plan.input_ids.numel() for n in range(10))
    memory = memory_of(made, parts.memory.sizes, rows * tokens)
    device = int(memory.total / (1 - module.HEADROOM))
    monkeypatch.setattr(module, "available_bytes", lambda _: device)
    forward = Scorer.forward

    def limited(self, plan, **asked):
        if memory_of(made, parts.memory.sizes, plan.input_ids.numel()).total > device:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
        return forward(self, plan, **asked)

    monkeypatch.setattr(Scorer, "forward", limited)
    with pytest.raises(TrainingError, match=r"memory ran out; got a micro-batch of 4 rows") as told:
        list(train(made))
    (value,) = re.findall(rf"{re.escape(setting)}=(\w+)", str(told.value))
    changed = apply_overrides(made.model_dump(mode="json"), [f"{setting}={value}"], "advice")
    changed = apply_overrides(changed, [f"run.output={made.run.output}-again"], "advice")
    assert isinstance(list(train(validate(changed, Recipe, "advised")))[-1], Finished)


def test_the_cpus_allocator_is_understood_and_other_errors_pass(recipe, monkeypatch):
    def full(*arguments, **named):
        torch.empty(2**60, dtype=torch.uint8)

    made = recipe(loss={"name": "dpo"})
    monkeypatch.setattr(Scorer, "forward", full)
    with pytest.raises(TrainingError, match=r"the machine's memory ran out"):
        list(train(made))

    def broken(*arguments, **named):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(Scorer, "forward", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        list(train(made))
