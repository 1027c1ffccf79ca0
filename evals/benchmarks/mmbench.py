"""MMBench (Liu et al., 2023, arXiv 2307.06281): choices, each asked once for every rotation.

CircularEval asks a question as often as it has options, these moved on by one each time, and counts
it as right if every answer is: a model that likes a letter gains nothing. So `accuracy` is of whole
questions; `vanilla` is of each question's first asking alone.

    official  VLMEvalKit's can_infer, without a language model: the one option letter that stands as
              a word among the last four, if no other letter does; else A, B, C or D after "answer
              is", case aside; else the one option whose words the answer holds, unless it is longer
              than twice all options
    strict    mmalign.options.chosen_option

The rule is that of VLMEvalKit's commit d21c5e969983, checked against ports of it. Other commits
have no "answer is", or let the letter stand anywhere and the answer be of any length. Its faults
are kept: "The answer is cat." is C, since no word has to end after the letter.
VLMEvalKit asks a language model about what its rule cannot tell, where it is given one, so that
published numbers may be higher: read `official/unparsed_rate` beside them.

Cells that pandas takes for missing are empty here too: an option named "None" or "N/A" is none.
"""

from __future__ import annotations

import base64
import binascii
import re
import string
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import ClassVar, Literal

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
from evals.sources import media_of, read_rows
from evals.stats import Ratio, ratio
from mmalign.errors import DataError
from mmalign.options import chosen_option
from mmalign.records import Media

# Rotation k of question i is named i + k * TURN in released files.
TURN = 1_000_000
# VLMEvalKit: what is no longer than this names the row that holds the picture.
_LONGEST_NAME = 64
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_FAILED = "Failed to obtain answer via API"
_MARKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
# Searched for without a word's end: it finds the c of "answer is cat".
_STATED = re.compile(r"answer\s+is\s+\**([ABCD])", re.IGNORECASE)
# What pandas.read_csv reads as missing, by default.
_MISSING = {
    *("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN"),
    *("<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"),
}


class MmBench(QuestionBench):
    """data: a released TSV of a split with answers, or the rows of a hub dataset.

    Rows have index, question, perhaps a hint, options A, B, …, answer, category, l2-category, and
    image: base64, or the index of the row that holds it. Where a file holds rotations they are
    asked as they stand, else they are made. subset, part: of a hub dataset. limit: whole questions.
    """

    name: Literal["mmbench"] = "mmbench"
    images: Path | None = None
    data: str
    subset: str | None = None
    part: str = "dev"
    # LLaVA's. The rule reads the end of an answer, and a short cut would make another.
    max_new_tokens: int = Field(default=1024, ge=1)
    prompt: QuestionPrompt = (
        "{question}\nAnswer with the option's letter from the given choices directly."
    )

    method: ClassVar[str] = (
        "official: VLMEvalKit's rule without a language model; strict: one option, else unread"
    )

    def load(self) -> list[Question]:
        """Every question with its rotations behind it, in the order of first rows."""
        rows = list(read_rows(self.data, subset=self.subset, split=self.part))
        pictures = _pictures(rows)
        read = [_question(where, row, pictures) for where, row in rows]
        places: dict[str, int] = {}
        for question in read:
            places.setdefault(question.group or question.id, len(places))
        read.sort(key=lambda question: (places[question.group or question.id], int(question.id)))
        if all(question.id == question.group for question in read):
            return [turn for question in read for turn in _rotated(question)]
        for group, turns in groupby(read, key=lambda question: question.group):
            asked = list(turns)
            if len(asked) != len(asked[0].options) or asked[0].id != group:
                raise DataError(
                    "has not every rotation, as its other questions have",
                    where=f"{self.data}, index {group}",
                    got=f"rows {', '.join(question.id for question in asked)}",
                    wanted=f"{len(asked[0].options)} rows, as many as options",
                )
        return read

    def read(self, question: Question, answer: str, reading: Reading) -> str | None:
        """A letter of the options."""
        if reading == "strict":
            return chosen_option(answer, question.options)
        return official(answer, question.options)

    def metrics(self, items: Sequence[Row]) -> dict[str, Ratio]:
        """The metrics above."""
        return metrics(items)


def official(answer: str, options: Mapping[str, str]) -> str | None:
    """VLMEvalKit's can_infer; None where it cannot tell, or reads a refusal or the letter Z.

    options: by letter. Their words are looked for in lower case, wherever they stand, so that "cat"
    is in "cattle"; of an answer that holds VLMEvalKit's word for a failure nothing else is read.
    """
    if _FAILED not in answer:
        if any(refusal in answer for refusal in _REFUSALS):
            return None
        words = answer.translate(_MARKS).split()
        letters = [letter for letter in options if letter in words]
        if len(letters) == 1 and words.index(letters[0]) > len(words) - 5:
            return letters[0]
        if not letters and "Z" in words:
            return None
        stated = _STATED.search(answer)
        if stated is not None and stated[1].upper() in options:
            return stated[1].upper()
    text = answer.lower()
    if len(text) > 2 * sum(map(len, options.values())):
        return None
    named = [letter for letter, option in options.items() if option.lower() in text]
    return named[0] if len(named) == 1 else None


