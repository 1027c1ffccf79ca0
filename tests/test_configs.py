from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from mmalign.chain import standing_of
from mmalign.config import load_config
from mmalign.quickstart import Plan
from mmalign.specs_chain import SpecsChain
from mmalign.standing import Standing
from trainers.config import Recipe

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "configs").rglob("*.y*ml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_config_is_a_yaml_mapping(path: Path):
    assert isinstance(yaml.safe_load(path.read_text()), dict)


def test_every_quickstart_step_names_a_config_that_exists():
    plan = load_config(ROOT / "configs/quickstart/steps.yaml", Plan)
    named = [word for step in plan.steps for word in step.run if word.endswith(".yaml")]
    assert named
    assert [word for word in named if not (ROOT / word).is_file()] == []


CHAINS = ["configs/recipes/specs_qwen25vl.yaml", "configs/lab/sums_specs_recipe.yaml"]


@pytest.mark.parametrize("file", CHAINS)
def test_every_stage_of_a_shipped_chain_would_start(file: str, tmp_path, monkeypatch):
    """Each config reads with what the chain hands to it."""
    monkeypatch.chdir(ROOT)
    steps = load_config(file, SpecsChain, [f"output={tmp_path}"]).steps()
    assert {step.name: standing_of(step) for step in steps} == {
        step.name: Standing.ABSENT for step in steps
    }
    assert all(step.accelerate is None or step.accelerate.is_file() for step in steps)
    assert list(tmp_path.iterdir()) == []


ACCELERATE = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.name)
def test_accelerate_reads_every_config_of_its_own(path: Path):
    from accelerate.commands.config.config_args import load_config_from_file

    # Raises for a key that it does not know.
    assert load_config_from_file(str(path)).num_machines == 1


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.name)
def test_the_head_of_an_accelerate_config_launches_it_and_names_its_test(path: Path):
    head = "".join(
        line.removeprefix("#").strip().removesuffix("\\").rstrip() + " "
        for line in path.read_text().splitlines()
        if line.startswith("#")
    )
    assert f"accelerate launch --config_file configs/accelerate/{path.name} " in head
    recipe = re.search(r"-m trainers (configs/\S+\.yaml)((?: [\w.]+=\S+)*)", head)
    assert recipe
    load_config(ROOT / recipe[1], Recipe, recipe[2].split())
    tested = "Tested: tests/trainers/test_sharded.py runs this file on two CPU processes." in head
    engines = (ROOT / "tests" / "trainers" / "test_sharded.py").read_text()
    assert tested == (f'"{path.stem}"' in engines)
