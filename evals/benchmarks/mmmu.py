"""MMMU (Yue et al., 2023, arXiv 2311.16502): college questions, choices or open, with pictures.

    official  the released script's rules. Choices: the last of the letters in brackets, else of
              those between blanks, else, in answers of more than five words, of the options whose
              words are there. Open: an answer is right if what stands behind its last "is", "so",
              "=" and the like, or a number in it, holds or equals a right one
    strict    choices: mmalign.options.chosen_option. Open: what "answer is" states, or the whole of
              a short answer, has the words of a right one or is the same number to two digits

Where no choice is found the released script draws an option at random; here it is wrong. So
`official/accuracy` is lower than the script's, on average by `official/unparsed_rate` divided by
the number of options. Its open rule is kind: "24 or 25" is right for 24.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from evals.base import QuestionPrompt, Row, text_field
from evals.questions import READ_TWICE, Question, QuestionBench, Reading, question_rules, unparsed
from evals.questions import metrics as question_metrics
from evals.rules import Metric
from evals.sources import media_of, read_rows
from evals.stats import Ratio
from mmalign.errors import DataError
from mmalign.generate.base import Request
from mmalign.options import chosen_option, words_of
from mmalign.records import Block, Media, Message, user

DISCIPLINES = {
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": (
        "Basic_Medical_Science",
        "Clinical_Medicine",
        "Diagnostics_and_Laboratory_Medicine",
        "Pharmacy",
        "Public_Health",
    ),
    "Humanities and Social Science": ("History", "Literature", "Sociology", "Psychology"),
    "Tech and Engineering": (
        "Agriculture",
        "Architecture_and_Engineering",
        "Computer_Science",
        "Electronics",
        "Energy_and_Power",
        "Materials",
        "Mechanical_Engineering",
    ),
}
_DISCIPLINE_OF = {subject: name for name, group in DISCIPLINES.items() for subject in group}
_FILES = (".json", ".jsonl", ".parquet", ".tsv", ".csv")
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_PLACE = re.compile(r"<image (\d+)>")
_ID = re.compile(r"[^_]+_(.+)_\d+")
# What the answer stands behind, for the released script; "=" counts in the last line only.
_LEADS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
    r"-?(?:\d*\.\d+|\d+\b)(?![eE][+-]?\d)(?![,\d])",
)
_STATES = re.compile(r"\banswer(?:\s+is\s*:?|:)\s*([^\n]+)", re.IGNORECASE)
_MOST_WORDS = 10


class Mmmu(QuestionBench):
    """data: the hub's MMMU/MMMU, a folder or file of its parquet, or its rows in JSON.

    Rows have id, question, options (a list, or the text of one), answer, question_type, image_1 to
    image_7. A picture stands where "<image 1>" does, each time; one whose place is nowhere is left
    out, unless no picture has a place: then all stand first. part: the split, of those with
    answers. subjects: those asked, all 30 by default. images: where rows name
    files. prompt, open_prompt: for choices, and for other questions.
    """

    name: Literal["mmmu"] = "mmmu"
    images: Path | None = None
    data: str
    part: str = "validation"
    subjects: tuple[str, ...] = Field(default=tuple(_DISCIPLINE_OF), min_length=1)
    # The rule reads the end of an answer, and a short cut would make another.
    max_new_tokens: int = Field(default=1024, ge=1)
    prompt: QuestionPrompt = (
        "{question}\n\nAnswer with the option's letter from the given choices directly."
    )
    open_prompt: QuestionPrompt = "{question}\n\nAnswer the question using a single word or phrase."

    method: ClassVar[str] = (
        "official: the released rules, without their random choice; strict: one option, or equal"
    )

    def requests(self) -> list[Request]:
        """One request per question, each picture at its place among the words."""
        return [
            Request(
                id=question.id,
                prompt=_placed(self.asked(question), len(question.images)),
                images=question.images,
                media_root=self.folder,
            )
            for question in self.selected()
        ]

    def load(self) -> list[Question]:
        """The questions; their categories are discipline, subject and kind of question."""
        found = [_question(where, row) for where, row in self._rows()]
        return [one for one in found if one.categories[1] in self.subjects]

    def read(self, question: Question, answer: str, reading: Reading) -> str | None:
        """A letter; to an open question a right answer that was found, or else what is said."""
        if question.options:
            if reading == "strict":
                return chosen_option(answer, question.options)
            return official_choice(answer, question.options)
        truths = (question.truth,) if isinstance(question.truth, str) else question.truth
        if reading == "strict":
            return _strict_open(answer, truths)
        said = official_open(answer)
        found = next((truth for truth in truths if _holds(said, truth)), None)
        return found or "; ".join(str(one) for one in said if str(one).strip()) or None

    def metrics(self, items: Sequence[Row]) -> dict[str, Ratio]:
        """The metrics above."""
        return metrics(items)

    def asked(self, question: Question) -> str:
        """The words of the prompt, which differ for choices and open questions."""
        prompt = self.prompt if question.options else self.open_prompt
        return prompt.replace("{question}", question.text)

    def _rows(self) -> Iterator[tuple[str, Row]]:
        if Path(self.data).exists() or Path(self.data).suffix in _FILES:
            yield from read_rows(self.data, split=self.part)
            return
        for subject in self.subjects:
            yield from read_rows(self.data, subset=subject, split=self.part)


def official_choice(answer: str, options: Mapping[str, str]) -> str | None:
    """The released script's letter; None where it would draw one at random.

    Of several it takes that which comes last, of equals the first.
    """
    text = answer
    for mark in ",.!?;:'":
        text = text.strip(mark)
    text = f" {text} "
    for pattern in ("({})", " {} "):
        places = {letter: text.rfind(pattern.format(letter)) for letter in options}
        found = {letter: place for letter, place in places.items() if place >= 0}
        if found:
            return max(found, key=lambda letter: found[letter])
    if len(text.split()) <= 5:
        return None
    lower = text.lower()
    places = {letter: lower.rfind(words.lower()) for letter, words in options.items()}
    found = {letter: place for letter, place in places.items() if place >= 0}
    return max(found, key=lambda letter: found[letter]) if found else None


def official_open(answer: str) -> list[str | float]:
    """What the released script finds in an open answer: ends of its lines, and numbers in these.

    Of each line, what follows the last of the words that lead to an answer, the shortest such; of
    no line, all of it. The script also means to part sentences, but looks for capitals in lower
    case. Numbers are rounded to two digits.
    """
    text = answer.strip().strip(".").lower()
    lines, ends = text.split("\n"), list[str]()
    for number, line in enumerate(lines, start=1):
        shortest = ""
        for lead in (*_LEADS, "=") if number == len(lines) else _LEADS:
            if lead in line:
                end = line.split(lead)[-1].strip()
                shortest = end if not shortest or len(end) < len(shortest) else shortest
        if shortest and shortest not in tuple(":,.!?;'"):
            ends.append(shortest)
    ends = ends or [text]
    numbers = [one for end in ends for pattern in _NUMBERS for one in re.findall(pattern, end)]
    return list(dict.fromkeys(value for one in (*ends, *numbers) for value in _normal(one)))


def metrics(items: Sequence[Row]) -> dict[str, Ratio]:
    """Both accuracies, the official one by category, and what either reading declined."""
    found = question_metrics(items)
    return found | {"official/unparsed_rate": unparsed(items, "official")}


def _question(where: str, row: Row) -> Question:
    name = text_field(row, "id", where)
    options = _options(row.get("options"), where)
    kind = row.get("question_type") or ("multiple-choice" if options else "open")
    if kind != "multiple-choice":
        options = {}
    elif len(options) < 2:
        raise DataError("has no options", where=where, got=repr(row.get("options")))
    lines = "".join(f"\n{letter}. {text}" for letter, text in options.items())
    text = text_field(row, "question", where) + lines
    subject = row.get("subject") or (found[1] if (found := _ID.fullmatch(name)) else None)
    if subject not in _DISCIPLINE_OF:
        raise DataError(
            "its id names no subject", where=where, got=name, wanted="such as validation_Math_1"
        )
    return Question(
        id=name,
        images=_pictures(text, row, where),
        text=text,
        truth=_truth(row, options, where),
        categories=(_DISCIPLINE_OF[subject], str(subject), str(kind)),
        options=options,
    )


def _pictures(text: str, row: Row, where: str) -> tuple[Media, ...]:
    """The pictures in the order of their places, or all where the text has no place."""
    names = [f"image_{number}" for number in _PLACE.findall(text)]
    for name in names:
        if row.get(name) is None:
            raise DataError(f"has a place for {name}, and no such picture", where=where)
    names = names or [f"image_{number}" for number in range(1, 8)]
    return tuple(media_of(row[name], where) for name in names if row.get(name) is not None)


def _placed(text: str, num_images: int) -> tuple[Message, ...]:
    """A prompt with a picture at each place, or all of them first where the text has none."""
    if not _PLACE.search(text):
        return user(text, images=num_images)
    blocks: list[Block] = []
    # Every second part is a number.
    for number, part in enumerate(_PLACE.split(text)):
        if number % 2:
            blocks.append(Block(type="image"))
        elif part:
            blocks.append(Block(type="text", text=part))
    return (Message(role="user", content=tuple(blocks)),)


def _options(value: Any, where: str) -> dict[str, str]:
    """By letter; the hub's dataset holds the text of a Python list."""
    listed = _literal(value) if isinstance(value, str) else value
    if not isinstance(listed, list) or len(listed) > len(_LETTERS):
        raise DataError("options are no list", where=where, got=repr(value)[:60])
    return {letter: str(text) for letter, text in zip(_LETTERS, listed, strict=False)}


