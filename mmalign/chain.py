"""Verbs in order, each in a process of its own: what is complete is skipped, what began goes on.

A chain is a list of steps. Each is one command, with the paths that are handed from step to step
written out, so that it can be typed by hand. How far a step is, its own verb says (`--check`); the
same question reads its config, so that a mistake in the last one is found before the first starts.
"""

from __future__ import annotations

import io
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
import yaml
from pydantic import Field

from mmalign import cli
from mmalign.config import Strict, apply_overrides, read_yaml
from mmalign.errors import ConfigError, DataError, MmalignError
from mmalign.standing import Standing

BUILD, TRAIN, EVAL, MERGE = ("build",), ("train",), ("eval", "run"), ("merge",)
_WORDS = {Standing.ABSENT: "to do", Standing.BEGUN: "go on", Standing.COMPLETE: "done"}


class Stage(Strict):
    """A config file of a stage, and what is set in it, as nested keys: {optim: {steps: 100}}.

    What the chain itself hands to the stage cannot be set.
    """

    config: Path
    set: dict[str, Any] = Field(default_factory=dict)

    def data(self) -> dict[str, Any]:
        """The file with what is set, before the chain hands it anything."""
        return apply_overrides(read_yaml(self.config), dotted(self.set), str(self.config))


class TrainStage(Stage):
    """A stage that trains. accelerate: a config to launch it with, on several GPUs."""

    accelerate: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One command. words: what follows `mmalign`. output: the folder that it fills.

    made_from: the steps before it whose outputs it reads. reads: datasets of its own that must be
    there. again: it finds out by itself what it was made from, so that it may go on after changes.
    """

    name: str
    words: tuple[str, ...]
    output: Path
    made_from: tuple[str, ...] = ()
    reads: tuple[Path, ...] = ()
    accelerate: Path | None = None
    again: bool = False

    @property
    def command(self) -> str:
        """The line that a reader would type."""
        if self.accelerate is None:
            return shlex.join(["mmalign", *self.words])
        return shlex.join(["accelerate", "launch", *self._launched()])

    @property
    def argv(self) -> list[str]:
        """The same with the Python that runs this."""
        if self.accelerate is not None:
            return [sys.executable, "-m", "accelerate.commands.launch", *self._launched()]
        if self.words[0] == TRAIN[0]:
            return [sys.executable, "-m", "trainers", *self.words[1:]]
        return [sys.executable, "-m", "mmalign", *self.words]

    def _launched(self) -> list[str]:
        return ["--config_file", str(self.accelerate), "-m", "trainers", *self.words[1:]]


class StepFailed(MmalignError):
    """A step ended without completing; `code` is what to exit with."""

    def __init__(self, step: Step, why: str, code: int) -> None:
        self.code = code
        super().__init__(
            f"{step.name} {why}. Mend what it says above and start the chain again: finished steps "
            f"are skipped. To run this one by hand:\n  {step.command}"
        )


def make_step(
    name: str, verb: tuple[str, ...], stage: Stage, handed: Mapping[str, Any], **more: Any
) -> Step:
    """The step of a stage, with what the chain hands to it. Other keywords are the Step's own.

    Raises ConfigError where the stage sets what it is handed.
    """
    own = list(dotted(stage.set))
    for key in handed:
        for text in own:
            set_key = text.partition("=")[0]
            if f"{set_key}.".startswith(f"{key}.") or f"{key}.".startswith(f"{set_key}."):
                raise ConfigError(
                    f"{name}.set: {set_key} is not to be set: the chain hands {key} on",
                    got=text,
                    wanted=f"{key}={handed[key]}",
                )
    words = (*verb, str(stage.config), *own, *dotted(handed))
    return Step(name=name, words=words, **more)


def dotted(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Nested keys as the overrides that set them, such as `optim.steps=100`."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from dotted(value, f"{prefix}{key}.")
        else:
            # Inside a list, so that what YAML would misread comes quoted, on one line.
            text = yaml.safe_dump(
                [str(value) if isinstance(value, Path) else value],
                default_flow_style=True,
                allow_unicode=True,
                width=sys.maxsize,
            )
            yield f"{prefix}{key}={text.strip()[1:-1]}"


def asked(words: Sequence[str]) -> str:
    """What a verb prints, in this process. What it raises passes."""
    with redirect_stdout(io.StringIO()) as said:
        cli.application().main(args=list(words), prog_name="mmalign", standalone_mode=False)
    return said.getvalue()


def standing_of(step: Step) -> Standing:
    """How far a step is, as its verb tells. Raises what is wrong with its config or its output."""
    if step.words[:1] == MERGE:
        return Standing.COMPLETE if step.output.exists() else Standing.ABSENT
    return Standing(asked([*step.words, "--check"]).split()[0])


def standings(
    steps: Sequence[Step], standing: Callable[[Step], Standing] | None = None
) -> dict[str, Standing]:
    """How far each step is. Starts nothing.

    Raises ConfigError with all that is wrong with any step, DataError where one is there that was
    made from what is to be made anew.
    """
    standing = standing or standing_of
    found: dict[str, Standing] = {}
    wrong: dict[str, list[str]] = {}  # What is wrong, once, with the steps that it is wrong with.
    outputs = {step.output for step in steps}
    for step in steps:
        missing = [path for path in step.reads if path not in outputs and not path.exists()]
        told = [f"there is no {path}, and no step makes it" for path in missing]
        if step.accelerate is not None and not step.accelerate.is_file():
            told.append(f"accelerate: no such file: {step.accelerate}")
        try:
            found[step.name] = standing(step)
        except MmalignError as error:
            told.append(str(error))
        for what in told:
            wrong.setdefault(what, []).append(step.name)
    if wrong:
        lines = [f"{', '.join(names)}: {what}" for what, names in wrong.items()]
        what = lines[0] if len(lines) == 1 else "\n  - ".join([f"{len(lines)} problems", *lines])
        raise ConfigError(f"nothing was started: {what}")
    for step in steps:
        open_ones = [name for name in step.made_from if found[name] is not Standing.COMPLETE]
        if not open_ones or found[step.name] is Standing.ABSENT:
            continue
        if not step.again:
            raise DataError(
                f"{step.name} is there already, but {open_ones[0]}, which it was made from, is not",
                where=str(step.output),
                fix="delete it and what was made from it, or choose another output",
            )
        found[step.name] = Standing.BEGUN
    return found


def plan_of(steps: Sequence[Step], found: Mapping[str, Standing]) -> str:
    """The plan, a line for each step."""
    width = max(len(step.name) for step in steps)
    return "\n".join(
        f"{_WORDS[found[step.name]]}  {step.name.ljust(width)}  {step.command}" for step in steps
    )


def run_steps(
    steps: Sequence[Step],
    found: Mapping[str, Standing],
    *,
    run: Callable[[Step], int] | None = None,
    standing: Callable[[Step], Standing] | None = None,
) -> None:
    """Run what is not complete, in order. Raises StepFailed at the first that does not complete."""
    run, standing = run or in_a_process, standing or standing_of
    for number, step in enumerate(steps, start=1):
        if found[step.name] is Standing.COMPLETE:
            continue
        typer.echo(f"\n[{number}/{len(steps)}] {step.name}\n$ {step.command}")
        started = time.monotonic()
        if code := run(step):
            # A process that was killed has the signal's number, negative.
            how = f"was killed by signal {-code}" if code < 0 else f"failed with exit code {code}"
            raise StepFailed(step, how, code if code > 0 else 128 - code)
        if standing(step) is not Standing.COMPLETE:
            why = f"ended, but {step.output} is not complete"
            raise StepFailed(step, why, 1)
        typer.echo(f"({time.monotonic() - started:.0f} s)")


def in_a_process(step: Step) -> int:
    """Run a step in a process of its own, whose memory is free again afterwards."""
    sys.stdout.flush()  # Or its lines come before those that announce it.
    with subprocess.Popen(step.argv) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.wait()  # The terminal told it too; it may be writing a file.
            raise


def comparison(a: Path, b: Path) -> list[dict[str, Any]]:
    """What `mmalign eval compare` finds, b against a."""
    return json.loads(asked(["eval", "compare", str(a), str(b), "--json"]))
