"""Which weights a run starts from: told always, and refused where they are the wrong ones."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

import trainers.origin
from mmalign.errors import TrainingError
from mmalign.models.tiny import TinyModel, Tower
from trainers.loop import train

FULL = {"lora": None}


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that differs from `tiny_model` in its weights alone."""
    small = Tower(hidden=32, layers=2, heads=4, mlp=32)
    path = tmp_path_factory.mktemp("other") / "llava"
    return TinyModel(output=str(path), image_size=16, vision=small, text=small, seed=1).build()


@pytest.fixture
def one_step(recipe, tmp_path: Path):
    def made(name: str, **sections):
        run = {"output": str(tmp_path / name)}
        return recipe(loss={"name": "sft"}, optim={"steps": 1}, run=run, **sections)

    return made


def told(folder: Path, file: str = "start.json") -> str:
    return json.loads((folder / file).read_text())["weights"]


def exhaust(made) -> Path:
    list(train(made))
    return made.run.output


def test_every_run_tells_the_hash_of_what_it_started_from(one_step, tiny_model, other_model):
    lora, full = exhaust(one_step("lora")), exhaust(one_step("full", model=FULL))
    wide = one_step("bf16", model={"dtype": "bfloat16"})
    other = exhaust(one_step("other", model={"path": str(other_model)}))
    found = told(lora)
    assert re.fullmatch("weights:[0-9a-f]{24}", found)
    # A fresh adapter adds nothing, and what trains does not matter.
    assert told(full) == told(lora, "run.json") == told(full, "run.json") == found
    assert told(other) != found
    # These weights were made in float32, and 16 bits round them.
    assert told(exhaust(wide)) not in (found, told(other))


def test_16_bit_weights_are_the_same_in_every_dtype(one_step, tiny_model, tmp_path):
    from mmalign.models.load import ModelConfig, load_policy

    half = tmp_path / "half"
    load_policy(ModelConfig(path=str(tiny_model), dtype="bfloat16")).save(half)
    hashes = {
        told(exhaust(one_step(dtype, model={"path": str(half), "dtype": dtype})))
        for dtype in ("bfloat16", "float32")
    }
    assert len(hashes) == 1


def test_the_base_is_accepted_by_its_folder_by_a_copy_and_by_its_hash(
    one_step, tiny_model, tmp_path, monkeypatch
):
    copied = shutil.copytree(tiny_model, tmp_path / "copied")
    found = told(exhaust(one_step("copy", start_from=str(copied))))
    exhaust(one_step("hash", start_from=found))
    monkeypatch.setattr(trainers.origin, "load_policy", None)  # The folder itself is not loaded.
    assert told(exhaust(one_step("same", start_from=str(tiny_model)))) == found


def test_other_weights_are_refused_with_both_hashes_and_the_way_out(
    one_step, tiny_model, other_model
):
    ours, others = (
        told(exhaust(one_step(f"plain-{path.parent.name}", model={"path": str(path)})))
        for path in (tiny_model, other_model)
    )
    zero = {"path": str(other_model)}
    with pytest.raises(TrainingError) as error:
        exhaust(one_step("zero", model=zero, start_from=str(tiny_model)))
    said = str(error.value)
    assert f"model.path={other_model}: training must start from other weights" in said
    assert f"got {others}; wanted {ours}, of {tiny_model}" in said
    assert f"Set model.path={tiny_model}, or drop start_from" in said
    with pytest.raises(TrainingError, match=f"got {others}; wanted {ours}. Set model.path to the"):
        exhaust(one_step("by-hash", model=zero, start_from=ours))


def test_the_rl_model_is_refused_where_it_is_an_adapter_on_the_base(one_step, tiny_model):
    """Its folder names the base, whose weights it does not have."""
    zero = exhaust(one_step("zero")) / "model"
    with pytest.raises(TrainingError, match="training must start from other weights"):
        exhaust(one_step("cold", model={"path": str(zero), **FULL}, start_from=str(tiny_model)))


def test_another_start_is_refused_when_a_run_is_resumed(one_step, tiny_model, other_model):
    exhaust(one_step("run", start_from=str(tiny_model)))
    with pytest.raises(TrainingError, match="start_from was"):
        exhaust(one_step("run", start_from=str(other_model)))
