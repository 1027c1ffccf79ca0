"""GQA: equality, and the categories of its released numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evals.benchmarks.gqa import Gqa
from mmalign.errors import DataError
from mmalign.records import Media

TYPES = {"structural": "query", "semantic": "attr", "detailed": "color"}
FILE: dict[str, Any] = {
    "201": {"imageId": "n1", "question": "What color?", "answer": "red", "types": TYPES},
    "202": {
        "imageId": "n1",
        "question": "Is it left?",
        "answer": "no",
        "isBalanced": True,
        "types": {"structural": "verify", "semantic": "rel"},
    },
    "203": {"isBalanced": False},
}


def gqa(root: Path, content: Any = FILE) -> Gqa:
    (root / "q.json").write_text(json.dumps(content))
    return Gqa(questions=root / "q.json", images=root / "images")


def test_the_balanced_questions_are_asked(tmp_path: Path):
    first, last = gqa(tmp_path).requests()
    assert (first.id, last.id) == ("201", "202")
    assert first.images == (Media(path="n1.jpg"),)
    asked = first.prompt[0].content[-1].text
    assert asked == "What color?\nAnswer the question using a single word or phrase."


def test_the_score(tmp_path: Path):
    suite = gqa(tmp_path).score({"201": "Red.", "202": "yes"})
    assert {name: metric.value for name, metric in suite.metrics.items()} == {
        "official/accuracy": 1 / 2,
        "official/accuracy/open": 1,
        "official/accuracy/query": 1,
        "official/accuracy/attribute": 1,
        "official/accuracy/binary": 0,
        "official/accuracy/verify": 0,
        "official/accuracy/relation": 0,
        "strict/accuracy": 1 / 2,
        "unparsed_rate": 0,
    }


@pytest.mark.parametrize(
    ("answer", "official", "strict"),
    [
        ("red", "red", "red"),
        (" RED..", "red", "red"),
        ("The red", "the red", "red"),
        ("red!", "red!", "red"),
        ("blue", "blue", "blue"),
        ("red\nIt is.", "red\nit is", None),
        ("it is a kind of red", "it is a kind of red", None),
        ("", "", None),
    ],
)
def test_readings(tmp_path: Path, answer, official, strict):
    tested = gqa(tmp_path)
    question = tested.load()[0]
    assert tested.read(question, answer, "official") == official
    assert tested.read(question, answer, "strict") == strict


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([], "wanted an object"),
        ({"1": []}, "question 1: is wrong"),
        ({"1": FILE["201"] | {"types": None}}, "question 1, types: is wrong"),
        ({"1": FILE["201"] | {"types": {"structural": "query"}}}, "field semantic is missing"),
        ({"1": FILE["201"] | {"imageId": None}}, "imageId is wrong"),
        ({"1": FILE["201"] | {"answer": 3}}, "answer is no text"),
        ({"1": {"isBalanced": False}}, "holds no question"),
    ],
)
def test_malformed_files_are_named(tmp_path: Path, content, said):
    with pytest.raises(DataError, match=said):
        gqa(tmp_path, content).requests()
