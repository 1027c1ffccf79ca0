"""`mmalign data`: check, measure, look at and import datasets."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from data_builders.importers import (
    hpdv2,
    image_folders,
    llava,
    mm_rlhf,
    pickapic,
    povid,
    realign,
    rlaif_v,
    rlhf_v,
    rrpo,
    sharegpt,
    trl,
)
from mmalign.comparisons import Choice

app = typer.Typer(
    help="Check, measure, look at and import datasets.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)

IMPORTERS = {
    "trl": trl.read,
    "llava": llava.read,
    "rlaif_v": rlaif_v.read,
    "realign": realign.read,
    "rlhf_v": rlhf_v.read,
    "povid": povid.read,
    "sharegpt": sharegpt.read,
    "rrpo": rrpo.read,
    "mm_rlhf": mm_rlhf.read,
    "pickapic": pickapic.read,
    "hpdv2": hpdv2.read,
    "image_folders": image_folders.read,
}
Format = StrEnum("Format", list(IMPORTERS))

Directory = Annotated[Path, typer.Argument(metavar="DIR", help="A dataset directory.")]


@app.command()
def validate(
    directory: Directory,
    max_problems: Annotated[int, typer.Option(min=1, help="Print no more than this.")] = 50,
    skip_media: Annotated[bool, typer.Option("--skip-media", help="Open no picture.")] = False,
) -> None:
    """Check every row and every picture. Exit code: 0 clean, 1 problems, 2 unusable."""
    from data_builders.inspect import validate as find
    from mmalign.store import open_dataset

    dataset = open_dataset(directory)
    rows: set[int | None] = set()
    num_findings = 0
    for finding in find(dataset, skip_media=skip_media):
        rows.add(finding.row)
        num_findings += 1
        if num_findings <= max_problems:
            typer.echo(finding)
    if num_findings > max_problems:
        typer.echo(f"… and {num_findings - max_problems} more; --max-problems shows them")
    if num_findings:
        typer.echo(f"{directory}: {num_findings} problems in {len(rows)} of {len(dataset)} rows")
        raise typer.Exit(1)
    typer.echo(f"{directory}: {len(dataset)} {dataset.manifest.kind} records, no problems")


@app.command()
def stats(
    directory: Directory,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Count: lengths, length bias, duplicates, yes/no balance, missing media, reasons."""
    from data_builders.inspect import stats as measure
    from data_builders.inspect import stats_text
    from mmalign.store import open_dataset

    numbers = measure(open_dataset(directory))
    typer.echo(json.dumps(numbers, indent=2) if as_json else stats_text(numbers))


@app.command()
def preview(
    directory: Directory,
    out: Annotated[
        Path | None, typer.Option(help="HTML file; by default preview.html in DIR.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many records.")] = 24,
    processor: Annotated[
        str | None,
        typer.Option(metavar="CHECKPOINT", help="Show prompts as this model would see them."),
    ] = None,
) -> None:
    """Write an HTML page that shows records with their pictures and differing words."""
    from data_builders.preview import preview as show
    from mmalign.store import open_dataset

    dataset = open_dataset(directory)
    preparer = None
    if processor is not None:
        from mmalign.models.load import load_processor

        preparer = load_processor(processor)
    out = out or directory / "preview.html"
    show(dataset, limit=limit, preparer=preparer).write(out)
    typer.echo(out)


@app.command()
def convert(
    source: Annotated[
        Path,
        typer.Argument(
            help="A parquet, JSON or JSON lines file, a folder, or a quoted pattern of files."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="The dataset directory to make.")],
    format: Annotated[Format, typer.Option("--from", help="What SOURCE holds.")],
    media_root: Annotated[
        Path | None,
        typer.Option(
            "--media-root",
            "--images-root",
            help="Where the paths of pictures and clips start; by default SOURCE's folder.",
        ),
    ] = None,
    embed_media: Annotated[
        bool, typer.Option("--embed-media", help="Copy pictures and clips into the rows.")
    ] = False,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Stop after so many records; ties and bad rows do not count."),
    ] = None,
) -> None:
    """Import another tool's file; rows that cannot be used go to OUT/quarantine.jsonl."""
    from data_builders.convert import QUARANTINE, told
    from data_builders.convert import convert as run

    read = IMPORTERS[format.value]
    manifest = run(source, out, read, media_root=media_root, embed_media=embed_media, limit=limit)
    typer.echo(f"{out}: {manifest.num_records} {manifest.kind} records")
    num_bad = sum(manifest.counts.values()) - manifest.counts["imported"]
    if num_bad:
        reasons = told(manifest.counts)
        typer.echo(f"{num_bad} rows left out ({reasons}); {out / QUARANTINE} says why")


@app.command()
def pairs(
    rankings: Annotated[Path, typer.Argument(help="A dataset directory of rankings.")],
    out: Annotated[Path, typer.Argument(help="The dataset directory to make.")],
    choice: Annotated[
        Choice,
        typer.Option("--pairs", help="Every two different ranks, or the first and the last."),
    ] = "all",
    min_gap: Annotated[
        float | None,
        typer.Option(help="Leave out pairs whose scores differ by less, or are not known."),
    ] = None,
) -> None:
    """Expand rankings into pairs of a chosen and a rejected response; ties are none."""
    from data_builders.inspect import by_reason
    from data_builders.pairs import make_pairs

    manifest = make_pairs(rankings, out, choice=choice, min_gap=min_gap)
    typer.echo(f"{out}: {manifest.num_records} {manifest.kind} records")
    for reason, count in by_reason(manifest.counts).items():
        typer.echo(f"{count:>8}  {reason}")
