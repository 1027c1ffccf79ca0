"""ScienceQA from the released folder and from rows: prompts, LLaVA's rule, the released table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evals.benchmarks.science_qa import ScienceQa, official
from evals.config import EvalRecipe
from mmalign.config import validate
from mmalign.errors import DataError
from mmalign.records import Media


def problem(
    answer: int,
    *,
    image: str | None = None,
    hint: str = "",
    subject: str = "natural science",
    grade: str = "grade2",
) -> dict[str, Any]:
    return {
        "question": "Which is it?",
        "choices": ["a cat", "a dog", "a fish"],
        "answer": answer,
        "hint": hint,
        "image": image,
        "subject": subject,
        "grade": grade,
        "lecture": "Cats are cats.",
        "split": "test",
    }


PROBLEMS = {
    "5": problem(0, image="image.png", hint="Look."),
    "7": problem(1, image="choice_0.png", subject="social science", grade="grade7"),
    "8": problem(2, hint="It swims.", subject="language science", grade="grade12"),
    "9": problem(1, grade="grade6"),
    "10": problem(0),
}
SPLITS = {"test": ["7", "5", "8", "9"], "val": ["10"]}


def bench(folder: Path, problems: Any = PROBLEMS, splits: Any = SPLITS, **fields: Any) -> ScienceQa:
    (folder / "problems.json").write_text(json.dumps(problems))
    (folder / "pid_splits.json").write_text(json.dumps(splits))
    return ScienceQa(data=str(folder), **{"images": folder / "test", **fields})


def test_an_answer_is_not_cut_short(tmp_path: Path):
    """The official rule reads more than its beginning."""
    assert bench(tmp_path).max_new_tokens == 1024


def test_what_is_asked(tmp_path: Path):
    requests = bench(tmp_path).requests()
    assert [request.id for request in requests] == ["7", "5", "8", "9"]
    assert requests[1].images == (Media(path="5/image.png"),)
    assert requests[1].media_root == tmp_path / "test"
    assert requests[1].prompt[0].content[-1].text == (
        "Context: Look.\nWhich is it?\nA. a cat\nB. a dog\nC. a fish\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert requests[3].images == ()
    assert requests[3].prompt[0].content[0].text.startswith("Which is it?\nA. a cat")
    assert [one.id for one in bench(tmp_path, part="val").requests()] == ["10"]
    assert [one.id for one in bench(tmp_path, only_pictures=True).requests()] == ["7", "5"]


def test_numbers_by_hand(tmp_path: Path):
    # 7 right, 5 wrong by LLaVA's rule only, 8 right, 9 unread and wrong.
    answers = {"7": "B", "5": "(A)", "8": "The answer is C", "9": "I cannot tell"}
    suite = bench(tmp_path).score(answers)
    values = {name: metric.value for name, metric in suite.metrics.items()}
    assert values == {
        "official/accuracy": pytest.approx(2 / 4),
        "official/accuracy/SOC": 1.0,
        "official/accuracy/NAT": 0.0,
        "official/accuracy/LAN": 1.0,
        "official/accuracy/IMG": pytest.approx(1 / 2),
        # Of questions with a text: 5 and 8.
        "official/accuracy/TXT": pytest.approx(1 / 2),
        "official/accuracy/NO": 0.0,
        "official/accuracy/G1-6": 0.0,
        "official/accuracy/G7-12": 1.0,
        "strict/accuracy": pytest.approx(3 / 4),
        "strict/accuracy/IMG": 1.0,
        "official/unparsed_rate": pytest.approx(2 / 4),
        "unparsed_rate": pytest.approx(1 / 4),
    }


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("B", "B"),
        (" B\n", None),
        (" B ", "B"),
        ("B. a dog", "B"),
        ("B\na dog", "B"),
        ("B.", None),
        ("b", None),
        ("(B)", None),
        ("Cats. The answer is B.", "B"),
        # One with a full stop goes before one without.
        ("The answer is A or so. The answer is C.", "C"),
        ("The answer is Blue", "B"),
        ("the answer is B", None),
        ("", None),
    ],
)
def test_the_rule_of_llava(answer: str, said: str | None):
    assert official(answer) == said


def test_a_letter_that_is_not_offered_is_not_read(tmp_path: Path):
    suite = bench(tmp_path).score({"7": "D", "5": "E. none"})
    assert [row["official"] for row in suite.items] == [None] * 4


def test_rows_are_named_by_their_number(tmp_path: Path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    picture = {"bytes": b"a picture", "path": None}
    rows = [PROBLEMS["9"] | {"image": None}, PROBLEMS["7"] | {"image": picture}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "test-00000-of-00001.parquet")
    (request,) = ScienceQa(data=str(tmp_path), only_pictures=True).requests()
    assert (request.id, request.images) == ("2", (Media(bytes=b"a picture"),))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"answer": 3}, "7: choices or answer are wrong; got 3 choices, answer 3"),
        ({"answer": None}, "answer None"),
        ({"answer": True}, "answer True"),
        ({"choices": list("abcdef")}, "6 choices"),
        ({"choices": None}, "7, choices: is wrong; got NoneType"),
        ({"question": None}, "field question is no text"),
        ({"subject": "golf"}, "subject or grade are wrong; got golf, grade7"),
        ({"grade": "grade13"}, "got social science, grade13"),
    ],
)
def test_problems_that_are_wrong_are_named(tmp_path: Path, change: dict[str, Any], said: str):
    with pytest.raises(DataError, match=said):
        bench(tmp_path, PROBLEMS | {"7": PROBLEMS["7"] | change}).requests()


@pytest.mark.parametrize(
    ("splits", "fields", "said"),
    [
        ({"test": ["11"]}, {}, "problem 11 is missing"),
        ({"train": ["5"]}, {}, "pid_splits.json, test: is wrong; got NoneType; wanted a list"),
        ({"test": []}, {}, "holds no question"),
        ({"test": ["9", "9"]}, {}, "two questions share an id"),
        (SPLITS, {"images": None}, "needs images, the folder of the pictures"),
    ],
)
def test_splits_that_are_wrong_are_named(
    tmp_path: Path, splits: Any, fields: dict[str, Any], said: str
):
    with pytest.raises(DataError, match=said):
        bench(tmp_path, splits=splits, **fields).requests()


def test_recipes_name_it():
    recipe = {
        "name": "x",
        "model": {"path": "x"},
        "output": "x",
        "benchmarks": [{"name": "science_qa", "data": "x", "images": "x"}],
    }
    assert validate(recipe, EvalRecipe, "test").benchmarks[0].key == "science_qa"
