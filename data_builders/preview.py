"""A dataset as one HTML page: pictures, prompts, responses with their differing words marked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_builders.clip_page import ClipArtist
from mmalign.errors import MediaError, MmalignError
from mmalign.media import open_image
from mmalign.records import (
    Example,
    ImagePreference,
    Preference,
    Ranking,
    Record,
    Verifiable,
    media_of,
    prompt_text,
)
from mmalign.report.page import Card, Marked, Page, difference, thumbnail
from mmalign.store import Dataset

if TYPE_CHECKING:
    from mmalign.prepare import Preparer

Text = tuple[str, str | Marked]


def preview(dataset: Dataset[Any], *, limit: int = 24, preparer: Preparer | None = None) -> Page:
    """A page of `limit` rows, spread evenly over the dataset.

    With a preparer, each card also holds the prompt as that model sees it.
    """
    count = min(limit, len(dataset))
    rows = [index * len(dataset) // count for index in range(count)]
    page = Page(f"{dataset.path.name}: {dataset.manifest.kind} records", str(dataset.path))
    page.paragraph(f"{count} of {len(dataset)} records, spread evenly.")
    with ClipArtist() as artist:
        cards = [_card(row, dataset[row], dataset.media_root, preparer, artist) for row in rows]
    page.gallery(cards)
    return page


def _card(
    row: int, record: Record, root: Path, preparer: Preparer | None, artist: ClipArtist
) -> Card:
    pictures: list[str] = []
    names: list[str] = []
    sizes: list[str] = []
    texts: list[Text] = [*_responses(record)]
    for column, media in media_of(record):
        if column.endswith("videos"):
            texts.append((column, media.path or "embedded clip"))
            continue
        try:
            image = open_image(media, root)
            pictures.append(thumbnail(image))
            names.append(column)
            sizes.append(f"{image.width} x {image.height}")
        except MediaError as error:
            texts.append((column, str(error)))
    if preparer is not None and not isinstance(record, ImagePreference):
        texts += _as_the_model_sees(record, root, preparer)
    strips, problems = artist.strips(record, root)
    texts += [("clip", problem) for problem in problems]
    texts.append(("origin", _origin(record)))
    title = f"row {row}: {record.id}"
    if isinstance(record, ImagePreference):
        # Which of the two is which must not need counting.
        under = tuple(f"{name}, {size}" for name, size in zip(names, sizes, strict=True))
        return Card(title, pictures, texts, under=under)
    note = f"pictures, in order: {', '.join(names)}" if len(set(names)) > 1 else ""
    return Card(title, pictures, texts, note, strips)


def _responses(record: Record) -> Iterator[Text]:
    prompt = record.prompt if isinstance(record, ImagePreference) else prompt_text(record.prompt)
    yield "prompt", prompt
    match record:
        case Preference():
            yield "chosen", difference(record.chosen, record.rejected, kind="good")
            yield "rejected", difference(record.rejected, record.chosen)
        case Ranking():
            for response in sorted(record.responses, key=lambda response: response.rank):
                yield f"rank {response.rank}", response.text
        case Example() | Verifiable():
            yield "answer", record.answer or "none given"
        case ImagePreference() if record.p_target != 1.0:
            yield "p_target", f"{record.p_target:.3g}"


def _as_the_model_sees(record: Any, root: Path, preparer: Preparer) -> Iterator[Text]:
    try:
        condition = preparer.condition(
            record.prompt, record.images, root, videos=record.videos, id=record.id
        )
    except MmalignError as error:
        yield "as the model sees it", f"it cannot: {error}"
        return
    yield "as the model sees it", condition.text
    num_tokens = len(condition.prompt_ids)
    num_media = condition.num_media_tokens
    kind = "image" if num_media == condition.num_image_tokens else "image and video"
    yield "prompt tokens", f"{num_tokens}, of which {num_media} are {kind} tokens"


def _origin(record: Record) -> str:
    origin = record.origin
    parts = (f"{origin.builder} {origin.version}".strip(), origin.source, origin.reason)
    return ", ".join(part for part in parts if part) or "not told"
