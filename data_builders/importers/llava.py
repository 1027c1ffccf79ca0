"""LLaVA's JSON: `id`, `image`, and `conversations` of `{"from": "human" | "gpt", "value"}`.

`<image>` in a human turn is where the picture goes. The last assistant turn is the answer, the
earlier turns stay in the prompt; a conversation that ends with a question has no known answer.
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
    with_image_places,
)
from mmalign.records import Example, Preference


def read(source: Path) -> Iterator[Example | Preference | Bad]:
    """Examples from a JSON list or JSON lines."""
    return import_rows(source, _example, "import:llava")


def _example(row: Row) -> Example:
    turns = messages(required(row.values, "conversations"), role="from", content="value")
    answered = bool(turns) and turns[-1].role == "assistant"
    prompt = turns[:-1] if answered else turns
    images = media(row.values.get("image"))
    return Example(
        id=row.id,
        prompt=with_image_places(prompt, len(images)),
        images=images,
        answer=answer(turns[-1:], "the last turn") if answered else None,
    )
