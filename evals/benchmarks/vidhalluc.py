"""VidHalluc (Li et al., 2025, arXiv 2412.03735): clips that look alike and show other things.

Three of its tests, each in its released file:

    vidhalluc_binary  ACH, yes or no: is this action in the clip? `official/accuracy` is the share
                      of questions that are right for **every** clip they are asked about
    vidhalluc_choice  ACH, multiple choice, with one right option or several
    vidhalluc_order   TSH: in which order do two actions come, or which one comes at all?

Readings of the released scripts, with what they take for an answer:

    binary   the text before the first full stop and comma, in capitals, must be YES or NO
    choice   the capitals A to D that stand as words; without any, the first option whose words the
             answer holds. "ABCD" is no word of theirs, so it has no letters
    order    AB, BA, A or B alone; else which of "action a" and "action b" is named, in the order
             that "before", "then" or "after" tells, or else that of the text

The scripts leave questions of a clip without any answer out of the count; here these are wrong.
A question of order whose right answer is no order is refused.
The fourth test (STH, scene changes) is evals.benchmarks.vidhalluc_scenes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from evals.base import QuestionPrompt, Row, text_field
from evals.questions import (
    Question,
    QuestionBench,
    Reading,
    accuracy,
    by_category,
    question_rules,
    together,
    unparsed,
)
from evals.sources import of_kind, read_json
from evals.stats import Ratio
from mmalign.answers import yes_no
from mmalign.errors import DataError
from mmalign.options import chosen_option

_MENTION = r"(action [ab]|[ab][.)])"
# Which mention comes first in time: the one before the word, or the one after it.
_LINKS = (("before", 1, 2), ("then", 1, 2), ("after", 2, 1))
_LEAD = r"(?i:\W*(?:(?:the\s+)?(?:correct\s+)?(?:answer|order)(?:\s+is)?\W+)?)"
_ORDER = re.compile(rf"{_LEAD}(AB|BA|A|B)\W*")
_LETTERS = re.compile(rf"{_LEAD}([A-Z](?:(?:\s*(?:,|&|and|\s)\s*)?[A-Z])*)[\s.)]*")


class VidHallucBinary(QuestionBench):
    """ach_binaryqa.json: {id: [{q, a: {clip: Yes or No}}]}. data: the file."""

    name: Literal["vidhalluc_binary"] = "vidhalluc_binary"
    videos: Path
    data: Path
    prompt: QuestionPrompt = "{question} Only answer with a single word 'Yes' or 'No'."

    method: ClassVar[str] = (
        "official: the text before the first . or , is Yes or No; strict: opens with either"
    )

    def load(self) -> list[Question]:
        """A question for each clip; those with the same words and clips belong together."""
        questions: list[Question] = []
        for name, asked in read_json(self.data, dict).items():
            where = f"{self.data}, {name}"
            for number, row in enumerate(of_kind(asked, list, where), start=1):
                here = f"{where}, question {number}"
                text = text_field(of_kind(row, dict, here), "q", here)
                answers = of_kind(row.get("a"), dict, f"{here}, a")
                for clip in answers:
                    truth = text_field(answers, clip, here).strip().lower()
                    if truth not in ("yes", "no"):
                        raise DataError(
                            "answer is wrong", where=f"{here}, {clip}", got=truth, wanted="Yes, No"
                        )
                    questions.append(
                        Question(
                            id=f"{name}/{number}/{clip}",
                            video=f"{clip}.mp4",
                            text=text,
                            truth=truth,
                            categories=("binary",),
                            cluster=name,
                            group=f"{name}/{number}",
                        )
                    )
        return questions

    def read(self, question: Question, answer: str, reading: Reading) -> str | None:
        """Yes or no."""
        if reading == "strict":
            return yes_no(answer)
        # The script trims blanks first, so that ". Yes" has nothing before its full stop.
        start = answer.strip().split(".")[0].split(",")[0].strip().lower()
        return start if start in ("yes", "no") else None

    def metrics(self, items: Sequence[Row]) -> dict[str, Ratio]:
        """Accuracy of whole questions, and per_clip of each clip's answer."""
        return binary_metrics(items)


