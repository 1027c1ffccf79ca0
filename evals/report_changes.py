"""The report's galleries of questions: what a run got right that base had wrong, and worse."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from evals.base import Row
from evals.report import Report, evenly, suite_title
from evals.report_media import Pictures, shortened
from mmalign.report.page import Card, Marked, Page

SIDE = 192
# Prompts may hold a clip's subtitles, and answers may not end.
MOST_CHARS = 600
MOST_TRUTHS = 5


@dataclass(frozen=True)
class Changes:
    """What one run did to the questions that it and base both answered; ids are sorted.

    Of answers to which a judge gave points, fixed are those that got more and broke those that got
    fewer; then num_same is the rest, and nothing is right or wrong.
    """

    fixed: list[str]
    broke: list[str]
    num_right: int = 0
    num_wrong: int = 0
    num_same: int | None = None

    @property
    def counts(self) -> str:
        """How many of each, in words."""
        total = len(self.fixed) + len(self.broke) + self.num_right + self.num_wrong
        if self.num_same is not None:
            return (
                f"of {total + self.num_same:,} answers that both gave, {len(self.fixed):,} got "
                f"more points, {len(self.broke):,} fewer, {self.num_same:,} as many."
            )
        return (
            f"of {total:,} questions that both answered, fixed {len(self.fixed):,}, broke "
            f"{len(self.broke):,}; {self.num_right:,} right under both, {self.num_wrong:,} under "
            "neither."
        )


def right(row: Row) -> bool | None:
    """Whether a question's answer is right by the official reading; None for other items.

    Of answers with soft credit, those with half of it or more.
    """
    if row.get("label") is None or not {"prompt", "answer"} <= row.keys():
        return None
    if "correct_official" in row:
        return row["correct_official"] >= 0.5
    return row["official"] == row["label"] if "official" in row else None


def points(row: Row) -> float | None:
    """What a judge gave an answer, by the official reading; None where no judge was asked."""
    return row.get("score_official") if {"prompt", "label", "answer"} <= row.keys() else None


def changes(base: Mapping[str, Row], run: Mapping[str, Row]) -> Changes | None:
    """Compare the answers to one suite's questions; None where it has none."""
    answered = [
        id
        for id in sorted(base.keys() & run.keys())
        if all(rows[id].get("answer") is not None for rows in (base, run))
    ]
    if any(points(row) is not None for row in base.values()):
        moved = {id: (points(run[id]) or 0.0) - (points(base[id]) or 0.0) for id in answered}
        return Changes(
            fixed=[id for id in answered if moved[id] > 0],
            broke=[id for id in answered if moved[id] < 0],
            num_same=sum(by == 0 for by in moved.values()),
        )
    if all(right(row) is None for row in base.values()):
        return None
    found: dict[tuple[bool | None, bool | None], list[str]] = {}
    for id in answered:
        found.setdefault((right(base[id]), right(run[id])), []).append(id)
    return Changes(
        fixed=found.get((False, True), []),
        broke=found.get((True, False), []),
        num_right=len(found.get((True, True), [])),
        num_wrong=len(found.get((False, False), [])),
    )


def add_changes(page: Page, report: Report) -> dict[str, dict[str, Changes]]:
    """For each suite of questions and each run: how many it fixed and broke, and some of either.

    Half of a gallery's cards at most are fixed ones, half broken ones. Returns the changes, by run,
    then by suite.
    """
    made: dict[str, dict[str, Changes]] = {run.name: {} for run in report.runs}
    for key, suite in report.suites.items():
        runs = [run for run in report.runs if key in run.suites]
        if key not in report.base.suites or not runs:
            continue
        before = report.base.items(key)
        pictures = Pictures(report.base.suites[key], SIDE)
        for run in runs:
            after = run.items(key)
            found = changes(before, after)
            if found is None:
                break
            if not any(made.values()):
                _begin(page)
            made[run.name][key] = found
            where = f"{suite_title(suite)}, {run.name}"
            page.paragraph(Marked(((where, "strong"), (f": {found.counts}", None))))
            rows = {report.base.name: before, run.name: after}
            words = ("Fixed", "Broke") if found.num_same is None else ("Better", "Worse")
            for word, ids in zip(words, (found.fixed, found.broke), strict=True):
                if chosen := evenly(ids, report.recipe.gallery // 2):
                    cards = [_card(word, id, rows, pictures) for id in chosen]
                    page.gallery(cards, narrow=True)
    return made


def _begin(page: Page) -> None:
    page.heading("Fixed and broken answers")
    page.paragraph(
        "Fixed: wrong under base, right under the run. Broke: the other way round. Answers count "
        "as the official reading has them; those that a judge gives points are better or worse. "
        "Those below are evenly spread; nobody chose them."
    )


def _card(word: str, id: str, rows: Mapping[str, Mapping[str, Row]], pictures: Pictures) -> Card:
    first = next(iter(rows.values()))[id]
    texts: list[tuple[str, str | Marked]] = [
        ("question", shortened(first["prompt"], MOST_CHARS)),
        ("right answer", shortened(_truth(first["label"]), MOST_CHARS)),
    ]
    for name, of_run in rows.items():
        row = of_run[id]
        said = shortened(row["answer"], MOST_CHARS) or "(empty)"
        given, was_right = points(row), right(row)
        if given is not None:
            texts.append((f"{name} · {given:.3g} points", said))
            continue
        answer = Marked(((said, None if was_right else "bad"),))
        texts.append((f"{name} · {'right' if was_right else 'wrong'}{_reading(row)}", answer))
    seen = pictures.of(first)
    return Card(f"{word}: {id}", list(seen.images), texts, seen.note, strips=seen.strips)


def _truth(label: str | list[str]) -> str:
    if isinstance(label, str):
        return label
    truths = list(dict.fromkeys(label))
    return " / ".join([*truths[:MOST_TRUTHS], *(["…"] if len(truths) > MOST_TRUTHS else [])])


def _reading(row: Row) -> str:
    """How the answer was read, where that is not the answer itself."""
    said = row.get("official")
    if said is None:
        return ", not read"
    plain = row["answer"].strip().rstrip(".").casefold()
    return "" if str(said).casefold() == plain else f", read as {shortened(str(said), 40)}"
