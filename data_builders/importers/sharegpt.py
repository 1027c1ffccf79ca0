"""ShareGPT conversations as LLaMA-Factory reads them, with or without a preference.

`conversations` are turns of `from` (human, gpt) and `value`, or `messages` turns of `role` and
`content`; `system` is a first turn. `chosen` and `rejected` are one such turn each and make a
preference; without them the last gpt turn is the answer of an example. `images` and `videos` are
lists of paths whose places are `<image>` and `<video>` in the text, or the front of the first
question. Tools, sound, and clips given as lists of frames are refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_builders.importers.common import (
    MEDIA_PLACES,
    Bad,
    Row,
    Unusable,
    answer,
    import_rows,
    media,
    messages,
    required,
    with_places,
)
from mmalign.records import Example, Media, Message, Preference

TAGS = {"conversations": ("from", "value"), "messages": ("role", "content")}


def read(source: Path) -> Iterator[Example | Preference | Bad]:
    """Preferences, or examples, from JSON, JSON lines or parquet."""
    return import_rows(source, _record, "import:sharegpt")


def _record(row: Row) -> Example | Preference:
    values = row.values
    for column in ("tools", "audios"):
        if values.get(column):
            raise Unusable(f"holds_{column}", f"{column} have no place in a record")
    column = "conversations" if values.get("messages") is None else "messages"
    role, content = TAGS[column]
    turns = messages(required(values, column), role=role, content=content, places=MEDIA_PLACES)
    if values.get("system") and not (turns and turns[0].role == "system"):
        turns = (*messages([{"role": "system", "content": values["system"]}]), *turns)
    images = media(values.get("images") or values.get("image"))
    videos = _clips(values.get("videos") or values.get("video"))

    def prompt(turns: tuple[Message, ...]) -> tuple[Message, ...]:
        return with_places(with_places(turns, "video", len(videos)), "image", len(images))

    if values.get("chosen") is None and values.get("rejected") is None:
        answered = bool(turns) and turns[-1].role == "assistant"
        return Example(
            id=row.id,
            prompt=prompt(turns[:-1] if answered else turns),
            images=images,
            videos=videos,
            answer=answer(turns[-1:], "the last turn") if answered else None,
        )
    chosen, rejected = (
        answer(messages([required(values, column)], role=role, content=content), column)
        for column in ("chosen", "rejected")
    )
    return Preference(
        id=row.id,
        prompt=prompt(turns),
        images=images,
        videos=videos,
        chosen=chosen,
        rejected=rejected,
    )


def _clips(value: Any) -> tuple[Media, ...]:
    if isinstance(value, list) and any(isinstance(clip, list) for clip in value):
        raise Unusable(
            "frames_as_clip", "a clip is a list of frames; give its file, or its frames as images"
        )
    return media(value)
