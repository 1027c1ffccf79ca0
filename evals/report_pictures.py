"""The report's pictures: what each model drew for the same prompt and noise, side by side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evals.image_preference import BENCHMARK
from evals.report import Evaluation, Report, measures, suite_title
from mmalign.errors import MediaError
from mmalign.media import open_image
from mmalign.records import Media
from mmalign.report.page import Card, Page, thumbnail

SIDE = 160


def add_pictures(page: Page, report: Report) -> None:
    """A card for each of some prompts, spread evenly: nobody chose them."""
    for key, suite in report.suites.items():
        shown = [e for e in report.evaluations if key in e.suites]
        if suite["benchmark"] != BENCHMARK or report.recipe.gallery == 0:
            continue
        items = {e.name: e.items(key) for e in shown}
        ids = sorted(set.intersection(*(set(rows) for rows in items.values())))
        count = min(report.recipe.gallery, len(ids))
        page.heading(f"Pictures: {suite_title(suite)}")
        page.paragraph(
            f"{count} of {len(ids):,} prompts, spread evenly. All pictures of a card were drawn "
            "for one prompt from one noise; under each stand its model and its scores."
        )
        chosen = [ids[number * len(ids) // count] for number in range(count)]
        page.gallery([_card(id, suite, shown, items) for id in chosen])


def _card(
    id: str,
    suite: Mapping[str, Any],
    shown: list[Evaluation],
    items: Mapping[str, Mapping[str, dict[str, Any]]],
) -> Card:
    pictures: list[str] = []
    under: list[str] = []
    problems: list[str] = []
    labels = {metric.key: metric for metric in measures(suite)}
    for evaluation in shown:
        row = items[evaluation.name][id]
        root = Path(evaluation.suites[suite["key"]]["images"])
        try:
            pictures.append(thumbnail(open_image(Media(path=row["image"]), root), max_side=SIDE))
        except MediaError as error:
            problems.append(f"{evaluation.name}: {error}")
            continue
        scores = [f"{name} {labels[name].show(value)}" for name, value in row["scores"].items()]
        under.append("\n".join([evaluation.name, *scores]))
    texts: list[Any] = [("prompt", items[shown[0].name][id]["prompt"])]
    return Card(id, pictures, texts, note="; ".join(problems), under=tuple(under))
