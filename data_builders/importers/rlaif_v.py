"""RLAIF-V's parquet: question, chosen, rejected, and `image` with the bytes inside."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data_builders.importers.common import (
    Bad,
    Row,
    import_rows,
    media,
    messages,
    required,
    text,
    with_image_places,
)
from mmalign.records import Example, Preference


def read(source: Path) -> Iterator[Example | Preference | Bad]:
    """Preferences from parquet (a file or a folder of them), JSON or JSON lines.

    Rows are named by their place, since nothing says that the set's own `idx` is unique.
    """
    return import_rows(source, _preference, "import:rlaif_v")


def _preference(row: Row) -> Preference:
    images = media(required(row.values, "image"))
    prompt = messages([{"role": "user", "content": text(row.values, "question")}])
    return Preference(
        id=row.id,
        prompt=with_image_places(prompt, len(images)),
        images=images,
        chosen=text(row.values, "chosen"),
        rejected=text(row.values, "rejected"),
    )
