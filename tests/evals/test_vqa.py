"""VQAv2, TextVQA and VizWiz: files, both readings, and the accuracy of ten answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from evals.benchmarks.vqa import TextVqa, VizWiz, VqaV2
from evals.compare import compare
from evals.config import EvalRecipe
from evals.known import RULES
from mmalign.config import validate
from mmalign.errors import DataError
from mmalign.records import Media

YES = ["yes"] * 10
TWO = ["2"] * 3 + ["two"] * 2 + ["3"] * 5
BUS = ["a bus"] * 2 + ["bus"] + ["red bus"] * 7


def ten(answers: list[str]) -> list[dict[str, Any]]:
    return [
        {"answer": a, "answer_confidence": "yes", "answer_id": i} for i, a in enumerate(answers, 1)
    ]


def vqav2(root: Path, **changed: Any) -> VqaV2:
    asked = {
        "data_subtype": "val2014",
        "questions": [
            {"image_id": 42, "question": "Is it red?", "question_id": 42000},
            {"image_id": 42, "question": "How many?", "question_id": 42001},
            {"image_id": 7, "question": "What is it?", "question_id": 7000},
        ],
    }
    types = {42000: ("yes/no", "is it"), 42001: ("number", "how many"), 7000: ("other", "what is")}
    answers = {42000: YES, 42001: TWO, 7000: BUS}
    annotated = {
        "annotations": [
            {
                "question_id": id,
                "answer_type": kind,
                "question_type": of,
                "answers": ten(answers[id]),
            }
            for id, (kind, of) in reversed(types.items())
        ]
    }
    (root / "asked.json").write_text(json.dumps({**asked, **changed.get("asked", {})}))
    (root / "annotated.json").write_text(json.dumps({**annotated, **changed.get("annotated", {})}))
    return VqaV2(
        questions=str(root / "asked.json"),
        annotations=root / "annotated.json",
        images=root / "images",
    )


def textvqa(root: Path, answers: list[str] = BUS, **changed: Any) -> TextVqa:
    row = {"question_id": 1, "image_id": "0a1b", "question": "what is it?", "answers": answers}
    (root / "text.json").write_text(json.dumps({"data": [row | changed]}))
    return TextVqa(data=str(root / "text.json"), images=root / "images")


def vizwiz(root: Path, answers: list[str] = BUS) -> VizWiz:
    confident = [{"answer": a, "answer_confidence": "yes"} for a in answers]
    row = {"image": "VizWiz_val_00000000.jpg", "question": "What is it?", "answers": confident}
    row |= {"answerable": 1, "answer_type": "other"}
    (root / "val.json").write_text(json.dumps([row]))
    return VizWiz(data=str(root / "val.json"), images=root / "images")


def test_what_is_asked(tmp_path: Path):
    first, _, last = vqav2(tmp_path).requests()
    assert (first.id, first.media_root) == ("42000", tmp_path / "images")
    assert first.images == (Media(path="COCO_val2014_000000000042.jpg"),)
    assert last.images == (Media(path="COCO_val2014_000000000007.jpg"),)
    asked = first.prompt[0].content[-1].text
    assert asked == "Is it red?\nAnswer the question using a single word or phrase."
    (one,) = textvqa(tmp_path).requests()
    assert (one.id, one.images) == ("1", (Media(path="0a1b.jpg"),))
    (one,) = vizwiz(tmp_path).requests()
    assert (one.id, one.images) == ("VizWiz_val_00000000.jpg", (Media(path=one.id),))
    assert "respond with 'Unanswerable'.\nAnswer" in (one.prompt[0].content[-1].text or "")


def test_words_that_were_found_are_asked_with(tmp_path: Path):
    tested = textvqa(tmp_path, ocr_tokens=["KODAK", "X1"]).model_copy(update={"ocr": True})
    asked = tested.requests()[0].prompt[0].content[-1].text or ""
    assert asked.startswith("what is it?\nReference OCR token: KODAK, X1\nAnswer")
    assert tested.key == "textvqa-ocr"
    with pytest.raises(DataError, match="ocr_tokens: is wrong"):
        textvqa(tmp_path).model_copy(update={"ocr": True}).requests()


def test_the_score_of_vqav2(tmp_path: Path):
    """Official "Yes" is wrong, as all references are alike; 2 is said by five; "a bus" by three.

    Official (0 + 1 + 0.9) / 3, strict and tidied (1 + 1 + 0.9) / 3.
    """
    given = {"42000": "Yes", "42001": "Two.", "7000": "The bus"}
    suite = vqav2(tmp_path).score(given)
    found = {name: metric.value for name, metric in suite.metrics.items()}
    assert found == pytest.approx(
        {
            "official/accuracy": 1.9 / 3,
            "official/accuracy/yes/no": 0,
            "official/accuracy/is it": 0,
            "official/accuracy/number": 1,
            "official/accuracy/how many": 1,
            "official/accuracy/other": 0.9,
            "official/accuracy/what is": 0.9,
            "strict/accuracy": 2.9 / 3,
            "unparsed_rate": 0,
            "tidied/accuracy": 2.9 / 3,
        }
    )
    assert (suite.key, suite.images) == ("vqav2", tmp_path / "images")
    assert suite.items[0]["label"] == YES
    assert [row["cluster"] for row in suite.items] == ["42", "42", "7"]
    assert [row["correct_official"] for row in suite.items] == [False, True, pytest.approx(0.9)]
    missing = vqav2(tmp_path).score({})
    assert {name: m.value for name, m in missing.metrics.items() if m.value} == {"unparsed_rate": 1}
    with pytest.raises(DataError, match="43000"):
        vqav2(tmp_path).score({"43000": "yes"})


@pytest.mark.parametrize(
    ("number", "answer", "official", "strict", "tidied"),
    [
        (0, "yes", 1, 1, 1),
        (0, " yes\n", 1, 1, 1),
        (0, "yes.", 0, 1, 1),
        (0, "YES", 0, 1, 1),
        (0, "yes it is", 0, 0, 0),
        (1, "3", 1, 1, 1),
        (1, "three", 1, 1, 1),
        (1, "4", 0, 0, 0),
        # Five words at most are an answer, and in one line.
        (2, "a red bus", 1, 1, 1),
        (2, "red\nbus", 1, None, 1),
        (2, "bus\n\nIt is parked.", 0, None, 0),
        (2, "I see a red bus here", 0, None, 0),
        (2, "a a a a red bus", 1, None, 1),
        (2, "red,bus", 1, 1, 0),
        (2, "", 0, None, 0),
    ],
)
def test_readings_of_vqav2(tmp_path: Path, number, answer, official, strict, tidied):
    tested = vqav2(tmp_path)
    row = tested.score({tested.load()[number].id: answer}).items[number]
    assert row["correct_official"] == official
    assert row["correct_tidied"] == tidied
    assert row["correct_strict"] == (strict or 0)
    assert (row["strict"] is None) == (strict is None)


def test_references_that_only_look_different(tmp_path: Path):
    """Ten that differ are rewritten, and so is the answer, even if they are alike afterwards."""
    annotated = {
        "question_id": 42000,
        "answer_type": "other",
        "question_type": "what",
        "answers": ten(["a cat"] * 5 + ["cat"] * 5),
    }
    asked = {"questions": [{"image_id": 42, "question": "What?", "question_id": 42000}]}
    tested = vqav2(tmp_path, asked=asked, annotated={"annotations": [annotated]})
    assert tested.score({"42000": "The CAT"}).items[0]["correct_official"] is True


@pytest.mark.parametrize(
    ("answers", "answer", "official", "strict"),
    [
        (YES, "Yes.", 1, 1),
        (["Kodak's"] * 10, "kodak 's", 1, 1),
        (["1,000"] * 3 + ["x"] * 7, "1000", 0.9, 0.9),
        (["5?"] + ["6"] * 9, "5", 0.3, 0.3),
        (["one two three four five six"] * 10, "1 2 3 4 5 6", 1, 1),
        (["x"] * 10, "x " * 11, 0, None),
    ],
)
def test_textvqa_rewrites_both_sides(tmp_path: Path, answers, answer, official, strict):
    row = textvqa(tmp_path, answers).score({"1": answer}).items[0]
    assert row["correct_official"] == pytest.approx(official)
    assert row["correct_strict"] == pytest.approx(strict or 0)
    assert (row["strict"] is None) == (strict is None)
    assert "correct_tidied" not in row


@pytest.mark.parametrize(
    ("answers", "answer", "official", "strict", "tidied"),
    [
        (YES, "Yes.", 1, 1, 1),
        (["a bus"] * 10, "a bus", 0, 1, 0),  # the reference keeps its article, the answer not
        (["don't"] * 10, "dont", 0, 1, 1),  # and gets a curly apostrophe, EvalAI's is straight
        (["red,"] * 4 + ["red"] * 6, "red,", 1, 1, 1),
        (["1,5"] * 10, "1,5", 0, 1, 0),
        (["dog 's"] * 10, "dog's", 0, 0, 1),
        (["Unanswerable"] * 10, "unanswerable", 0, 1, 0),
    ],
)
def test_vizwiz_rewrites_the_answer_alone(tmp_path, answers, answer, official, strict, tidied):
    tested = vizwiz(tmp_path, answers)
    suite = tested.score({tested.load()[0].id: answer})
    row = suite.items[0]
    assert row["correct_official"] == official
    assert row["correct_strict"] == strict
    assert row["correct_tidied"] == tidied
    assert suite.metrics["official/accuracy/other"].value == official


def test_parquet_files_hold_pictures_and_answers(tmp_path: Path):
    folder = tmp_path / "data"
    folder.mkdir()
    row = {"question_id": 42000, "image_id": 42, "question": "Is it red?", "answers": ten(YES)}
    row |= {"answer_type": "yes/no", "question_type": "is it", "image": {"bytes": b"picture"}}
    pq.write_table(pa.Table.from_pylist([row]), folder / "validation-00000-of-00001.parquet")
    pq.write_table(pa.table({"question_id": [1]}), folder / "test-00000-of-00001.parquet")
    tested = VqaV2(questions=str(folder))
    assert tested.requests()[0].images == (Media(bytes=b"picture"),)
    assert tested.score({"42000": "yes"}).metrics["official/accuracy"].value == 1
    row = {"question_id": "VizWiz_val_0", "question": "What?", "answers": YES, "category": "other"}
    row |= {"image": {"bytes": b"picture", "path": None}}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "val.parquet")
    suite = VizWiz(data=str(tmp_path / "val.parquet")).score({"VizWiz_val_0": "yes"})
    assert suite.metrics["official/accuracy/other"].value == 1


def test_one_without_an_image_folder_is_told(tmp_path: Path):
    tested = vqav2(tmp_path).model_copy(update={"images": None})
    with pytest.raises(DataError, match="Give images"):
        tested.requests()


@pytest.mark.parametrize(
    ("asked", "annotated", "said"),
    [
        ({"questions": {}}, {}, "questions: is wrong"),
        ({"questions": []}, {}, "holds no question"),
        ({"questions": [7]}, {}, "row 1: is wrong"),
        ({"data_subtype": None}, {}, "has no data_subtype"),
        ({"questions": [{"question_id": 1, "image_id": 2}]}, {}, "has no annotation"),
        ({"questions": [{"question_id": True, "image_id": 2}]}, {}, "question_id is wrong"),
        ({}, {"annotations": [{"question_id": 7000}] * 2}, "annotated twice; got 7000"),
        ({}, {"annotations": [{"question_id": id} for id in (42000, 42001, 7000)]}, "answers are"),
        ({}, {"annotations": None}, "annotations: is wrong"),
    ],
)
def test_malformed_files_are_named(tmp_path: Path, asked, annotated, said):
    with pytest.raises(DataError, match=said):
        vqav2(tmp_path, asked=asked, annotated=annotated).requests()


@pytest.mark.parametrize("answers", [[], YES[:9], [""] * 10, [1] * 10, None, [{"a": "x"}] * 10])
def test_ten_answers_are_wanted(tmp_path: Path, answers: Any):
    with pytest.raises(DataError, match=r"row 1: answers are wrong.*wanted 10 answers.*public"):
        textvqa(tmp_path, answers).requests()


def test_missing_files_are_named(tmp_path: Path):
    for tested in (
        VqaV2(questions=str(tmp_path / "a.json"), images=tmp_path),
        TextVqa(data=str(tmp_path / "a.json"), images=tmp_path),
        VizWiz(data=str(tmp_path / "a.json"), images=tmp_path),
    ):
        with pytest.raises(DataError, match=r"a\.json: is not there"):
            tested.requests()


def test_runs_are_compared(tmp_path: Path):
    """Rows hold what comparing needs: the tidied accuracy goes from 0 to 1, the official stays."""
    tested = vizwiz(tmp_path, ["dog 's"] * 10)
    for name, answer in (("a", "cat"), ("b", "dog's")):
        suite = tested.score({tested.load()[0].id: answer})
        (tmp_path / name).mkdir()
        (tmp_path / name / "items.jsonl").write_text(json.dumps(suite.items[0]) + "\n")
        told = {"key": suite.key, "benchmark": suite.benchmark, "items": "items.jsonl"}
        results = {"suites": [told | {"metrics": {}}]}
        (tmp_path / name / "results.json").write_text(json.dumps(results))
    found = {one.metric: one.difference for one in compare(tmp_path / "a", tmp_path / "b")}
    assert found == {"official/accuracy": 0, "strict/accuracy": 0, "tidied/accuracy": 1}


def test_a_recipe_names_them(tmp_path: Path):
    ours = [
        {"name": "vqav2", "questions": "q.json", "annotations": "a.json", "images": "x"},
        {"name": "textvqa", "data": "d.json", "images": "x"},
        {"name": "vizwiz", "data": "lmms-lab/VizWiz-VQA"},
        {"name": "gqa", "questions": "q.json", "images": "x"},
    ]
    recipe = {"name": "x", "model": {"path": "x"}, "output": "x", "benchmarks": ours}
    keys = [one.key for one in validate(recipe, EvalRecipe, "test").benchmarks]
    assert keys == ["vqav2", "textvqa", "vizwiz", "gqa"]
    assert set(keys) <= set(RULES)
