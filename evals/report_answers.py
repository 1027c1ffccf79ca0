"""The report's page of checked answers: some responses to read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evals.benchmarks.verifiable import BENCHMARK
from evals.report import Evaluation, Report, spread, suite_title
from mmalign.errors import MmalignError
from mmalign.media import open_image
from mmalign.records import Verifiable
from mmalign.report.page import Card, Marked, Page, thumbnail
from mmalign.store import Dataset, open_dataset

SIDE = 160
# A longer response is shown by its beginning and its end, where the answer stands.
MOST_CHARS = 800


def add_answers(page: Page, report: Report) -> None:
    """For each suite of checked answers, cards spread evenly."""
    for key, suite in report.suites.items():
        shown = [e for e in report.evaluations if key in e.suites]
        if suite["benchmark"] != BENCHMARK:
            continue
        items = {e.name: e.items(key) for e in shown}
        chosen, total = spread(items, report.recipe.gallery)
        if not chosen:
            continue
        page.heading(f"Answers: {suite_title(suite)}")
        page.paragraph(
            f"{len(chosen)} of {total:,} questions, spread evenly: nobody chose them. What a "
            "response got wrong, in its answer or in its form, stands beside its model."
        )
        records = _records(shown[0], key, chosen)
        page.gallery([_card(id, items, records) for id in chosen])


def _records(
    evaluation: Evaluation, key: str, ids: list[str]
) -> dict[str, tuple[Verifiable, Path]]:
    """The rows themselves, for their pictures, and where these lie; {} where they are not here."""
    for benchmark in evaluation.results["config"]["benchmarks"]:
        name = "-".join(filter(None, (benchmark["name"], benchmark.get("split"))))
        if name == key:
            try:
                dataset: Dataset[Verifiable] = open_dataset(benchmark["data"], Verifiable)
            except MmalignError:
                return {}  # Responses are worth reading without their pictures.
            wanted = set(ids)
            return {row.id: (row, dataset.media_root) for row in dataset if row.id in wanted}
    return {}


def _card(
    id: str,
    items: Mapping[str, Mapping[str, dict[str, Any]]],
    records: Mapping[str, tuple[Verifiable, Path]],
) -> Card:
    first = next(iter(items.values()))[id]
    texts: list[tuple[str, str | Marked]] = [
        ("question", first["prompt"]),
        ("right answer", first["truth"]),
    ]
    for name, rows in items.items():
        row = rows[id]
        answer = Marked(((_shortened(row["answer"] or ""), None if row["correct"] else "bad"),))
        texts.append((f"{name} · {_verdict(row)}", answer))
    pictures, note = [], ""
    if id in records:
        record, root = records[id]
        try:
            pictures = [thumbnail(open_image(one, root), max_side=SIDE) for one in record.images]
        except MmalignError as error:
            note = f"The picture is not shown: {error}"
    return Card(id, pictures, texts, note)


def _verdict(row: Mapping[str, Any]) -> str:
    """Such as "right, in form" or "no_answer, no_tags"."""
    return f"{'right' if row['correct'] else row['reason']}, {row['form'] or 'in form'}"


def _shortened(text: str) -> str:
    if len(text) <= MOST_CHARS:
        return text
    return f"{text[: MOST_CHARS // 2]} […] {text[-MOST_CHARS // 2 :]}"
