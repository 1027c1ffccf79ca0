"""MMMU's rows: pictures at their places, the released rules for choices and open answers."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from evals.benchmarks.mmmu import DISCIPLINES, Mmmu, official_choice, official_open
from evals.config import EvalRecipe
from mmalign.config import validate
from mmalign.errors import DataError
from mmalign.records import Media


def picture(name: str) -> dict[str, Any]:
    return {"bytes": name.encode(), "path": f"{name}.png"}


def row(id: str, question: str, options: list[str], answer: str, **more: Any) -> dict[str, Any]:
    empty = {f"image_{number}": None for number in range(1, 8)}
    return {
        "id": id,
        "question": question,
        "options": str(options),
        "answer": answer,
        "question_type": "multiple-choice" if options else "open",
        **empty,
        "image_1": picture("one"),
        **more,
    }


ROWS = [
    row("validation_Math_1", "What is <image 1>?", ["a cat", "it's a dog"], "B"),
    row(
        "validation_Art_Theory_2",
        "Which is like <image 2>, if any?",
        ["<image 1>", "<image 3>", "<image 2>"],
        "A",
        image_2=picture("two"),
        image_3=picture("three"),
    ),
    row("validation_Physics_3", "How many are in <image 1>?", [], "24"),
    row("validation_Physics_4", "How many?", [], "['3.14', 'pi']", image_2=picture("two")),
]


def bench(folder: Path, rows: list[dict[str, Any]] = ROWS, **fields: Any) -> Mmmu:
    (folder / "Math").mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "Math" / "validation-0.parquet")
    return Mmmu(data=str(folder), **fields)


def test_an_answer_is_not_cut_short(tmp_path: Path):
    """The official rule reads more than its beginning."""
    assert bench(tmp_path).max_new_tokens == 1024


def test_pictures_stand_at_their_places(tmp_path: Path):
    first, second, third, fourth = bench(tmp_path).requests()
    blocks = first.prompt[0].content
    assert [block.type for block in blocks] == ["text", "image", "text"]
    assert [block.text for block in blocks] == [
        "What is ",
        "",
        "?\nA. a cat\nB. it's a dog\n\n"
        "Answer with the option's letter from the given choices directly.",
    ]
    # In the order of their places, and again where a place stands again.
    assert [media.bytes for media in second.images] == [b"two", b"one", b"three", b"two"]
    assert [block.type for block in second.prompt[0].content] == (
        ["text", "image", "text", "image", "text", "image", "text", "image", "text"]
    )
    assert third.prompt[0].content[-1].text == (
        "?\n\nAnswer the question using a single word or phrase."
    )
    # Without a place all pictures stand first.
    assert [block.type for block in fourth.prompt[0].content] == ["image", "image", "text"]
    assert [media.bytes for media in fourth.images] == [b"one", b"two"]


ANSWERS = {
    "validation_Math_1": "B",
    "validation_Art_Theory_2": "I do not know",
    "validation_Physics_3": "There are 24 or 25",
    "validation_Physics_4": "3.1415",
}


def test_numbers_by_hand(tmp_path: Path):
    suite = bench(tmp_path).score(ANSWERS)
    values = {name: metric.value for name, metric in suite.metrics.items()}
    assert values == {
        # The open rule takes 24 among others, and 3.1415 for 3.14.
        "official/accuracy": pytest.approx(3 / 4),
        "official/accuracy/Science": 1.0,
        "official/accuracy/Math": 1.0,
        "official/accuracy/multiple-choice": pytest.approx(1 / 2),
        "official/accuracy/Art and Design": 0.0,
        "official/accuracy/Art_Theory": 0.0,
        "official/accuracy/Physics": 1.0,
        "official/accuracy/open": 1.0,
        "strict/accuracy": pytest.approx(2 / 4),
        "unparsed_rate": pytest.approx(1 / 4),
        "official/unparsed_rate": pytest.approx(1 / 4),
    }
    assert suite.items[3]["label"] == ["3.14", "pi"]
    assert [item["official"] for item in suite.items] == ["B", None, "24", "3.14"]
    assert [item["strict"] for item in suite.items] == ["B", None, "There are 24 or 25", "3.14"]


OPTIONS = {"A": "a cat", "B": "a dog", "C": "a cat and a dog"}


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("The answer is B.", "B"),
        ("Not (A), but (B)", "B"),
        ("(B), for B is better than A", "B"),
        ("A or B", "B"),
        ("B: it barks", None),
        # Words count in answers of more than five, the last of them, of equals the first.
        ("I see a cat", None),
        ("In this picture I see a cat", "A"),
        ("In this picture I see a cat and a dog", "B"),
        ("In this picture I see nothing at all", None),
        ("", None),
    ],
)
def test_the_rule_for_choices(answer: str, said: str | None):
    assert official_choice(answer, OPTIONS) == said


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("24.", [24.0]),
        ("Paris", ["paris"]),
        ("x", [" x", "x "]),
        ("The answer is 1,234.567 m", ["1,234.567 m", 1234.0, 234.57]),
        ("So it is 5\nas x = 7", [5.0, 7.0]),
        # "=" leads to an answer in the last line only.
        ("x = 7\nyes", ["x = 7\nyes", 7.0]),
        ("It is:", ["it is:"]),
    ],
)
def test_what_is_found_in_open_answers(answer: str, found: list[Any]):
    assert official_open(answer) == found


@pytest.mark.parametrize(
    ("truth", "answer", "official", "strict"),
    [
        ("24", "24", True, True),
        ("24", "The answer is 24.0.", True, True),
        ("24", "It is 24 apples", True, False),
        ("24", "240", False, False),
        ("1000", "1,000", True, True),
        ("Paris", "the city of Paris", True, False),
        ("Paris", "paris.", True, True),
        ("d", "dad", False, False),
        ("d", "d", True, True),
        ("d", "it is not b but c d", True, False),
        ("3", "", False, False),
    ],
)
def test_open_answers(tmp_path: Path, truth: str, answer: str, official: bool, strict: bool):
    asked = bench(tmp_path, [row("validation_Math_1", "How many?", [], truth)])
    (item,) = asked.score({"validation_Math_1": answer}).items
    assert (item["correct_official"], item["correct_strict"]) == (official, strict)


def test_a_long_open_answer_is_not_read_strictly(tmp_path: Path):
    asked = bench(tmp_path, [row("validation_Math_1", "How many?", [], "24")])
    long = "I counted them all twice over and came to a total of 24"
    for answer in (long, "24\n25"):
        assert asked.score({"validation_Math_1": answer}).items[0]["strict"] is None
    said = f"{long} + 1.\nThe answer is: 24."
    assert asked.score({"validation_Math_1": said}).items[0]["strict"] == "24"


def test_subjects_can_be_chosen(tmp_path: Path):
    assert [one.id for one in bench(tmp_path, subjects=("Math",)).requests()] == [
        "validation_Math_1"
    ]
    assert sum(len(subjects) for subjects in DISCIPLINES.values()) == 30


def test_rows_of_json_whose_pictures_are_files(tmp_path: Path):
    rows = [row("dev_Math_1", "<image 1>?", ["x", "y"], "A", image_1="one.png")]
    rows[0]["options"] = ["x", "y"]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (request,) = Mmmu(data=str(tmp_path / "rows.json"), images=tmp_path).requests()
    assert request.images == (Media(path="one.png"),)
    assert request.media_root == tmp_path


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"answer": "?"}, "answer is wrong; got '\\?'; wanted one of A, B. Give a split"),
        ({"answer": "C"}, "row 1: answer is wrong; got 'C'"),
        ({"answer": None}, "answer is wrong; got None"),
        ({"options": "['x', "}, "row 1: options are no list; got"),
        ({"options": "__import__('os')"}, "options are no list"),
        ({"options": None}, "options are no list; got None"),
        ({"options": "[]"}, "has no options; got '\\[\\]'"),
        ({"id": "validation_Golf_1"}, "its id names no subject; got validation_Golf_1"),
        ({"id": None}, "field id is no text"),
        ({"question": "And <image 2>?"}, "has a place for image_2, and no such picture"),
        ({"question": "And <image 9>?"}, "has a place for image_9"),
    ],
)
def test_rows_that_are_wrong_are_named(tmp_path: Path, change: dict[str, Any], said: str):
    with pytest.raises(DataError, match=said):
        bench(tmp_path, [ROWS[0] | change]).requests()


@pytest.mark.parametrize("answer", ["", "?", "[]"])
def test_an_open_question_needs_an_answer(tmp_path: Path, answer: str):
    with pytest.raises(DataError, match="answer is wrong"):
        bench(tmp_path, [ROWS[2] | {"answer": answer}]).requests()


def test_a_model_answers_where_pictures_stand_between_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from evals.run import evaluate
    from mmalign.models.tiny import TinyModel

    monkeypatch.chdir(tmp_path)
    drawn = io.BytesIO()
    Image.new("RGB", (40, 32), "red").save(drawn, "PNG")
    red = {"bytes": drawn.getvalue(), "path": None}
    rows = [{k: red if isinstance(v, dict) else v for k, v in one.items()} for one in ROWS]
    bench(tmp_path, rows)
    TinyModel(output="model", family="qwen25vl").build()
    recipe = {
        "name": "x",
        "model": {"path": "model"},
        "output": "out",
        "bootstrap_samples": 20,
        "benchmarks": [{"name": "mmmu", "data": "."}],
    }
    folder = evaluate(validate(recipe, EvalRecipe, "test"))
    (suite,) = json.loads((folder / "results.json").read_text())["suites"]
    assert (suite["num_items"], suite["num_missing"]) == (4, 0)


def test_ids_appear_once(tmp_path: Path):
    with pytest.raises(DataError, match="two questions share an id"):
        bench(tmp_path, [ROWS[0], ROWS[0]]).requests()


def test_recipes_name_it():
    recipe = {
        "name": "x",
        "model": {"path": "x"},
        "output": "x",
        "benchmarks": [{"name": "mmmu", "data": "MMMU/MMMU"}],
    }
    assert validate(recipe, EvalRecipe, "test").benchmarks[0].key == "mmmu"
