"""`mmalign report`: evaluation directories in, one readable page out."""

from __future__ import annotations

from pathlib import Path

import typer

app = typer.Typer(
    help="Compare evaluated models with their base: a page, Markdown, JSON, a model card's part.",
    rich_markup_mode=None,
    add_completion=False,
)


@app.command(name="report")
def report(
    config: Path = typer.Argument(
        help="A report recipe, such as configs/eval/report_example.yaml."
    ),
    overrides: list[str] = typer.Argument(None, help="Changes to it, as dotted.key=value."),
) -> None:
    """Build the before/after report of a recipe and print its tables."""
    from evals.report import ReportRecipe, collect
    from evals.report_page import write
    from evals.report_tables import suite_table, value_tables
    from evals.report_words import sentences
    from mmalign.config import load_config

    found = collect(load_config(config, ReportRecipe, overrides or ()))
    path = write(found)
    whole = [suite_table(found)] if len(found.suites) > 1 else []
    for grid in [*whole, *value_tables(found)]:
        typer.echo(grid.text())
    for name, sentence in sentences(found).items():
        typer.echo(f"{name}: {sentence}\n")
    typer.echo(f"page     {path}")
    typer.echo(f"words    {path.with_name('report.md')}")
    typer.echo(f"card     {path.with_name('model_card.md')}")
    typer.echo(f"numbers  {path.with_name('results.json')}")
