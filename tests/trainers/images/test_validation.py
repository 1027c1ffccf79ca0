"""Validation pictures: as plain diffusers draws them, each time of one noise, changing nothing."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from mmalign.errors import ConfigError, TrainingError
from trainers.images import encode
from trainers.images.config import ValidationConfig
from trainers.images.validation import noise_of
from trainers.loop import Saved, train

VALIDATION = {"prompts": ["a seven", "something else"], "num_steps": 3, "every_steps": 2}


def pixels(file):
    return np.asarray(Image.open(file)).astype(int)


def drawn(pipeline, values, number):
    """As plain diffusers draws it, from text."""
    config = ValidationConfig.model_validate(values)
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        picture = pipeline(
            config.prompts[number],
            negative_prompt=config.negative_prompt or None,
            num_inference_steps=config.num_steps,
            guidance_scale=config.guidance,
            height=32,
            width=32,
            generator=noise_of(config, number),
        ).images[0]
    return np.asarray(picture).astype(int)


def plain(folder, kind="sdxl"):
    from diffusers import DiffusionPipeline

    absent = {"text_encoder_3": None, "tokenizer_3": None}
    return DiffusionPipeline.from_pretrained(folder, **(absent if kind == "sd3" else {}))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("sdxl", {}),
        ("sdxl", {"negative_prompt": "bold", "guidance": 2.5}),
        ("sd", {"negative_prompt": "bold"}),
        ("sd3", {}),
    ],
)
def test_they_are_those_of_plain_diffusers(
    tiny_pipeline, data, tmp_path, recipe_of, trained, kind, changes
):
    """Before training and after it; the text encoders are not asked again."""
    folder, values = tiny_pipeline(kind), {**VALIDATION, **changes}
    output = tmp_path / "run"
    list(train(recipe_of(folder, data, output, validation=values, optim__lr=0.01)))
    for step, model in (("000000", folder), ("000003", output / "model")):
        pipeline = plain(model, kind)
        for number in range(2):
            found = pixels(output / f"samples/step-{step}/{number}.png")
            assert np.abs(found - drawn(pipeline, values, number)).max() <= 1, (step, number)
    first, last = (pixels(output / f"samples/step-{s}/0.png") for s in ("000000", "000003"))
    assert not np.array_equal(first, last)


def test_the_average_draws_them(folder, data, tmp_path, recipe_of, trained):
    output = tmp_path / "run"
    changes = {"ema": {}, "optim__lr": 0.02, "validation": VALIDATION}
    trained(recipe_of(folder, data, output, **changes))
    found = pixels(output / "samples/step-000003/1.png")
    assert np.abs(found - drawn(plain(output / "model"), VALIDATION, 1)).max() <= 1
    raw = recipe_of(folder, data, tmp_path / "raw", optim__lr=0.02, validation=VALIDATION)
    trained(raw)
    assert not np.array_equal(found, pixels(tmp_path / "raw/samples/step-000003/1.png"))


@pytest.mark.parametrize(
    "changes",
    [{}, {"model__lora": {"rank": 2}, "run__precision": "bf16"}],
)
def test_no_weight_is_changed_and_text_encoders_stay_away(
    folder, data, tmp_path, recipe_of, trained, equal, monkeypatch, changes
):
    _, without = trained(recipe_of(folder, data, tmp_path / "without", **changes))
    loads = []
    load = encode.load_encoders
    monkeypatch.setattr(encode, "load_encoders", lambda c: (loads.append(c), load(c))[1])
    output = tmp_path / "with"
    _, weights = trained(recipe_of(folder, data, output, validation=VALIDATION, **changes))
    assert equal(weights, without)
    assert len(loads) == 1  # For the prompts that the rows do not have.
    steps = sorted(folder.name for folder in (output / "samples").iterdir())
    assert steps == ["step-000000", "step-000002", "step-000003"]


def test_what_is_drawn_is_not_drawn_again_unless_it_would_be_another(
    folder, data, tmp_path, recipe_of, trained
):
    output = tmp_path / "run"
    changes = {"optim__steps": 4, "run__save_every_steps": 1, "validation": VALIDATION}
    events = train(recipe_of(folder, data, output, **changes))
    next(event for event in events if isinstance(event, Saved) and event.step == 2)
    events.close()
    marks = {}
    for step in ("000000", "000002"):
        file = output / f"samples/step-{step}/0.png"
        marks[file] = file.read_bytes() + b"mark"  # A PNG with something after its end.
        file.write_bytes(marks[file])
    # Without the last checkpoint the run comes past step 2 again.
    for file in (output / "checkpoints/step-000002").glob("checkpoint.json"):
        file.unlink()
    other = {**VALIDATION, "seed": 1, "every_steps": 3}  # Which changes no weight.
    events = train(recipe_of(folder, data, output, **changes))
    next(event for event in events if isinstance(event, Saved) and event.step == 2)
    events.close()
    assert all(file.read_bytes() == mark for file, mark in marks.items())
    trained(recipe_of(folder, data, output, **{**changes, "validation": other}))
    assert {file.parent.name for file in output.glob("samples/*/0.png")} == {
        "step-000000", "step-000002", "step-000003", "step-000004",
    }  # fmt: skip
    settings = json.loads((output / "samples/step-000004/settings.json").read_text())
    assert settings["seed"] == 1


def test_pictures_of_another_run_are_drawn_anew(folder, data, tmp_path, recipe_of):
    """A run that died before its first checkpoint may be started again with other settings."""
    output = tmp_path / "run"
    for lr in (1e-3, 1e-2):
        events = train(recipe_of(folder, data, output, validation=VALIDATION, optim__lr=lr))
        for _ in range(2):
            next(events)
        assert (output / "samples/step-000000/settings.json").exists()
        events.close()
        file = output / "samples/step-000000/0.png"
        assert not file.read_bytes().endswith(b"mark")
        file.write_bytes(file.read_bytes() + b"mark")


def test_tensorboard_gets_them_once_however_often_a_run_starts(
    folder, data, tmp_path, recipe_of, trained
):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    changes = {"run__trackers": ["tensorboard"], "validation": VALIDATION}
    recipe = recipe_of(folder, data, tmp_path / "run", **changes)
    events = train(recipe)
    for _ in range(3):  # Past step 2's pictures, without a checkpoint.
        next(events)
    events.close()
    trained(recipe)
    board = EventAccumulator(
        str(tmp_path / "run/tensorboard"), size_guidance={"images": 0}
    ).Reload()
    assert [event.step for event in board.Images("validation")] == [0, 2, 3]


def test_pictures_that_are_not_finite_are_an_error(folder, data, tmp_path, recipe_of, trained):
    values = {**VALIDATION, "guidance": 1e38}
    with pytest.raises(TrainingError, match="draws pictures that are not finite"):
        trained(recipe_of(folder, data, tmp_path / "run", validation=values))


def test_what_the_pipeline_cannot_draw_is_told(folder, data, tmp_path, recipe_of, trained):
    recipe = recipe_of(folder, data, tmp_path / "run", validation=VALIDATION, data__resolution=36)
    with pytest.raises(TrainingError, match="divisible by 8"):
        trained(recipe)
    with pytest.raises(ConfigError, match="prompts"):
        recipe_of(folder, data, tmp_path / "run", validation={"prompts": []})
