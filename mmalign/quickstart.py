"""The quickstart: the public verbs, in the order of configs/quickstart/steps.yaml."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import typer
from pydantic import Field

from mmalign import cli
from mmalign.config import Strict, load_config
from mmalign.errors import ConfigError

STEPS = Path("configs/quickstart/steps.yaml")


class Step(Strict):
    """One command: what it is for, and its words after `mmalign`."""

    say: str
    run: tuple[str, ...] = Field(min_length=1)

    @property
    def command(self) -> str:
        """The line that a reader would type."""
        return shlex.join(["mmalign", *self.run])


class Plan(Strict):
    """The file of steps."""

    steps: tuple[Step, ...] = Field(min_length=1)


def load_steps(path: Path = STEPS) -> tuple[Step, ...]:
    """The steps, in order. Raises ConfigError outside the repository."""
    if not path.exists():
        raise ConfigError(
            f"{path} is not here",
            where=str(Path.cwd()),
            fix="clone the mmalign repository and run `mmalign quickstart` from its top folder",
        )
    return load_config(path, Plan).steps


def run_steps(
    steps: Sequence[Step],
    *,
    only: int | None = None,
    run: Callable[[list[str]], int] = cli.run,
) -> None:
    """Run the steps in this process. Each verb skips what is complete, so a second run is short.

    `only` is a step's number, from 1. Exits with a failing step's code.
    """
    if only is not None and not 1 <= only <= len(steps):
        raise ConfigError("no such step", got=only, wanted=f"1 to {len(steps)}: see --list")
    start = time.monotonic()
    for number, step in enumerate(steps, start=1):
        if only not in (None, number):
            continue
        typer.echo(f"\n[{number}/{len(steps)}] {step.say}\n$ {step.command}")
        begun = time.monotonic()
        if code := run(list(step.run)):
            typer.echo(
                f"quickstart stopped: step {number} of {len(steps)} failed with exit code {code}. "
                "Mend what it says above and run the same command again: "
                "finished steps are skipped.",
                err=True,
            )
            raise typer.Exit(code)
        typer.echo(f"({time.monotonic() - begun:.1f} s)")
    typer.echo(f"\nDone in {time.monotonic() - start:.0f} s.")
