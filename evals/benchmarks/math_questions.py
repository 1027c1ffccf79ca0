"""MathVista and MathVerse: questions of mathematics about pictures.

Papers report both with a language model in the scorer: GPT-4 finds the answer in a response
(MathVista), or finds it and judges it (MathVerse). `official/` is what the released scripts do by
rule, without one, and so far lower than published numbers where models write more than the answer.

    mathvista  (Lu et al., 2024, arXiv 2310.02255) extract_answer.py with its --quick_extract, then
               calculate_score.py. The response is a choice, or a number of the kind asked for, or
               holds 'The answer is "…".' on one line. A choice is then named by the letter in
               brackets, by a letter alone, or is the one with the fewest edits. What the rules do
               not find is wrong, as with --ignore_empty_extractions; `match_rate` is what they find
    mathverse  (Zhang et al., 2024, arXiv 2403.14624) score_answer_s2.py with its --quick_match. Of
               step 1 only what it does to its model's text is done, to the response itself; then
               it must be the answer, letter by letter

Strict is evals.benchmarks.math_answers: compare with published numbers by that one, if at all.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, PositiveFloat

from evals.base import Row, Suite, text_field
from evals.benchmarks.math_answers import (
    chosen_letter,
    given_answer,
    listed_numbers,
    mathematics,
    nearest,
    same_value,
)
from evals.questions import READ_TWICE, Question, QuestionBench, Reading, question_rules
from evals.questions import metrics as question_metrics
from evals.rules import Metric
from evals.sources import media_of, of_kind, read_json, read_rows
from evals.stats import Ratio, mean
from mmalign.errors import DataError
from mmalign.generate.base import Request
from mmalign.math_verifier import check_installed
from mmalign.numerals import number
from mmalign.records import Media

_HINTS = {
    "multi_choice": "Please answer the question and provide the correct option letter, "
    "e.g., A, B, C, D, at the end.",
    "integer": "Please answer the question requiring an integer answer and provide the final "
    "value, e.g., 1, 2, 3, at the end.",
    "float1": "Please answer the question requiring a floating-point number with one decimal place "
    "and provide the final value, e.g., 1.2, 1.3, 1.4, at the end.",
    "float2": "Please answer the question requiring a floating-point number with two decimal "
    "places and provide the final value, e.g., 1.23, 1.34, 1.45, at the end.",
    "list": "Please answer the question requiring a Python list as an answer and provide the final "
    "list, e.g., [1, 2, 3], [1.2, 1.3, 1.4], at the end.",
}
_QUOTED = re.compile(r'The answer is "(.*)"\.')


class MathBench(QuestionBench):
    """What benchmarks of mathematics share.

    data: a released file, parquet files, or a hub name. hub_subset, hub_split: of the latter two.
    images: the folder that pictures' names are relative to.
    math_timeout_seconds: what comparing one answer by math-verify may take.
    """

    images: Path | None = None
    data: str
    hub_subset: str | None = None
    hub_split: str = "testmini"
    max_new_tokens: int = Field(default=1024, ge=1)
    math_timeout_seconds: PositiveFloat = 5.0

    def requests(self) -> list[Request]:
        """One request per question. Raises MissingExtra where math-verify is not installed."""
        check_installed()
        return super().requests()

    def score(self, answers: Mapping[str, str]) -> Suite:
        """Score answers by question id; a missing one is wrong under both readings."""
        try:
            return super().score(answers)
        finally:
            mathematics(self.math_timeout_seconds).close()

    def read(self, question: Question, answer: str, reading: Reading) -> str | None:
        """The truth itself where the answer is right."""
        if reading == "official":
            return self.by_script(question, answer)
        given = given_answer(answer)
        return None if given is None else self.by_us(question, given)

    @abstractmethod
    def by_script(self, question: Question, answer: str) -> str | None:
        """What the released script finds in a response."""

    def by_us(self, question: Question, given: str) -> str | None:
        """What an answer says: a letter, or a value, which is the truth where it equals it."""
        if question.options:
            return chosen_letter(given, question.options)
        return self.value(given, str(question.truth))

    def value(self, given: str, truth: str) -> str | None:
        """The truth where a value equals it, the value where not, None where it cannot be told."""
        same = same_value(given, truth, self.math_timeout_seconds)
        return None if same is None else truth if same else given

    def rows(self) -> Iterator[tuple[str, Row]]:
        """The rows of the data, also of JSON that has them by their number."""
        file = Path(self.data)
        if not file.is_file() or file.suffix != ".json" or not _holds_an_object(file):
            yield from read_rows(self.data, subset=self.hub_subset, split=self.hub_split)
            return
        for id, row in read_json(file, dict).items():
            where = f"{file}, {id}"
            yield where, of_kind(row, dict, where)

    def picture(self, row: Row, where: str, inside: str = "image") -> tuple[Media, ...]:
        """The row's picture, from the data or from the folder; none where its name is empty."""
        if isinstance(row.get(inside), dict | bytes):
            return (media_of(row[inside], f"{where}, {inside}"),)
        name = row.get("image")
        if name in (None, ""):
            return ()
        if self.images is None:
            fix = "give images, the folder of the pictures"
            raise DataError("names a picture's file, and there is no folder", where=where, fix=fix)
        return (Media(path=text_field(row, "image", where)),)


