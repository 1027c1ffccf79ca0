"""MathVista and MathVerse: the released rules without their language models, and the strict one."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from evals.benchmarks.math_questions import MathVerse, MathVista
from evals.config import EvalRecipe
from evals.known import RULES
from mmalign.config import validate
from mmalign.errors import DataError, MissingExtra
from mmalign.records import Media

ABOUT = {
    "task": "geometry problem solving",
    "category": "math-targeted-vqa",
    "context": "geometry diagram",
    "grade": "high school",
    "language": "english",
    "skills": ["geometry reasoning", "algebraic reasoning"],
}
CHOICE = {
    "pid": "3",
    "question": "Find the angle.",
    "image": "images/3.jpg",
    "choices": ["135°", "140°", "145°", "150°"],
    "unit": None,
    "precision": None,
    "answer": "145°",
    "question_type": "multi_choice",
    "answer_type": "text",
    "metadata": ABOUT,
}
FREE = CHOICE | {"choices": None, "question_type": "free_form"}
INTEGER = FREE | {"pid": "2", "answer": "1000", "answer_type": "integer", "unit": "g"}
FLOAT = FREE | {"pid": "1", "answer": "1.2", "answer_type": "float", "precision": 1.0}
LIST = FREE | {"pid": "4", "answer": "[1, 2]", "answer_type": "list"}


def vista(root: Path, *rows: dict[str, Any]) -> MathVista:
    rows = rows or (CHOICE, INTEGER, FLOAT, LIST)
    (root / "testmini.json").write_text(json.dumps({row["pid"]: row for row in rows}))
    return MathVista(data=str(root / "testmini.json"), images=root, math_timeout_seconds=60)


def test_what_mathvista_asks(tmp_path: Path):
    choice, integer, decimal, listed = vista(tmp_path).requests()
    assert choice.images == (Media(path="images/3.jpg"),)
    assert choice.prompt[0].content[-1].text == (
        "Hint: Please answer the question and provide the correct option letter, e.g., A, B, C, D, "
        "at the end.\nQuestion: Find the angle.\nChoices:\n(A) 135°\n(B) 140°\n(C) 145°\n(D) 150°"
    )
    assert integer.prompt[0].content[-1].text == (
        "Hint: Please answer the question requiring an integer answer and provide the final value, "
        "e.g., 1, 2, 3, at the end.\nQuestion: Find the angle. (Unit: g)"
    )
    assert "with one decimal place and" in (decimal.prompt[0].content[-1].text or "")
    assert "a Python list as an answer" in (listed.prompt[0].content[-1].text or "")
    (own,) = vista(tmp_path, CHOICE | {"query": "As it is."}).requests()
    assert own.prompt[0].content[-1].text == "As it is."


def test_the_score_of_mathvista(tmp_path: Path):
    """Official finds the first and the last right, strict the first two; 1.26 is 1.3 to both."""
    given = {"3": "145°", "2": "It is \\boxed{1000}", "1": "1.26", "4": 'The answer is "[1, 2]".'}
    suite = vista(tmp_path).score(given)
    found = {name: metric.value for name, metric in suite.metrics.items()}
    assert [row["official"] for row in suite.items] == ["145°", None, "1.3", "[1, 2]"]
    assert [row["strict"] for row in suite.items] == ["145°", "1000", "1.26", None]
    assert found["official/accuracy"] == found["strict/accuracy"] == 1 / 2
    assert (found["match_rate"], found["unparsed_rate"]) == (3 / 4, 1 / 4)
    assert found["official/accuracy/algebraic reasoning"] == 1 / 2
    assert suite.items[0]["categories"][:2] == ["geometry problem solving", "math-targeted-vqa"]
    missing = vista(tmp_path).score({})
    assert {name: m.value for name, m in missing.metrics.items() if m.value} == {"unparsed_rate": 1}


@pytest.mark.parametrize(
    ("row", "answer", "official", "strict"),
    [
        (CHOICE, "145°", "145°", "145°"),
        (CHOICE, "C", None, "145°"),  # the script would ask its language model
        (CHOICE, "(C)", None, "145°"),
        (CHOICE, 'The answer is "(c) 145°".', "145°", "145°"),
        (CHOICE, 'The answer is "C".', "145°", "145°"),
        (CHOICE, 'The answer is "145".', "145°", "145°"),
        (CHOICE, 'So. The answer is "14".', "140°", None),  # the first that takes one edit more
        (CHOICE, 'The answer is "(F)".', "135°", None),  # four edits from each: the first
        (CHOICE, 'The answer is "".', None, None),
        (CHOICE, "We see it.\nThe answer is C.", None, "145°"),
        (CHOICE, "", None, None),
        (INTEGER, "1000", "1000", "1000"),
        (INTEGER, " 1_000\n", "1000", None),  # what Python's int reads
        (INTEGER, "1,000", None, "1000"),
        (INTEGER, "1000.0", None, "1000"),
        (INTEGER, 'The answer is "1000.9".', "1000", '"1000.9".'),  # cut, not rounded
        (INTEGER, 'The answer is "inf".', None, None),
        (INTEGER, 'The answer is "1e3".', "1000", "1000"),
        (INTEGER, "1000 g", None, "1000"),
        (INTEGER, "1000.5", None, "1000.5"),
        (INTEGER, "9" * 5000, None, None),
        (FLOAT, "1.24", "1.2", "1.2"),
        (FLOAT, "1.2500001", "1.3", "1.2500001"),
        (FLOAT, "nan", "nan", None),
        (FLOAT, "\\boxed{6/5}", None, "1.2"),
        (LIST, 'The answer is "[1, 2]".', "[1, 2]", None),
        (LIST, 'The answer is "[1,2]".', "[1,2]", None),  # as texts they differ
        (LIST, "[1,2]", None, "[1, 2]"),
        (LIST, "\\boxed{[1, 3]}", None, "[1, 3]"),
    ],
)
def test_readings_of_mathvista(tmp_path: Path, row, answer, official, strict):
    tested = vista(tmp_path, row)
    (question,) = tested.load()
    assert tested.read(question, answer, "official") == official
    assert tested.read(question, answer, "strict") == strict


def test_parquet_rows_hold_their_pictures(tmp_path: Path):
    row = INTEGER | {"decoded_image": {"bytes": b"picture"}, "query": "How much?"}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "testmini.parquet")
    (asked,) = MathVista(data=str(tmp_path / "testmini.parquet")).requests()
    assert asked.images == (Media(bytes=b"picture"),)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"answer": ""}, "answers of the test split are not public"),
        ({"answer": "45°"}, "answer is no choice; got 45°; wanted 135°, 140°"),
        ({"choices": []}, "choices are wrong"),
        ({"choices": None}, "choices: is wrong"),
        ({"question_type": "choice"}, "question_type is wrong; got choice"),
        ({"metadata": None}, "metadata: is wrong"),
        ({"metadata": ABOUT | {"grade": None}}, "metadata: field grade is no text"),
        ({"image": 3}, "field image is no text"),
    ],
)
def test_malformed_rows_of_mathvista_are_named(tmp_path: Path, changed, said):
    with pytest.raises(DataError, match=said):
        vista(tmp_path, CHOICE | changed).requests()


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (INTEGER | {"answer": "many"}, "testmini.json, 2: answer is no number; got 'many'"),
        (FLOAT | {"precision": None}, "got float of precision None"),
        (FLOAT | {"precision": 3.0}, "got float of precision 3"),
        (FLOAT | {"answer_type": "text"}, "answer_type is wrong; got text"),
    ],
)
def test_malformed_free_answers_are_named(tmp_path: Path, row, said):
    with pytest.raises(DataError, match=said):
        vista(tmp_path, row).requests()


# --- MathVerse --------------------------------------------------------------------------------

VERSE = {
    "sample_index": "1",
    "problem_index": "7",
    "problem_version": "Text Dominant",
    "question": "How large is angle CED? ()\nChoices:\nA:40°\nB:60°\nC:120°\nD:140°",
    "image": "images_version_1-4/image_7.png",
    "answer": "D",
    "question_type": "multi-choice",
    "metadata": {"subject": "Plane Geometry", "subfield": "Angle"},
    "query_wo": "Directly: how large?",
    "query_cot": "First reason: how large?",
}
UNSEEN = {"sample_index": "2", "problem_version": "Vision Only", "question": ""}
FORM = {"sample_index": "3", "question_type": "free-form", "answer": "2\\sqrt{2}", "question": "L?"}


def verse(root: Path, *rows: dict[str, Any], **settings: Any) -> MathVerse:
    rows = tuple(VERSE | row for row in rows or ({}, UNSEEN, FORM))
    (root / "testmini.json").write_text(json.dumps(rows))
    data = str(root / "testmini.json")
    return MathVerse(data=data, images=root, math_timeout_seconds=60, **settings)


def test_what_mathverse_asks(tmp_path: Path):
    first, *_ = verse(tmp_path).requests()
    assert first.images == (Media(path="images_version_1-4/image_7.png"),)
    assert first.prompt[0].content[-1].text == "Directly: how large?"
    reasoned = verse(tmp_path, query="query_cot").requests()[0]
    assert reasoned.prompt[0].content[-1].text == "First reason: how large?"
    (words,) = verse(tmp_path, {"image": "", "problem_version": "Text Only"}).requests()
    assert words.images == ()


def test_the_score_of_mathverse(tmp_path: Path):
    """Official takes only the bare letter: 1/3; strict reads all three as right."""
    given = {"1": "D", "2": "So.\nThe answer is D.", "3": "L = \\boxed{\\sqrt{8}}"}
    suite = verse(tmp_path).score(given)
    found = {name: metric.value for name, metric in suite.metrics.items()}
    assert found == pytest.approx(
        {
            "official/accuracy": 1 / 3,
            "official/accuracy/Text Dominant": 1 / 2,
            "official/accuracy/Vision Only": 0,
            "official/accuracy/Plane Geometry": 1 / 3,
            "official/accuracy/Angle": 1 / 3,
            "strict/accuracy": 1,
            "unparsed_rate": 0,
        }
    )
    assert {row["cluster"] for row in suite.items} == {"7"}


@pytest.mark.parametrize(
    ("number", "answer", "official", "strict"),
    [
        (0, "Extracted Answer: D ", "D", "D"),
        (0, "d", "d", "D"),
        (0, "D.", "D.", "D"),
        (0, "140°", "140°", "D"),
        (0, "D:140°", "D:140°", "D"),
        (0, "D:120°", "D:120°", None),
        (0, "E", "E", None),
        (1, "(D)", "(D)", "D"),
        (1, "140°", "140°", None),  # its options are in the picture alone
        (2, "2.83", "2.83", "2.83"),
        (2, "It is long", "It is long", None),
    ],
)
def test_readings_of_mathverse(tmp_path: Path, number, answer, official, strict):
    tested = verse(tmp_path)
    question = tested.load()[number]
    assert tested.read(question, answer, "official") == official
    assert tested.read(question, answer, "strict") == strict


def test_the_question_for_evaluation_tells_the_options(tmp_path: Path):
    tested = verse(tmp_path, UNSEEN | {"question_for_eval": VERSE["question"]})
    assert tested.read(tested.load()[0], "140°", "strict") == "D"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"question_type": "choice"}, "question_type is wrong"),
        ({"answer": "140"}, "answer is no letter"),
        ({"metadata": {}}, "field subject is missing"),
        ({"query_wo": None}, "query_wo is no text"),
        ({"sample_index": 1}, "sample_index is no text"),
    ],
)
def test_malformed_rows_of_mathverse_are_named(tmp_path: Path, changed, said):
    with pytest.raises(DataError, match=f"row 1(, metadata)?: .*{said}"):
        verse(tmp_path, changed).requests()


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch):
    with pytest.raises(DataError, match="is not there"):
        MathVista(data=str(tmp_path / "x.json"), images=tmp_path).requests()
    with pytest.raises(DataError, match="Give images"):
        vista(tmp_path).model_copy(update={"images": None}).requests()
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(MissingExtra, match="math-verify"):
        vista(tmp_path).requests()


def test_recipes_name_them():
    ours = [
        {"name": "mathvista", "data": "AI4Math/MathVista"},
        {"name": "mathverse", "data": "testmini.json", "images": "images"},
        {"name": "mathvision", "data": "test.jsonl", "images": "MATH-V"},
    ]
    recipe = {"name": "x", "model": {"path": "x"}, "output": "x", "benchmarks": ours}
    keys = [one.key for one in validate(recipe, EvalRecipe, "test").benchmarks]
    assert keys == ["mathvista", "mathverse", "mathvision"]
    assert set(keys) <= set(RULES)
