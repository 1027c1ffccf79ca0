"""The answer that a response gives, and what it is compared with."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import pytest

from evals.benchmarks.math_answers import (
    chosen_letter,
    edit_distance,
    given_answer,
    listed_numbers,
    mathematics,
    nearest,
    same_value,
)

SECONDS = 60.0


@pytest.fixture(scope="module", autouse=True)
def _ended() -> Iterator[None]:
    yield
    mathematics(SECONDS).close()


@pytest.mark.parametrize(
    ("response", "given"),
    [
        ("\\boxed{12}", "12"),
        ("so \\boxed{11}\nno, \\boxed{12}", "12"),
        ("<think>5</think><answer>12</answer>", "12"),
        ("12", "12"),
        ("  12 cm. \n", "12 cm."),
        ("We add.\nThe answer is 12.", "12."),
        ("We add.\nFinal Answer: 12", "12"),
        ("We add.\n**Answer:** (B)", "(B)"),
        ("The answer should be $\\frac12$", "$\\frac12$"),
        ("The answer is not 5, the answer is 6", "6"),
        ("The answer: is 6", "is 6"),
        # An answer that was cut off, an announcement before the end, a long line, no answer.
        ("It is \\boxed{12", None),
        ("The answer is 12.\nOr so I think.", None),
        ("Adding both of the numbers in the picture we find 12", None),
        ("12\n13", None),
        ("answers are hard:\n", "answers are hard:"),
        ("", None),
    ],
)
def test_the_answer_of_a_response(response, given):
    assert given_answer(response) == given


@pytest.mark.parametrize(
    ("given", "letter"),
    [("B", "B"), ("(b)", "B"), ("$B$", "B"), ("\\text{B}", "B"), ("B. 60°", "B"),
     ("option C", None), ("60", "B"), ("60°", "B"), ("B. 40°", None), ("F", None),
     ("A or B", None), ("70", None)],
)  # fmt: skip
def test_options(given, letter):
    assert chosen_letter(given, {"A": "40°", "B": "60°"}) == letter


def test_options_whose_words_are_unknown():
    letters = dict.fromkeys("ABCD", "")
    assert chosen_letter("(C)", letters) == "C"
    assert chosen_letter("The answer is option C.", letters) == "C"
    assert chosen_letter("a cat", letters) is None


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("[1, 2.5]", [Fraction(1), Fraction(5, 2)]),
        ("(0, 4).", [Fraction(0), Fraction(4)]),
        ("[1]", [Fraction(1)]),
        ("1, 2", None),
        ("[1, x]", None),
        ("[]", None),
    ],
)
def test_lists(text, numbers):
    assert listed_numbers(text) == numbers


@pytest.mark.parametrize(
    ("given", "truth", "same"),
    [
        ("14 cm", "14", True),
        ("0.5", "1/2", True),
        ("13", "14", False),
        ("2\\sqrt{2}", "\\sqrt{8}", True),
        ("(x+1)(x-1)", "x^2-1", True),
        ("x+1", "x^2-1", False),
        ("Isosceles.", "isosceles", True),
        ("equilateral", "isosceles triangle", False),
        ("twelve zebras", "\\sqrt{8}", None),
        ("9" * 5000, "14", None),
    ],
)
def test_values(given, truth, same):
    assert same_value(given, truth, SECONDS) is same


@pytest.mark.parametrize(
    ("a", "b", "edits"),
    [("", "", 0), ("", "abc", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("ab", "ba", 2)],
)
def test_edits(a, b, edits):
    assert edit_distance(a, b) == edit_distance(b, a) == edits


def test_the_nearest_choice_is_the_first_of_equals():
    assert nearest("cat", ["dog", "cart", "cut"]) == "cart"
    assert nearest("x", ["aa", "bb"]) == "aa"
