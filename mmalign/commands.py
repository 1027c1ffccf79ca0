"""The core's own verbs; nothing here imports torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

init_model = typer.Typer(rich_markup_mode=None, add_completion=False)
merge = typer.Typer(rich_markup_mode=None, add_completion=False)
doctor = typer.Typer(rich_markup_mode=None, add_completion=False)
quickstart = typer.Typer(rich_markup_mode=None, add_completion=False)
recipe = typer.Typer(rich_markup_mode=None, add_completion=False, no_args_is_help=True)


@init_model.command()
def _init_model(
    config: Annotated[Path, typer.Argument(help="YAML of a small model.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Dotted overrides.")
    ] = None,
) -> None:
    """Make a small model from scratch: an ordinary transformers checkpoint, or for a config that
    names a `pipeline` an ordinary diffusers pipeline."""
    from mmalign.config import apply_overrides, read_yaml, validate
    from mmalign.diffusion.tiny import TinyPipeline
    from mmalign.models.tiny import TinyModel

    data = apply_overrides(read_yaml(config), overrides or (), str(config))
    kind = TinyPipeline if "pipeline" in data else TinyModel
    typer.echo(validate(data, kind, str(config)).build())


@merge.command()
def _merge(
    adapter: Annotated[Path, typer.Argument(help="Folder of a LoRA adapter.")],
    output: Annotated[Path, typer.Argument(help="New folder for the whole model.")],
) -> None:
    """Merge a LoRA adapter into its base, in float32: an ordinary checkpoint to train on."""
    from mmalign.models.load import ModelConfig
    from mmalign.models.merge import merge_into

    merge_into(ModelConfig(path=str(adapter)), output)
    typer.echo(output)


@doctor.command()
def _doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what is installed, what works on this machine, and what installs the rest."""
    from mmalign.doctor import examine

    typer.echo("trying kernels and codecs; to compile one takes up to a minute", err=True)
    diagnosis = examine()
    typer.echo(diagnosis.as_json() if as_json else diagnosis.as_text())
    if not diagnosis.healthy:
        raise typer.Exit(1)


@quickstart.command()
def _quickstart(
    only: Annotated[int | None, typer.Option(metavar="STEP", help="Run this step alone.")] = None,
    show: Annotated[bool, typer.Option("--list", help="List the steps and stop.")] = False,
) -> None:
    """Train, align and evaluate a small model here, from nothing, in a few minutes."""
    from mmalign.quickstart import load_steps, run_steps

    steps = load_steps()
    if show:
        for number, step in enumerate(steps, start=1):
            typer.echo(f"{number:2d}  {step.say}\n    {step.command}")
        return
    run_steps(steps, only=only)


@recipe.callback()
def _recipe() -> None:
    """Run all stages of a method in order, each in a process of its own."""


@recipe.command(name="specs")
def _specs(
    config: Annotated[
        Path,
        typer.Argument(help="YAML of the stages, such as configs/recipes/specs_qwen25vl.yaml."),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Dotted overrides, such as grpo.set.optim.steps=100 or zero=null.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check all configs, print the plan, and stop.")
    ] = False,
) -> None:
    """SPECS: prompts, pairs, cold start, GRPO and evaluation. What is complete is skipped."""
    from mmalign.chain import StepFailed, plan_of, run_steps, standings
    from mmalign.config import load_config
    from mmalign.specs_chain import SpecsChain, tell

    chain = load_config(config, SpecsChain, overrides or ())
    steps = chain.steps()
    chain.check_base()
    found = standings(steps)
    typer.echo(plan_of(steps, found))
    if dry_run:
        return
    try:
        run_steps(steps, found)
    except StepFailed as error:
        typer.echo(f"stopped: {error}", err=True)
        raise typer.Exit(error.code) from None
    tell(chain)
