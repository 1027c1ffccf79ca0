"""The report's pictures: what each model drew for the same prompt and noise, side by side.

And what a run drew while it trained, from before its first step to its last.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evals.image_preference import BENCHMARK
from evals.report import Evaluation, Report, measures, spread, suite_title
from mmalign.errors import MediaError
from mmalign.media import open_image
from mmalign.records import Media
from mmalign.report.page import Card, Page, thumbnail

SIDE = 160
# Most that a card of a training run holds: the first, the last, and some between, evenly spread.
STEPS = 6


def add_pictures(page: Page, report: Report) -> None:
    """A card for each of some prompts, spread evenly: nobody chose them."""
    for key, suite in report.suites.items():
        shown = [e for e in report.evaluations if key in e.suites]
        if suite["benchmark"] != BENCHMARK or report.recipe.gallery == 0:
            continue
        items = {e.name: e.items(key) for e in shown}
        chosen, total = spread(items, report.recipe.gallery)
        page.heading(f"Pictures: {suite_title(suite)}")
        page.paragraph(
            f"{len(chosen)} of {total:,} prompts, spread evenly. All pictures of a card were drawn "
            "for one prompt from one noise; under each stand its model and its scores."
        )
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


def add_samples(page: Page, report: Report) -> None:
    """What each training run drew of its `validation` prompts, by step."""
    for run in report.recipe.runs:
        folders = sorted(run.train.glob("samples/step-*")) if run.train else []
        complete = [folder for folder in folders if (folder / "settings.json").exists()]
        if run.train is None or not complete:
            continue
        count = min(STEPS, len(complete))
        last = len(complete) - 1
        shown = [complete[number * last // max(1, count - 1)] for number in range(count)]
        prompts = json.loads((complete[-1] / "settings.json").read_text())["prompts"]
        page.heading(f"During training: {run.name}")
        page.paragraph("Drawn from one noise each time; under each picture stands the step.")
        page.gallery([_by_step(number, prompt, shown) for number, prompt in enumerate(prompts)])


def _by_step(number: int, prompt: str, folders: Sequence[Path]) -> Card:
    pictures: list[str] = []
    under: list[str] = []
    problems: list[str] = []
    for folder in folders:
        try:
            picture = open_image(Media(path=f"{number}.png"), folder)
        except MediaError as error:
            problems.append(str(error))
            continue
        pictures.append(thumbnail(picture, max_side=SIDE))
        under.append(f"step {int(folder.name.removeprefix('step-')):,}")
    texts: list[Any] = [("prompt", prompt)]
    return Card(prompt, pictures, texts, note="; ".join(problems), under=tuple(under))
