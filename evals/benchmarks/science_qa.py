"""ScienceQA (Lu et al., 2022, arXiv 2209.09513): school questions, some about a picture.

`official/accuracy` is over all questions, and `official/accuracy/IMG` over those with a picture:
the number that LLaVA and its kin report. The other categories are those of the released table: NAT,
SOC and LAN are subjects, TXT has a text as context, NO has neither text nor picture, G1-6 and G7-12
are grades.

    official  LLaVA's eval_science_qa: the answer is one letter, or opens with a letter, a full stop
              and a blank, or else holds "The answer is" and a letter. "B.", "(B)" and "b" are wrong
    strict    mmalign.options.chosen_option: one letter, or the words of one option

The prompt is lmms-eval's default, which follows LLaVA's: the context if there is one, the question,
and a line for each option. Lectures and solutions are not shown.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from evals.base import QuestionPrompt, Row, text_field
from evals.questions import (
    Question,
    QuestionBench,
    Reading,
    accuracy,
    by_category,
    question_rules,
    unparsed,
)
from evals.rules import Metric
from evals.sources import media_of, of_kind, read_json, read_rows
from evals.stats import Ratio
from mmalign.errors import DataError
from mmalign.options import chosen_option
from mmalign.records import Media

LETTERS = "ABCDE"
SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
_STATED = re.compile("The answer is ([A-E])")


class ScienceQa(QuestionBench):
    """data: the folder of problems.json and pid_splits.json, or the rows of a hub dataset.

    images: with the folder, that of the split's pictures, <id>/<picture> each. subset, part: of a
    hub dataset the subset, and its split; part is also the split of pid_splits.json. only_pictures:
    leaves out questions without a picture. Rows have no ids and are named by their number.
    """

    name: Literal["science_qa"] = "science_qa"
    images: Path | None = None
    data: str
    subset: str | None = None
    part: str = "test"
    only_pictures: bool = False
    # LLaVA's: "The answer is A" may stand at the end of a long answer.
    max_new_tokens: int = Field(default=1024, ge=1)
    prompt: QuestionPrompt = (
        "{question}\nAnswer with the option's letter from the given choices directly."
    )

    method: ClassVar[str] = (
        "official: LLaVA's script: a letter, or one stated; strict: one option, else unread"
    )

    def load(self) -> list[Question]:
        """The questions of the split; their categories are those of the released table."""
        folder = Path(self.data)
        official = folder.is_dir() and (folder / "problems.json").exists()
        rows = self._problems(folder) if official else self._rows()
        found = [self._question(where, name, row) for where, name, row in rows]
        return [one for one in found if one.images or not self.only_pictures]

    def read(self, question: Question, answer: str, reading: Reading) -> str | None:
        """A letter of the options."""
        if reading == "strict":
            return chosen_option(answer, question.options)
        letter = official(answer)
        return letter if letter in question.options else None

    def metrics(self, items: Sequence[Row]) -> dict[str, Ratio]:
        """The metrics above."""
        return metrics(items)

    def _problems(self, folder: Path) -> Iterator[tuple[str, str, Row]]:
        problems = read_json(folder / "problems.json", dict)
        splits = folder / "pid_splits.json"
        ids = read_json(splits, dict).get(self.part)
        for name in of_kind(ids, list, f"{splits}, {self.part}"):
            if str(name) not in problems:
                raise DataError(f"problem {name} is missing", where=str(folder / "problems.json"))
            where = f"{folder / 'problems.json'}, {name}"
            row = of_kind(problems[str(name)], dict, where)
            if row.get("image") and self.images is None:
                raise DataError("needs images, the folder of the pictures", where=self.data)
            file = f"{name}/{row['image']}" if row.get("image") else None
            yield where, str(name), row | {"image": file}

    def _rows(self) -> Iterator[tuple[str, str, Row]]:
        rows = read_rows(self.data, subset=self.subset, split=self.part)
        for number, (where, row) in enumerate(rows, start=1):
            yield where, str(number), row

    def _question(self, where: str, name: str, row: Row) -> Question:
        choices = row.get("choices")
        of_kind(choices, list, f"{where}, choices")
        options = {letter: str(text) for letter, text in zip(LETTERS, row["choices"], strict=False)}
        answer = row.get("answer")
        if (
            len(row["choices"]) > len(LETTERS)
            or type(answer) is not int
            or answer not in range(len(options))
        ):
            raise DataError(
                "choices or answer are wrong",
                where=where,
                got=f"{len(row['choices'])} choices, answer {answer!r}",
                wanted="at most 5 choices, and the place of one, from 0",
            )
        hint = row.get("hint") or ""
        images: tuple[Media, ...] = ()
        if row.get("image") is not None:
            images = (media_of(row["image"], where),)
        lines = "\n".join(f"{letter}. {text}" for letter, text in options.items())
        context = f"Context: {hint}\n" if hint else ""
        return Question(
            id=name,
            images=images,
            text=f"{context}{text_field(row, 'question', where)}\n{lines}",
            truth=LETTERS[answer],
            categories=_categories(row, where, text=bool(hint), picture=bool(images)),
            options=options,
        )


def official(answer: str) -> str | None:
    """LLaVA's reading: a letter A to E, which the question need not offer; None where it fails.

    A line's end is read as a full stop and a blank.
    """
    text = answer.replace("\n", ". ")
    if text.strip() in tuple(LETTERS):
        return text.strip()
    if re.match(r"[A-E]\. ", text):
        return text[0]
    # With a full stop behind it first, wherever that stands.
    found = re.search(rf"{_STATED.pattern}\.", text) or _STATED.search(text)
    return found[1] if found else None


def metrics(items: Sequence[Row]) -> dict[str, Ratio]:
    """Both accuracies, the official one by category, both of pictures, and what was not read."""
    whole, strict = accuracy(items, "official"), accuracy(items, "strict")
    found = {
        "official/accuracy": whole,
        **by_category(items, "official/accuracy", whole),
        "strict/accuracy": strict,
    }
    of_pictures = "strict/accuracy/IMG"
    by_strict = by_category(items, "strict/accuracy", strict)
    if of_pictures in by_strict:
        found[of_pictures] = by_strict[of_pictures]
    found["official/unparsed_rate"] = unparsed(items, "official")
    found["unparsed_rate"] = unparsed(items)
    return found


def _categories(row: Row, where: str, *, text: bool, picture: bool) -> tuple[str, ...]:
    """The columns of the released table that a question counts under."""
    subject, grade = (text_field(row, name, where) for name in ("subject", "grade"))
    year = grade.removeprefix("grade")
    if subject not in SUBJECTS or not (year.isdecimal() and 1 <= int(year) <= 12):
        raise DataError(
            "subject or grade are wrong",
            where=where,
            got=f"{subject}, {grade}",
            wanted=f"{', '.join(SUBJECTS)}; grade1 to grade12",
        )
    context: dict[str, Any] = {"TXT": text, "IMG": picture, "NO": not text and not picture}
    given = [name for name, is_there in context.items() if is_there]
    return (SUBJECTS[subject], *given, "G1-6" if int(year) <= 6 else "G7-12")


RULES = question_rules(
    metrics,
    {
        "official/accuracy": "mcnemar",
        "official/accuracy/IMG": "mcnemar",
        "strict/accuracy": "mcnemar",
    },
    shown=(
        Metric("official/accuracy", "accuracy", "higher"),
        Metric("official/accuracy/IMG", "accuracy, pictures", "higher"),
        Metric("strict/accuracy", "accuracy, strict", "higher"),
        Metric("unparsed_rate", "unparsed", "lower"),
    ),
    meaning="ScienceQA asks school questions with two to five options, some of them about a "
    "picture.",
)
