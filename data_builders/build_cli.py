"""`mmalign build`: run a builder from its config. Nothing here imports torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Build a dataset from a config.", rich_markup_mode=None, add_completion=False
)


@app.command()
def build(
    config: Annotated[
        Path, typer.Argument(help="YAML of a builder, such as those in configs/build.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Dotted overrides, such as shard=3/16."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Read the config, say how far its output is, and stop.")
    ] = False,
) -> None:
    """Build a dataset: examples, or preference pairs from examples.

    A build that was stopped goes on where it stopped when it is started again. To use several
    processes or machines, give each its shard=0/16, shard=1/16, … and one output folder.
    """
    from data_builders.built_page import PREVIEW
    from data_builders.config import load_builder
    from data_builders.inspect import by_reason
    from mmalign.store import MANIFEST, read_manifest

    builder = load_builder(config, overrides or ())
    if check:
        from data_builders.standing import standing

        typer.echo(standing(builder).told(builder.output))
        return
    out = builder.build()
    if not (out / MANIFEST).exists():
        typer.echo(f"{out}: this shard is finished, others are not")
        return
    manifest = read_manifest(out)
    for reason, count in by_reason(manifest.counts).items():
        typer.echo(f"{count:8d}  {reason}")
    typer.echo(f"{manifest.num_records:8d}  {manifest.kind} records in {out}")
    if (out / PREVIEW).exists():
        typer.echo(f"look at   {out / PREVIEW}")
