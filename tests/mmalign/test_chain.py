"""Stages in order: what is handed on, what is skipped, and what stops a chain before it starts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmalign import chain as chains
from mmalign import cli, specs_chain
from mmalign.chain import Stage, Step, StepFailed, dotted, make_step, plan_of, run_steps, standings
from mmalign.config import load_config
from mmalign.errors import ConfigError, DataError
from mmalign.specs_chain import SpecsChain
from mmalign.standing import Standing

FILES: dict[str, dict[str, Any]] = {
    "prompts": {"name": "instruct", "source": "rows", "output": "x"},
    "train": {"model": {"path": "x"}, "optim": {"lr": 1.0e-6}},
    "pairs": {"name": "specs", "generator": {"model": {"path": "x"}, "temperature": 1.0}},
    "eval": {"name": "x", "benchmarks": [{"name": "verifiable", "data": "test"}]},
}


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes config files and a chain of them; keywords replace what the chain says."""
    monkeypatch.chdir(tmp_path)
    for name in ("rows", "test"):
        Path(name).mkdir()

    def make(**changes: Any) -> Path:
        for name, data in FILES.items():
            Path(f"{name}.yaml").write_text(yaml.safe_dump(data))
        values: dict[str, Any] = {"output": "out", "base": "org/base"}
        for stage in ("prompts", "zero", "pairs", "cold_start", "grpo", "eval"):
            file = "train" if stage in ("zero", "cold_start", "grpo") else stage
            values[stage] = {"config": f"{file}.yaml"}
        Path("chain.yaml").write_text(yaml.safe_dump(values | changes))
        return Path("chain.yaml")

    return make


def steps_of(path: Path, *overrides: str) -> dict[str, Step]:
    return {step.name: step for step in load_config(path, SpecsChain, overrides).steps()}


def handed(step: Step) -> dict[str, str]:
    return dict(word.split("=", 1) for word in step.words if "=" in word)


def test_each_stage_is_handed_what_the_one_before_it_made(write):
    steps = steps_of(write())
    assert list(steps) == [
        "prompts", "zero", "pairs", "cold_start", "grpo",
        "eval/base", "eval/zero", "eval/cold_start", "eval/grpo",
    ]  # fmt: skip
    assert handed(steps["prompts"]) == {"output": "out/prompts"}
    assert handed(steps["zero"]) == {
        "model.path": "org/base", "data.path": "out/prompts", "run.output": "out/zero",
    }  # fmt: skip
    assert handed(steps["pairs"]) == {
        "source": "out/prompts", "output": "out/pairs", "generator.model.path": "out/zero/model",
    }  # fmt: skip
    # From the base, not from zero: what zero learnt comes through its words alone.
    assert handed(steps["cold_start"]) == {
        "model.path": "org/base", "data.path": "out/pairs", "run.output": "out/cold_start",
        "start_from": "org/base",
    }  # fmt: skip
    assert handed(steps["grpo"]) == {
        "model.path": "out/cold_start/model", "data.path": "out/prompts", "run.output": "out/grpo",
    }  # fmt: skip
    assert handed(steps["eval/base"])["model.path"] == "org/base"
    assert handed(steps["eval/grpo"]) == {
        "name": "grpo", "model.path": "out/grpo/model", "output": "out/eval/grpo",
    }  # fmt: skip
    assert steps["grpo"].made_from == ("prompts", "cold_start")
    assert steps["pairs"].command == (
        "mmalign build pairs.yaml source=out/prompts output=out/pairs "
        "generator.model.path=out/zero/model"
    )


def test_without_zero_the_base_writes_the_pairs(write):
    steps = steps_of(write(), "zero=null")
    assert "zero" not in steps
    assert "eval/zero" not in steps
    assert handed(steps["pairs"])["generator.model.path"] == "org/base"


def test_without_a_cold_start_grpo_begins_from_the_base(write):
    steps = steps_of(write(), "zero=null", "pairs=null", "cold_start=null")
    assert list(steps) == ["prompts", "grpo", "eval/base", "eval/grpo"]
    assert handed(steps["grpo"])["model.path"] == "org/base"
    with pytest.raises(ConfigError, match="pairs is there and cold_start is not"):
        steps_of(write(), "cold_start=null")
    with pytest.raises(ConfigError, match="zero makes responses for pairs"):
        steps_of(write(), "pairs=null", "cold_start=null")


def test_both_generators_are_handed_models_and_servers_keep_their_names(write):
    path = write()
    pairs = {"name": "specs", "generator": {"engine": "server", "model": "served"}}
    pairs["base_generator"] = {"model": {"path": "x"}}
    Path("pairs.yaml").write_text(yaml.safe_dump(pairs))
    found = handed(steps_of(path)["pairs"])
    assert found["base_generator.model.path"] == "org/base"
    assert not any(key.startswith("generator.") for key in found)


