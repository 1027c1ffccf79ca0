from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mmalign.cli import run
from mmalign.config import dump_yaml


def test_the_verbs_import_no_torch():
    code = "import sys, trainers.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_train_runs_a_recipe_with_overrides(recipe, tmp_path: Path, monkeypatch):
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_yaml(recipe()))
    output = tmp_path / "elsewhere"
    assert run(["train", str(file), "optim.steps=1", f"run.output={output}"]) == 0
    assert (output / "run.json").exists()
    assert "steps: 1" in (output / "recipe.yaml").read_text()


def test_estimate_prints(recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_yaml(recipe()))
    assert run(["estimate", str(file)]) == 0
    assert "trainable" in capsys.readouterr().out


def test_a_mistake_is_a_sentence(recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_yaml(recipe()))
    assert run(["train", str(file), "loss.bata=0.2"]) == 2
    told = capsys.readouterr().err
    assert "did you mean" in told
    assert "Traceback" not in told
