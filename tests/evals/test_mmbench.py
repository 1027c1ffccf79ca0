"""MMBench's TSV: rotations made and found, circular and vanilla accuracy, pictures by reference."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest

from evals.benchmarks.mmbench import TURN, MmBench, official
from evals.config import EvalRecipe
from mmalign.config import validate
from mmalign.errors import DataError
from mmalign.records import Media

CAT, DOG = b"a picture of a cat" * 9, b"a picture of a dog" * 9
COLUMNS = (
    *("index", "question", "hint", "A", "B", "C", "D"),
    *("answer", "category", "image", "source", "l2-category", "split"),
)


def row(index: int, options: list[str], answer: str, image: str, **more: str) -> dict[str, str]:
    return {
        "index": str(index),
        "question": "Which is it?",
        **dict(zip("ABCD", options, strict=False)),
        "answer": answer,
        "category": "image_scene",
        "l2-category": "coarse_perception",
        "split": "dev",
        "image": image,
        **more,
    }


ROWS = [
    row(241, ["cat", "dog", "fish"], "B", base64.b64encode(CAT).decode(), hint="Look."),
    row(252, ["red", "blue"], "A", "241", category="ocr", hint="nan"),
    row(253, ["one", "two"], "B", base64.b64encode(DOG).decode()),
]


def bench(folder: Path, rows: list[dict[str, str]] = ROWS, **fields: Any) -> MmBench:
    lines = [COLUMNS, *([one.get(name, "") for name in COLUMNS] for one in rows)]
    (folder / "dev.tsv").write_text("".join("\t".join(line) + "\n" for line in lines))
    return MmBench(data=str(folder / "dev.tsv"), **fields)


def turned(one: dict[str, str], turn: int) -> dict[str, str]:
    """A row as released files hold rotations, by hand for two options."""
    if not turn:
        return one
    swapped = {"A": one["B"], "B": one["A"], "answer": "BA"["AB".index(one["answer"])]}
    return one | swapped | {"index": str(int(one["index"]) + TURN), "image": one["index"]}


def test_an_answer_is_not_cut_short(tmp_path: Path):
    """The official rule reads more than its beginning."""
    assert bench(tmp_path).max_new_tokens == 1024


def test_every_rotation_is_asked(tmp_path: Path):
    asked = bench(tmp_path).load()
    assert [question.id for question in asked] == [
        *("241", "1000241", "2000241"),
        *("252", "1000252", "253", "1000253"),
    ]
    assert [question.truth for question in asked] == ["B", "A", "C", "A", "B", "B", "A"]
    assert asked[1].options == {"A": "dog", "B": "fish", "C": "cat"}
    assert asked[1].text == "Look.\nWhich is it?\nA. dog\nB. fish\nC. cat"
    # A hint that pandas wrote for none is none.
    assert asked[3].text == "Which is it?\nA. red\nB. blue"
    request = bench(tmp_path).requests()[2]
    assert request.prompt[0].content[-1].text == (
        "Look.\nWhich is it?\nA. fish\nB. cat\nC. dog\n"
        "Answer with the option's letter from the given choices directly."
    )


def test_a_picture_may_be_that_of_another_row(tmp_path: Path):
    requests = bench(tmp_path).requests()
    assert requests[0].images == requests[3].images == (Media(bytes=CAT),)
    assert requests[-1].images == (Media(bytes=DOG),)
    items = bench(tmp_path).score({}).items
    assert len({item["cluster"] for item in items}) == 2


ANSWERS = {
    # All right, under the official rule by letter and by words.
    "241": "B",
    "1000241": "It is a dog",
    "2000241": "C. dog",
    # Right as it stands, then the same letter again.
    "252": "A",
    "1000252": "A",
    # Wrong as it stands.
    "253": "A",
    "1000253": "The answer is A.",
}


def test_numbers_by_hand(tmp_path: Path):
    suite = bench(tmp_path).score(ANSWERS)
    values = {name: metric.value for name, metric in suite.metrics.items()}
    assert values == {
        "official/accuracy": pytest.approx(1 / 3),
        "official/vanilla": pytest.approx(2 / 3),
        "official/accuracy/image_scene": pytest.approx(1 / 2),
        "official/accuracy/coarse_perception": pytest.approx(1 / 3),
        "official/accuracy/ocr": 0.0,
        "strict/accuracy": pytest.approx(1 / 3),
        "strict/vanilla": pytest.approx(2 / 3),
        "official/unparsed_rate": 0.0,
        "unparsed_rate": 0.0,
    }


def test_a_missing_rotation_is_wrong(tmp_path: Path):
    given = {id: answer for id, answer in ANSWERS.items() if id != "2000241"}
    metrics = bench(tmp_path).score(given).metrics
    assert metrics["official/accuracy"].value == 0.0
    assert metrics["official/vanilla"].value == pytest.approx(2 / 3)
    assert metrics["official/unparsed_rate"].value == pytest.approx(1 / 7)


def test_released_rotations_are_asked_as_they_stand(tmp_path: Path):
    two = ROWS[2], row(254, ["up", "down"], "A", "253")
    rows = [*two, *(turned(one, 1) for one in two)]
    rows[3]["image"] = "253"
    asked = bench(tmp_path, rows).load()
    assert [question.id for question in asked] == ["253", "1000253", "254", "1000254"]
    assert [question.group for question in asked] == ["253", "253", "254", "254"]
    assert [question.truth for question in asked] == ["B", "A", "A", "B"]
    assert len(bench(tmp_path, rows, limit=1).requests()) == 2
    with pytest.raises(DataError, match="index 254: has not every rotation") as caught:
        bench(tmp_path, rows[:3]).load()
    assert "got rows 254; wanted 2 rows" in str(caught.value)
    with pytest.raises(DataError, match="index 253: has not every rotation"):
        bench(tmp_path, [rows[2] | {"image": rows[0]["image"]}]).load()


OPTIONS = {"A": "cat", "B": "dog", "C": "cat and dog"}


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("B", "B"),
        ("(B) dog", "B"),
        ("**B**", "B"),
        ("Both A and B", None),
        ("A dog", "A"),
        # The letter is too far from the end; the words decide, and here the answer is too long.
        ("A big animal that is sleeping there", None),
        ("a dog", "B"),
        # What is stated is read before the words; no end of a word is asked for.
        ("The answer is B because the sky is blue and clear today.", "B"),
        ("The correct answer is **c**, as two animals lie on the bed here.", "C"),
        ("A or B? I think that the answer is  B here.", "B"),
        ("The answer is cat.", "C"),
        ("The answer is D because of the sky that is blue today.", None),
        # Of a failure only words are read.
        ("Failed to obtain answer via API. B", None),
        ("Failed to obtain answer via API dog", None),
        # "cat", "dog" and "cat and dog" are all there.
        ("cat and dog", None),
        ("b", None),
        ("Z", None),
        ("I'm sorry, but without the image provided: B", None),
        ("", None),
    ],
)
def test_the_rule_of_vlmevalkit(answer: str, said: str | None):
    assert official(answer, OPTIONS) == said


def test_of_a_failure_only_words_are_read():
    options = {"A": "a small cat on a mat", "B": "a dog on a long walk"}
    assert official("Failed to obtain answer via API: a dog on a long walk", options) == "B"
    assert official("Failed to obtain answer via API: A", options) is None


def test_what_pandas_takes_for_missing_is_no_option(tmp_path: Path):
    for word in ("None", "N/A", "null", "NA", "nan", " "):
        (first, *others) = bench(tmp_path, [row(3, ["x", word, "y"], "C", ROWS[0]["image"])]).load()
        assert first.options == {"A": "x", "C": "y"}
        assert [one.truth for one in others] == ["A"]
    (first, *_) = bench(tmp_path, [row(3, ["x", "none", "y"], "C", ROWS[0]["image"])]).load()
    assert first.options == {"A": "x", "B": "none", "C": "y"}
    with pytest.raises(DataError, match=r"options A, C; answer 'B'.*Write 'None' in other words"):
        bench(tmp_path, [row(3, ["x", "None", "y"], "B", ROWS[0]["image"])]).load()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"answer": ""}, "row 3: options or answer are wrong; got options A, B; answer None"),
        ({"answer": "C"}, "answer 'C'"),
        ({"B": ""}, "got options A; answer 'B'"),
        ({"index": "x"}, "row 3: index is no whole number; got 'x'"),
        ({"index": "241"}, "row 3: index appears twice; got 241"),
        ({"question": ""}, "field question is missing"),
        ({"image": "999"}, "row 3: image names no row that holds one; got 999"),
        ({"image": "253"}, "image names no row that holds one; got 253"),
        ({"image": "%" * 90}, "row 3: image is no base64; got '%%%"),
        ({"image": "abc" * 31}, "row 3: image is no base64"),
        ({"image": ""}, "row 3: holds no picture"),
    ],
)
def test_rows_that_are_wrong_are_named(tmp_path: Path, change: dict[str, str], said: str):
    with pytest.raises(DataError, match=said):
        bench(tmp_path, [*ROWS[:2], ROWS[2] | change]).requests()


def test_a_table_that_is_cut_short_is_named(tmp_path: Path):
    bench(tmp_path)
    text = (tmp_path / "dev.tsv").read_text()
    (tmp_path / "dev.tsv").write_text(text[: text.rindex("one") + 3])
    with pytest.raises(DataError, match=r"row 3: holds no picture"):
        MmBench(data=str(tmp_path / "dev.tsv")).requests()
    (tmp_path / "dev.tsv").write_text("\t".join(COLUMNS) + "\n")
    with pytest.raises(DataError, match="holds no question"):
        MmBench(data=str(tmp_path / "dev.tsv")).requests()


def test_rows_of_the_hub(tmp_path: Path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {
            **{"index": 3, "question": "Which?", "hint": "nan", "A": "cat", "B": "dog"},
            **{"C": "nan", "D": None, "answer": "B", "L2-category": "x", "category": "y"},
            "image": {"bytes": CAT, "path": None},
        }
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "dev-0.parquet")
    first, second = MmBench(data=str(tmp_path)).load()
    assert (first.id, second.id, second.truth) == ("3", "1000003", "A")
    assert (first.categories, first.images) == (("y", "x"), (Media(bytes=CAT),))


def test_recipes_name_it():
    recipe = {
        "name": "x",
        "model": {"path": "x"},
        "output": "x",
        "benchmarks": [{"name": "mmbench", "data": "dev.tsv", "split": "dev"}],
    }
    assert validate(recipe, EvalRecipe, "test").benchmarks[0].key == "mmbench-dev"
