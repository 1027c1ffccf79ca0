"""RLHF-V's parquet: `image` with the bytes inside, and `text`, which is JSON of the pair.

`text` holds question, chosen and rejected, as a JSON text or as an object; where there is none, as
in older files, these three are columns. The picture is `image`, or else `image_path`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_builders.importers.common import (
    Bad,
    Row,
    Unusable,
    import_rows,
    media,
    messages,
    required,
    text,
    with_image_places,
)
from mmalign.records import Preference


def read(source: Path) -> Iterator[Preference | Bad]:
    """Preferences from parquet (a file or a folder of them), JSON or JSON lines.

    Rows are named by their place, since nothing says that the set's own `idx` is unique.
    """
    return import_rows(source, _preference, "import:rlhf_v")


def _preference(row: Row) -> Preference:
    pair = _pair(row.values)
    column = "image" if row.values.get("image") else "image_path"
    images = media(required(row.values, column))
    prompt = messages([{"role": "user", "content": text(pair, "question")}])
    return Preference(
        id=row.place,
        prompt=with_image_places(prompt, len(images)),
        images=images,
        chosen=text(pair, "chosen"),
        rejected=text(pair, "rejected"),
    )


def _pair(values: dict[str, Any]) -> dict[str, Any]:
    """What holds the question and its two responses."""
    pair = values.get("text")
    if pair is None:
        return values
    if isinstance(pair, str):
        try:
            pair = json.loads(pair)
        except (ValueError, RecursionError) as error:
            raise Unusable("malformed_text", f"text is not JSON: {error}") from None
    if not isinstance(pair, dict):
        raise Unusable("wrong_type", f"text is {type(pair).__name__}, wanted an object")
    return pair
