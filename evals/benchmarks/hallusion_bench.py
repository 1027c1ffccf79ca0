"""HallusionBench (Guan et al., 2023, arXiv 2310.14566): does it look, or does it only know?

Figures come in sets: one as it was found, others edited so that the answer changes. Visual
dependent questions (VD) cannot be answered without a figure; visual supplement ones (VS) can, and
are first asked without any. The papers' numbers:

    accuracy   aAcc: questions answered right
    figures    fAcc: figures of which every question is right; questions without a figure left out
    pairs      qAcc: questions that are right for every figure, and without one where so asked
    easy       questions about the figure as it was found; VS: without a figure
    hard       questions that are right for every other figure

The released script asks GPT-4 whether an answer agrees with the truth: correct, incorrect, or
unclear, which counts as right for VS without a figure, else as wrong. `score_verdicts_file` counts
such verdicts as it does. Without a judge, answers are read:

    official  VLMEvalKit's rule: the words hold yes and not no, or no and not yes; else unread. It
              has no question without a figure, which are asked and counted here
    strict    mmalign.answers.yes_no

Without a judge nothing is unclear: an answer that was not read is wrong, with a figure or without.
By the paper, yes_difference is (answers that say yes - questions whose answer is yes) / questions,
and false_positive is the share of wrong answers that say yes: both of the official reading.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from evals.base import QuestionPrompt, Row, text_field
from evals.questions import (
    READINGS,
    Question,
    QuestionBench,
    Reading,
    accuracy,
    by_category,
    question_rules,
    together,
    unparsed,
)
from evals.rules import Metric
from evals.sources import media_of, of_kind, read_json, read_rows
from evals.stats import Ratio, mean, ratio
from mmalign.answers import yes_no
from mmalign.errors import DataError
from mmalign.records import Media

# The splits of the hub's lmms-lab/HallusionBench.
HUB_SPLITS = ("image", "non_image")
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
# The rule means to pass a flag to re.sub, and passes a count.
_MAX_PERIODS = 32
_FIELDS = ("category", "subcategory", "set_id", "figure_id", "question_id")


class HallusionBench(QuestionBench):
    """data: HallusionBench.json, or the hub's lmms-lab/HallusionBench.

    images: the folder in which `hallusion_bench` of the released zip lies. limit: whole sets.
    """

    name: Literal["hallusion_bench"] = "hallusion_bench"
    images: Path | None = None
    data: str
    # The rule reads the whole of an answer: one that says yes, and no later on, is unread.
    max_new_tokens: int = Field(default=1024, ge=1)
    prompt: QuestionPrompt = "{question}\nPlease answer yes or no."

    method: ClassVar[str] = (
        "official: VLMEvalKit's rule, no judge: one of the words yes and no; strict: opens with it"
    )

    def load(self) -> list[Question]:
        """The questions, named category/subcategory/set/figure/question."""
        questions: list[Question] = []
        for where, row in self._rows():
            parts = _parts(row, where)
            figure = _text(row, "visual_input", where) != "0"
            truth = {"0": "no", "1": "yes"}.get(_text(row, "gt_answer", where))
            if truth is None:
                raise DataError(
                    "gt_answer is wrong", where=where, got=row["gt_answer"], wanted="0 or 1"
                )
            questions.append(
                Question(
                    id="/".join(parts),
                    images=(self._picture(row, where),) if figure else (),
                    text=text_field(row, "question", where),
                    truth=truth,
                    categories=(parts[0], "/".join(parts[:2])),
                    cluster="/".join(parts[:3]),
                    group="/".join(parts[:3]),
                )
            )
        return questions

    def read(self, question: Question, answer: str, reading: Reading) -> str | None:
        """Yes or no."""
        return yes_no(answer) if reading == "strict" else official(answer)

    def metrics(self, items: Sequence[Row]) -> dict[str, Ratio]:
        """The metrics above."""
        return metrics(items)

    def _rows(self) -> list[tuple[str, Row]]:
        if Path(self.data).suffix == ".json":
            return list(read_rows(self.data))
        return [row for split in HUB_SPLITS for row in read_rows(self.data, split=split)]

    def _picture(self, row: Row, where: str) -> Media:
        if row.get("image") is not None:
            return media_of(row["image"], where)
        if self.images is None:
            raise DataError("needs images, the folder of the figures", where=self.data)
        return Media(path=text_field(row, "filename", where).removeprefix("./"))


def official(answer: str) -> str | None:
    """VLMEvalKit's reading: whichever of the words yes and no the answer holds, if it holds one.

    A mark of punctuation vanishes where any such mark stands beside a blank, and else becomes a
    blank; colons, asterisks and apostrophes stay, so that "**Yes**" is not read. Of the full stops
    the first 32 vanish: "yes." behind these is no "yes".
    """
    text = answer.lower()
    digits = re.search(r"\d,\d", text) is not None
    found = text
    for mark in _MARKS:
        alone = not digits and f"{mark} " not in text and f" {mark}" not in text
        found = found.replace(mark, " " if alone else "")
    words = re.sub(r"\.(?!\d)", "", found, count=_MAX_PERIODS).split()
    said = [word for word in ("yes", "no") if word in words]
    return said[0] if len(said) == 1 else None


def metrics(items: Sequence[Row]) -> dict[str, Ratio]:
    """The numbers of both readings, the official accuracy by category, and which way it leans."""
    found: dict[str, Ratio] = {}
    for reading in READINGS:
        found |= {f"{reading}/{name}": value for name, value in _shares(items, reading).items()}
        if reading == "official":
            found |= by_category(items, "official/accuracy", found["official/accuracy"])
    said = [row["official"] == "yes" for row in items]
    excess = [int(yes) - (row["label"] == "yes") for yes, row in zip(said, items, strict=True)]
    wrong = [not row["correct_official"] for row in items]
    found["yes_difference"] = mean(excess)
    found["false_positive"] = ratio([a and b for a, b in zip(said, wrong, strict=True)], wrong)
    found["unparsed_rate"] = unparsed(items)
    return found


def score_verdicts_file(path: str | Path, field: str = "gpt4v_output_gpt_check") -> dict[str, Any]:
    """The released script on a judged file: rows of HallusionBench.json with a verdict each.

    field: where the verdict stands: 0 incorrect, 1 correct, 2 unclear, as text or number.
    Returns accuracy, figures, pairs, easy and hard of all, and under "VD" and "VS" of either.
    Raises DataError on another verdict, and on a question that stands there twice.
    """
    items: list[Row] = []
    for number, row in enumerate(read_json(Path(path), list), start=1):
        where = f"{path}, row {number}"
        parts = _parts(of_kind(row, dict, where), where)
        verdict = _text(row, field, where)
        if verdict not in ("0", "1", "2"):
            raise DataError(f"{field} is wrong", where=where, got=verdict, wanted="0, 1 or 2")
        right = verdict == "1" or (verdict == "2" and not _has_figure(parts))
        items.append({"id": "/".join(parts), "categories": parts[:2], "correct_official": right})
    ids = [row["id"] for row in items]
    if not ids or len(set(ids)) < len(ids):
        twice = next((id for id in ids if ids.count(id) > 1), None)
        what = "a question stands there twice" if ids else "holds no row"
        raise DataError(what, where=str(path), got=twice)

    def values(rows: list[Row]) -> dict[str, float]:
        return {name: value.value for name, value in _shares(rows, "official").items()}

    sides = {
        side: values(rows)
        for side in ("VD", "VS")
        if (rows := [row for row in items if row["categories"][0] == side])
    }
    return {**values(items), **sides}


def _shares(items: Sequence[Row], reading: Reading) -> dict[str, Ratio]:
    """The five shares; a group counts at its first row, so each is right for any choice of rows."""
    names = [tuple(row["id"].split("/")) for row in items]
    easy = [parts[3] == "0" for parts in names]

    def right(key: Callable[[tuple[str, ...]], tuple[str, ...]], counted: Sequence[bool]) -> Ratio:
        """Groups all right; those of rows that do not count are all of such rows."""
        grouped = [{**row, "group": key(parts)} for row, parts in zip(items, names, strict=True)]
        whole = together(grouped, reading)
        return ratio(whole.numerator * counted, whole.denominator * counted)

    return {
        "accuracy": accuracy(items, reading),
        "figures": right(lambda parts: parts[:4], [_has_figure(parts) for parts in names]),
        "pairs": right(lambda parts: (*parts[:3], parts[4]), [True] * len(items)),
        "easy": right(lambda parts: (*parts[:3], parts[4], str(parts[3] == "0")), easy),
        "hard": right(
            lambda parts: (*parts[:3], parts[4], str(parts[3] == "0")), [not one for one in easy]
        ),
    }


def _has_figure(parts: Sequence[str]) -> bool:
    """By the released script's rule: all but VS questions of figure 0."""
    return parts[0] != "VS" or parts[3] != "0"