def test_a_cold_start_that_trains_an_adapter_is_merged_before_grpo(write):
    steps = steps_of(write(), "cold_start.set.model.lora.rank=8")
    assert steps["cold_start/merged"].command == (
        "mmalign merge out/cold_start/model out/cold_start/merged"
    )
    assert handed(steps["grpo"])["model.path"] == "out/cold_start/merged"
    assert handed(steps["eval/cold_start"])["model.path"] == "out/cold_start/merged"
    assert steps["grpo"].made_from == ("prompts", "cold_start/merged")


def test_an_adapter_on_the_base_is_another_start(write):
    with pytest.raises(ConfigError, match=r"cold_start begins from org/base.*model.adapter: a"):
        steps_of(write(), "cold_start.set.model.adapter=a")


def test_training_is_launched_by_accelerate_where_a_config_is_named(write):
    Path("two.yaml").write_text("{}")
    steps = steps_of(write(), "grpo.accelerate=two.yaml", "grpo.set.optim.lr=1e-5")
    rest = "train.yaml optim.lr=1e-5 model.path=out/cold_start/model data.path=out/prompts"
    assert steps["grpo"].command == (
        f"accelerate launch --config_file two.yaml -m trainers {rest} run.output=out/grpo"
    )
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "two.yaml"]
    assert steps["grpo"].argv[:7] == [*launch, "-m", "trainers"]
    assert steps["cold_start"].argv[:3] == [sys.executable, "-m", "trainers"]
    assert steps["prompts"].argv[:4] == [sys.executable, "-m", "mmalign", "build"]


@pytest.mark.parametrize(
    "values",
    [
        {"a": 1.0e-6, "b": {"c": True, "d": None}, "e": [1, "x y"], "f": {}},
        {"a": "1e-5", "b": "null", "c": "7", "d": "a, b", "e": "it's", "f": "line\nline", "g": "ö"},
    ],
)
def test_what_is_set_reads_back_as_it_was(values):
    from mmalign.config import apply_overrides

    assert apply_overrides({}, dotted(values), "test") == values


@pytest.mark.parametrize("key", ["model.path", "model", "run.output"])
def test_what_the_chain_hands_on_cannot_be_set(write, key):
    with pytest.raises(ConfigError, match=r"grpo.set: \S+ is not to be set: the chain hands"):
        steps_of(write(), f"grpo.set.{key}=x")


def test_a_key_that_begins_like_a_handed_one_can_be_set():
    step = make_step(
        "s", ("train",), Stage(config=Path("c"), set={"model": {"path_of": 1}}),
        {"model.path": "m"}, output=Path("o"),
    )  # fmt: skip
    assert step.words == ("train", "c", "model.path_of=1", "model.path=m")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("coldstart.set.optim.steps=3", "coldstart: did you mean cold_start"),
        ("grpo.optim.steps=3", "grpo.optim: unknown key; known here: accelerate, config, set"),
        ("judge.config=x.yaml", "judge: unknown key; known here: base, cold_start"),
    ],
)
def test_overrides_for_a_stage_that_is_none_are_refused(write, override, message):
    with pytest.raises(ConfigError, match=message):
        steps_of(write(), override)


class Disk:
    """Stands for verbs and their marks: which steps are begun or complete, and which fail."""

    def __init__(self, *, failing: str = "", code: int = 3) -> None:
        self.found: dict[str, Standing] = {}
        self.ran: list[str] = []
        self.failing, self.code = failing, code

    def standing(self, step: Step) -> Standing:
        return self.found.get(step.name, Standing.ABSENT)

    def run(self, step: Step) -> int:
        self.ran.append(step.name)
        if step.name == self.failing:
            self.found[step.name] = Standing.BEGUN
            return self.code
        self.found[step.name] = Standing.COMPLETE
        return 0

    def start(self, path: Path, *overrides: str) -> None:
        self.ran.clear()
        steps = list(steps_of(path, *overrides).values())
        found = standings(steps, self.standing)
        run_steps(steps, found, run=self.run, standing=self.standing)


def test_a_chain_goes_on_where_it_stopped_and_skips_what_is_complete(write, capsys):
    path, disk = write(zero=None), Disk(failing="cold_start")
    with pytest.raises(StepFailed) as failed:
        disk.start(path)
    assert disk.ran == ["prompts", "pairs", "cold_start"]
    assert failed.value.code == 3
    assert str(failed.value).startswith("cold_start failed with exit code 3. ")
    assert str(failed.value).endswith(
        "by hand:\n  mmalign train train.yaml model.path=org/base data.path=out/pairs "
        "run.output=out/cold_start start_from=org/base"
    )
    disk.failing = ""
    disk.start(path)
    evals = ["eval/base", "eval/cold_start", "eval/grpo"]
    assert disk.ran == ["cold_start", "grpo", *evals]
    disk.start(path)
    assert disk.ran == []
    assert "[4/7] grpo\n$ mmalign train train.yaml" in capsys.readouterr().out


