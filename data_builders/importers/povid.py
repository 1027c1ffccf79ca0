"""POVID's JSON: `image`, `conversations` and `rejected_conversations`, turns of `from` and `value`.

Both are whole conversations of human and gpt that share their prompt: the question, or all turns
before the last one. Such as differ before their last turn are refused: they are no pair.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
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
from mmalign.records import Origin, Preference


def read(source: Path) -> Iterator[Preference | Bad]:
    """Preferences from a JSON list or JSON lines.

    Rows are named by their place: the set's own `id` names the COCO picture, which several rows
    may share. It is kept in the origin's detail.
    """
    return import_rows(source, _preference, "import:povid")


def _preference(row: Row) -> Preference:
    prompt, chosen, rejected = split_pair(
        *(
            messages(required(row.values, column), role="from", content="value")
            for column in ("conversations", "rejected_conversations")
        )
    )
    images = media(required(row.values, "image"))
    return Preference(
        id=row.place,
        prompt=with_image_places(prompt, len(images)),
        images=images,
        chosen=chosen,
        rejected=rejected,
        origin=Origin(detail=json.dumps({"id": row.id})),
    )