@dataclass(frozen=True, kw_only=True)
class VistaQuestion(Question):
    """kind: of a free answer, integer, float1, float2 or list; "" for one of the options."""

    kind: str = ""


class MathVista(MathBench):
    """data: the released testmini.json, or parquet files or a hub name, with the pictures.

    The rows' own `query` is asked, or, where the file has none, one put together as theirs are.
    """

    name: Literal["mathvista"] = "mathvista"

    method: ClassVar[str] = (
        "official: the released rules without a language model; strict: the answer block, box or "
        "last line that gives one option or number"
    )

    def load(self) -> list[Question]:
        """The questions, in the file's order; of their categories the first is the task."""
        found: list[Question] = []
        for where, row in self.rows():
            truth, choices = text_field(row, "answer", where), _choices(row, where)
            if not truth:
                fix = "take testmini; answers of the test split are not public"
                raise DataError("answer is empty", where=where, fix=fix)
            if choices and truth not in choices:
                wanted = ", ".join(choices)
                raise DataError("answer is no choice", where=where, got=truth, wanted=wanted)
            kind = "" if choices else _kind(row, where)
            asked = _query(row, choices, kind, where)
            told = of_kind(row.get("metadata"), dict, f"{where}, metadata")
            names = ("task", "category", "context", "grade", "language")
            skills = of_kind(told.get("skills"), list, f"{where}, skills")
            found.append(
                VistaQuestion(
                    id=text_field(row, "pid", where),
                    text=text_field(row, "query", where) if row.get("query") else asked,
                    truth=truth,
                    categories=(
                        *(text_field(told, name, f"{where}, metadata") for name in names),
                        *map(str, skills),
                    ),
                    images=self.picture(row, where, "decoded_image"),
                    options=_lettered(choices),
                    kind=kind,
                )
            )
        return found

    def by_script(self, question: Question, answer: str) -> str | None:
        """A choice's words, or a number as the script writes it."""
        assert isinstance(question, VistaQuestion)
        choices, kind = list(question.options.values()), question.kind
        found = _extracted(answer, choices, kind)
        if not found:
            return None
        if choices:
            return _chosen(found.strip(), choices) if found.strip() else None
        try:
            if kind == "integer":
                return str(int(float(found)))
            return found if kind == "list" else str(round(float(found), int(kind[-1])))
        except (ValueError, OverflowError):
            return None

    def by_us(self, question: Question, given: str) -> str | None:
        """A choice's words, or a number, rounded as was asked."""
        assert isinstance(question, VistaQuestion)
        if question.options:
            letter = chosen_letter(given, question.options)
            return None if letter is None else question.options[letter]
        truth, kind = str(question.truth), question.kind
        if kind == "list":
            mine, wanted = listed_numbers(given), listed_numbers(truth)
            return None if mine is None else truth if mine == wanted else given
        value = number(given)
        if value is None:
            return None
        rounded = value if kind == "integer" else round(value, int(kind[-1]))
        return truth if rounded == number(truth) else given

    def metrics(self, items: Sequence[Row]) -> dict[str, Ratio]:
        """Those of questions, and what the official rules find an answer in."""
        return vista_metrics(items)


class MathVerse(MathBench):
    """data: the released testmini.json, testmini_text_only.json, or parquet files with pictures.

    query: asked are the rows' `query_wo`, for a direct answer, or `query_cot`, to reason first.
    Published "w/o" numbers are of the five versions in testmini. A problem's versions are drawn
    together in intervals.
    """

    name: Literal["mathverse"] = "mathverse"
    hub_subset: str | None = "testmini"
    query: Literal["query_wo", "query_cot"] = "query_wo"

    method: ClassVar[str] = (
        "official: the response is the answer, letter by letter; strict: the answer block, box or "
        "last line that gives an option, or what math-verify finds equal"
    )

    def load(self) -> list[Question]:
        """The questions, in the file's order; categories: version, subject, part of it."""
        found: list[Question] = []
        for where, row in self.rows():
            told = of_kind(row.get("metadata"), dict, f"{where}, metadata")
            truth, kind = text_field(row, "answer", where), text_field(row, "question_type", where)
            if kind not in ("multi-choice", "free-form"):
                wanted = "multi-choice or free-form"
                raise DataError("question_type is wrong", where=where, got=kind, wanted=wanted)
            options = _listed(row.get("question_for_eval") or text_field(row, "question", where))
            if kind == "multi-choice" and not re.fullmatch("[A-H]", truth):
                raise DataError("answer is no letter", where=where, got=truth, wanted="A to H")
            letters = options or dict.fromkeys("ABCDEFGH", "")
            found.append(
                Question(
                    id=text_field(row, "sample_index", where),
                    text=text_field(row, self.query, where),
                    truth=truth,
                    categories=(
                        text_field(row, "problem_version", where),
                        text_field(told, "subject", f"{where}, metadata"),
                        text_field(told, "subfield", f"{where}, metadata"),
                    ),
                    images=self.picture(row, where),
                    cluster=text_field(row, "problem_index", where),
                    options=letters if kind == "multi-choice" else {},
                )
            )
        return found

    def by_script(self, question: Question, answer: str) -> str | None:
        """The response as it stands."""
        return answer.replace("Extracted Answer: ", "").strip()


