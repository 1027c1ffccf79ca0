"""Answers to questions of mathematics: the one that a response gives, and whether it is right.

The strict reading of the mathematics benchmarks. A response gives an answer in its answer block or
last box (mmalign.think), behind "answer is" or "Answer:" on its last line, or by being one short
line. It is then an option, a number, or mathematics that math-verify compares in a child process.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction

from mmalign.answers import unwrapped
from mmalign.math_verifier import MathVerifier
from mmalign.numerals import number
from mmalign.options import chosen_option
from mmalign.think import final_answer
from mmalign.verify import MAX_ANSWER_CHARS, exact

# A line of more words explains, and does not answer.
MAX_WORDS = 10
_ANNOUNCED = re.compile(r"(?i).*\banswer\W*?(?:\s(?:is|should be)\b|:)[\s:*_]*(?=\S)(.+)")


def given_answer(response: str) -> str | None:
    """The answer that a response gives, or None. One that was cut inside of a box gives none."""
    found = final_answer(response)
    if found is not None or "\\boxed" in response:
        return found
    lines = [line.strip() for line in response.split("\n") if line.strip()]
    if not lines:
        return None
    announced = _ANNOUNCED.fullmatch(lines[-1])
    if announced is not None:
        return announced[1].strip()
    return lines[0] if len(lines) == 1 and len(lines[0].split()) <= MAX_WORDS else None


def chosen_letter(given: str, options: Mapping[str, str]) -> str | None:
    """The letter of the option that an answer is, by letter or words. Words may be unknown, "".

    A small letter is one only by itself: "a cat" begins with an article.
    """
    text = unwrapped(given).replace("$", "").strip()
    alone = re.fullmatch(r"\W*([A-Za-z])\W*", text)
    if alone is not None:
        return alone[1].upper() if alone[1].upper() in options else None
    return chosen_option(text, options)


def listed_numbers(text: str) -> list[Fraction] | None:
    """The numbers of a list such as "[1, 2.5]", or None where it is none."""
    found = re.fullmatch(r"[\[(](.*)[\])]", text.strip().removesuffix(".").strip(), re.DOTALL)
    if found is None:
        return None
    numbers = [number(part) for part in found[1].split(",")]
    known = [one for one in numbers if one is not None]
    return known if len(known) == len(numbers) else None


def same_value(given: str, truth: str, timeout_seconds: float) -> bool | None:
    """Whether two values are equal: as texts, as numbers, as mathematics; None where none can tell.

    Units of a number are dropped: "14 cm" is 14. A truth that is words is compared as a text.
    """
    if len(given) > MAX_ANSWER_CHARS:
        return None
    if exact(given, truth).correct:
        return True
    mine, wanted = number(given), number(truth)
    if mine is not None and wanted is not None:
        return mine == wanted
    checked = mathematics(timeout_seconds)(given, truth)
    return False if checked.reason == "truth_unread" else checked.correct


@functools.cache
def mathematics(timeout_seconds: float) -> MathVerifier:
    """The one verifier with this time limit. Closing it ends its child; it may be used again."""
    return MathVerifier(timeout_seconds=timeout_seconds)


def nearest(text: str, choices: Sequence[str]) -> str:
    """The choice that takes the fewest edits to make from a text, the first one of several."""
    return min(choices, key=lambda choice: edit_distance(text, choice))


def edit_distance(a: str, b: str) -> int:
    """Levenshtein's: the fewest characters put in, taken out or exchanged."""
    row = list(range(len(b) + 1))
    for place, letter in enumerate(a, start=1):
        before, row[0] = row[0], place
        for column, other in enumerate(b, start=1):
            changed = before + (letter != other)
            before, row[column] = row[column], min(row[column] + 1, row[column - 1] + 1, changed)
    return row[-1]
