"""VideoHallucer: which pairs count, by hand, under both readings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evals.benchmarks.video_hallucer import VideoHallucer
from evals.compare import compare
from evals.config import EvalRecipe
from evals.report import ReportRecipe, collect
from evals.report_page import write as write_report
from evals.run import evaluate
from mmalign.config import validate
from mmalign.errors import DataError
from mmalign.generate.base import Generation
from mmalign.records import Media


def pair(clip: str = "a.mp4", other: str | None = None) -> dict[str, Any]:
    return {
        "basic": {"video": clip, "question": "A bird?", "answer": "yes"},
        "hallucination": {"video": other or clip, "question": "A crow?", "answer": "No"},
        "type": "subject",
    }


def write(root: Path, **subsets: Any) -> VideoHallucer:
    for name, pairs in subsets.items():
        (root / name).mkdir(exist_ok=True)
        (root / name / f"{name}.json").write_text(json.dumps(pairs))
    return VideoHallucer.model_validate({"videos": root, "subsets": list(subsets)})


@pytest.fixture
def bench(tmp_path: Path) -> VideoHallucer:
    """Two subsets of different size: three pairs and one."""
    three = [pair(), pair("b.mp4"), pair("c.mp4", "d.mp4")]
    return write(tmp_path, temporal=three, object_relation=[pair("e.mp4")])


def answers(*pairs: tuple[str, str]) -> dict[str, str]:
    names = ["temporal/1", "temporal/2", "temporal/3", "object_relation/1"]
    return {
        f"{name}/{side}": text
        for name, both in zip(names, pairs, strict=False)
        for side, text in zip(("basic", "hallucination"), both, strict=True)
    }


def values(bench: VideoHallucer, given: dict[str, str]) -> dict[str, float]:
    return {name: metric.value for name, metric in bench.score(given).metrics.items()}


def test_an_answer_is_not_cut_short(bench: VideoHallucer):
    """The official rule reads more than its beginning."""
    assert bench.max_new_tokens == 1024


def test_each_question_is_asked_about_its_own_clip(bench: VideoHallucer):
    asked = bench.requests()
    assert [request.id for request in asked[4:]] == [
        "temporal/3/basic",
        "temporal/3/hallucination",
        "object_relation/1/basic",
        "object_relation/1/hallucination",
    ]
    assert asked[5].videos == (Media(path="temporal/videos/d.mp4"),)
    assert asked[5].media_root == bench.videos
    assert asked[5].prompt[0].content[-1].text == (
        "A crow?\nAnswer the question using 'yes' or 'no'."
    )


def test_scores_are_means_over_subsets(bench: VideoHallucer):
    """Temporal: basic 2/3, hallucinated 2/3, both 1/3. Object-relation: 1, 0, 0."""
    found = values(bench, answers(("Yes.", "No."), ("yes", "yes"), ("no", "no"), ("Yes", "Yes")))
    for reading in ("official", "strict"):
        assert found[f"{reading}/basic"] == pytest.approx((2 / 3 + 1) / 2)
        assert found[f"{reading}/hallucination"] == pytest.approx((2 / 3 + 0) / 2)
        assert found[f"{reading}/accuracy"] == pytest.approx((1 / 3 + 0) / 2)
    assert found["official/accuracy/temporal"] == pytest.approx(1 / 3)
    assert found["official/accuracy/object_relation"] == 0
    # Five of eight answers say yes, four questions are to be answered so; two of three wrong ones.
    assert found["yes_difference"] == pytest.approx(1 / 8)
    assert found["false_positive"] == pytest.approx(2 / 3)
    assert found["unparsed_rate"] == 0


def test_facts_are_the_mean_of_both_questions(tmp_path: Path):
    """Three pairs, every answer no: basic 2/3, hallucinated 1/3, no pair has both."""
    facts = pair()
    facts["basic"]["answer"] = "no"
    bench = write(tmp_path, fact_detect=[facts] * 3)
    assert bench.requests()[0].videos == (Media(path="fact_detect/videos/a.mp4"),)
    texts = [("No.", "yes"), ("yes", "No"), ("no", "Yes")]
    given = {
        f"fact_detect/{number}/{side}": text
        for number, both in enumerate(texts, start=1)
        for side, text in zip(("basic", "hallucination"), both, strict=True)
    }
    found = values(bench, given)
    for reading in ("official", "strict"):
        assert found[f"{reading}/basic"] == pytest.approx(2 / 3)
        assert found[f"{reading}/fact_score"] == pytest.approx((2 / 3 + 1 / 3) / 2)
        assert found[f"{reading}/accuracy"] == 0
    # Three of six answers say yes, where none should.
    assert found["yes_difference"] == 0.5
    # Beside other subsets it is still of its own questions.
    both = write(tmp_path, fact_detect=[facts] * 3, temporal=[pair()])
    assert values(both, given)["official/fact_score"] == pytest.approx(1 / 2)
    assert "official/fact_score" not in values(write(tmp_path, temporal=[pair()]), {})


@pytest.mark.parametrize(
    ("basic", "hallucinated", "official", "strict"),
    [
        ("YES!", "no", True, True),
        ("I think yes or no", "yes and no", True, False),
        ("eyes", "nope", False, False),
        ("yes_", "no", False, False),
        ("", "", False, False),
        ("The answer is yes.", "The answer is no.", True, True),
        ("There is a bird, yes", "There is no crow", True, False),
        ("<b>yes</b>", "<script>no</script>", True, False),
    ],
)
def test_what_either_reading_takes_for_right(tmp_path, basic, hallucinated, official, strict):
    found = values(
        write(tmp_path, temporal=[pair()]),
        {"temporal/1/basic": basic, "temporal/1/hallucination": hallucinated},
    )
    assert (found["official/accuracy"], found["strict/accuracy"]) == (official, strict)


def test_missing_answers_are_wrong_and_unknown_ones_refused(bench: VideoHallucer):
    suite = bench.score({"temporal/1/basic": "yes"})
    assert suite.metrics["official/basic"].value == pytest.approx((1 / 3 + 0) / 2)
    assert suite.metrics["official/accuracy"].value == 0
    assert suite.num_unparsed == 7
    assert values(bench, {})["false_positive"] == 0
    assert values(bench, answers(*[("yes", "no")] * 4))["false_positive"] == 0
    with pytest.raises(DataError, match="temporal/9/basic"):
        bench.score({"temporal/9/basic": "yes"})


def test_pairs_about_one_clip_are_drawn_together(tmp_path: Path):
    rows = write(tmp_path, temporal=[pair(), pair("a.mp4", "b.mp4"), pair("b.mp4")]).score({}).items
    assert [row["cluster"] for row in rows[::2]] == [f"temporal/{n}.mp4" for n in "aab"]
    assert len({row["group"] for row in rows}) == 3


def test_limit_keeps_pairs_whole(bench: VideoHallucer):
    limited = bench.model_copy(update={"limit": 3})
    assert len(limited.requests()) == 4


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([{"basic": pair()["basic"]}], "pair 1, hallucination: is wrong; got NoneType"),
        ([pair(), {**pair(), "basic": {"video": "a", "question": "b"}}], "pair 2, basic: field an"),
        ([{**pair(), "basic": {"video": "a", "question": "b", "answer": "maybe"}}], "got maybe"),
        ({}, "wanted a list"),
        ([], "holds no question"),
        (["text"], "pair 1: is wrong; got str; wanted an object"),
    ],
)
def test_malformed_files_are_named(tmp_path: Path, content: Any, said: str):
    with pytest.raises(DataError, match=said):
        write(tmp_path, temporal=content).requests()


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(DataError, match=r"temporal\.json: cannot be read"):
        VideoHallucer(videos=tmp_path, subsets=("temporal",)).requests()
    write(tmp_path, temporal=[pair()])
    with pytest.raises(DataError, match=r"interaction.json: is not there.*subsets: \[temporal\]"):
        VideoHallucer(videos=tmp_path, subsets=("temporal", "interaction")).requests()


class Told:
    """Answers as it is told."""

    name = "told"

    def __init__(self, answers: dict[str, str]) -> None:
        self.answers = answers

    def generate(self, requests, sampling):
        return [
            Generation(id=one.id, text=self.answers[one.id], num_tokens=1, finished=True)
            for one in requests
        ]


def test_a_recipe_is_run_compared_and_reported(
    bench: VideoHallucer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    runs = {"base": answers(*[("yes", "yes")] * 4), "good": answers(*[("yes", "no")] * 4)}
    for name, given in runs.items():
        (tmp_path / "clips").mkdir(exist_ok=True)
        recipe = {
            "name": name,
            "model": {"path": name},
            "output": str(tmp_path / name),
            "benchmarks": [bench.model_dump(mode="json")],
        }
        evaluate(validate(recipe, EvalRecipe, "test"), Told(given))
    found = {one.metric: one for one in compare(tmp_path / "base", tmp_path / "good")}
    assert found["official/accuracy"].difference == pytest.approx(1)
    # A mean over subsets weighs its pairs, which McNemar's test does not.
    assert found["official/accuracy"].test == "bootstrap"
    assert found["official/basic"].p_value == 1
    assert found["yes_difference"].difference == pytest.approx(-0.5)
    told = {"output": "report", "base": "base", "runs": [{"name": "good", "eval": "good"}]}
    monkeypatch.chdir(tmp_path)
    page = write_report(collect(validate(told, ReportRecipe, "test")))
    assert "both right, strict" in (page.parent / "report.md").read_text()
