"""What a builder shows when it is done: counts by reason, what made the pairs, the first pairs."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import yaml

from data_builders.inspect import by_reason
from mmalign.media import open_image
from mmalign.records import Preference, prompt_text
from mmalign.report.page import Card, Marked, Page, difference, thumbnail
from mmalign.store import Dataset, open_dataset

PREVIEW = "preview.html"


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
    page.paragraph(
        f"The first {shown} pairs. Words that chosen and rejected do not share are highlighted. "
        "Where there are two pictures, the left one is the example's own; the right one is the "
        "contrast picture, in view of which the rejected response was written."
    )
    page.gallery([_card(pair, dataset) for pair in itertools.islice(dataset, limit)])
    page.write(path / PREVIEW)
    return path / PREVIEW


def _card(pair: Preference, dataset: Dataset[Preference]) -> Card:
    detail: dict[str, Any] = json.loads(pair.origin.detail or "{}")
    texts: list[tuple[str, str | Marked]] = [("prompt", prompt_text(pair.prompt))]
    if "masked" in detail:
        texts.append(("masked", detail.pop("masked")))
    texts += [
        ("chosen", difference(pair.chosen, pair.rejected, kind="good")),
        ("rejected", difference(pair.rejected, pair.chosen, kind="bad")),
    ]
    facts = [f"{name.replace('_', ' ')} {value}" for name, value in detail.items() if value != []]
    return Card(
        title=pair.id,
        images=[
            thumbnail(open_image(media, dataset.media_root))
            for media in (*pair.images, *pair.contrast_images)
        ],
        texts=texts,
        note=", ".join([pair.origin.reason, *facts]),
    )