class VidHallucChoice(QuestionBench):
    """ach_mcq.json: {id: {clip: {Question, Choices: {A: words}, Correct Answer}}}. data: the file.

    The clips of an id show the same scene with other actions.
    """

    name: Literal["vidhalluc_choice"] = "vidhalluc_choice"
    videos: Path
    data: Path
    # The rule reads letters and words anywhere: a short cut would make another answer.
    max_new_tokens: int = Field(default=1024, ge=1)

    method: ClassVar[str] = (
        "official: the letters that stand as words, else the first option whose words are "
        "there; strict: letters alone, or the words of one option"
    )

    def load(self) -> list[Question]:
        """One question for each clip."""
        questions: list[Question] = []
        for name, clips in read_json(self.data, dict).items():
            for clip, row in of_kind(clips, dict, f"{self.data}, {name}").items():
                where = f"{self.data}, {name}, {clip}"
                choices = of_kind(of_kind(row, dict, where).get("Choices"), dict, where)
                options = {letter: text_field(choices, letter, where) for letter in choices}
                right = text_field(row, "Correct Answer", where).strip().upper()
                truth = "".join(sorted(set(re.findall("[A-D]", right))))
                if not truth or not set(truth) <= set(options):
                    raise DataError(
                        "Correct Answer is wrong",
                        where=where,
                        got=right,
                        wanted=f"letters of {', '.join(options)}",
                    )
                lines = "\n".join(f"{letter}. {text}" for letter, text in options.items())
                questions.append(
                    Question(
                        id=f"{name}/{clip}",
                        video=f"{clip}.mp4",
                        text=f"{text_field(row, 'Question', where)} Please select the correct "
                        "answer (one or more options), only return your answer(s). (e.g., ABCD)\n"
                        f"Choices:\n{lines}",
                        truth=truth,
                        categories=("one" if len(truth) == 1 else "several",),
                        cluster=name,
                        options=options,
                    )
                )
        return questions

    def read(self, question: Question, answer: str, reading: Reading) -> str | None:
        """Letters in the alphabet's order, such as "AC"."""
        if reading == "strict":
            found = _LETTERS.fullmatch(answer)
            letters = set(re.findall("[A-Z]", re.sub("and", "", found[1]))) if found else set[str]()
            if letters:
                return "".join(sorted(letters)) if letters <= set(question.options) else None
            return chosen_option(answer, question.options)
        letters = set(re.findall(r"\b[A-D]\b", answer))
        if not letters:
            lower = answer.lower()
            named = (key for key, text in question.options.items() if text.lower() in lower)
            letters = set(next(named, ""))
        return "".join(sorted(letters)) or None

    def metrics(self, items: Sequence[Row]) -> dict[str, Ratio]:
        """Accuracy under both readings."""
        return metrics(items)


class VidHallucOrder(QuestionBench):
    """The file of TSH: {id: {video, Question, Correct Answer}}. data: the file."""

    name: Literal["vidhalluc_order"] = "vidhalluc_order"
    videos: Path
    data: Path
    prompt: QuestionPrompt = (
        "{question}Sort these two actions in the order they occur in the video, and return the "
        "order you detect (i.e., AB or BA). If you only detect one action of these two in the "
        "video, return that action."
    )
    max_new_tokens: int = Field(default=64, ge=1)

    method: ClassVar[str] = (
        "official: the released script's rules; strict: AB, BA, A or B and nothing else"
    )

    def load(self) -> list[Question]:
        """One question for each id."""
        questions: list[Question] = []
        for name, row in read_json(self.data, dict).items():
            where = f"{self.data}, {name}"
            truth = text_field(of_kind(row, dict, where), "Correct Answer", where)
            if truth not in ("AB", "BA", "A", "B"):
                raise DataError(
                    "Correct Answer is wrong", where=where, got=truth, wanted="AB, BA, A or B"
                )
            clip = text_field(row, "video", where)
            questions.append(
                Question(
                    id=name,
                    video=f"{clip}.mp4",
                    text=text_field(row, "Question", where),
                    truth=truth,
                    categories=("both" if len(truth) == 2 else "one",),
                    cluster=clip,
                )
            )
        return questions

    def read(self, question: Question, answer: str, reading: Reading) -> str | None:
        """AB, BA, A or B; the official rule may find others, such as "ABA", which are wrong."""
        if reading == "strict":
            found = _ORDER.fullmatch(answer)
            return found[1] if found else None
        return official_order(answer)

    def metrics(self, items: Sequence[Row]) -> dict[str, Ratio]:
        """Accuracy under both readings."""
        return metrics(items)


def official_order(answer: str) -> str | None:
    """The released script's reading of an order, None where it says None.

    A mention is "action a", or an a or b with a full stop or a closing bracket, whose last
    character then counts: "a. then b." is read as "..". Words between a mention and "before" must
    hold none of that word's letters, so that most sentences fall to the order of the text.
    """
    text = answer.lower()
    if text in ("ab", "ba", "a", "b"):
        return text.upper()
    if "not clear" in text or "no clear" in text:
        return None
    named = [letter for letter in "ab" if f"action {letter}" in text]
    if len(named) < 2:
        return named[0].upper() if named else None
    for word, first, second in _LINKS:
        if word in text:
            found = re.search(rf"{_MENTION}[^{word}]+{word}[^action]*?{_MENTION}", text)
            if found:
                return (found[first][-1] + found[second][-1]).upper()
            break
    return "".join(mention[-1].upper() for mention in re.findall(_MENTION, text))


def metrics(items: Sequence[Row]) -> dict[str, Ratio]:
    """Accuracy of questions under both readings and by kind of answer, and what was not read."""
    official = accuracy(items, "official")
    return {
        "official/accuracy": official,
        **by_category(items, "official/accuracy", official),
        "strict/accuracy": accuracy(items, "strict"),
        "unparsed_rate": unparsed(items),
    }


def binary_metrics(items: Sequence[Row]) -> dict[str, Ratio]:
    """As metrics, but a question is right only for all of its clips; `per_clip` counts each."""
    found: dict[str, Ratio] = {}
    readings: tuple[Reading, ...] = ("official", "strict")
    for reading in readings:
        found[f"{reading}/accuracy"] = together(items, reading)
        found[f"{reading}/per_clip"] = accuracy(items, reading)
    found["unparsed_rate"] = unparsed(items)
    return found


RULES = question_rules(metrics)
BINARY_RULES = question_rules(binary_metrics)
