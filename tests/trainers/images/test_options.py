"""Options of runs over images: the average that is saved, fp16, attention."""

from __future__ import annotations

import random
from contextlib import suppress
from functools import partial

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from mmalign.errors import ConfigError, ModelError
from trainers import precision
from trainers.average import Average
from trainers.loop import Finished, Saved, train
from trainers.randomness import untouched_randomness

VALIDATION = {"prompts": ["a seven"], "num_steps": 2, "every_steps": 1}


def test_an_average_by_hand():
    """d = 1/10, 2/11, then the decay 0.2: 1, 2 and 4 give 0.9, 1.8 and 3.56."""
    layer = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(layer.weight)
    average = Average(layer, decay=0.2)
    found = []
    for value in (1.0, 2.0, 4.0):
        torch.nn.init.constant_(layer.weight, value)
        average.update()
        with average.in_place():
            found.append(layer.weight.item())
        assert layer.weight.item() == value
    assert found == pytest.approx([0.9, 0.9 * 2 / 11 + 2 * 9 / 11, 0.2 * 1.8 + 0.8 * 4])


def test_the_weights_come_back_whatever_happens():
    layer = torch.nn.Linear(1, 1)
    average = Average(layer, decay=0.5)
    torch.nn.init.constant_(layer.weight, 3.0)
    with suppress(OSError), average.in_place():
        assert layer.weight.item() != 3.0
        raise OSError("disk")
    assert layer.weight.item() == 3.0


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_the_average_is_what_is_saved(
    folder, data, tmp_path, recipe_of, trained, weights_of, equal, lora
):
    """After one step it is a tenth of the weights before it and nine of those after."""
    changes = {"optim__steps": 2, "run__save_every_steps": 1, "model__lora": lora}
    _, plain = trained(recipe_of(folder, data, tmp_path / "plain", **changes))
    _, kept = trained(recipe_of(folder, data, tmp_path / "ema", ema={}, **changes))
    first = "checkpoints/step-000001"
    before = load_file(folder / "unet/diffusion_pytorch_model.safetensors")
    after = weights_of(tmp_path / "plain" / first / "model")
    saved = weights_of(tmp_path / "ema" / first / "model")
    assert not equal(kept, plain)
    if lora is None:
        for name, value in saved.items():
            assert torch.allclose(value, 0.1 * before[name] + 0.9 * after[name], atol=1e-6), name
    state = tmp_path / "ema" / first / "state"
    raw = load_file(state / "weights.safetensors")
    assert equal(raw, load_file(tmp_path / "plain" / first / "state/weights.safetensors"))
    average = load_file(state / "average.safetensors")
    assert sorted(v.sum().item() for v in average.values()) == pytest.approx(
        sorted(v.sum().item() for v in saved.values())
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"ema": {}},
        {"ema": {"decay": 0.5}, "model__lora": {"rank": 2}, "validation": VALIDATION},
        {"run__precision": "fp16", "ema": {}},
    ],
)
def test_a_stopped_run_ends_as_one_that_was_not(
    folder, data, tmp_path, recipe_of, trained, equal, monkeypatch, changes
):
    # A scale from which some steps in fp16 are skipped before one fits.
    scaler = partial(torch.amp.GradScaler, init_scale=2.0**36, backoff_factor=2.0**-8)
    monkeypatch.setattr(precision.torch.amp, "GradScaler", scaler)
    changes = {"optim__steps": 6, **changes}
    metrics, whole = trained(recipe_of(folder, data, tmp_path / "whole", **changes))
    if "run__precision" in changes:
        skipped = [m["train/skipped_steps"] for m in metrics]
        assert skipped[0] == 1
        assert skipped[-1] == 0
    recipe = recipe_of(folder, data, tmp_path / "cut", run__save_every_steps=1, **changes)
    for step in (1, 3):
        events = train(recipe)
        assert next(e for e in events if isinstance(e, Saved) and e.step == step)
        events.close()
    _, resumed = trained(recipe)
    assert equal(whole, resumed)


