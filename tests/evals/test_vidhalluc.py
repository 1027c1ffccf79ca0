"""VidHalluc: what its scripts read in an answer, and when a question is right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evals.benchmarks.vidhalluc import (
    VidHallucBinary,
    VidHallucChoice,
    VidHallucOrder,
    official_order,
)
from evals.config import EvalRecipe
from mmalign.config import validate
from mmalign.errors import DataError
from mmalign.records import Media

BINARY = {
    "1": [
        {"q": "Is he running?", "a": {"v_0_1": "Yes", "v_2_3": "No"}},
        {"q": "Is he walking?", "a": {"v_0_1": "No", "v_2_3": "Yes"}},
    ],
    "2": [{"q": "Is she eating?", "a": {"w_0_1": "Yes"}}],
}
CHOICES = {"A": "a run", "B": "walking", "C": "a cat", "D": "a run home"}
MCQ = {
    "1": {
        "v_0_1": {"Question": "What?", "Choices": CHOICES, "Correct Answer": "A"},
        "v_2_3": {"Question": "What?", "Choices": CHOICES, "Correct Answer": "B, C"},
    }
}
ORDER = {
    "1": {"video": "v", "Question": "Action A. runs, Action B. eats. ", "Correct Answer": "BA"},
    "2": {"video": "w", "Question": "Action A. runs, Action B. eats. ", "Correct Answer": "A"},
}


def bench(tmp_path: Path, kind: Any, content: Any, **settings: Any) -> Any:
    (tmp_path / "data.json").write_text(json.dumps(content))
    return kind(data=tmp_path / "data.json", videos=tmp_path, **settings)


def values(suite: Any) -> dict[str, float]:
    return {name: metric.value for name, metric in suite.metrics.items()}


def test_binary_is_right_only_for_all_clips(tmp_path: Path):
    binary = bench(tmp_path, VidHallucBinary, BINARY)
    asked = binary.requests()
    assert [one.id for one in asked] == [
        "1/1/v_0_1", "1/1/v_2_3", "1/2/v_0_1", "1/2/v_2_3", "2/1/w_0_1",
    ]  # fmt: skip
    assert asked[1].videos == (Media(path="v_2_3.mp4"),)
    text = asked[1].prompt[0].content[-1].text
    assert text == "Is he running? Only answer with a single word 'Yes' or 'No'."
    given = {
        "1/1/v_0_1": "Yes.",
        "1/1/v_2_3": "no, he walks",
        "1/2/v_0_1": "no",
        "2/1/w_0_1": "yes",
    }
    found = values(binary.score({**given, "1/2/v_2_3": "No"}))
    assert found["official/accuracy"] == pytest.approx(2 / 3)
    assert found["official/per_clip"] == pytest.approx(4 / 5)
    # A clip without an answer makes its question wrong.
    assert values(binary.score(given))["official/accuracy"] == pytest.approx(2 / 3)
    assert values(binary.score({}))["official/accuracy"] == 0
    # The first three answers belong to two questions, which are kept whole.
    assert len(bench(tmp_path, VidHallucBinary, BINARY, limit=3).requests()) == 4


@pytest.mark.parametrize(
    ("answer", "official", "strict"),
    [
        ("Yes", "yes", "yes"),
        (" YES . No", "yes", None),
        ("no,yes", "no", None),
        ("Yes he is", None, "yes"),
        (". yes", None, "yes"),
        ("yes!", None, "yes"),
        ("", None, None),
        ("<script>yes</script>", None, None),
    ],
)
def test_binary_readings(tmp_path, answer, official, strict):
    binary = bench(tmp_path, VidHallucBinary, BINARY)
    question = binary.load()[0]
    assert binary.read(question, answer, "official") == official
    assert binary.read(question, answer, "strict") == strict


def test_an_answer_is_not_cut_short(tmp_path: Path):
    """The official rule reads more than its beginning."""
    assert bench(tmp_path, VidHallucChoice, MCQ).max_new_tokens == 1024


def test_choices_are_sets_of_letters(tmp_path: Path):
    choice = bench(tmp_path, VidHallucChoice, MCQ)
    assert choice.requests()[0].prompt[0].content[-1].text == (
        "What? Please select the correct answer (one or more options), only return your answer(s). "
        "(e.g., ABCD)\nChoices:\nA. a run\nB. walking\nC. a cat\nD. a run home"
    )
    found = values(choice.score({"1/v_0_1": "A", "1/v_2_3": "C and B"}))
    assert found["official/accuracy"] == found["strict/accuracy"] == 1
    found = values(choice.score({"1/v_0_1": "A", "1/v_2_3": "B"}))
    assert found["official/accuracy"] == 0.5
    assert (found["official/accuracy/one"], found["official/accuracy/several"]) == (1, 0)
    found = values(choice.score({"1/v_2_3": "BC"}))
    # "BC" is no letter as a word: the released script cannot read what its prompt asks for.
    assert (found["official/accuracy"], found["strict/accuracy"]) == (0, 0.5)


@pytest.mark.parametrize(
    ("answer", "official", "strict"),
    [
        ("(A)", "A", "A"),
        ("A, C", "AC", "AC"),
        ("The answer is B.", "B", "B"),
        ("A cat runs", "A", "C"),
        ("he is walking", "B", "B"),
        # The script takes the first option that is there, though a longer one holds it.
        ("a run home", "A", "D"),
        ("ABCD", None, "ABCD"),
        ("A but not B", "AB", None),
        ("E", None, None),
        ("", None, None),
    ],
)
def test_choice_readings(tmp_path, answer, official, strict):
    choice = bench(tmp_path, VidHallucChoice, MCQ)
    question = choice.load()[0]
    assert choice.read(question, answer, "official") == official
    assert choice.read(question, answer, "strict") == strict


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        ("AB", "AB"),
        ("ba", "BA"),
        ("b", "B"),
        ("B.", None),
        ("It is not clear: action a, action b", None),
        ("I only see Action B", "B"),
        ("Action B, then Action A", "BA"),
        ("action b is before action a", "BA"),
        # Between "action a" and "after" no a, f, t, e or r may stand, so here the link is read.
        ("action a is; after action b", "BA"),
        # "comes" has an e of "after": the order of the text is taken, the wrong way round.
        ("Action A comes after Action B", "AB"),
        ("action a, action b, action a", "ABA"),
        ("nothing", None),
        ("", None),
    ],
)
def test_the_script_reads_orders(answer, wanted):
    assert official_order(answer) == wanted


def test_orders_are_scored_under_both_readings(tmp_path: Path):
    order = bench(tmp_path, VidHallucOrder, ORDER)
    found = values(order.score({"1": "action b, then action a", "2": "A."}))
    # The script does not know "A.", the strict reading no sentence.
    assert (found["official/accuracy"], found["strict/accuracy"]) == (0.5, 0.5)
    assert (found["official/accuracy/both"], found["official/accuracy/one"]) == (1, 0)
    assert found["unparsed_rate"] == 0.5
    strict = [order.read(order.load()[0], text, "strict") for text in ("BA", "Order: BA.", "BAB")]
    assert strict == ["BA", "BA", None]
    with pytest.raises(DataError, match="to questions it does not ask"):
        order.score({"3": "A"})


@pytest.mark.parametrize(
    ("kind", "content", "said"),
    [
        (VidHallucBinary, [], "wanted an object"),
        (VidHallucBinary, {}, "holds no question"),
        (VidHallucBinary, {"1": [{"q": "?", "a": {"v": "maybe"}}]}, "1, question 1, v: answer is"),
        (VidHallucBinary, {"1": [{"q": "?"}]}, "question 1, a: is wrong"),
        (VidHallucChoice, {"1": {"v": {"Question": "?"}}}, "1, v: is wrong; got NoneType"),
        (
            VidHallucChoice,
            {"1": {"v": {"Question": "?", "Choices": {"A": "x"}, "Correct Answer": "B"}}},
            "got B; wanted letters of A",
        ),
        (VidHallucOrder, {"1": {"video": "v", "Question": "?"}}, "Correct Answer is missing"),
        (VidHallucOrder, {"1": {**ORDER["1"], "Correct Answer": "C"}}, "wanted AB, BA, A or B"),
    ],
)
def test_malformed_files_are_named(tmp_path, kind, content, said):
    with pytest.raises(DataError, match=said):
        bench(tmp_path, kind, content).requests()


def test_an_id_that_stands_twice_is_refused(tmp_path: Path):
    (tmp_path / "data.json").write_text('{"1": [], "1": []}')
    with pytest.raises(DataError, match="the key 1 appears twice"):
        VidHallucBinary(data=tmp_path / "data.json", videos=tmp_path).requests()


def test_recipes_name_them(tmp_path: Path):
    names = ["vidhalluc_binary", "vidhalluc_choice", "vidhalluc_order"]
    recipe = {
        "name": "x",
        "model": {"path": "x"},
        "output": "x",
        "benchmarks": [{"name": name, "data": "x.json", "videos": "x"} for name in names],
    }
    assert [one.key for one in validate(recipe, EvalRecipe, "test").benchmarks] == names
