"""LLaVA-Bench: what is asked, pairs of scores, and the relative score."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evals.benchmarks.llava_bench import LlavaBench, read_pair
from evals.compare import compare
from evals.judging import Judged
from mmalign.config import validate
from mmalign.errors import ConfigError, DataError

ANSWERS = {"0": "A hill.", "1": "It is {reference}.", "2": "10 10"}
QUESTIONS = [
    {"question_id": n, "image": f"00{image}.jpg", "text": f"Question {n}?", "category": kind}
    for n, image, kind in [(0, 1, "conv"), (1, 1, "detail"), (2, 2, "conv")]
]
CONTEXT = [
    {"id": "001", "image": "001.jpg", "caption": "Hi!"},
    {"id": "002", "image": "002.jpg", "caption": "Fruit on a table."},
]
# Not in the order of the questions.
REFERENCES = [{"question_id": n, "text": f"Truth {n}."} for n in (2, 0, 1)]
RULE = {
    f"{prefix}{kind}": {"role": "Assistant", "prompt": f"Rate {prefix}{kind}."}
    for prefix in ("", "llava_bench_")
    for kind in ("conv", "detail")
}


def lines(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def bench(folder: Path, **settings: Any) -> LlavaBench:
    files = {
        "questions": lines(folder / "questions.jsonl", QUESTIONS),
        "context": lines(folder / "context.jsonl", CONTEXT),
        "references": lines(folder / "answers_gpt4.jsonl", REFERENCES),
        "images": folder,
    }
    return validate(files | settings, LlavaBench, "test")


def asked(llava_bench: LlavaBench) -> dict[str, str]:
    return {one.id: one.prompt[0].content[-1].text for one in llava_bench.verdict_requests(ANSWERS)}


def test_scores_are_counted_by_hand(tmp_path: Path, judged: Callable[..., Any]):
    """Pairs (8, 6), (5, 4), and prose, -1 and -1: (6 + 4 - 1) / (8 + 5 - 1); strictly 10 / 13."""
    suite = judged(
        bench(tmp_path).model_dump(mode="json"),
        ANSWERS,
        {"Question 0": "8 6\nFine.", "Question 1": "5 4", "Question 2": "Both are fine."},
        tries=1,
    )
    metrics = suite["metrics"]
    assert metrics["official/relative_score"] == pytest.approx(9 / 12)
    assert metrics["strict/relative_score"] == pytest.approx(10 / 13)
    assert metrics["official/relative_score/conv"] == pytest.approx(5 / 7)
    assert metrics["official/relative_score/detail"] == pytest.approx(4 / 5)
    assert metrics["official/points"] == 3
    assert metrics["official/reference_points"] == 4
    assert metrics["unjudged_rate"] == pytest.approx(1 / 3)
    assert suite["judge"]["scores"] == [0.75]


def test_the_judge_is_asked_again_and_varies(tmp_path: Path, judged: Callable[..., Any]):
    """Two repeats: (10, 5) and (5, 5) for question 0, (10, 10) else: 25/30 and 25/25."""
    suite = judged(
        bench(tmp_path).model_dump(mode="json"),
        ANSWERS,
        {"Question 0": ["None.", "10 5", "5 5"], "Question 1": "10 10", "Question 2": "10 10"},
        repeats=2,
    )
    assert suite["judge"]["scores"] == [pytest.approx(25 / 30), 1.0]
    assert suite["judge"]["replies"] == 7
    # Item 0 has the means 7.5 and 5. Only the reference's score differs.
    assert suite["metrics"]["official/relative_score"] == pytest.approx(25 / 27.5)
    assert suite["metrics"]["judge_disagreement"] == pytest.approx(1 / 3)


def test_rows_are_enough_to_compare_runs(tmp_path: Path, judged: Callable[..., Any]):
    settings = bench(tmp_path).model_dump(mode="json")
    judged(settings, ANSWERS, {"Question": "10 5"})
    (tmp_path / "out").rename(tmp_path / "a")
    judged(settings, dict.fromkeys(ANSWERS, "Better."), {"Question": "10 8"})
    found = {one.metric: one for one in compare(tmp_path / "a", tmp_path / "out", samples=50)}
    assert found["official/relative_score"].difference == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("reply", "official", "strict"),
    [
        ("8 9", (8, 9), (8, 9)),
        ("8.5 9\nBecause", (8.5, 9), (8.5, 9)),
        ("8,9", (8, 9), (8, 9)),
        # The comma becomes a second blank, and the script counts three words.
        ("8, 9", None, (8, 9)),
        ("8 9 ", None, (8, 9)),
        ("\n8 9", None, (8, 9)),
        ("Scores:\n8 9", None, (8, 9)),
        ("8 9\n1 1", (8, 9), None),
        ("85 90", (85, 90), None),
        ("0 9", (0, 9), None),
        ("-1 -1", (-1, -1), None),
        ("nan 9", None, None),
        ("8", None, None),
        ("eight nine", None, None),
        ("", None, None),
    ],
)
def test_replies(reply: str, official: tuple[float, float] | None, strict: Any):
    assert read_pair(reply, "official") == official
    assert read_pair(reply, "strict") == strict


def test_the_judge_sees_the_reference_first(tmp_path: Path):
    texts = asked(bench(tmp_path))
    code = texts["1"].partition("[BEGIN question ")[2].partition("]")[0]
    assert f"[BEGIN description {code}]\nHi!\n[END" in texts["1"]
    assert f"[BEGIN answer 1 {code}]\nTruth 1.\n[END" in texts["1"]
    assert f"[BEGIN answer 2 {code}]\nIt is {{reference}}.\n[END" in texts["1"]
    assert "Truth 2." in texts["2"]


def test_the_released_rules_are_asked_as_released(tmp_path: Path):
    (tmp_path / "rule.json").write_text(json.dumps(RULE))
    texts = asked(bench(tmp_path, rule=tmp_path / "rule.json"))
    # The released script joins the letters of a caption by line breaks.
    assert texts["1"] == (
        "[Context]\nH\ni\n!\n\n[Question]\nQuestion 1?\n\n"
        "[Assistant 1]\nTruth 1.\n\n[End of Assistant 1]\n\n"
        "[Assistant 2]\nIt is {reference}.\n\n[End of Assistant 2]\n\n"
        "[System]\nRate llava_bench_detail.\n\n"
    )
    assert "Rate llava_bench_conv." in texts["2"]


def test_coco_s_context_holds_captions_and_boxes(tmp_path: Path):
    box = {"category": "dog", "bbox": [0.1, 0.2, 0.3, 0.4]}
    rows = [
        {"image": f"00{n}.jpg", "captions": ["A dog.", "It runs."], "instances": [box, box]}
        for n in (1, 2)
    ]
    (tmp_path / "rule.json").write_text(json.dumps(RULE))
    files = {"context": lines(tmp_path / "boxes.jsonl", rows), "rule": tmp_path / "rule.json"}
    told = "A dog.\nIt runs.\n\ndog: [0.1, 0.2, 0.3, 0.4]\ndog: [0.1, 0.2, 0.3, 0.4]\n"
    texts = asked(bench(tmp_path, **files))
    assert texts["1"].startswith(f"[Context]\n{told}\n[Question]\n")
    assert "[System]\nRate detail.\n" in texts["1"]
    assert told in asked(bench(tmp_path, context=files["context"]))["1"]


def test_a_prompt_of_one_s_own_has_the_context(tmp_path: Path):
    (tmp_path / "prompt.txt").write_text("{context} / {question} / {reference} / {answer}")
    texts = asked(bench(tmp_path, judge_prompt=tmp_path / "prompt.txt"))
    assert texts["0"] == "Hi! / Question 0? / Truth 0. / A hill."
    with pytest.raises(ConfigError, match="give rule or judge_prompt, not both"):
        bench(tmp_path, judge_prompt=tmp_path / "prompt.txt", rule=tmp_path / "rule.json")


def test_an_unanswered_question_counts_zero_beside_the_usual_reference(tmp_path: Path):
    """References 8 and 4, so 6 for the third; (8 + 2 + 0) / (8 + 4 + 6)."""
    judged = Judged(texts={"0": ["8 8"], "1": ["4 2"]}, told={})
    metrics = bench(tmp_path).score({"0": "x", "1": "y"}, judged).metrics
    assert metrics["official/relative_score"].value == pytest.approx(10 / 18)
    assert metrics["strict/relative_score"].value == pytest.approx(10 / 12)
    assert metrics["official/points"].value == pytest.approx(10 / 3)


@pytest.mark.parametrize(
    ("name", "rows", "told"),
    [
        ("questions", [QUESTIONS[0] | {"text": 1}], "line 1: field text is no text"),
        ("questions", [{"image": "001.jpg"}], "line 1: field question_id is missing"),
        ("questions", [QUESTIONS[0], QUESTIONS[0]], "two questions share an id; got 0"),
        ("questions", [], "holds no question"),
        ("context", CONTEXT[:1], "for .*line 3: has no line there; got 002.jpg"),
        ("context", [CONTEXT[0] | {"caption": 3}, CONTEXT[1]], "field caption is no text"),
        ("context", [{"image": "001.jpg", "captions": []}, CONTEXT[1]], "instances: is wrong"),
        ("references", REFERENCES[:2], "for .*line 2: has no line there; got 1"),
        ("references", [{"question_id": 0}], "line 1: field text is missing"),
    ],
)
def test_malformed_files_are_named(tmp_path: Path, name: str, rows: list, told: str):
    with pytest.raises(DataError, match=told):
        bench(tmp_path, **{name: lines(tmp_path / "bad.jsonl", rows)}).requests()


@pytest.mark.parametrize(
    ("rule", "told"),
    [
        ({}, "has no rule of this name; got llava_bench_conv"),
        ({"llava_bench_conv": 1}, "llava_bench_conv: is wrong"),
        ({"llava_bench_conv": {"role": "Assistant"}}, "field prompt is missing"),
        ([], "wanted an object"),
    ],
)
def test_rules_that_do_not_fit_are_named(tmp_path: Path, rule: Any, told: str):
    (tmp_path / "rule.json").write_text(json.dumps(rule))
    with pytest.raises(DataError, match=told):
        bench(tmp_path, rule=tmp_path / "rule.json").requests()
