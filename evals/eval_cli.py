"""`mmalign eval`: run a recipe, score its answers again, compare two runs."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import typer

app = typer.Typer(
    help="Score a checkpoint on benchmarks, with intervals and paired tests.",
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
)

# Means of counts and of judges' scores; every other metric is a fraction, shown in percent.
_NUMBERS = {
    "num_words", "mentions", "response_tokens",
    "pick_score", "hps_v2", "aesthetic", "clip_score", "digit_style",
}  # fmt: skip


@app.command()
def run(
    config: Path = typer.Argument(help="An eval recipe, such as configs/eval/pope_coco.yaml."),
    overrides: list[str] = typer.Argument(None, metavar="[KEY=VALUE]...", help="Replace settings."),
    check: bool = typer.Option(
        False, "--check", help="Read the recipe, say how far its output is, and stop."
    ),
) -> None:
    """Generate the answers that are not there yet, score all of them, print the scores."""
    from evals.config import EvalRecipe
    from evals.run import evaluate
    from mmalign.config import load_config

    recipe = load_config(config, EvalRecipe, overrides or ())
    if check:
        from evals.standing import standing

        typer.echo(standing(recipe).told(recipe.output))
        return
    _print_results(evaluate(recipe))


@app.command(name="image_preference")
def image_preference(
    config: Path = typer.Argument(
        help="A recipe of pictures to draw, such as configs/eval/image_preference.yaml."
    ),
    overrides: list[str] = typer.Argument(None, metavar="[KEY=VALUE]...", help="Replace settings."),
) -> None:
    """Draw the pictures that are not there yet, have judges score them, print the scores.

    Win rates take two models: `mmalign eval compare BASE ALIGNED`, or `mmalign report`.
    """
    from evals.image_preference import ImagePreferenceRecipe, evaluate
    from mmalign.config import load_config

    _print_results(evaluate(load_config(config, ImagePreferenceRecipe, overrides or ())))


@app.command()
def rescore(
    config: Path = typer.Argument(help="The recipe that the answers were generated with."),
    overrides: list[str] = typer.Argument(None, metavar="[KEY=VALUE]...", help="Replace settings."),
) -> None:
    """Score the answers in the recipe's output folder again, without the model."""
    from evals import run as runner
    from evals.config import EvalRecipe
    from mmalign.config import load_config

    recipe = load_config(config, EvalRecipe, overrides or ())
    _print_results(runner.rescore(recipe.output, recipe))


@app.command()
def compare(
    a: Path = typer.Argument(help="Output folder of the run to compare with."),
    b: Path = typer.Argument(help="Output folder of the run to judge."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON instead of a table."),
) -> None:
    """Test whether run B differs from run A on the questions that both answered."""
    from evals.compare import compare as compare_runs

    found = compare_runs(a, b)
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(one) for one in found], indent=2))
        return
    rows = [
        (
            one.suite,
            one.metric,
            _shown(one.metric, one.a),
            _shown(one.metric, one.b),
            _shown(one.metric, one.difference, sign="+"),
            _range(one.metric, one.interval, sign="+"),
            "" if one.relative is None else f"{100 * one.relative:+.1f}%",
            "<0.001" if one.p_value < 0.001 else f"{one.p_value:.3f}",
            one.test,
        )
        for one in found
    ]
    heads = ("suite", "metric", "a", "b", "b - a", "95% interval", "relative", "p", "test")
    _print_table(heads, rows, num_left=2)


def _print_results(folder: Path) -> None:
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    rows = [
        (
            suite["key"],
            metric,
            _shown(metric, value),
            _range(metric, suite["intervals"][metric]),
            str(suite["num_items"]),
        )
        for suite in results["suites"]
        for metric, value in suite["metrics"].items()
    ]
    typer.echo(f"{results['name']}: {results['model']}")
    _print_table(("suite", "metric", "value", "95% interval", "items"), rows, num_left=2)
    for suite in results["suites"]:
        if suite["num_missing"]:
            typer.echo(
                f"{suite['key']}: {suite['num_missing']} questions stay unanswered: "
                "their pictures cannot be read",
                err=True,
            )
    typer.echo(str(folder / "results.json"))


def _shown(metric: str, value: float, *, sign: str = "") -> str:
    return f"{value if metric in _NUMBERS else 100 * value:{sign}.2f}"


def _range(metric: str, interval: Sequence[float], *, sign: str = "") -> str:
    low, high = interval
    return f"{_shown(metric, low, sign=sign)} to {_shown(metric, high, sign=sign)}"


def _print_table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, num_left: int) -> None:
    """A rich table on a terminal, aligned columns elsewhere; all but `num_left` right-aligned."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table()
        for i, head in enumerate(heads):
            table.add_column(head, justify="left" if i < num_left else "right")
        for row in rows:
            table.add_row(*row)
        Console().print(table)
        return
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    for row in (heads, *rows):
        cells = [
            cell.ljust(width) if i < num_left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        typer.echo("  ".join(cells).rstrip())
