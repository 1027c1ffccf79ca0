"""What holds for every benchmark, whatever it asks: a new one is added to small_files.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError
from small_files import FILES

from evals.config import AnyBenchmark
from evals.judged import JudgedBench
from evals.judging import Judged
from evals.known import RULES, is_number, title_of
from evals.reward_pairs import RewardPairs
from evals.stats import intervals
from mmalign.errors import DataError

HOSTILE = [
    "",
    "   \n\t",
    "<script>alert(1)</script></style><img src=x onerror=alert(2)>",
    "Yes. No. A. B. 3.14 \\boxed{",
    "\u2028{question} {answer} \\frac{1}{0} ((((",
    "no " * 5000,
    "\x00\ud7ff𝟘 नहीं",
]
# Benchmarks whose names are in capitals.
PLAIN = {"POPE", "CHAIR", "AMBER", "MME", "GQA", "MMMU", "MLVU"}
# These two score what only a model of ours gives, and have tests of their own.
APART = {"verifiable", "image_preference"}


def bench(name: str, root: Path) -> Any:
    kind: Any = TypeAdapter(AnyBenchmark)
    return kind.validate_python({"name": name, **FILES[name](root)})


def scored(tested: Any, answers: dict[str, str]) -> Any:
    if isinstance(tested, JudgedBench):
        replies = ["Lovely!", "Rating: 5"]
        texts = {one.id: replies for one in tested.verdict_requests(answers)}
        return tested.score(answers, Judged(texts=texts, told={"model": "m"}))
    if isinstance(tested, RewardPairs):
        reward = {"reward": 1.0, "critiques": [], "num_written": 0, "num_cut": 0}
        answers = {id: json.dumps(reward) for id in answers}
    return tested.score(answers)


def test_every_benchmark_has_rules_and_small_files():
    names = {one.model_fields["name"].default for one in get_args(get_args(AnyBenchmark)[0])}
    assert names | {"image_preference"} == set(RULES)
    assert names - APART == set(FILES)
    assert all(title_of(name) != name.upper() or name.upper() in PLAIN for name in names)


@pytest.fixture(params=FILES)
def tested(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    return bench(request.param, tmp_path)


def check(tested: Any, suite: Any) -> None:
    rules = RULES[tested.name]
    rows = json.loads(json.dumps(suite.items))
    assert rows
    for row in rows:
        assert {"id", "answer", *rules.read, *rules.same} <= row.keys()
        assert {"image", "video"} & row.keys()
    again = rules.metrics(rows)
    assert {n: m.value for n, m in again.items()} == {n: m.value for n, m in suite.metrics.items()}
    assert all(np.isfinite(metric.value) for metric in suite.metrics.values())
    for low, high in intervals(suite.metrics, samples=20).values():
        # Both are NaN where a metric counts nothing that is there.
        assert np.isfinite([low, high]).all() or np.isnan([low, high]).all()


def test_numbers_are_made_of_rows_alone_whatever_the_answers_are(tested: Any):
    ids = [request.id for request in tested.requests()]
    assert len(set(ids)) == len(ids) > 0
    for text in HOSTILE:
        check(tested, scored(tested, dict.fromkeys(ids, text)))


def test_missing_answers_are_scored_and_others_refused(tested: Any):
    suite = scored(tested, {})
    check(tested, suite)
    assert all(row["answer"] is None for row in suite.items)
    if not isinstance(tested, JudgedBench):
        with pytest.raises(DataError, match="answers are to questions it does not ask"):
            scored(tested, {"no such id": "Yes"})


def test_the_order_of_answers_does_not_matter(tested: Any):
    answers = {one.id: "Yes" if n % 2 else "B" for n, one in enumerate(tested.requests())}
    backwards = dict(reversed(answers.items()))
    assert scored(tested, answers).items == scored(tested, backwards).items


def test_what_the_report_shows_is_there(tested: Any):
    suite = scored(tested, {one.id: "Yes" for one in tested.requests()})
    shown = [metric.key for metric in RULES[tested.name].shown]
    assert shown
    assert shown[0] in suite.metrics
    compared = RULES[tested.name].tests(suite.metrics)
    assert compared


def test_counts_and_points_are_no_percentages():
    assert is_number("answer_tokens")
    assert is_number("official/points/attribute")
    assert is_number("official/perception")
    assert not is_number("official/accuracy")
    assert not is_number("official/score")


def test_no_split_leads_out_of_the_folder_of_items(tested: Any):
    assert "split" in type(tested).model_fields
    settings = tested.model_dump() | {"split": "../../esc"}
    with pytest.raises(ValidationError, match="wanted a name of letters"):
        type(tested).model_validate(settings)
