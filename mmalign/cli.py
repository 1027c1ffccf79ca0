"""The `mmalign` command: finds its verbs by entry point, prints mistakes as sentences.

Nothing here imports torch, so `mmalign --help` answers at once.
"""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import typer
import typer.main

from mmalign import __version__, log
from mmalign.errors import MmalignError

GROUP = "mmalign.commands"
HELP = "Preference alignment for vision-language and diffusion models: build, train, evaluate."


def verbs() -> dict[str, EntryPoint]:
    """Every verb that an installed package registers, by name."""
    return {point.name: point for point in sorted(entry_points(group=GROUP))}


def application() -> Any:
    """The whole command: one click group, each verb a Typer app of its own."""
    app = typer.Typer(help=HELP, no_args_is_help=True, rich_markup_mode=None)

    @app.callback()
    def root(
        version: bool = typer.Option(False, "--version", help="Print the version and stop."),
    ) -> None:
        if version:
            typer.echo(__version__)
            raise typer.Exit

    root.__doc__ = HELP
    group: Any = typer.main.get_group(app)
    for name, point in verbs().items():
        command = typer.main.get_command(point.load())
        command.name = name
        group.add_command(command, name)
    return group


def run(arguments: list[str]) -> int:
    """Run one command line in this process; returns its exit code."""
    log.configure()
    try:
        code = application().main(args=arguments, prog_name="mmalign", standalone_mode=False)
    except MmalignError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except Exception as error:
        # click's own usage errors know how to show themselves; anything else is our bug.
        if not hasattr(error, "format_message"):
            raise
        error.show()  # type: ignore[attr-defined]
        return getattr(error, "exit_code", 2)
    return code if isinstance(code, int) else 0


def main() -> None:
    """Entry point of the console script."""
    sys.exit(run(sys.argv[1:]))
