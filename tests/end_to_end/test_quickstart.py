"""The quickstart in miniature: the same steps and files, fewer scenes and steps."""

import json
import shutil

import pytest

from mmalign import cli
from mmalign.quickstart import load_steps, run_steps

SMALL = {
    "configs/quickstart/scenes_train.yaml": ["num_scenes=60"],
    "configs/quickstart/scenes_pairs.yaml": ["num_scenes=60"],
    "configs/quickstart/scenes_eval.yaml": ["num_scenes=20"],
    "configs/quickstart/pairs.yaml": ["similarity.threshold=1.0", "k=3"],
    "configs/quickstart/sft_base.yaml": ["optim.steps=3", "optim.batch_size=8"],
    **{
        f"configs/quickstart/{name}.yaml": ["optim.steps=2", "optim.batch_size=4"]
        for name in ("sft_chosen", "dpo", "rdpo")
    },
    "configs/quickstart/eval.yaml": ["bootstrap_samples=50"],
}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_step_runs_and_the_report_holds_the_numbers(repo_root, tmp_path, monkeypatch, capsys):
    shutil.copytree(repo_root / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    steps = load_steps()

    def small(arguments: list[str]) -> int:
        config = next(word for word in arguments if word.startswith("configs/"))
        return cli.run([*arguments, *SMALL.get(config, [])])

    run_steps(steps, run=small)
    folder = tmp_path / "runs" / "quickstart"
    page = (folder / "report.html").read_text()
    for name in ("SFT on chosen", "DPO + SFT", "rDPO + SFT"):
        assert name in page
    results = json.loads((folder / "results.json").read_text())
    measured = json.loads((folder / "eval" / "dpo" / "results.json").read_text())
    chair = next(suite for suite in measured["suites"] if suite["key"] == "chair")
    told = results["runs"]["DPO + SFT"]["chair"]["chair_i"]
    assert told == pytest.approx(chair["metrics"]["chair_i"], abs=1e-6)
    assert "report.html" in capsys.readouterr().out

    # A second call finds everything there and changes nothing.
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*.safetensors")}
    assert before
    run_steps(steps, run=small)
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*.safetensors")} == before


def test_every_step_is_a_verb_with_a_config_that_is_there(repo_root, monkeypatch):
    monkeypatch.chdir(repo_root)
    for step in load_steps():
        assert step.run[0] in cli.verbs()
        configs = [word for word in step.run if word.startswith("configs/")]
        assert len(configs) == 1
        assert (repo_root / configs[0]).exists()
