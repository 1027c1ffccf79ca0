from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from mmalign.config import dump_yaml, read_yaml, validate
from mmalign.errors import ConfigError
from trainers.config import Recipe
from trainers.recipes import kind_of

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "configs/train").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_and_its_head_says_how_to_launch_it(path: Path):
    data = read_yaml(path)
    validate(data, kind_of(data), str(path))
    launch = re.search(
        r"^# Launch: .*--config_file (\S+) -m trainers (\S+)$", path.read_text(), re.M
    )
    assert launch is not None
    assert (ROOT / launch[1]).is_file()
    assert ROOT / launch[2] == path


def test_recipes_are_there():
    assert len(RECIPES) >= 4


def test_a_resolved_recipe_reads_back_as_itself(recipe):
    made = recipe(reference="cached", optim={"betas": [0.9, 0.95]})
    assert validate(yaml.safe_load(dump_yaml(made)), Recipe, "again") == made


def test_a_typo_gets_a_suggestion(recipe):
    with pytest.raises(ConfigError, match=r"did you mean optim\.batch_size\?"):
        recipe(optim={"batchsize": 4})


def test_a_typo_in_a_loss_gets_a_suggestion(recipe):
    with pytest.raises(ConfigError, match=r"did you mean loss.*\.beta\?"):
        recipe(loss={"name": "dpo", "bata": 0.2})


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"reference": "adapter_off", "model": {"lora": None}}, "needs an adapter to switch off"),
        ({"model": {"lora": None, "dtype": "bfloat16"}}, "float32 with run.precision=bf16"),
        ({"model": {"lora": None, "dtype": "float16"}}, "float32 with run.precision=bf16"),
        (
            {"model": {"dtype": "bfloat16", "train": {"projector": True}}},
            r"float32 with run.precision=bf16, .*model.train.projector false",
        ),
        ({"optim": {"batch_size": 4, "micro_batch_size": 3}}, "no multiple of micro_batch_size 3"),
        ({"data": {"max_tokens": 0}}, "data.max_tokens"),
    ],
)
def test_what_does_not_fit_together_is_said_in_a_sentence(recipe, sections, message):
    with pytest.raises(ConfigError, match=message):
        recipe(**sections)


def test_auto_reference(recipe):
    assert recipe().reference_kind() == "adapter_off"
    assert recipe(model={"lora": None}).reference_kind() == "frozen_copy"
