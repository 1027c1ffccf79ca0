"""The verbs `mmalign train`, `precompute` and `estimate`. Torch is imported inside them."""

from __future__ import annotations

import typer

train = typer.Typer(rich_markup_mode=None, add_completion=False)
precompute = typer.Typer(rich_markup_mode=None, add_completion=False)
estimate = typer.Typer(rich_markup_mode=None, add_completion=False)

CONFIG = typer.Argument(..., metavar="RECIPE", help="A YAML file, such as configs/train/*.yaml.")
OVERRIDES = typer.Argument(None, metavar="[key=value]...", help="Dotted overrides: loss.beta=0.2")


CHECK = typer.Option(False, "--check", help="Read the recipe, say how far its run is, and stop.")


@train.command()
def train_command(
    config: str = CONFIG, overrides: list[str] | None = OVERRIDES, check: bool = CHECK
) -> None:
    """Train a model by a recipe, or continue where its run stopped."""
    from trainers.recipes import load_recipe

    recipe = load_recipe(config, overrides or [])
    if check:
        from trainers.directory import standing

        typer.echo(standing(recipe).told(recipe.run.output))
        return
    from trainers.loop import train

    for _ in train(recipe):
        pass  # The run tells what happens through its log lines.


@precompute.command()
def precompute_command(
    config: str = CONFIG,
    overrides: list[str] | None = OVERRIDES,
    fresh: bool = typer.Option(False, "--fresh", help="Delete what is stored, and start anew."),
) -> None:
    """Store the reference's scores of a recipe's dataset, for all runs with reference=cached.

    With `features` in the recipe, also those of its pictures.
    """
    from mmalign.log import is_main_process
    from trainers.precompute import precompute
    from trainers.recipes import load_text_recipe

    recipe = load_text_recipe(config, [*(overrides or []), "reference=cached"])
    folder = precompute(recipe, fresh=fresh)
    if is_main_process():
        typer.echo(folder)


@estimate.command()
def estimate_command(config: str = CONFIG, overrides: list[str] | None = OVERRIDES) -> None:
    """Say what a recipe would train and how much memory it takes, loading no weights."""
    from trainers.estimate import estimate
    from trainers.recipes import load_text_recipe

    typer.echo(estimate(load_text_recipe(config, overrides or [])))
