"""The scenes of the report: the descriptions that changed most, better and worse."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evals.base import Row
from evals.report import Evaluation, Report, suite_title
from evals.report_media import Pictures
from mmalign.report.page import Card, Kind, Marked, Page

SIDE = 320


def add_scenes(page: Page, report: Report) -> None:
    """For each suite of descriptions, where they changed most: half got better, half worse."""
    headed = False
    half = report.recipe.gallery // 2
    for key, suite in report.suites.items():
        shown = [e for e in report.evaluations if key in e.suites]
        if half == 0 or key not in report.base.suites or len(shown) < 2:
            continue
        items = {e.name: _described(e, key) for e in shown}
        shared = sorted(set.intersection(*(set(rows) for rows in items.values())))
        before = items[report.base.name]
        change = {
            id: sum(_errors(rows[id]) for rows in items.values()) - len(items) * _errors(before[id])
            for id in shared
        }
        fixed = sorted((id for id in shared if change[id] < 0), key=lambda id: (change[id], id))
        broken = sorted((id for id in shared if change[id] > 0), key=lambda id: (-change[id], id))
        if not fixed and not broken:
            continue
        if not headed:
            page.heading("Scenes")
            headed = True
        page.paragraph(
            f"{suite_title(suite)}: over all runs, {len(fixed):,} of {len(shared):,} "
            f"answered items have fewer errors than under base, {len(broken):,} have more, and "
            f"{len(shared) - len(fixed) - len(broken):,} as many. Below are the largest changes "
            "each way, not a random sample; what is not there is highlighted."
        )
        pictures = Pictures(report.base.suites[key], SIDE)
        for verdict, ids in (("Fixed", fixed[:half]), ("Broken", broken[:half])):
            if ids:
                page.gallery([_card(verdict, id, items, pictures) for id in ids])


def _described(evaluation: Evaluation, key: str) -> dict[str, Row]:
    """The items of a suite that are descriptions whose made-up words are known."""
    return {
        id: row
        for id, row in evaluation.items(key).items()
        if {"mentioned", "spans", "hallucinated", "truth"} <= row.keys()
        and row.get("label") is None
        and row["answer"]
    }


def _card(verdict: str, id: str, items: Mapping[str, dict[str, Any]], pictures: Pictures) -> Card:
    first = next(iter(items.values()))[id]
    medium = "clip" if "video" in first else "picture"
    truth = ", ".join(first["truth"]) or "none of the known objects"
    texts: list[tuple[str, str | Marked]] = [(f"in the {medium}", truth)]
    for name, rows in items.items():
        absent = ", ".join(sorted(set(rows[id]["hallucinated"]))) or "nothing"
        listed = (f"\nNot in the {medium}: {absent}.", "quiet")
        texts.append((name, Marked((*_caption(rows[id]), listed))))
    seen = pictures.of(first)
    return Card(f"{verdict}: {id}", list(seen.images), texts, seen.note, strips=seen.strips)


def _caption(row: Row) -> list[tuple[str, Kind | None]]:
    """The answer, the words for what is not in the picture highlighted."""
    parts: list[tuple[str, Kind | None]] = []
    position = 0
    for category, (start, end) in zip(row["mentioned"], row["spans"], strict=True):
        if category in row["hallucinated"]:
            parts += [(row["answer"][position:start], None), (row["answer"][start:end], "bad")]
            position = end
    return [*parts, (row["answer"][position:], None)]


def _errors(row: Row) -> int:
    return len(set(row["hallucinated"]))
