from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from mmalign.cli import run
from mmalign.config import dump_yaml
from mmalign.losses import DPO
from mmalign.scoring.scorer import Scorer
from trainers.loop import Saved, train


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


@pytest.mark.parametrize("output", ["recipe.yaml", "recipe.yaml/run"])
def test_a_folder_that_cannot_be_made_is_a_sentence(recipe, tmp_path: Path, capsys, output: str):
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_yaml(recipe()))
    assert run(["train", str(file), f"run.output={tmp_path / output}"]) == 2
    told = capsys.readouterr().err
    assert re.search(r"cannot be made or written to \(.*\)\. Choose another run\.output", told)


@pytest.mark.parametrize(
    ("owner", "name", "reference"),
    [
        (DPO, "__call__", "adapter_off"),
        (torch.optim.AdamW, "step", "adapter_off"),
        (Scorer, "forward", "cached"),
    ],
)
def test_a_full_gpu_is_a_sentence(
    recipe, tmp_path: Path, capsys, monkeypatch, owner, name: str, reference: str
):
    def full(*arguments, **named):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(owner, name, full)
    file = tmp_path / "recipe.yaml"
    made = recipe(loss={"name": "dpo"}, optim={"micro_batch_size": 2}, reference=reference)
    file.write_text(dump_yaml(made))
    assert run(["train", str(file)]) == 2
    told = capsys.readouterr().err
    assert re.search(r"memory ran out; got a micro-batch of 2 rows, \d+ tokens", told)
    assert "uffices alone" in told or "suffice alone" in told


def test_a_mistake_is_a_sentence(recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_yaml(recipe()))
    assert run(["train", str(file), "loss.bata=0.2"]) == 2
    told = capsys.readouterr().err
    assert "did you mean" in told
    assert "Traceback" not in told


def test_an_error_is_all_that_is_said(tmp_path: Path):
    """In a process of its own, where libraries that warn when imported have not been."""
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "{model: {path: x}, data: {path: nowhere}, loss: {name: dpo}, "
        "optim: {lr: 1.0e-3, batch_size: 1}, run: {output: run}}"
    )
    command = [sys.executable, "-m", "trainers", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "error: nowhere: no such dataset. Build it, or correct the path.\n"


def test_how_far_a_run_is_can_be_asked(recipe, pairs, tmp_path: Path, capsys):
    """Nothing is written and no folder made; what must not be gone on with is told."""
    made = recipe(optim={"steps": 2}, run={"save_every_steps": 1})
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_yaml(made))

    def asked(*overrides: str) -> str:
        code = run(["train", str(file), "--check", *overrides])
        told = capsys.readouterr()
        return told.out.split()[0] if code == 0 else told.err

    assert asked() == "absent"
    assert not made.run.output.exists()
    events = train(made)
    assert next(event for event in events if isinstance(event, Saved))
    events.close()
    assert asked() == "begun"
    assert "holds a run of another recipe: optim.lr was 0.001" in asked("optim.lr=0.5")
    for _ in train(made):
        pass
    before = {file: file.stat().st_mtime_ns for file in made.run.output.rglob("*")}
    assert asked() == "complete"
    assert asked("run.log_every_steps=7") == "complete"
    assert "holds a run of another recipe" in asked("optim.steps=3")
    assert "loss.bata: did you mean loss.beta?" in asked("loss.bata=1")
    other = tmp_path / "pairs"
    shutil.copytree(pairs, other)
    manifest = other / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"content_hash": "', '"content_hash": "0'))
    started = yaml.safe_load((made.run.output / "recipe.yaml").read_text())
    started["data"]["path"] = str(other)
    (made.run.output / "recipe.yaml").write_text(yaml.safe_dump(started))
    assert "the dataset changed since this run was trained" in asked(f"data.path={other}")
    shutil.rmtree(other)
    assert asked(f"data.path={other}") == "complete"
    after = {file: file.stat().st_mtime_ns for file in made.run.output.rglob("*")}
    assert before.keys() == after.keys()
