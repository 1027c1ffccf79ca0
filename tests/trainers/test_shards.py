"""What is told to the engines, without starting one; test_sharded.py starts them."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.utils import DistributedType

from mmalign.errors import TrainingError
from mmalign.models.families import FAMILIES
from mmalign.models.load import ModelConfig, TrainParts, load_policy
from mmalign.models.tiny import TinyModel
from mmalign.store import open_dataset
from trainers.directory import RunDirectory
from trainers.loop import Saved, train
from trainers.reference import adapter_off
from trainers.setup import set_up
from trainers.shards import blank_for, layer_classes, layout_under


def engine(name: str, stage: int = 0) -> Any:
    """An accelerator as far as trainers.shards looks at it."""
    kind = DistributedType[name]
    plugin = SimpleNamespace(zero_stage=stage)
    return SimpleNamespace(distributed_type=kind, deepspeed_plugin=plugin, device="cpu")


@pytest.mark.parametrize("family", [family.name for family in FAMILIES])
def test_fsdp_wraps_every_layer_of_language_model_and_tower(family: str, tmp_path):
    path = TinyModel(output=str(tmp_path / "model"), family=family).build()
    policy = load_policy(ModelConfig(path=str(path)))
    names = layer_classes(policy.model)
    layers = [n for n, m in policy.model.named_modules() if type(m).__name__ in names]
    tower = [name for name in layers if name.startswith(f"model.{policy.family.vision}.")]
    for inside in (tower, [name for name in layers if name not in tower]):
        assert len(inside) >= 2
        # Each of them one of a row, and none inside another.
        assert all(name.rsplit(".", 1)[1].isdigit() for name in inside)
    assert not any(a != b and b.startswith(f"{a}.") for a in layers for b in layers)


@pytest.mark.parametrize(
    ("accelerator", "vision", "images"),
    [
        (engine("NO"), True, False),
        (engine("MULTI_GPU"), True, False),
        (engine("FSDP"), False, True),
        (engine("DEEPSPEED", 2), False, False),
        (engine("DEEPSPEED", 2), True, True),
        (engine("DEEPSPEED", 3), False, True),
    ],
)
def test_a_blank_is_made_where_processes_wait_in_the_tower_and_rows_differ(
    accelerator, vision: bool, images: bool, tiny_model
):
    policy = load_policy(
        ModelConfig(path=str(tiny_model), train=TrainParts(vision=vision, projector=vision))
    )
    blank = blank_for(accelerator, policy, ["image", "text"], stored=False)
    assert bool(blank.images) == images
    assert not blank.videos
    assert not blank_for(accelerator, policy, ["image", "image"], stored=False).images
    assert not blank_for(accelerator, policy, ["text", "text"], stored=False).images
    # The tower runs on no picture then.
    assert not blank_for(accelerator, policy, ["image", "text"], stored=True).images


def test_weights_in_pieces_take_one_layout():
    whole, zero2, fsdp, zero3 = (
        engine("NO"),
        engine("DEEPSPEED", 2),
        engine("FSDP"),
        engine("DEEPSPEED", 3),
    )
    for layout in ("auto", "padded", "shared_prefix"):
        assert layout_under(whole, layout) == layout_under(zero2, layout) == layout
    assert layout_under(fsdp, "auto") == layout_under(zero3, "auto") == "shared_prefix"
    assert layout_under(fsdp, "padded") == "padded"
    with pytest.raises(TrainingError, match=r"got scorer.layout=padded.*shared_prefix"):
        layout_under(zero3, "padded")


def test_switching_the_adapter_off_leaves_frozen_what_was_frozen(recipe):
    """peft lets all of a part that it keeps a copy of train again, the projector in it too."""
    made = recipe(model={"train": {"projector": True}})
    parts = set_up(made, open_dataset(made.data.path), RunDirectory(made))
    frozen = next(n for n, p in parts.policy.model.named_parameters() if "modules_to_save" in n)
    parts.policy.model.get_parameter(frozen).requires_grad_(False)
    before = {n: p.requires_grad for n, p in parts.policy.model.named_parameters()}
    asked = {"competitor": False, "rewards": False, "distributions": False}
    adapter_off(parts.policy, parts.scorer, asked=asked)(next(parts.batches(first_step=0)))
    assert {n: p.requires_grad for n, p in parts.policy.model.named_parameters()} == before


def test_a_run_of_a_version_that_did_not_look_at_media_is_refused_in_words(recipe):
    made = recipe(run={"save_every_steps": 2})
    next(event for event in train(made) if isinstance(event, Saved))
    file = made.run.output / "start.json"
    values = json.loads(file.read_text())
    del values["survey"]["kinds"]
    file.write_text(json.dumps(values))
    with pytest.raises(TrainingError, match="without regard to media"):
        list(train(made))
