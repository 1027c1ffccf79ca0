"""MM-Vet: what is asked, both readings of a reply, and scores by ability."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evals.benchmarks.mm_vet import MmVet
from evals.judging import Judged
from mmalign.errors import DataError

ROWS = {
    "v1_0": ("What is x?", "-1<AND>-5", ["ocr", "math"]),
    "v1_1": ("What is it?", "a cat<OR>a tabby", ["rec"]),
    "v1_2": ("Who is it?", "Ada", ["math", "ocr"]),
    "v1_3": ("Where is it?", "left", ["ocr"]),
}
ANSWERS = {"v1_0": "x = -1", "v1_1": "A tabby.", "v1_2": "No {reference}.", "v1_3": "1.0"}


def row(id: str) -> dict[str, Any]:
    question, answer, takes = ROWS[id]
    return {
        "imagename": f"{id}.png",
        "question": question,
        "answer": answer,
        "imagesource": "",
        "capability": takes,
    }


def bench(folder: Path, **settings: Any) -> MmVet:
    (folder / "mm-vet.json").write_text(json.dumps({id: row(id) for id in ROWS}))
    return MmVet(data=folder / "mm-vet.json", images=folder, **settings)


def test_scores_are_counted_by_hand(tmp_path: Path, judged: Callable[..., Any]):
    """0.5, 1.0, 0.2 by the official rule alone, and prose."""
    suite = judged(
        bench(tmp_path).model_dump(mode="json"),
        ANSWERS,
        {"x?": "0.5", "What is it?": "1.0\n", "Who": "0.2 for the name", "Where": "It is right."},
        tries=1,
    )
    metrics = suite["metrics"]
    assert metrics["official/score"] == pytest.approx(1.7 / 4)
    assert metrics["strict/score"] == 0.75
    assert metrics["unjudged_rate"] == 0.5
    assert metrics["official/score/ocr"] == pytest.approx(0.7 / 3)
    assert metrics["official/score/math"] == pytest.approx(0.7 / 2)
    assert metrics["official/score/rec"] == 1.0
    assert metrics["official/integration/math+ocr"] == pytest.approx(0.7 / 2)
    assert metrics["official/integration/ocr"] == 0.0
    assert suite["num_unparsed"] == 2
    assert suite["judge"]["scores"] == [pytest.approx(1.7 / 4)]


def test_runs_are_averaged_and_their_deviation_told(tmp_path: Path, judged: Callable[..., Any]):
    """The first question has 0.0 and 1.0, the others 1.0: means 0.75 and 1, (0.25)/sqrt(2)."""
    suite = judged(
        bench(tmp_path).model_dump(mode="json"),
        ANSWERS,
        {"x?": ["0.0", "1.0"], "is it?": "1.0"},
        repeats=2,
    )
    assert suite["metrics"]["official/score"] == pytest.approx(0.875)
    assert suite["metrics"]["judge_disagreement"] == 0.25
    assert suite["judge"]["scores"] == [0.75, 1.0]
    assert suite["judge"]["standard_deviation"] == pytest.approx(0.25 / 2**0.5)


def test_it_is_asked_again_while_the_official_reading_finds_no_number(
    tmp_path: Path, judged: Callable[..., Any]
):
    """The first is asked twice, the second once, though strict cannot read it, the others once."""
    suite = judged(
        bench(tmp_path).model_dump(mode="json"),
        ANSWERS,
        {"x?": ["1\nAll right.", "0.5"], "What is it?": ["0.2 or so", "1.0"], "": "0.0"},
        tries=2,
    )
    assert suite["judge"]["replies"] == 5
    assert suite["metrics"]["official/score"] == pytest.approx(0.7 / 4)
    assert suite["metrics"]["strict/score"] == pytest.approx(0.5 / 3)
    assert suite["metrics"]["unjudged_rate"] == 0.25


@pytest.mark.parametrize(
    ("reply", "official", "strict"),
    [
        ("0.5", 0.5, 0.5),
        ("1", 1.0, 1.0),
        ("\n0.5", 0.5, 0.5),
        # The script splits at blanks alone, so that a line break is part of the first word.
        ("0.5\nIt names one of two.", None, 0.5),
        ("0.5 | partly", 0.5, None),
        (" 0.5", None, 0.5),
        ("0.5\n0.6", None, None),
        ("1.5", None, None),
        ("-0.1", None, None),
        ("nan", None, None),
        ("Correctness: 0.5", None, None),
        ("", None, None),
    ],
)
def test_replies(tmp_path: Path, reply: str, official: float | None, strict: float | None):
    mm_vet = bench(tmp_path)
    question = mm_vet.load()[0]
    assert mm_vet.read_verdict(question, reply, "official") == official
    assert mm_vet.read_verdict(question, reply, "strict") == strict


def test_the_judge_is_told_what_joins_the_parts(tmp_path: Path):
    mm_vet = bench(tmp_path)
    asked = {one.id: one.prompt[0].content[-1].text for one in mm_vet.verdict_requests(ANSWERS)}
    assert "-1 <AND> -5" in asked["v1_0"]
    assert "a cat <OR> a tabby" in asked["v1_1"]
    assert "No {reference}." in asked["v1_2"]
    (first, *_) = mm_vet.requests()
    assert first.images[0].path == "v1_0.png"
    assert not mm_vet.verdict_requests(ANSWERS)[0].images


def test_the_released_prompt_takes_its_place(tmp_path: Path):
    (tmp_path / "prompt.txt").write_text("Examples.\n\n{question} | {reference} | {answer} | ")
    mm_vet = bench(tmp_path, judge_prompt=tmp_path / "prompt.txt")
    (first, *_) = mm_vet.verdict_requests(ANSWERS)
    assert first.prompt[0].content[-1].text == ("Examples.\n\nWhat is x? | -1 <AND> -5 | x = -1 | ")


def test_an_unanswered_question_scores_nothing(tmp_path: Path):
    judged = Judged(texts={"v1_1": ["1.0"]}, told={})
    metrics = bench(tmp_path).score({"v1_1": "A tabby."}, judged).metrics
    assert metrics["official/score"].value == 0.25
    assert metrics["strict/score"].value == 1.0
    assert metrics["unjudged_rate"].value == 0.75


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"answer": None}, "v1_0: field answer is no text"),
        ({"imagename": 1}, "v1_0: field imagename is no text"),
        ({"capability": "ocr"}, "v1_0, capability: is wrong; got str; wanted a list"),
        ({"capability": []}, "v1_0: names no capability"),
        ({"capability": [1]}, "v1_0: names no capability"),
    ],
)
def test_malformed_rows_are_named(tmp_path: Path, change: dict[str, Any], told: str):
    (tmp_path / "bad.json").write_text(json.dumps({"v1_0": row("v1_0") | change}))
    with pytest.raises(DataError, match=told):
        MmVet(data=tmp_path / "bad.json").requests()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[]", "got list; wanted an object"),
        ('{"v1_0": 1}', "got int; wanted an object"),
        ("{}", "holds no question"),
        ("{", "is not JSON"),
    ],
)
def test_files_of_another_kind_are_refused(tmp_path: Path, text: str, told: str):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(DataError, match=told):
        MmVet(data=tmp_path / "bad.json").requests()


def test_neither_key_nor_address_of_the_judge_is_written(
    tmp_path: Path, judged: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("OPENAI_API_KEY", "a-key-for-nobody")
    judged(bench(tmp_path).model_dump(mode="json"), ANSWERS, {"": "0.5"})
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {"results.json", "verdicts.jsonl"} <= {path.name for path in files}
    for path in files:
        assert [one for one in ("a-key", "127.0.0.1") if one in path.read_text()] == []