def vista_metrics(items: Sequence[Row]) -> dict[str, Ratio]:
    """Those of questions, and the share of answers that the official rules find."""
    found = mean([row["official"] is not None for row in items])
    return question_metrics(items) | {"match_rate": found}


def _holds_an_object(file: Path) -> bool:
    with open(file, "rb") as opened:
        return opened.read(64).lstrip().startswith(b"{")


def _choices(row: Row, where: str) -> list[str]:
    """The choices of a question, [] for one with a free answer."""
    kind = text_field(row, "question_type", where)
    if kind not in ("multi_choice", "free_form"):
        wanted = "multi_choice or free_form"
        raise DataError("question_type is wrong", where=where, got=kind, wanted=wanted)
    if kind == "free_form":
        return []
    choices = of_kind(row.get("choices"), list, f"{where}, choices")
    if not choices or not all(isinstance(one, str) for one in choices):
        raise DataError("choices are wrong", where=where, got=repr(choices), wanted="texts")
    return choices


def _kind(row: Row, where: str) -> str:
    """Of a free answer: integer, list, or float with its number of decimal places."""
    kind, precision = text_field(row, "answer_type", where), row.get("precision")
    if kind == "float":
        # Parquet files hold it as 1.0.
        places = next((n for n in (1, 2) if precision == n), None)
        kind = f"float of precision {precision}" if places is None else f"float{places}"
    if kind not in _HINTS or kind == "multi_choice":
        wanted = "integer, list, or float of precision 1 or 2"
        raise DataError("answer_type is wrong", where=where, got=kind, wanted=wanted)
    if kind != "list" and number(row["answer"]) is None:
        raise DataError("answer is no number", where=where, got=repr(row["answer"]))
    return kind


def _query(row: Row, choices: Sequence[str], kind: str, where: str) -> str:
    """A question as the released dataset's own `query` asks it: hint, question, choices."""
    hint = _HINTS[kind or "multi_choice"]
    lines = [f"Hint: {hint}", f"Question: {text_field(row, 'question', where)}"]
    if row.get("unit"):
        lines[-1] += f" (Unit: {row['unit']})"
    if choices:
        lines.append("Choices:")
    return "\n".join(
        [*lines, *(f"({letter}) {text}" for letter, text in _lettered(choices).items())]
    )


def _lettered(choices: Sequence[str]) -> dict[str, str]:
    return {chr(ord("A") + place): text for place, text in enumerate(choices)}


def _extracted(answer: str, choices: Sequence[str], kind: str) -> str | None:
    """What the script takes for the answer; its last step, a language model, is left out."""
    if answer in choices:
        return answer
    try:
        if kind == "integer":
            return str(int(answer))
        if kind.startswith("float"):
            return str(float(answer))
    except ValueError:
        pass
    quoted = _QUOTED.search(answer)
    return quoted[1] if quoted else None


def _chosen(found: str, choices: Sequence[str]) -> str:
    letters = re.findall(r"\(([a-zA-Z])\)", found)
    found = letters[0].upper() if letters else found
    return _lettered(choices).get(found) or nearest(found, choices)


def _listed(question: Any) -> dict[str, str]:
    """The options that stand below "Choices:", "A:40°" each on its line; {} without them."""
    lines = str(question).partition("Choices:")[2].split("\n")
    found = [re.fullmatch(r"\s*([A-H])\s*[:.)]\s*(.*\S)\s*", line) for line in lines]
    options = {one[1]: one[2] for one in found if one}
    return options if "".join(options) == "ABCDEFGH"[: len(options)] else {}


_MEANING = "Strict reads the one answer that a response gives; official is the released rule "
VISTA_RULES = question_rules(
    vista_metrics,
    shown=(*READ_TWICE, Metric("match_rate", "matched")),
    meaning=f"{_MEANING}without its language model, and matched the share that it can read.",
)
VERSE_RULES = question_rules(
    question_metrics,
    meaning=f"{_MEANING}without its language model: the response must be the bare answer.",
)
