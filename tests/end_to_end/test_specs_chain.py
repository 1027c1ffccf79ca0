"""All stages of SPECS by one command, by the lab's own files: a small model, a few steps."""

from __future__ import annotations

import json

import pytest

from mmalign import chain, cli
from mmalign.chain import Step, in_a_process

LAB = "configs/lab/sums_"
QUESTION = "what is the sum of the digits ?"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_specs_from_prompts_to_numbers(repo_root, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(repo_root)
    out, ran = tmp_path / "specs", []

    def verb(*words: str) -> None:
        assert cli.run(list(words)) == 0, capsys.readouterr().err

    verb("init-model", f"{LAB}model.yaml", f"output={tmp_path}/init")
    # Forms are learnt in a few steps, sums are not: some are right by chance.
    lessons = [
        "answers={tagged: 1, half_tagged: 0, boxed: 0, plain: 0}",
        f"questions=['{QUESTION}']",
    ]
    verb(
        "build", f"{LAB}train.yaml", f"output={tmp_path}/train", "num_rows=64", "num_digits=[2]",
        *lessons,
    )  # fmt: skip
    verb(
        "train", f"{LAB}base.yaml", f"model.path={tmp_path}/init", f"data.path={tmp_path}/train",
        f"run.output={tmp_path}/base", "optim.steps=30", "optim.batch_size=8", "optim.lr=5e-3",
    )  # fmt: skip
    verb("build", f"{LAB}test.yaml", f"output={tmp_path}/test", "num_rows=12", "num_digits=[2]")

    def run(step: Step) -> int:
        """One stage in a process of its own; the others here, where torch is loaded already."""
        ran.append(step.name)
        if step.name == "cold_start":
            return in_a_process(step)
        return cli.run(list(step.words))

    monkeypatch.setattr(chain, "in_a_process", run)
    suite = f"{{name: verifiable, data: {tmp_path}/test, max_new_tokens: 24, "
    suite += "decoding: {temperature: 1.0}}"
    few = "probe: null, optim: {steps: 2, batch_size: 2}"
    words = [
        "recipe", "specs", f"{LAB}specs_recipe.yaml",
        f"output={out}", f"base={tmp_path}/base/model",
        "prompts.set={num_rows: 32, num_digits: [2]}", "pairs.set={shard_rows: 32}",
        f"cold_start.set={{{few}}}",
        f"grpo.set={{{few}, rollouts: {{group_size: 2}}}}",
        f"eval.set={{benchmarks: [{suite}], bootstrap_samples: 50}}",
    ]  # fmt: skip

    # A mistake in a late stage is told before the first one starts.
    assert cli.run([*words, "grpo.set.optim.stepss=3"]) == 2
    assert "optim.stepss: did you mean" in capsys.readouterr().err
    assert cli.run([*words, "--dry-run"]) == 0
    assert capsys.readouterr().out.count("to do  ") == 7
    assert ran == []
    assert not out.exists()

    assert cli.run(words) == 0, capsys.readouterr().err
    evals = ["eval/base", "eval/cold_start", "eval/grpo"]
    assert ran == ["prompts", "pairs", "cold_start", "grpo", *evals]
    told = capsys.readouterr().out
    told = told[told.rindex("suite ") :]  # The summary, after the tables of the evaluations.
    head = told.splitlines()[0]
    assert head.split()[:5] == ["suite", "metric", "base", "cold_start", "grpo"]
    results = json.loads((out / "eval" / "grpo" / "results.json").read_text())
    (row,) = [line for line in told.splitlines() if line.startswith("verifiable  format")]
    assert float(row.split()[4]) == pytest.approx(
        100 * results["suites"][0]["metrics"]["format"], abs=0.05
    )
    # The cold start began from the base itself, GRPO from the cold start.
    recipe = (out / "grpo" / "recipe.yaml").read_text()
    assert f"path: {out}/cold_start/model" in recipe
    recipe = (out / "cold_start" / "recipe.yaml").read_text()
    assert f"path: {tmp_path}/base/model" in recipe
    assert f"start_from: {tmp_path}/base/model" in recipe

    before = {file: file.stat().st_mtime_ns for file in out.rglob("*")}
    ran.clear()
    assert cli.run(words) == 0
    assert ran == []
    assert {file: file.stat().st_mtime_ns for file in out.rglob("*")} == before

    # Without the evaluation of the last model, that alone is done again.
    (out / "eval" / "grpo" / "results.json").unlink()
    assert cli.run(words) == 0
    assert ran == ["eval/grpo"]
