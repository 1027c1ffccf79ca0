"""Does an answer equal the truth? One verifier for each kind of truth, named in the row.

Rewards, builders and evaluations ask the same ones. An answer is what `think.final_answer` reads
out of a response.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

from mmalign.answers import option_letter, unwrapped, yes_no
from mmalign.checked import Checked, Verifier
from mmalign.errors import DataError
from mmalign.math_verifier import MathVerifier, check_installed, legible
from mmalign.numerals import number
from mmalign.options import chosen_option, options_of
from mmalign.records import Verifiable, prompt_text
from mmalign.think import final_answer

VERIFIERS = ("exact", "number", "option", "yes_no", "math")
# A longer one is no short answer, and some of what reads answers takes quadratic time.
MAX_ANSWER_CHARS = 4096
# Where the question lists no options, as when they stand in the picture.
_LETTERS = "ABCDEFGHIJ"


def exact(answer: str, truth: str, question: str = "") -> Checked:
    """The same text but for case, white space, Unicode form, and quotes or marks around it."""
    return _compared(_normal(answer) or None, _normal(truth))


def same_number(answer: str, truth: str, question: str = "") -> Checked:
    """The same rational number, exactly: 0.5 is 1/2, and 0.33 is not 1/3."""
    return _compared(number(answer), number(truth))


def same_yes_no(answer: str, truth: str, question: str = "") -> Checked:
    """The same of yes and no."""
    return _compared(yes_no(answer), yes_no(truth))


def same_option(answer: str, truth: str, question: str = "") -> Checked:
    """The same option, each given by its letter, its words, or both.

    Options are those that the question lists; where it lists none, only letters are read, A to J.
    """
    options = options_of(question)
    return _compared(_option(answer, options), _option(truth, options))


class Verifiers:
    """All verifiers. A context manager: it ends the process in which mathematics is compared.

    That process starts with the first row of the verifier `math`; `math_timeout_seconds` is what
    one comparison may take. Threads may share it.
    """

    def __init__(self, *, math_timeout_seconds: float = 5.0) -> None:
        self._math = MathVerifier(timeout_seconds=math_timeout_seconds)

    def __enter__(self) -> Verifiers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def check(self, answer: str, row: Verifiable) -> Checked:
        """Whether an answer equals the row's truth.

        Raises DataError where the row itself is at fault (see `truth_problem`), and MissingExtra
        where `math` is asked for and not installed.
        """
        if problem := truth_problem(row):
            raise DataError(problem, where=f"row {row.id}", fix="mend the row, or drop it")
        if len(answer) > MAX_ANSWER_CHARS:
            return Checked(None, "too_long")
        return self._named(row.verifier)(answer, row.answer, prompt_text(row.prompt))

    def check_response(self, response: str, row: Verifiable) -> Checked:
        """`check` for the answer that a response gives; one that gives none is not correct."""
        answer = final_answer(response)
        return Checked(False, "no_answer") if answer is None else self.check(answer, row)

    def close(self) -> None:
        """End the child, where there is one."""
        self._math.close()

    def _named(self, name: str) -> Verifier:
        match name:
            case "exact":
                return exact
            case "number":
                return same_number
            case "option":
                return same_option
            case "yes_no":
                return same_yes_no
        assert name == "math"
        return self._math


def truth_problem(row: Verifiable) -> str | None:
    """Why no answer to this row can ever be checked, or None. It does not parse mathematics."""
    truth = row.answer
    if row.verifier not in VERIFIERS:
        return f"no verifier is called {row.verifier!r}: there are {', '.join(VERIFIERS)}"
    if not _normal(truth) or len(truth) > MAX_ANSWER_CHARS:
        return f"the answer has {len(truth.strip())} characters, wanted 1 to {MAX_ANSWER_CHARS}"
    match row.verifier:
        case "number":
            readable = number(truth) is not None
        case "yes_no":
            readable = yes_no(truth) is not None
        case "math":
            readable = legible(truth) is not None
        case "option":
            readable = _option(truth, options_of(prompt_text(row.prompt))) is not None
        case _:
            readable = True
    if readable:
        return None
    return f"the answer {truth[:80]!r} is nothing that the verifier {row.verifier} reads"


def check_extras(rows: Iterable[Verifiable]) -> None:
    """Raise MissingExtra where a row needs a package that is not installed."""
    if any(row.verifier == "math" for row in rows):
        check_installed()


def _compared(answer: object, truth: object) -> Checked:
    if answer is None:
        return Checked(None, "unread")
    return Checked(True, "equal") if answer == truth else Checked(False, "different")


def _normal(text: str) -> str:
    text = unicodedata.normalize("NFKC", text).casefold()
    text = re.sub(r"\s+", " ", unwrapped(text)).strip(" \"'`*$“”‘’")
    return text.removesuffix(".").strip(" \"'`*$“”‘’")


def _option(text: str, options: dict[str, str]) -> str | None:
    text = unwrapped(text).replace("$", "").strip()
    letters = "".join(options) or _LETTERS
    # A small letter is one only by itself: "a cat" begins with an article.
    if (alone := re.fullmatch(r"\W*([a-z])\W*", text)) and alone[1].upper() in letters:
        return alone[1].upper()
    return chosen_option(text, options) if options else option_letter(text, letters)
