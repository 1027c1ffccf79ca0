"""Answers that a program checks: what metrics count, when answers are asked anew, the report."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evals.benchmarks.verifiable import MOST_CATEGORIES, VerifiableBench, metrics
from evals.compare import compare
from evals.config import EvalRecipe
from evals.report import ReportRecipe, collect
from evals.report_page import write
from evals.run import evaluate, rescore
from evals.stats import intervals, mean
from mmalign.config import load_config, validate
from mmalign.errors import ConfigError, DataError
from mmalign.generate.base import Generation
from mmalign.media import embed
from mmalign.records import Media, Origin, Verifiable, user
from mmalign.rewards import AccuracyReward, FormatReward, Rewards, Rollout
from mmalign.store import write_dataset
from mmalign.verify import Verifiers

ROOT = Path(__file__).resolve().parents[2]
GOOD = "<think> three and four </think> <answer> \\boxed{7} </answer>"


def row(name: str, **changes) -> Verifiable:
    values = {"id": name, "prompt": user("How much?"), "answer": "7", "verifier": "number"}
    return Verifiable(**(values | changes))


def bench(path: Path, rows: list[Verifiable], **settings) -> VerifiableBench:
    write_dataset(path, Verifiable, rows, builder="test")
    return VerifiableBench(data=path, **settings)


def said(text: str, *, finished: bool = True, num_tokens: int = 4) -> Generation:
    return Generation(id="", text=text, num_tokens=num_tokens, finished=finished)


CASES = {
    "good": said(GOOD, num_tokens=10),
    "wrong": said(GOOD.replace("7", "8")),
    "boxed": said("It is \\boxed{7}"),
    "no_answer": said("It is 7."),
    "cut": said(GOOD, finished=False),
    "unread": said(GOOD.replace("{7}", "{some}")),
    "two": said(GOOD + GOOD),
}


def test_what_each_metric_counts(tmp_path):
    suite = bench(tmp_path, [row(name) for name in [*CASES, "missing"]]).score(CASES)
    items = {item["id"]: item for item in suite.items}
    assert {name: item["correct"] for name, item in items.items()} == {
        "good": True, "wrong": False, "boxed": True, "no_answer": False, "cut": True,
        "unread": False, "two": True, "missing": False,
    }  # fmt: skip
    assert {name: item["form"] for name, item in items.items()} == {
        "good": "", "wrong": "", "boxed": "no_tags", "no_answer": "no_tags", "cut": "cut",
        "unread": "", "two": "two_thinks", "missing": "missing",
    }  # fmt: skip
    assert {name: item["reason"] for name, item in items.items()} == {
        "good": "correct", "wrong": "different", "boxed": "correct", "no_answer": "no_answer",
        "cut": "correct", "unread": "unread", "two": "correct", "missing": "missing",
    }  # fmt: skip
    assert {name: metric.value for name, metric in suite.metrics.items()} == pytest.approx(
        {
            "accuracy": 4 / 8,
            "format": 3 / 8,
            "no_answer": 2 / 8,
            "undecided": 1 / 8,
            "finished": 6 / 8,
            "response_tokens": (10 + 6 * 4) / 8,
        }
    )
    assert items["good"]["given"] == "7"
    assert items["missing"]["answer"] is None
    assert suite.num_unparsed == 2


def test_accuracy_and_format_are_the_rewards_of_training(tmp_path):
    suite = bench(tmp_path, [row(name) for name in CASES]).score(CASES)
    rollouts = [
        Rollout(id="0", row=row(name), text=made.text, num_tokens=1, finished=made.finished)
        for name, made in sorted(CASES.items())
    ]
    with Rewards([FormatReward(), AccuracyReward()], Verifiers()) as rewards:
        parts = [scored.parts for scored in rewards.score(rollouts)]
    assert [float(item["correct"]) for item in suite.items] == [one["accuracy"] for one in parts]
    assert [float(item["well_formed"]) for item in suite.items] == [one["format"] for one in parts]


def test_categories_are_those_of_the_rows_else_verifiers(tmp_path):
    def of(category: str) -> Origin:
        return Origin(detail=json.dumps({"category": category}))

    rows = [
        row("a", origin=of("sums")),
        row("b", origin=of("sums")),
        row("c", origin=of("counting")),
        row("d", verifier="exact"),
        row("e", origin=Origin(detail="no JSON")),
        row("f", origin=Origin(detail="[1]")),
    ]
    good = {name: said(GOOD) for name in "abde"} | {"b": said("?"), "c": said(GOOD)}
    found = {
        name: metric.value
        for name, metric in bench(tmp_path, rows).score(good).metrics.items()
        if "/" in name
    }
    assert found == {
        "accuracy/counting": 1.0,
        "accuracy/exact": 1.0,
        "accuracy/number": 1 / 2,
        "accuracy/sums": 1 / 2,
    }


def test_one_category_or_too_many_are_not_told_apart(tmp_path):
    item = bench(tmp_path, [row("a")]).score({"a": said(GOOD)}).items[0]
    assert not any("/" in name for name in metrics([item, item]))
    many = [item | {"category": str(n)} for n in range(MOST_CATEGORIES + 1)]
    assert not any("/" in name for name in metrics(many))
    assert sum("/" in name for name in metrics(many[:-1])) == MOST_CATEGORIES


def test_what_cannot_be_checked_is_told_before_a_model_is_loaded(tmp_path):
    with pytest.raises(DataError, match=r"1 of 2 rows cannot be checked, such as b: .*'seven-ish'"):
        bench(tmp_path / "bad", [row("a"), row("b", answer="seven-ish")]).requests()
    with pytest.raises(DataError, match="holds no question"):
        bench(tmp_path / "none", []).requests()
    with pytest.raises(DataError, match="no such dataset"):
        VerifiableBench(data=tmp_path / "absent").requests()
    with pytest.raises(DataError, match="answers are to questions it does not ask, such as z"):
        bench(tmp_path / "one", [row("a")]).score({"z": said(GOOD)})


def test_an_answer_that_hangs_the_verifier_is_undecided_and_nothing_else(tmp_path):
    pytest.importorskip("math_verify")
    rows = [row(name, verifier="math") for name in "ab"]
    made = {"a": said("\\boxed{9^{9^{9^{9}}}}"), "b": said("\\boxed{\\frac{14}{2}}")}
    suite = bench(tmp_path, rows, math_timeout_seconds=2).score(made)
    assert [item["correct"] for item in suite.items] == [False, True]
    assert [item["undecided"] for item in suite.items] == [True, False]
    assert suite.items[0]["reason"] in ("timeout", "crashed")


class Told:
    """Answers as it is told, and remembers how it was asked."""

    def __init__(self, name: str, answers: dict[str, Generation]) -> None:
        self.name, self.answers, self.asked = name, answers, []

    def generate(self, requests, sampling):
        self.asked += [(request.id, sampling.temperature, sampling.seed) for request in requests]
        made = [(r.id, self.answers[r.id.partition("/")[0]]) for r in requests]
        return [
            Generation(id=id, text=m.text, num_tokens=m.num_tokens, finished=m.finished)
            for id, m in made
        ]


@pytest.fixture
def recipe(tmp_path):
    """Twelve questions about six pictures, kept in the rows; a greedy and a sampled suite."""
    pixels = np.random.default_rng(0).integers(0, 255, (6, 8, 8, 3), dtype=np.uint8)
    pictures = [embed(Image.fromarray(one)) for one in pixels]
    rows = [
        row(f"{name}/{n}", prompt=user("How much?", images=1), images=(pictures[n % 6],))
        for n, name in enumerate(["good", "wrong"] * 6)
    ]
    write_dataset(tmp_path / "data", Verifiable, rows, builder="test")

    def make(name: str, **decoding) -> EvalRecipe:
        sampled = {"temperature": 1.0, "seed": 0} | decoding
        suites = [{"split": "greedy"}, {"split": "sampled", "decoding": sampled}]
        data = {
            "name": name,
            "model": {"path": "none/such"},
            "output": str(tmp_path / name),
            "bootstrap_samples": 100,
            "benchmarks": [
                {"name": "verifiable", "data": str(tmp_path / "data"), **suite} for suite in suites
            ],
        }
        return validate(data, EvalRecipe, "test")

    return make


def test_answers_are_sampled_as_told_and_asked_anew_where_that_changes(recipe, tmp_path):
    told = Told("told", CASES)
    folder = evaluate(recipe("run"), told)
    assert sorted({(t, seed) for _, t, seed in told.asked}) == [(0.0, 0), (1.0, 0)]
    assert len(told.asked) == 24
    results = (folder / "results.json").read_text()
    told.asked.clear()
    evaluate(recipe("run"), told)
    assert told.asked == []
    assert (folder / "results.json").read_text() == results
    rescore(folder, recipe("run"))
    assert (folder / "results.json").read_text() == results
    evaluate(recipe("run", seed=1), told)
    assert {(t, seed) for _, t, seed in told.asked} == {(1.0, 1)}
    assert len(told.asked) == 12


def test_intervals_draw_the_questions_of_a_picture_together(recipe):
    """Pictures are all right or all wrong: the interval is of six, not of twelve."""
    folder = evaluate(recipe("run"), Told("told", CASES))
    suite = json.loads((folder / "results.json").read_text())["suites"][0]
    assert suite["metrics"]["accuracy"] == 0.5
    alone = intervals({"accuracy": mean([1] * 3 + [0] * 3)}, samples=100)["accuracy"]
    assert suite["intervals"]["accuracy"] == list(alone)


def test_two_runs_are_compared_and_reported_with_responses_to_read(recipe, tmp_path):
    a = evaluate(recipe("base"), Told("base", CASES))
    b = evaluate(recipe("better"), Told("better", CASES | {"wrong": said(GOOD)}))
    found = {c.metric: c for c in compare(a, b, suites=["verifiable-greedy"])}
    assert {name: one.test for name, one in found.items()} == {
        "accuracy": "mcnemar", "format": "mcnemar", "no_answer": "bootstrap",
        "undecided": "bootstrap", "finished": "bootstrap", "response_tokens": "bootstrap",
    }  # fmt: skip
    assert (found["accuracy"].a, found["accuracy"].b) == (0.5, 1.0)
    assert found["accuracy"].p_value == 2 / 2**6
    assert found["format"].p_value == 1.0
    report = {"output": str(tmp_path / "report"), "base": str(a), "gallery": 4}
    report["runs"] = [{"name": "better", "eval": str(b)}]
    page = write(collect(validate(report, ReportRecipe, "test"))).read_text()
    assert "Verifiable greedy" in page
    # Four cards in each of two suites, with the rows' own pictures.
    assert page.count("data:image/") == 8
    assert "base · different, in form" in page
    assert "better · right, in form" in page
    assert "\\boxed{8}" in page


def test_a_report_without_the_dataset_still_shows_responses(recipe, tmp_path):
    a = evaluate(recipe("base"), Told("base", CASES))
    b = evaluate(recipe("better"), Told("better", CASES))
    (tmp_path / "data").rename(tmp_path / "moved")
    report = {"output": str(tmp_path / "report"), "base": str(a)}
    report["runs"] = [{"name": "better", "eval": str(b)}]
    page = write(collect(validate(report, ReportRecipe, "test"))).read_text()
    assert "base · different, in form" in page
    assert "data:image/" not in page


def test_a_picture_that_cannot_be_read_leaves_its_question_wrong(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "there.png")
    rows = [
        row(name, prompt=user("?", images=1), images=(Media(path=f"{name}.png"),))
        for name in ("lost", "there")
    ]
    write_dataset(tmp_path / "data", Verifiable, rows, media_root=str(tmp_path))

    class Opens(Told):
        def generate(self, requests, sampling):
            from mmalign.media import open_image

            for request in requests:
                open_image(request.images[0], request.media_root)
            return super().generate(requests, sampling)

    data = {"name": "verifiable", "data": str(tmp_path / "data")}
    recipe = {"name": "x", "model": {"path": "x"}, "output": str(tmp_path / "out")}
    made = validate(recipe | {"benchmarks": [data]}, EvalRecipe, "test")
    folder = evaluate(made, Opens("opens", {"there": said(GOOD), "lost": said(GOOD)}))
    (suite,) = json.loads((folder / "results.json").read_text())["suites"]
    assert suite["num_missing"] == 1
    assert suite["metrics"]["accuracy"] == 0.5


def test_two_suites_need_names_of_their_own(recipe, tmp_path):
    one = {"name": "verifiable", "data": str(tmp_path)}
    data = {"name": "x", "model": {"path": "x"}, "output": "x", "benchmarks": [one, one]}
    with pytest.raises(ConfigError, match="verifiable appears twice; give each a split"):
        validate(data, EvalRecipe, "test")


def test_it_loads_no_torch():
    code = "import sys, evals.benchmarks.verifiable, evals.run; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("name", ["eval/verifiable", "lab/sums_eval"])
def test_the_shipped_recipes_measure_format_as_sampled(name):
    recipe = load_config(ROOT / f"configs/{name}.yaml", EvalRecipe)
    sampled = [one for one in recipe.benchmarks if one.decoding.temperature == 1.0]
    assert {one.key.split("-")[1] for one in sampled} == {"test", "ood"}