def metrics(items: Sequence[Row]) -> dict[str, Ratio]:
    """Circular and vanilla accuracy of both readings, the official circular one by category."""
    first = [row["id"] == row["group"] for row in items]
    found: dict[str, Ratio] = {}
    for reading in READINGS:
        whole, plain = together(items, reading), accuracy(items, reading)
        found[f"{reading}/accuracy"] = whole
        found[f"{reading}/vanilla"] = ratio(plain.numerator * first, first)
        if reading == "official":
            found |= by_category(items, "official/accuracy", whole)
    found["official/unparsed_rate"] = unparsed(items, "official")
    found["unparsed_rate"] = unparsed(items)
    return found


def _question(where: str, row: Row, pictures: Mapping[str, Media]) -> Question:
    index = _index(row, where)
    options = {
        letter: str(row[letter]) for letter in string.ascii_uppercase if _filled(row.get(letter))
    }
    answer = row.get("answer")
    if len(options) < 2 or answer not in options:
        cell = str(row.get(str(answer), ""))
        renamed = f"write {cell!r} in other words: pandas reads it as no option, and so is it here"
        raise DataError(
            "options or answer are wrong",
            where=where,
            got=f"options {', '.join(options) or 'none'}; answer {answer!r}",
            wanted="two or more, and the letter of one",
            fix=renamed if cell.strip() else "give a file with answers, such as the dev split's",
        )
    hint = f"{row['hint']}\n" if _filled(row.get("hint")) else ""
    of_kind = (row.get("category"), row.get("l2-category", row.get("L2-category")))
    return Question(
        id=index,
        images=(pictures[index],),
        text=f"{hint}{text_field(row, 'question', where)}\n{_lines(options)}",
        truth=str(answer),
        categories=tuple(str(name) for name in of_kind if _filled(name)),
        group=str(int(index) % TURN),
        options=options,
    )


def _rotated(question: Question) -> list[Question]:
    """The question once for every option, these moved to the front by one each time."""
    letters, texts = list(question.options), list(question.options.values())
    stem = question.text.removesuffix(_lines(question.options))
    place = letters.index(str(question.truth))
    turns: list[Question] = []
    for turn in range(len(letters)):
        options = dict(zip(letters, texts[turn:] + texts[:turn], strict=True))
        turns.append(
            Question(
                id=str(int(question.id) + turn * TURN),
                images=question.images,
                text=stem + _lines(options),
                truth=letters[(place - turn) % len(letters)],
                categories=question.categories,
                group=question.group,
                options=options,
            )
        )
    return turns


def _pictures(rows: Sequence[tuple[str, Row]]) -> dict[str, Media]:
    """The picture of every row by its index, those given by another row's index looked up."""
    held: dict[str, Media] = {}
    named: dict[str, tuple[str, str]] = {}
    for where, row in rows:
        index, value = _index(row, where), row.get("image")
        if index in held or index in named:
            raise DataError("index appears twice", where=where, got=index)
        if isinstance(value, str) and 0 < len(value.strip()) <= _LONGEST_NAME:
            named[index] = (value.strip(), where)
        elif isinstance(value, str):
            held[index] = _decoded(value, where)
        else:
            held[index] = media_of(value, where)
    for index, (other, where) in named.items():
        if other not in held:
            raise DataError(
                "image names no row that holds one", where=where, got=other, wanted="an index"
            )
        held[index] = held[other]
    return held


def _decoded(text: str, where: str) -> Media:
    try:
        found = base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        found = b""
    if not found:
        raise DataError("image is no base64", where=where, got=f"{text[:30]!r} …" if text else "''")
    return Media(bytes=found)


def _index(row: Row, where: str) -> str:
    value = row.get("index")
    if not (isinstance(value, int | str) and str(value).isdecimal()):
        raise DataError("index is no whole number", where=where, got=repr(value))
    return str(int(value))


def _filled(value: object) -> bool:
    """Whether a cell holds something, by pandas' rule for tables; the hub has null."""
    return value is not None and str(value).strip() != "" and str(value) not in _MISSING


def _lines(options: Mapping[str, str]) -> str:
    return "\n".join(f"{letter}. {text}" for letter, text in options.items())


RULES = question_rules(
    metrics,
    {
        "official/accuracy": "mcnemar",
        "official/vanilla": "mcnemar",
        "strict/accuracy": "mcnemar",
    },
    shown=(
        Metric("official/accuracy", "accuracy, circular", "higher"),
        Metric("official/vanilla", "accuracy, vanilla", "higher"),
        Metric("strict/accuracy", "circular, strict", "higher"),
        Metric("unparsed_rate", "unparsed", "lower"),
    ),
    meaning="MMBench asks every question once for each rotation of its options. Circular accuracy "
    "counts questions right in all of them, vanilla accuracy those right as they first stand.",
)
