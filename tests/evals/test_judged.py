"""Benchmarks with a judge: what it is asked, how its replies are read, what is kept and told."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from evals.benchmarks.mmhal import MmHal
from evals.compare import compare
from evals.config import EvalRecipe
from evals.judging import VERDICTS, Judge, Judged
from evals.run import evaluate, rescore
from mmalign.config import validate
from mmalign.errors import ConfigError, DataError, ModelError
from mmalign.generate.base import Generation, Request, Sampling
from mmalign.generate.budget import BudgetReached

ANSWERS = {"1": "Two cats.", "2": "A red {reference} car.", "3": "Rating: 6 <script>"}


def data(folder: Path) -> Path:
    rows = [
        {
            "image_id": str(n),
            "image_src": f"https://example.org/photos/{n}.jpg",
            "image_content": ["Cat", "Sofa"],
            "question": f"What is in picture {n}?",
            "question_type": kind,
            "gt_answer": f"The truth of {n}.",
        }
        for n, kind in enumerate(["attribute", "counting", "attribute"], start=1)
    ]
    file = folder / "response_template.json"
    file.write_text(json.dumps(rows))
    return file


def recipe(folder: Path, url: str = "http://127.0.0.1:9/v1", **judge: Any) -> EvalRecipe:
    (folder / "images").mkdir(exist_ok=True)
    server = {"model": "judge-1", "base_url": url, "backoff_seconds": 0.01, "max_retries": 0}
    return validate(
        {
            "name": "base",
            "model": {"path": "nothing"},
            "output": str(folder / "out"),
            "benchmarks": [
                {"name": "mmhal", "data": str(data(folder)), "images": str(folder / "images")}
            ],
            "judge": {"server": server | judge.pop("server", {}), **judge},
            "bootstrap_samples": 50,
        },
        EvalRecipe,
        "test",
    )


class Told:
    """A model that gives the answers it was told."""

    name = "told"

    def __init__(self, given: dict[str, str]) -> None:
        self.given = given

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Generation]:
        return [
            Generation(id=one.id, text=self.given[one.id], num_tokens=2, finished=True)
            for one in requests
        ]


def by_question(replies: dict[str, str | list[str]]) -> Callable[[dict[str, Any], int], dict]:
    """A script that replies by the number of the picture; a list is given one by one."""
    counts: dict[str, int] = {}

    def script(body: dict[str, Any], number: int) -> dict[str, Any]:
        text = body["messages"][-1]["content"]
        which = next(n for n in replies if f"picture {n}?" in text)
        reply = replies[which]
        counts[which] = counts.get(which, -1) + 1
        return {"text": reply if isinstance(reply, str) else reply[counts[which]]}

    return script


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())["suites"][0]


def test_points_are_counted_by_hand(tmp_path: Path, scripted):
    """6, 2 and a prose reply: official (6 + 2 + 0) / 3, strictly (6 + 2) / 2."""
    scripted.script = by_question({"1": "Fine.\nRating: 6", "2": "No. Rating: 2", "3": "Lovely!"})
    done = evaluate(recipe(tmp_path, scripted.url, tries=1), Told(ANSWERS))
    metrics = results(done)["metrics"]
    assert metrics["official/points"] == pytest.approx(8 / 3)
    assert metrics["official/hallucination_rate"] == pytest.approx(2 / 3)
    # "No. Rating: 2" is no line of its own: the official rule alone reads it.
    assert metrics["strict/points"] == 6
    assert metrics["strict/hallucination_rate"] == 0
    assert metrics["unjudged_rate"] == pytest.approx(2 / 3)
    assert metrics["official/points/attribute"] == 3
    assert metrics["official/points/counting"] == 2


def test_a_reply_without_a_verdict_is_asked_for_again(tmp_path: Path, scripted):
    good = "Rating: 4"
    scripted.script = by_question(
        {"1": ["Hm.", "Rating: 1\nRating: 2", good], "2": good, "3": good}
    )
    done = evaluate(recipe(tmp_path, scripted.url), Told(ANSWERS))
    assert results(done)["metrics"]["official/points"] == 4
    assert len(scripted.bodies) == 5
    assert results(done)["judge"]["replies"] == 5


def test_verdicts_are_kept_and_asked_for_once(tmp_path: Path, scripted):
    scripted.script = by_question(dict.fromkeys("123", "Rating: 5"))
    plan = recipe(tmp_path, scripted.url)
    done = evaluate(plan, Told(ANSWERS))
    first = (done / "results.json").read_bytes()
    scripted.script = lambda body, number: {"status": 500}
    assert evaluate(plan, Told(ANSWERS)) == done
    assert rescore(done, plan) == done
    assert (done / "results.json").read_bytes() == first
    assert len(scripted.bodies) == 3


def test_the_same_answer_to_the_same_question_is_judged_once(tmp_path: Path, scripted):
    scripted.script = by_question({"1": "Rating: 5", "3": "Rating: 2"})
    plan = recipe(tmp_path, scripted.url)
    file = tmp_path / "response_template.json"
    rows = json.loads(file.read_text())
    file.write_text(json.dumps([rows[0], rows[0] | {"image_id": "2"}, rows[2]]))
    done = evaluate(plan, Told({"1": "ok", "2": "ok", "3": "ok"}))
    assert len(scripted.bodies) == results(done)["judge"]["replies"] == 2
    assert results(done)["metrics"]["official/points"] == 4
    first = (done / "results.json").read_bytes()
    assert (rescore(done, plan) / "results.json").read_bytes() == first


def test_a_verdict_that_was_cut_short_is_asked_for_again_and_swallows_none(
    tmp_path: Path, scripted
):
    scripted.script = by_question(dict.fromkeys("123", "Rating: 5"))
    plan = recipe(tmp_path, scripted.url)
    path = evaluate(plan, Told(ANSWERS)) / VERDICTS
    whole = path.read_text()
    path.write_text(whole[:-20])
    cut = path.read_bytes()
    assert plan.judge is not None
    Judge(plan.judge, plan.output)
    assert path.read_bytes() == cut
    evaluate(plan, Told(ANSWERS))
    assert path.read_text() == whole


def test_a_judge_s_budget_counts_by_the_ledger_it_is_given(tmp_path: Path, scripted):
    scripted.script = by_question(dict.fromkeys("123", "Rating: 5"))
    with pytest.raises(BudgetReached, match="max_requests is reached"):
        evaluate(recipe(tmp_path, scripted.url, server={"max_requests": 2}), Told(ANSWERS))
    assert len(scripted.bodies) == 2


def test_another_judge_or_answer_is_another_verdict(tmp_path: Path, scripted):
    scripted.script = by_question(dict.fromkeys("123", "Rating: 5"))
    evaluate(recipe(tmp_path, scripted.url), Told(ANSWERS))
    evaluate(recipe(tmp_path, scripted.url, server={"model": "judge-2"}), Told(ANSWERS))
    assert len(scripted.bodies) == 6
    evaluate(recipe(tmp_path, scripted.url, server={"temperature": 0.5}), Told(ANSWERS))
    assert len(scripted.bodies) == 9
    (tmp_path / "out" / "answers.jsonl").unlink()
    evaluate(recipe(tmp_path, scripted.url), Told(ANSWERS | {"1": "One cat."}))
    assert len(scripted.bodies) == 10


def test_repeats_show_the_judge_s_own_variance(tmp_path: Path, scripted):
    """Means 5 and 4 over two repeats: a deviation of sqrt(1/2); one answer of three differs."""
    same = ["Rating: 5", "Rating: 5"]
    scripted.script = by_question({"1": ["Rating: 5", "Rating: 2"], "2": same, "3": same})
    done = evaluate(recipe(tmp_path, scripted.url, repeats=2), Told(ANSWERS))
    told = results(done)["judge"]
    assert told["scores"] == [5, 4]
    assert told["standard_deviation"] == pytest.approx(0.5**0.5)
    assert results(done)["metrics"]["judge_disagreement"] == pytest.approx(1 / 3)
    assert results(done)["metrics"]["official/points"] == pytest.approx(4.5)
    # The first answer was hallucinated in one of two verdicts.
    assert results(done)["metrics"]["official/hallucination_rate"] == pytest.approx(1 / 6)
    assert len({body["seed"] for body in scripted.bodies}) == 6


def test_cost_is_of_the_tokens_that_were_paid(tmp_path: Path, scripted):
    scripted.script = lambda body, number: {"text": "Rating: 5", "tokens": (1000, 10)}
    prices = {"price_prompt": 2.0, "price_completion": 50.0}
    done = evaluate(recipe(tmp_path, scripted.url, server=prices), Told(ANSWERS))
    told = results(done)["judge"]
    assert (told["prompt_tokens"], told["completion_tokens"]) == (3000, 30)
    assert told["cost"] == pytest.approx(3000 * 2e-6 + 30 * 50e-6)


def test_a_server_that_falls_silent_keeps_what_it_said(tmp_path: Path, scripted):
    def silent(body: dict[str, Any], number: int) -> dict[str, Any]:
        asked = body["messages"][-1]["content"]
        return {"text": "Rating: 5"} if "picture 1?" in asked else {"status": 500}

    scripted.script = silent
    with pytest.raises(ModelError, match="not answered"):
        evaluate(recipe(tmp_path, scripted.url, server={"concurrency": 1}), Told(ANSWERS))
    assert len((tmp_path / "out" / VERDICTS).read_text().splitlines()) == 1
    assert not (tmp_path / "out" / "results.json").exists()
    scripted.script = by_question({"2": "Rating: 5", "3": "Rating: 5"})
    with open(tmp_path / "out" / VERDICTS, "a") as file:
        file.write('{"key": "cut sh')
    done = rescore(tmp_path / "out", recipe(tmp_path, scripted.url))
    assert results(done)["metrics"]["official/points"] == 5


def test_what_a_judge_said_before_it_refused_is_not_paid_for_twice(tmp_path: Path, scripted):
    scripted.script = lambda body, n: {"text": "Rating: 5"} if n == 1 else {"status": 401}
    with pytest.raises(ModelError, match="status 401"):
        evaluate(recipe(tmp_path, scripted.url, server={"concurrency": 1}), Told(ANSWERS))
    asked = len(scripted.bodies)
    scripted.script = lambda body, number: {"text": "Rating: 5"}
    done = evaluate(recipe(tmp_path, scripted.url), Told(ANSWERS))
    assert results(done)["metrics"]["official/points"] == 5
    assert len(scripted.bodies) == asked + 2


def test_the_answer_stands_between_marks_that_it_cannot_know(tmp_path: Path):
    bench = MmHal(data=str(data(tmp_path)), images=tmp_path)
    asked = {one.id: one.prompt[0].content[-1].text for one in bench.verdict_requests(ANSWERS)}
    code = asked["2"].partition("[BEGIN question ")[2].partition("]")[0]
    assert f"[BEGIN answer to be judged {code}]\nA red {{reference}} car.\n[END" in asked["2"]
    assert "The truth of 2." in asked["2"]
    assert "Cat, Sofa" in asked["2"]
    assert code not in asked["3"]
    assert not bench.verdict_requests(ANSWERS)[0].images


def test_the_judge_sees_the_picture_where_it_shall(tmp_path: Path):
    bench = MmHal(data=str(data(tmp_path)), images=tmp_path, judge_sees="picture")
    assert bench.key == "mmhal-picture"
    (first, *_) = bench.verdict_requests(ANSWERS)
    assert first.images == bench.requests()[0].images
    assert first.images[0].path == "1.jpg"


def test_a_prompt_of_one_s_own_is_filled_and_checked(tmp_path: Path):
    file = tmp_path / "prompt.txt"
    bench = MmHal(data=str(data(tmp_path)), judge_prompt=file)
    with pytest.raises(ConfigError, match=r"prompt.txt: cannot be read"):
        bench.verdict_requests(ANSWERS)
    file.write_text("{question} / {contents} / {reference} / {answer}")
    (first, second, _) = bench.verdict_requests(ANSWERS)
    assert first.prompt[0].content[-1].text == (
        "What is in picture 1? / Cat, Sofa / The truth of 1. / Two cats."
    )
    assert second.prompt[0].content[-1].text.endswith(" / A red {reference} car.")
    file.write_text("{question}")
    with pytest.raises(ConfigError, match=r"has no place for the \{answer\}"):
        bench.verdict_requests(ANSWERS)
    file.write_text("{answer} {mood}")
    with pytest.raises(ConfigError, match=r"cannot be filled; got mood; wanted answer, code"):
        bench.verdict_requests(ANSWERS)


def test_an_unanswered_question_is_not_judged_and_has_no_points(tmp_path: Path):
    bench = MmHal(data=str(data(tmp_path)), images=tmp_path)
    assert [one.id for one in bench.verdict_requests({"2": "x"})] == ["2"]
    judged = Judged(texts={"2": ["Rating: 6"]}, told={"model": "m"})
    metrics = bench.score({"2": "x"}, judged).metrics
    assert metrics["official/points"].value == 2
    assert metrics["official/hallucination_rate"].value == pytest.approx(2 / 3)
    assert metrics["strict/points"].value == 6


def test_a_recipe_without_its_judge_is_refused(tmp_path: Path):
    config = recipe(tmp_path).model_dump(mode="json", exclude={"judge"})
    with pytest.raises(ConfigError, match=r"mmhal takes a judge: give judge.server"):
        validate(config, EvalRecipe, "test")


def test_a_judge_that_cannot_be_asked_is_told_before_the_first_answer(tmp_path: Path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    plan = recipe(tmp_path, "https://judge.example.org/v1")
    with pytest.raises(ModelError, match="OPENAI_API_KEY is not set"):
        evaluate(plan, Told(ANSWERS))
    assert not (tmp_path / "out" / "answers.jsonl").exists()


def test_two_runs_are_compared(tmp_path: Path, scripted):
    scripted.script = by_question({"1": "Rating: 5", "2": "Rating: 5", "3": "Rating: 1"})
    a = evaluate(recipe(tmp_path, scripted.url), Told(ANSWERS))
    better = ANSWERS | {"3": "A sofa."}
    scripted.script = by_question(dict.fromkeys("123", "Rating: 5"))
    plan = recipe(tmp_path, scripted.url).model_copy(update={"output": tmp_path / "b"})
    b = evaluate(plan, Told(better))
    found = {one.metric: one.difference for one in compare(a, b, samples=50)}
    assert found["official/points"] == pytest.approx(4 / 3)
    assert found["official/hallucination_rate"] == pytest.approx(-1 / 3)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"image_content": "Cat"}, "row 1, image_content: is wrong; got str; wanted a list"),
        ({"gt_answer": None}, "row 1: field gt_answer is no text"),
        ({"image_src": 3}, "row 1: field image_src is no text"),
    ],
)
def test_malformed_rows_are_named(tmp_path: Path, change: dict[str, Any], told: str):
    rows = json.loads(data(tmp_path).read_text())
    (tmp_path / "bad.json").write_text(json.dumps([rows[0] | change]))
    with pytest.raises(DataError, match=told):
        MmHal(data=str(tmp_path / "bad.json")).requests()


def test_runs_of_different_judges_are_not_compared(tmp_path: Path, scripted):
    scripted.script = lambda body, number: {"text": "Rating: 5"}
    plan = recipe(tmp_path, scripted.url)
    a = evaluate(plan, Told(ANSWERS))
    assert compare(a, a, samples=20)
    file = tmp_path / "prompt.txt"
    file.write_text("{question} {contents} {reference} {answer}")
    judge = plan.judge
    assert judge is not None
    other = judge.model_copy(update={"server": judge.server.model_copy(update={"model": "j2"})})
    asked = plan.benchmarks[0].model_copy(update={"judge_prompt": file})
    for change, told in (({"judge": other}, "model, settings"), ({"benchmarks": [asked]}, "asked")):
        b = evaluate(plan.model_copy(update={"output": tmp_path / "b", **change}), Told(ANSWERS))
        with pytest.raises(DataError, match=f"judged differently: {told} of the judge differ"):
            compare(a, b, samples=20)
