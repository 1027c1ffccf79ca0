"""Who is better: best and worst of a group, and samples of a dataset of pairs by each annotator."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from mmalign.errors import RewardError
from mmalign.generate.base import Generation
from mmalign.judge import Ruling
from mmalign.reward import Judged
from mmalign.similarity import TokenOverlap
from mmalign.verdicts import RankVerdict
from trainers.annotators import (
    Verdict,
    _AnswerAnnotator,
    _JudgeAnnotator,
    _RewardAnnotator,
    best_and_worst,
    verdicts,
)


def said(*texts: str) -> list[Generation]:
    """Responses; one that ends in … was cut off."""
    return [
        Generation(id=str(n), text=text, num_tokens=1, finished=not text.endswith("…"))
        for n, text in enumerate(texts)
    ]


class Lengths:
    """Scores a text by its length; cannot tell where one is "?"."""

    def __init__(self) -> None:
        self.shown: list[list[str]] = []

    def score(self, rows, groups: Sequence[Sequence[str]], tag: str) -> list[list[float] | None]:
        self.shown += map(list, groups)
        return [None if "?" in group else [float(len(t)) for t in group] for group in groups]


def test_the_first_of_the_best_and_the_first_of_the_worst_are_the_pair():
    assert best_and_worst([1.0, 3.0, 0.5, 3.0, 0.5], "r") == Verdict(
        chosen=1, rejected=2, chosen_score=3.0, rejected_score=0.5
    )
    assert best_and_worst([2.0, 2.0], "r").reason == "tied"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_score_that_is_no_number_names_its_row(bad):
    with pytest.raises(RewardError, match="row r: the annotator's score"):
        best_and_worst([1.0, bad], "r")


def test_only_whole_and_different_texts_are_shown_and_places_are_those_of_the_group(preference):
    lengths = Lengths()
    groups = [
        said("aa", "", "aa ", "bbb…", "a", "aaaa"),
        said("aa", "aa"),
        said("aa", "a…"),
        said("aa", "bb"),
        said("aa", "?"),
    ]
    found = verdicts(lengths, [preference(n) for n in range(5)], groups, "step1")
    assert found[0] == Verdict(chosen=5, rejected=4, chosen_score=4.0, rejected_score=1.0)
    assert [one.reason for one in found[1:]] == ["too_few", "too_few", "tied", "no_verdict"]
    assert lengths.shown == [["aa", "a", "aaaa"], ["aa", "bb"], ["aa", "?"]]


def test_nobody_is_asked_about_nothing(preference):
    lengths = Lengths()
    assert verdicts(lengths, [preference(0)], [said("a…", "")], "")[0].reason == "too_few"
    assert lengths.shown == []


def test_the_answer_prefers_what_is_like_it(preference):
    rows = [preference(0, chosen="a red cup"), preference(1, chosen="two dogs")]
    groups = [["a red car", "no", "a red cup"], ["two cats", "two dogs"]]
    found = _AnswerAnnotator(TokenOverlap()).score(rows, groups, "")
    assert found[0] == pytest.approx([2 / 3, 0, 1])
    assert found[1] == pytest.approx([1 / 2, 1])


def test_a_reward_model_is_asked_about_every_text_with_its_row(preference, tmp_path):
    class Model:
        def judge(self, items):
            self.items = items
            return [Judged(id=i.id, reward=float(n)) for n, i in enumerate(items)]

    model = Model()
    rows = [preference(0), preference(1)]
    found = _RewardAnnotator(model, tmp_path).score(rows, [["a", "b", "c"], ["d", "e"]], "step3")
    assert found == [[0, 1, 2], [3, 4]]
    assert [i.response for i in model.items] == ["a", "b", "c", "d", "e"]
    assert [i.images for i in model.items] == [rows[0].images] * 3 + [rows[1].images] * 2
    assert len({i.id for i in model.items}) == 5


def test_a_judges_ranks_are_scores_and_no_verdict_is_none(preference, tmp_path):
    class Judge:
        def rank(self, contests):
            self.contests = contests
            ranked = RankVerdict(scores=(1, 5, 1), ranks=(1, 0, 1), critiques=("", "", ""))
            return [
                Ruling(id="a", value=ranked, reason="ok", num_tries=1),
                Ruling(id="b", value=None, reason="no_verdict", num_tries=3),
            ]

    judge = Judge()
    rows = [preference(0), preference(1)]
    found = _JudgeAnnotator(judge, tmp_path).score(rows, [["a", "b", "c"], ["d", "e"]], "step3")
    assert found == [[-1, 0, -1], None]
    assert [c.responses for c in judge.contests] == [("a", "b", "c"), ("d", "e")]
    assert [c.id for c in judge.contests] == ["step3/row-0", "step3/row-1"]
