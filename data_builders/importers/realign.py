"""Re-Align's JSON: `image`, `retrieved_image`, and `chosen` and `rejected` as lists of turns.

The retrieved image becomes the contrast image. As in the released code, the image goes to the
front of the first user turn, wherever `<image>` stood. Unlike there, conversations that differ
before their last turn are refused: they are no pair.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from data_builders.importers.common import (
    Bad,
    Row,
    import_rows,
    media,
    messages,
    required,
    split_pair,
    with_image_places,
)
from mmalign.records import Example, Message, Preference


def read(source: Path) -> Iterator[Example | Preference | Bad]:
    """Preferences with contrast images from a JSON list or JSON lines."""
    return import_rows(source, _preference, "import:realign")


def _preference(row: Row) -> Preference:
    prompt, chosen, rejected = split_pair(
        messages(required(row.values, "chosen")), messages(required(row.values, "rejected"))
    )
    images = media(required(row.values, "image"))
    return Preference(
        id=row.id,
        prompt=with_image_places(_without_places(prompt), len(images)),
        images=images,
        contrast_images=media(required(row.values, "retrieved_image")),
        chosen=chosen,
        rejected=rejected,
    )


def _without_places(prompt: tuple[Message, ...]) -> tuple[Message, ...]:
    return tuple(
        replace(message, content=tuple(b for b in message.content if b.type != "image"))
        for message in prompt
    )