def _truth(row: Row, options: Mapping[str, str], where: str) -> str | tuple[str, ...]:
    answer = row.get("answer")
    if (
        isinstance(answer, str)
        and answer.startswith("[")
        and isinstance(listed := _literal(answer), list)
    ):
        answer = listed
    answers = tuple(map(str, answer)) if isinstance(answer, list) else (str(answer or ""),)
    wrong = options and any(one not in options for one in answers)
    # The test split has "?" for an answer.
    if wrong or not answers or any(one.strip() in ("", "?") for one in answers):
        raise DataError(
            "answer is wrong",
            where=where,
            got=repr(row.get("answer")),
            wanted=f"one of {', '.join(options)}" if options else "text",
            fix="give a split with answers, such as validation",
        )
    return answers[0] if len(answers) == 1 else answers


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None


def _normal(text: str) -> list[str | float]:
    """A number to two digits, or lower case; a single character needs a blank beside it."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def _holds(said: Sequence[str | float], truth: str) -> bool:
    """Whether a number equals the truth, or a text holds it."""
    wanted = _normal(truth)
    texts = [one for one in wanted if isinstance(one, str)]
    return any(
        any(one in part for one in texts) if isinstance(part, str) else part in wanted
        for part in said
    )


def _strict_open(answer: str, truths: Sequence[str]) -> str | None:
    """A right answer that the text equals, or what it says; None if it is long, or says nothing."""
    stated = _STATES.findall(answer)
    text = (stated[-1] if stated else answer).strip().rstrip(".!")
    if not text or "\n" in text or len(text.split()) > _MOST_WORDS:
        return None
    for truth in truths:
        ours, theirs = _normal(text), _normal(truth)
        if isinstance(theirs[0], float) or isinstance(ours[0], float):
            same = ours == theirs
        else:
            same = words_of(text) == words_of(truth)
        if same:
            return truth
    return text


RULES = question_rules(
    metrics,
    shown=(*READ_TWICE, Metric("official/unparsed_rate", "no choice found", "lower")),
    meaning="MMMU asks college questions of 30 subjects, most with options, about one or several "
    "pictures.",
)