def test_a_skipped_step_changes_nothing_and_fp16_trains_float32(
    folder, data, tmp_path, recipe_of, trained, equal, monkeypatch
):
    start = load_file(folder / "unet/diffusion_pytorch_model.safetensors")
    scaler = partial(torch.amp.GradScaler, init_scale=2.0**8)
    monkeypatch.setattr(precision.torch.amp, "GradScaler", scaler)
    recipe = recipe_of(folder, data, tmp_path / "fp16", run__precision="fp16")
    metrics, half = trained(recipe)
    _, single = trained(recipe_of(folder, data, tmp_path / "float32"))
    assert {tensor.dtype for tensor in half.values()} == {torch.float32}
    assert sum(m["train/skipped_steps"] for m in metrics) == 0
    moved = sum((single[n] - start[n]).square().sum() for n in start) ** 0.5
    apart = sum((single[n] - half[n]).square().sum() for n in start) ** 0.5
    assert 0 < apart < 0.3 * moved

    monkeypatch.setattr(precision.torch.amp, "GradScaler", partial(scaler, init_scale=2.0**60))
    changes = {"run__precision": "fp16", "optim__steps": 2, "ema": {}, "run__save_every_steps": 1}
    metrics, still = trained(recipe_of(folder, data, tmp_path / "skipped", **changes))
    assert [m["train/skipped_steps"] for m in metrics] == [1, 1]
    assert equal(still, start)
    with safe_open(
        tmp_path / "skipped/checkpoints/step-000001/state/average.safetensors", "pt"
    ) as average:
        assert average.metadata() == {"num_updates": "0"}


def test_attention_is_told_and_refused_before_anything_is_encoded(
    folder, data, tmp_path, recipe_of, trained, caplog
):
    caplog.set_level("INFO", logger="mmalign")
    _, sdpa = trained(recipe_of(folder, data, tmp_path / "sdpa"))
    assert "attention sdpa" in caplog.text
    changes = {"model__attention": "flash", "model__gradient_checkpointing": True}
    dpo = {"loss": {"name": "diffusion_dpo"}}  # With a copied reference, which attends alike.
    _, flash = trained(recipe_of(folder, data, tmp_path / "flash", **changes))
    trained(recipe_of(folder, data, tmp_path / "dpo", **changes, **dpo))
    assert caplog.text.count("attention flash") == 2
    start = load_file(folder / "unet/diffusion_pytorch_model.safetensors")
    moved = sum((sdpa[n] - start[n]).square().sum() for n in start) ** 0.5
    apart = sum((sdpa[n] - flash[n]).square().sum() for n in start) ** 0.5
    assert apart < 0.05 * moved
    elsewhere = recipe_of(
        folder,
        data,
        tmp_path / "no",
        model__attention="xformers",
        data__encoded=str(tmp_path / "none"),
    )
    with pytest.raises(ModelError, match="xformers"):
        trained(elsewhere)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"model__encoder_dtype": "float16"},
        {
            "model__encoder_dtype": "float16",
            "model__dtype": "bfloat16",
            "model__lora": {"rank": 2},
            "run__precision": "bf16",
            "model__attention": "flash",
        },
        {"model__dtype": "float16", "model__lora": {"rank": 2}, "run__precision": "fp16"},
    ],
)
@pytest.mark.parametrize("kind", ["sdxl", "sd", "sd3"])
def test_parts_in_16_bits_train_and_draw(tiny_pipeline, data, tmp_path, recipe_of, changes, kind):
    recipe = recipe_of(
        tiny_pipeline(kind),
        data,
        tmp_path / "run",
        optim__steps=1,
        validation=VALIDATION,
        **changes,
    )
    *_, finished = train(recipe)
    assert isinstance(finished, Finished)
    assert len(list((tmp_path / "run/samples").rglob("0.png"))) == 2


def test_what_is_drawn_at_random_beside_training_leaves_no_trace():
    def state():
        return [random.random(), float(np.random.rand()), float(torch.rand(()))]

    with untouched_randomness():
        first = state()
    with untouched_randomness():
        assert state() == first
    assert state() == first
    assert state() != first


def test_16_bit_weights_are_computed_with_in_16_bits(folder, data, tmp_path, recipe_of):
    changes = {"model__dtype": "bfloat16", "model__lora": {"rank": 2}}
    with pytest.raises(ConfigError, match=r"set run\.precision=bf16 or fp16"):
        recipe_of(folder, data, tmp_path / "run", **changes)


def test_decay_is_a_share(folder, data, tmp_path, recipe_of):
    with pytest.raises(ConfigError, match=r"ema\.decay"):
        recipe_of(folder, data, tmp_path / "run", ema={"decay": 1.0})