def test_a_killed_step_says_so(write):
    with pytest.raises(StepFailed, match="prompts was killed by signal 9") as failed:
        Disk(failing="prompts", code=-9).start(write())
    assert failed.value.code == 137


def test_a_step_that_ends_without_completing_stops_the_chain(write):
    """As a build of one shard of several does."""
    disk = Disk(failing="pairs", code=0)
    with pytest.raises(StepFailed, match="pairs ended, but out/pairs is not complete"):
        disk.start(write())
    assert disk.ran[-1] == "pairs"


def test_all_mistakes_are_told_before_anything_starts(write, monkeypatch):
    path, disk = write(), Disk()

    def standing(step: Step) -> Standing:
        if step.name in ("cold_start", "eval/grpo"):
            raise ConfigError("optim.stepss: did you mean optim.steps?", where=step.words[1])
        return Standing.ABSENT

    monkeypatch.setattr(disk, "standing", standing)
    Path("test").rmdir()
    with pytest.raises(ConfigError) as refused:
        disk.start(path, "grpo.accelerate=none.yaml")
    said = str(refused.value)
    assert said.startswith("nothing was started: 4 problems")
    assert "cold_start: train.yaml: optim.stepss" in said
    assert "grpo: accelerate: no such file: none.yaml" in said
    who = "eval/base, eval/zero, eval/cold_start, eval/grpo"
    assert f"{who}: there is no test, and no step makes it" in said
    assert disk.ran == []


def test_what_is_made_of_what_is_gone_is_never_taken_for_done(write):
    path, disk = write(), Disk()
    disk.start(path)
    del disk.found["pairs"]
    with pytest.raises(DataError, match=r"cold_start is there already, but pairs.*Delete it") as e:
        disk.start(path)
    assert e.value.where == "out/cold_start"
    assert disk.ran == []
    for name in ("cold_start", "grpo"):
        del disk.found[name]
    disk.start(path)
    # Evaluations find out by themselves that the model is another: they are done again.
    assert disk.ran == ["pairs", "cold_start", "grpo", "eval/cold_start", "eval/grpo"]


def test_the_plan_says_what_is_done_and_what_goes_on(write):
    steps = list(steps_of(write()).values())
    disk = Disk()
    disk.found = {"prompts": Standing.COMPLETE, "zero": Standing.BEGUN}
    lines = plan_of(steps, standings(steps, disk.standing)).splitlines()
    assert [line[:5] for line in lines] == ["done ", "go on", *["to do"] * 7]
    assert lines[1].split()[2:5] == ["zero", "mmalign", "train"]


def test_the_command_prints_the_plan_stops_with_the_code_and_tells_the_numbers(
    write, monkeypatch, capsys
):
    path, disk = write(zero=None), Disk(failing="grpo", code=7)
    monkeypatch.setattr(SpecsChain, "check_base", lambda self: None)
    monkeypatch.setattr(chains, "in_a_process", disk.run)
    monkeypatch.setattr(chains, "standing_of", disk.standing)
    assert cli.run(["recipe", "specs", str(path), "--dry-run"]) == 0
    assert disk.ran == []
    assert capsys.readouterr().out.count("to do") == 7
    assert cli.run(["recipe", "specs", str(path)]) == 7
    assert "stopped: grpo failed with exit code 7" in capsys.readouterr().err
    disk.failing = ""
    tests = {"test": "mcnemar", "interval": [0, 0], "p_value": 0.0004}

    def compared(a: Path, b: Path) -> list[dict[str, Any]]:
        values = {"base": 0.4, "cold_start": 0.5, "grpo": 0.75}
        one = {"suite": "verifiable", "a": values[a.name], "b": values[b.name]}
        one["difference"] = one["b"] - one["a"]
        return [one | tests | {"metric": name} for name in ("accuracy", "finished")]

    monkeypatch.setattr(specs_chain, "comparison", compared)
    assert cli.run(["recipe", "specs", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    (row,) = [line for line in lines if line.startswith("verifiable")]
    assert row.split() == [
        "verifiable", "accuracy", "40.0", "50.0", "75.0", "+10.0", "(p<0.001)", "+25.0", "(p<0.001)"
    ]  # fmt: skip
    assert "grpo - cold_start" in "\n".join(lines)


def test_a_base_that_is_not_there_is_told_before_anything_starts(write, capsys):
    path = write()
    assert cli.run(["recipe", "specs", str(path), "base=./nowhere", "--dry-run"]) == 2
    assert "./nowhere: no such folder" in capsys.readouterr().err


def test_a_step_runs_in_a_process_of_its_own_and_gives_its_code(tmp_path):
    assert chains.in_a_process(Step(name="s", words=("--version",), output=tmp_path)) == 0
    assert chains.in_a_process(Step(name="s", words=("no-such",), output=tmp_path)) == 2
