"""`mmalign eval lmms` and `export`: to lmms-eval and VLMEvalKit."""

from __future__ import annotations

import sys
from pathlib import Path

import typer

from evals.tables import print_table


def add_to(app: typer.Typer) -> None:
    """Register the verbs of this file."""
    app.command()(lmms)
    app.command()(export)


def lmms(
    config: Path = typer.Argument(
        None, help="A recipe whose `model` is to be evaluated; or give --model."
    ),
    overrides: list[str] = typer.Argument(None, metavar="[KEY=VALUE]...", help="Replace settings."),
    tasks: str = typer.Option(help="Tasks of lmms-eval, with commas between: pope,mme."),
    output: Path = typer.Option(help="Folder for lmms.json, the log and what lmms-eval writes."),
    model: str = typer.Option(None, help="In place of a recipe: a folder, or a hub name."),
    adapter: str = typer.Option(None, help="A folder with a LoRA for --model."),
    python: str = typer.Option(
        sys.executable, help="The interpreter that has lmms-eval.", show_default="this one"
    ),
    include: Path = typer.Option(None, help="A folder with tasks of your own."),
    limit: int = typer.Option(None, min=1, help="Only the first so many questions of each task."),
    batch_size: int = typer.Option(1, min=1),
    device: str = typer.Option(None, help="Such as cpu or cuda:1.", show_default="a GPU if any"),
    lmms_model: str = typer.Option(
        None, help="The model class of lmms-eval.", show_default="by config.json"
    ),
    model_args: str = typer.Option(
        "", help="More arguments for that class, such as min_pixels=3136,max_num_frames=8."
    ),
) -> None:
    """Evaluate a checkpoint, adapters included, by tasks of lmms-eval."""
    from evals.config import EvalModel
    from evals.lmms import SUMMARY, Options, evaluate
    from evals.lmms_classes import Choice
    from mmalign.config import apply_overrides, read_yaml, validate
    from mmalign.errors import ConfigError

    if (config is None) == (model is None):
        raise ConfigError("give either a recipe or --model", where="mmalign eval lmms")
    if model is not None:
        asked = EvalModel(path=model, adapter=adapter)
    elif adapter is not None:
        raise ConfigError("--adapter goes with --model; in a recipe it is model.adapter")
    else:
        data = apply_overrides(read_yaml(config), overrides or (), str(config))
        if not isinstance(data.get("model"), dict):
            raise ConfigError("has no `model` section", where=str(config))
        if data["model"].get("engine", "local") == "server":
            raise ConfigError(
                "is a model behind a server, which is no checkpoint",
                where=f"{config}, model",
                fix="run lmms-eval by hand, with its class `openai`",
            )
        asked = validate(data["model"], EvalModel, f"{config}, model")
    options = Options(
        tasks=tuple(task.strip() for task in tasks.split(",")),
        choice=Choice(model_class=lmms_model, model_args=model_args, device=device),
        python=python,
        include=include,
        limit=limit,
        batch_size=batch_size,
    )
    summary = evaluate(asked, output, options)
    rows = [
        (
            metric["task"],
            metric["metric"] + ("" if metric["filter"] == "none" else f" ({metric['filter']})"),
            *("-" if metric[key] is None else f"{metric[key]:.4f}" for key in ("value", "stderr")),
            "-" if metric["num_items"] is None else str(metric["num_items"]),
        )
        for metric in summary["metrics"]
    ]
    print_table(("task", "metric", "value", "stderr", "items"), rows, num_left=2)
    for setting in summary["not_handed_on"]:
        typer.echo(f"not handed on: {setting}", err=True)
    if summary["num_failed"]:
        typer.echo(
            f"{summary['num_failed']} answers failed and count as empty: see {output / 'lmms.log'}",
            err=True,
        )
    typer.echo(str(output / SUMMARY))


def export(
    run: Path = typer.Argument(help="Output folder of a finished evaluation."),
    format: str = typer.Option(help="lmms-eval or vlmevalkit."),
    output: Path = typer.Option(help="Folder for the files."),
    name: str = typer.Option(
        None, help="What the model is called there.", show_default="the run's folder"
    ),
    suite: list[str] = typer.Option([], help="Only this suite; once for each."),
) -> None:
    """Write a run's questions, answers and scores as lmms-eval or VLMEvalKit would."""
    from evals.export import export_run

    done = export_run(run, format, output, name=name, suites=suite)
    for key, why in done.left_out.items():
        typer.echo(f"left out {key}: {why}", err=True)
    for path in done.written:
        typer.echo(str(path))
