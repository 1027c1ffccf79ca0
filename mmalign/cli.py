"""The `mmalign` command: finds its verbs by entry point, prints mistakes as sentences.

Nothing here imports torch, and a verb's module is imported only when the verb is called or listed,
so `mmalign --help` answers at once and one broken verb leaves the others working.
"""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint, entry_points
from typing import Annotated, Any

import typer
import typer.core
import typer.main

from mmalign import __version__, log
from mmalign.errors import MmalignError

GROUP = "mmalign.commands"
HELP = "Preference alignment for vision-language models: build, train, evaluate."


def verbs() -> dict[str, EntryPoint]:
    """Every verb that an installed package registers, by name."""
    return {point.name: point for point in sorted(entry_points(group=GROUP))}


class VerbGroup(typer.core.TyperGroup):
    """The top-level group: its commands are the registered verbs."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names of all verbs, sorted."""
        return list(verbs())

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The verb's own Typer app, as a command; None if there is no such verb."""
        point = verbs().get(cmd_name)
        if point is None:
            return None
        try:
            command = typer.main.get_command(point.load())
        except Exception as error:
            # A verb is another package's code: whatever stops it, the other verbs go on.
            command = _unusable(cmd_name, error)
        command.name = cmd_name
        return command


def _unusable(name: str, error: Exception) -> Any:
    """A command in the place of a verb that does not load; calling it, however, says why."""
    reason = " ".join(str(error).split()) or type(error).__name__
    app = typer.Typer(rich_markup_mode=None, add_completion=False)
    options = {"ignore_unknown_options": True, "help_option_names": []}

    @app.command(short_help=f"cannot be loaded: {reason}", context_settings=options)
    def _(arguments: Annotated[list[str] | None, typer.Argument()] = None) -> None:
        raise MmalignError(
            f"cannot be loaded: {reason}",
            where=f"mmalign {name}",
            fix="repair or reinstall the package that it comes from",
        )

    return typer.main.get_command(app)


def application() -> Any:
    """The whole command line as one click group."""
    app = typer.Typer(
        cls=VerbGroup,
        help=HELP,
        no_args_is_help=True,
        invoke_without_command=True,
        rich_markup_mode=None,
    )

    @app.callback()
    def root(
        version: bool = typer.Option(False, "--version", help="Print the version and stop."),
    ) -> None:
        if version:
            typer.echo(__version__)

    return typer.main.get_command(app)


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
