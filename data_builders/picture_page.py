"""What a builder of picture pairs shows when it is done: counts, models, the first pairs."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import yaml

from data_builders.built_page import PREVIEW
from data_builders.inspect import by_reason
from mmalign.media import open_image
from mmalign.records import ImagePreference
from mmalign.report.page import Card, Page, thumbnail
from mmalign.store import open_dataset

SIDES = ("chosen", "rejected")


def write_picture_page(path: Path, limit: int = 24) -> Path:
    """Write `preview.html` into a dataset of image preferences; returns its path."""
    dataset = open_dataset(path, ImagePreference)
    manifest = dataset.manifest
    num_inputs = sum(manifest.counts.values())
    page = Page(
        f"{manifest.builder}: {len(dataset)} pairs of pictures",
        f"from {num_inputs} prompts, seed {manifest.seed}, content {manifest.content_hash[:12]}",
    )
    page.heading("What became of the prompts")
    counts = by_reason(manifest.counts)
    page.table(
        ["reason", "prompts", "share"],
        [[reason, n, f"{100 * n / num_inputs:.1f} %"] for reason, n in counts.items()],
    )
    page.heading("What drew the pictures")
    page.table(["part", "value"], [[name, str(value)] for name, value in manifest.model.items()])
    page.code(yaml.safe_dump(manifest.config, sort_keys=False, allow_unicode=True), "its config")
    page.heading("Pairs")
    shown = min(limit, len(dataset))
    page.paragraph(f"The first {shown} pairs; chosen stands left, rejected right.")
    pairs = itertools.islice(dataset, limit)
    page.gallery([_card(pair, dataset.media_root) for pair in pairs])
    page.write(path / PREVIEW)
    return path / PREVIEW


def _card(pair: ImagePreference, root: Path) -> Card:
    detail = json.loads(pair.origin.detail or "{}")
    under = []
    for side in SIDES:
        score = detail.get(f"{side}_score")
        under.append(side if score is None else f"{side}, {score:.4g}")
    asked = [
        (f"{side} was drawn for", detail[f"{side}_prompt"])
        for side in SIDES
        if detail.get(f"{side}_prompt", pair.prompt) != pair.prompt
    ]
    return Card(
        title=pair.id,
        images=[thumbnail(open_image(getattr(pair, side), root)) for side in SIDES],
        texts=[("prompt", pair.prompt), *asked],
        under=tuple(under),
    )
