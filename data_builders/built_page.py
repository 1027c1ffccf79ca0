"""What a builder shows when it is done: counts by reason, what made the pairs, the first pairs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import yaml

from data_builders.clip_page import ClipArtist, detail_of
from data_builders.inspect import by_reason
from mmalign.media import open_image
from mmalign.records import Preference, Span, prompt_text
from mmalign.report.page import Card, Kind, Marked, Page, difference, thumbnail
from mmalign.store import Dataset, open_dataset

PREVIEW = "preview.html"

ON_PICTURES = """\
Where there are two pictures, the left one is the example's own; the right one is the contrast \
picture, in view of which the rejected response was written."""
ON_CLIPS = """\
The first strip is the clip of the pair. Where there is a second, the policy saw that one when it \
gave the rejected response, or the response that the rejected one was made from; the numbers say \
which frame of the first strip is shown there."""


def write_preview(path: Path, limit: int = 24) -> Path:
    """Write `preview.html` into a dataset of preferences; returns its path."""
    dataset = open_dataset(path, Preference)
    manifest = dataset.manifest
    num_inputs = sum(manifest.counts.values())
    page = Page(
        f"{manifest.builder}: {len(dataset)} preference pairs",
        f"from {num_inputs} examples, seed {manifest.seed}, content {manifest.content_hash[:12]}",
    )
    page.heading("What became of the examples")
    counts = by_reason(manifest.counts)
    rows = [[reason, n, f"{100 * n / num_inputs:.1f} %"] for reason, n in counts.items()]
    page.table(["reason", "examples", "share"], rows)
    page.heading("What made the pairs")
    page.table(["part", "value"], [[name, str(value)] for name, value in manifest.model.items()])
    page.code(yaml.safe_dump(manifest.config, sort_keys=False, allow_unicode=True), "its config")
    page.heading("Pairs")
    shown = min(limit, len(dataset))
    pairs = list(itertools.islice(dataset, limit))
    what = f"The first {shown} pairs. Highlighted are the phrases that the pair marks, or where it "
    what += "marks none, the words that chosen and rejected do not share. "
    what += ON_CLIPS if any(pair.videos for pair in pairs) else ON_PICTURES
    page.paragraph(what)
    with ClipArtist() as artist:
        page.gallery([_card(pair, dataset, artist) for pair in pairs])
    page.write(path / PREVIEW)
    return path / PREVIEW


def _card(pair: Preference, dataset: Dataset[Preference], artist: ClipArtist) -> Card:
    detail = detail_of(pair)
    texts: list[tuple[str, str | Marked]] = [("prompt", prompt_text(pair.prompt))]
    if pair.chosen_spans or pair.rejected_spans:
        chosen = marked(pair.chosen, pair.chosen_spans, kind="good")
        rejected = marked(pair.rejected, pair.rejected_spans, kind="bad")
    else:
        chosen = difference(pair.chosen, pair.rejected, kind="good")
        rejected = difference(pair.rejected, pair.chosen, kind="bad")
    if "masked" in detail:
        texts.append(("masked", detail.pop("masked")))
    texts += [("chosen", chosen), ("rejected", rejected)]
    if (response := detail.pop("response", None)) not in (None, pair.rejected):
        texts.append(("the policy's own words", str(response)))
    if "differences" in detail:
        texts.append(("differences, says the judge", str(detail.pop("differences"))))
    strips, problems = artist.strips(pair, dataset.media_root)
    texts += [("clip", problem) for problem in problems]
    drawn = {"perturbation", "frames", "try"}  # in the strips, and in the reason
    facts = [
        f"{name.replace('_', ' ')} {value}"
        for name, value in detail.items()
        if value != [] and name not in drawn
    ]
    return Card(
        title=pair.id,
        images=[
            thumbnail(open_image(media, dataset.media_root))
            for media in (*pair.images, *pair.contrast_images)
        ],
        texts=texts,
        note=", ".join([pair.origin.reason, *facts]),
        strips=strips,
    )


def marked(text: str, spans: Sequence[Span], *, kind: Kind) -> Marked:
    """The text with its spans highlighted."""
    parts: list[tuple[str, Kind | None]] = []
    end = 0
    for span in sorted(spans, key=lambda span: span.start):
        parts += [(text[end : span.start], None), (text[max(span.start, end) : span.end], kind)]
        end = max(end, span.end)
    parts.append((text[end:], None))
    return Marked(tuple(part for part in parts if part[0]))
