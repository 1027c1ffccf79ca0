"""TRL's preference format: prompt, chosen, rejected, and `images` or `image`.

Texts are plain, or conversations of role and content; the prompt may also be left out, as TRL
allows, where chosen and rejected are whole conversations that share it. Images that the prompt
gives no place go to the front of its first user turn, as in TRL.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data_builders.importers.common import (
    Bad,
    Row,
    answer,
    import_rows,
    media,
    messages,
    required,
    split_pair,
    text,
    with_image_places,
)
from mmalign.records import Example, Preference


def read(source: Path) -> Iterator[Example | Preference | Bad]:
    """Preferences from parquet, JSON or JSON lines."""
    return import_rows(source, _preference, "import:trl")


def _preference(row: Row) -> Preference:
    values = row.values
    chosen, rejected = (_turns(values, column) for column in ("chosen", "rejected"))
    if values.get("prompt") is None and isinstance(values["chosen"], list):
        prompt, chosen_text, rejected_text = split_pair(chosen, rejected)
    else:
        prompt = _turns(values, "prompt")
        chosen_text, rejected_text = answer(chosen, "chosen"), answer(rejected, "rejected")
    images = media(values.get("images")) or media(values.get("image"))
    return Preference(
        id=row.id,
        prompt=with_image_places(prompt, len(images)),
        images=images,
        chosen=chosen_text,
        rejected=rejected_text,
    )


def _turns(values: dict, column: str):
    """A column as messages: a plain text is one turn of the speaker that the column implies."""
    if isinstance(required(values, column), str):
        role = "user" if column == "prompt" else "assistant"
        return messages([{"role": role, "content": text(values, column)}])
    return messages(values[column])