def _parts(row: Row, where: str) -> tuple[str, ...]:
    """Category, subcategory, set, figure and question, which name a question."""
    parts = tuple(_text(row, name, where) for name in _FIELDS)
    if parts[0] not in ("VD", "VS"):
        raise DataError("category is wrong", where=where, got=parts[0], wanted="VD or VS")
    return parts


def _text(row: Row, name: str, where: str) -> str:
    """A field that holds text, or a number as some copies have it."""
    value = row.get(name)
    return str(value) if type(value) is int else text_field(row, name, where)


RULES = question_rules(
    metrics,
    {
        "official/accuracy": "mcnemar",
        "official/figures": "mcnemar",
        "official/pairs": "mcnemar",
        "strict/accuracy": "mcnemar",
        "yes_difference": "bootstrap",
    },
    shown=(
        Metric("official/accuracy", "accuracy", "higher"),
        Metric("official/figures", "figures", "higher"),
        Metric("official/pairs", "pairs", "higher"),
        Metric("strict/accuracy", "accuracy, strict", "higher"),
        Metric("yes_difference", "yes difference"),
        Metric("unparsed_rate", "unparsed", "lower"),
    ),
    meaning="HallusionBench asks about figures and about edited copies of them. Figures and pairs "
    "are those of which every question is right. Above 0, the yes difference says that yes is "
    "said more often than is right.",
)
