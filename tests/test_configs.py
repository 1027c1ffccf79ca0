from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from mmalign.config import load_config
from mmalign.quickstart import Plan

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
