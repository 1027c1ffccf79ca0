"""Answers that the official rule does not read, read by a judge on a loopback server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evals.compare import compare
from evals.config import EvalRecipe
from evals.report import ReportRecipe, collect
from evals.report_page import write
from evals.run import evaluate, rescore
from mmalign.config import validate
from mmalign.errors import ConfigError
from mmalign.generate.base import Generation

ANSWERS = {
    "1": "B",  # read by the rule, and right
    "2": "I think that it is the dog. Answer: A",  # the judge reads B, and is right
    "3": "Hard to say.",  # the judge finds no answer
    "4": "It may be the fish.",  # the judge gives no verdict in form
    "5": "A cat, clearly!",  # the judge reads A, which is wrong
}
REPLIES = {"2": "Answer: B", "3": "answer: none.", "4": "It gives the fish.", "5": "Answer: A"}


class Told:
    """A model that gives the answers it was told."""

    name = "told"

    def __init__(self, given: dict[str, str]) -> None:
        self.given = given

    def generate(self, requests, sampling):
        return [
            Generation(id=one.id, text=self.given[one.id], num_tokens=2, finished=True)
            for one in requests
        ]


def recipe(root: Path, url: str = "http://127.0.0.1:9/v1", **changes: Any) -> EvalRecipe:
    problem = {"choices": ["a cat", "a dog", "a fish"], "answer": 1, "hint": "", "image": None}
    problem |= {"subject": "natural science", "grade": "grade2", "lecture": "", "split": "test"}
    problems = {n: problem | {"question": f"What is number {n}?"} for n in ANSWERS}
    (root / "problems.json").write_text(json.dumps(problems))
    (root / "pid_splits.json").write_text(json.dumps({"test": list(ANSWERS)}))
    server = {"model": "j", "base_url": url, "backoff_seconds": 0.01, "max_retries": 0}
    data = {
        "name": "base",
        "model": {"path": "nothing"},
        "output": str(root / "out"),
        "benchmarks": [
            {"name": "science_qa", "data": str(root), "images": str(root), "judge_unread": True}
        ],
        "judge": {"server": server, "tries": 2},
        "bootstrap_samples": 50,
    }
    return validate(data | changes, EvalRecipe, "test")


def by_question(body: dict[str, Any], number: int) -> dict[str, Any]:
    asked = body["messages"][-1]["content"]
    which = next(n for n in ANSWERS if f"number {n}?" in asked)
    return {"text": REPLIES[which]}


def test_what_the_rule_does_not_read_the_judge_does(tmp_path: Path, scripted):
    """The rule alone has 1 of 5, with the judge 2 of 5; it leaves 4 unread, the judge 2."""
    scripted.script = by_question
    done = evaluate(recipe(tmp_path, scripted.url), Told(ANSWERS))
    (suite,) = json.loads((done / "results.json").read_text())["suites"]
    assert suite["metrics"]["official/accuracy"] == pytest.approx(1 / 5)
    assert suite["metrics"]["judged/accuracy"] == pytest.approx(2 / 5)
    assert suite["metrics"]["official/unparsed_rate"] == pytest.approx(4 / 5)
    assert suite["metrics"]["judged/unparsed_rate"] == pytest.approx(2 / 5)
    assert set(suite["intervals"]) == set(suite["metrics"])
    # Four answers were asked about, the one without a verdict twice.
    assert suite["judge"]["replies"] == len(scripted.bodies) == 5
    rows = [json.loads(line) for line in (done / suite["items"]).read_text().splitlines()]
    assert [row["judged"] for row in rows] == ["B", "B", None, None, "A"]
    assert [row["official"] for row in rows] == ["B", None, None, None, None]


def test_the_judge_is_not_shown_the_truth_and_the_response_stands_between_marks(
    tmp_path: Path, scripted
):
    scripted.script = by_question
    evaluate(recipe(tmp_path, scripted.url), Told(ANSWERS))
    (asked,) = [text for text in scripted.texts if "number 2?" in text]
    code = asked.partition("[BEGIN response ")[2].partition("]")[0]
    assert f"[BEGIN response {code}]\n{ANSWERS['2']}\n[END response {code}]" in asked
    assert asked.endswith("Answer: one of A, B, C, or none")


def test_verdicts_are_kept_and_runs_compared_and_reported(tmp_path: Path, scripted):
    scripted.script = by_question
    plan = recipe(tmp_path, scripted.url)
    a = evaluate(plan, Told(ANSWERS))
    first = (a / "results.json").read_bytes()
    asked = len(scripted.bodies)
    assert (rescore(a, plan) / "results.json").read_bytes() == first
    assert len(scripted.bodies) == asked
    b = evaluate(
        recipe(tmp_path, scripted.url, output=str(tmp_path / "b"), name="b"),
        Told(ANSWERS | {"3": "B", "5": "B"}),
    )
    found = {one.metric: one for one in compare(a, b, samples=50)}
    assert found["judged/accuracy"].difference == pytest.approx(2 / 5)
    assert found["judged/accuracy"].test == "mcnemar"
    told = {"base": str(a), "output": str(tmp_path / "r"), "runs": [{"name": "b", "eval": str(b)}]}
    write(collect(validate(told, ReportRecipe, "report")))
    assert "accuracy, judged" in (tmp_path / "r" / "report.md").read_text()


def test_of_repeats_the_reading_of_most_counts(tmp_path: Path, scripted):
    counts: dict[str, int] = {}

    def script(body: dict[str, Any], number: int) -> dict[str, Any]:
        asked = body["messages"][-1]["content"]
        counts[asked] = counts.get(asked, 0) + 1
        return {"text": f"Answer: {'BAA'[counts[asked] - 1]}"}

    scripted.script = script
    judge = recipe(tmp_path, scripted.url).judge
    assert judge is not None
    plan = recipe(tmp_path, scripted.url).model_copy(
        update={"judge": judge.model_copy(update={"repeats": 3})}
    )
    done = evaluate(plan, Told(ANSWERS))
    (suite,) = json.loads((done / "results.json").read_text())["suites"]
    rows = [json.loads(line) for line in (done / suite["items"]).read_text().splitlines()]
    assert [row["judged"] for row in rows] == ["B", "A", "A", "A", "A"]


def test_a_judge_is_needed(tmp_path: Path):
    with pytest.raises(ConfigError, match="science_qa takes a judge"):
        recipe(tmp_path, judge=None)


def test_without_it_nothing_is_asked_and_no_number_is_judged(tmp_path: Path):
    plan = recipe(tmp_path)
    bench = plan.benchmarks[0].model_copy(update={"judge_unread": False})
    done = evaluate(plan.model_copy(update={"benchmarks": [bench], "judge": None}), Told(ANSWERS))
    (suite,) = json.loads((done / "results.json").read_text())["suites"]
    assert not [name for name in suite["metrics"] if name.startswith("judged/")]
