"""MATH-Vision: the released script, corner by corner, and the strict reading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evals.benchmarks.mathvision import MathVision, equal, extracted
from mmalign.errors import DataError
from mmalign.records import Media

ROW = {
    "id": "7",
    "question": "How many bricks?\n<image1>",
    "options": [],
    "answer": "6",
    "level": 1,
    "subject": "counting",
    "image": "images/7.jpg",
}
PICTURES = ROW | {"id": "26", "options": list("ABCDE"), "answer": "B", "subject": "logic"}
LENGTHS = PICTURES | {"id": "91", "options": ["$6$ m", "8", "10 m", "11", "12"], "level": 2}


def bench(root: Path, *rows: dict[str, Any]) -> MathVision:
    lines = [json.dumps(row) for row in rows or (ROW, PICTURES, LENGTHS)]
    (root / "test.jsonl").write_text("\n".join(lines))
    return MathVision(data=str(root / "test.jsonl"), images=root, math_timeout_seconds=60)


def test_what_is_asked(tmp_path: Path):
    free, pictures, lengths = [one.prompt[0].content[-1].text for one in bench(tmp_path).requests()]
    lead = (
        'Please solve the problem step by step and put your answer in one "\\boxed{}". If it is a '
    )
    lead += 'multiple choice question, only one letter is allowed in the "\\boxed{}".\n'
    # Options that stand in the picture are not listed.
    assert free == pictures == lead + "How many bricks?\n<image1>"
    assert lengths == f"{free}\n(A) $6$ m\n(B) 8\n(C) 10 m\n(D) 11\n(E) 12"
    assert bench(tmp_path).requests()[0].images == (Media(path="images/7.jpg"),)


def test_the_score(tmp_path: Path):
    """The script compares a whole sentence with 6, and takes an option's text for its letter."""
    given = {"7": "There are 6", "26": "It is \\boxed{B}", "91": "\\boxed{8}"}
    suite = bench(tmp_path).score(given)
    assert {name: metric.value for name, metric in suite.metrics.items()} == pytest.approx(
        {
            "official/accuracy": 2 / 3,
            "official/accuracy/counting": 0,
            "official/accuracy/level 1": 1 / 2,
            "official/accuracy/logic": 1,
            "official/accuracy/level 2": 1,
            "strict/accuracy": 1,
            "unparsed_rate": 0,
        }
    )


@pytest.mark.parametrize(
    ("response", "found"),
    [
        ("So \\boxed{12}.", "12"),
        ("\\boxed{11} or \\boxed{12}", "12"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{x = 5}", "5"),
        ("\\boxed{5\\text{ cm}}", "5{cm}"),
        ("\\boxed{5 units}", "5"),
        ("\\boxed{90^\\circ}", "90"),
        ("\\boxed{.5}", "\\frac{1}{2}"),
        ("\\boxed{1/2}", "\\frac{1}{2}"),
        ("\\boxed{01/2}", "01/2"),
        ("\\boxed{\\sqrt3}", "\\sqrt{3}"),
        ("\\boxed{\\frac12}", "\\frac12"),
        ("\\boxed{\\frac12\\sqrt3}", "\\frac{1}{2}\\sqrt{3}"),
        ("\\boxed{(B)}", "b"),
        ("\\boxed{12", "\\boxed{12"),
        ("I choose B.", "b"),
        ("I choose (B).", "b"),
        ("B\nIt is so.", "b"),
        ("B", "b"),
        ("There are 12", "thereare12"),
        ("The total is 12.", "12"),
        ("The answer is 12 apples. Or so.", "12apples"),
        ("So the correct answer is (C) I think", "cithink"),
        ("the answer should be: 7", "7"),
        ("a = 7", "7"),
        ("", ""),
    ],
)
def test_what_the_script_finds(response, found):
    assert extracted(response) == found


@pytest.mark.parametrize(
    ("truth", "said", "same"),
    [
        ("6", "6", True),
        ("6", "6.0", True),
        ("6", "6.004", True),
        ("6", "6.006", False),
        ("1/3", "\\frac{1}{3}", True),
        ("\\pi", "3.14", True),
        ("5\\sqrt{3}", "8.66", True),
        ("B", "b", True),
        ("b", "c", False),
        ("1000", "1,000", True),
        ("\\frac{1}{2}", "\\frac12", False),
        ("\\frac{1}{2}", "\\frac1{2}", False),
        ("\\frac{1}{2}", "\\frac{1}2", False),
        ("\\frac{1}{2}", "1:2", True),
        ("7", "[7]", True),
        ("7", "\\{7\\}", True),
        ("3", "\\log_{2}{8}", False),  # our deviation: right by the script
        ("(1,2)", "(1.0,2.0)", True),
        ("[1,2.5]", "[1.0, 2.5]", True),
        # A quotient is a float, and 2 and 2.0 are told apart, as texts.
        ("(1,2)", "(1, 4/2)", False),
        ("(3,1)", "(6/2,1)", False),
        ("[1/3,2]", "[0.333,2]", True),
        ("(1,2)", "[1,2]", False),
        ("(0,\\infty)", "(0.0,\\infty)", True),
        ("(0,\\infty)", "(0/2,\\infty)", False),
        ("(a,2)", "(a,2.0)", True),
        ("(x,2)", "(x,2.0)", False),
        ("x+1", "1+x", False),
        ("", "", False),
        ("6", " ", False),
    ],
)
def test_what_the_script_finds_equal(truth, said, same):
    assert equal(truth, said) is same


@pytest.mark.parametrize(
    ("number", "answer", "official", "strict"),
    [
        (0, "There are 6", "thereare6", "6"),
        (0, "I count.\nThe answer is 6.", "6", "6"),
        (0, "\\boxed{6.001}", "6", "6.001"),
        (0, "\\boxed{six}", "six", "6"),
        (0, "", None, None),
        (1, "\\boxed{(B)}", "B", "B"),
        (1, "\\boxed{C}", "c", "C"),
        (1, "B or C", "borc", None),
        (2, "\\boxed{8}", "B", "B"),
        (2, "\\boxed{16/2}", "B", None),
        (2, "\\boxed{12 m}", "12m", "E"),
        (2, "\\boxed{13}", "13", None),
    ],
)
def test_readings(tmp_path: Path, number, answer, official, strict):
    tested = bench(tmp_path)
    question = tested.load()[number]
    assert tested.read(question, answer, "official") == official
    assert tested.read(question, answer, "strict") == strict


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"options": None}, "options: is wrong"),
        ({"options": ["x", "y"], "answer": "C"}, "answer is no option; got C; wanted A, B"),
        ({"answer": 6}, "answer is no text"),
        ({"subject": None}, "subject is no text"),
    ],
)
def test_malformed_rows_are_named(tmp_path: Path, changed, said):
    with pytest.raises(DataError, match=f"line 1.*{said}"):
        bench(tmp_path, ROW | changed).requests()
