"""TempCompass: what the released rules match, and the mean over tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evals.benchmarks.tempcompass import TempCompass
from evals.config import EvalRecipe
from mmalign.config import validate
from mmalign.errors import DataError
from mmalign.records import Media

CHOICE = "What is done?\nA. eating\nB. running home\nC. running"
CAPTIONS = "Which fits?\nCaption A: A man runs.\nCaption B: A man eats."
FILES: dict[str, Any] = {
    "multi-choice": {
        "7": {
            "action": [{"question": CHOICE, "answer": "C. running"}],
            "speed": [{"question": "Fast?\nA. fast\nB. slow", "answer": "B. slow"}],
        }
    },
    "yes_no": {"7": {"action": [{"question": "Is he running?", "answer": "yes"}]}},
    "caption_matching": {
        "7": {"order": [{"question": CAPTIONS, "answer": "Caption B: A man eats."}]},
        "8": {
            "order": [
                {
                    "question": "Which?\nOption 1: A dog.\nOption 2: A cat.",
                    "answer": "Option 1: A dog.",
                }
            ]
        },
    },
}
NAMES = [
    "multi-choice/7/action/1",
    "multi-choice/7/speed/1",
    "yes_no/7/action/1",
    "caption_matching/7/order/1",
    "caption_matching/8/order/1",
]


def bench(root: Path, **changed: Any) -> TempCompass:
    for task, content in {**FILES, **changed}.items():
        (root / f"{task}.json").write_text(json.dumps(content))
    return TempCompass(questions=root, videos=root / "videos")


def test_the_released_prompts_are_asked(tmp_path: Path):
    asked = bench(tmp_path).requests()
    assert [one.id for one in asked] == NAMES
    assert asked[0].videos == (Media(path="7.mp4"),)
    assert asked[0].prompt[0].content[-1].text == (
        CHOICE + "\nPlease directly give the best option:"
    )
    assert asked[2].prompt[0].content[-1].text == "Is he running?\nPlease answer yes or no:"


def test_the_score_is_the_mean_over_tasks(tmp_path: Path):
    """1 of 2, 1 of 1, 0 of 2: the mean is 1/2, where 2 of 5 questions are right."""
    given = dict(zip(NAMES, ["C", "A", "Yes, he is", "A", "maybe"], strict=True))
    suite = bench(tmp_path).score(given)
    found = {name: metric.value for name, metric in suite.metrics.items()}
    assert found == pytest.approx(
        {
            "official/accuracy": 1 / 2,
            "official/accuracy/multi-choice": 1 / 2,
            "official/accuracy/yes_no": 1,
            "official/accuracy/caption_matching": 0,
            "official/accuracy/action": 1,
            "official/accuracy/speed": 0,
            "official/accuracy/order": 0,
            "strict/accuracy": 1 / 2,
            "match_rate": 4 / 5,
            "unparsed_rate": 1 / 5,
        }
    )
    assert suite.num_unparsed == 1
    assert all(metric.value == 0 for name, metric in bench(tmp_path).score({}).metrics.items()
               if name != "unparsed_rate")  # fmt: skip
    with pytest.raises(DataError, match="captioning/7"):
        bench(tmp_path).score({**given, "captioning/7": "x"})


@pytest.mark.parametrize(
    ("number", "answer", "official", "strict"),
    [
        (0, "C", "C", "C"),
        (0, " C. eating</s>", "C", None),
        (0, "B) running home", "B", "B"),
        (0, "(C)", None, "C"),
        (0, "c", None, None),
        (0, "The answer is C.", None, "C"),
        (0, "He is running", None, "C"),
        (0, "C, I think", None, "C"),
        (0, "A dog runs", None, None),
        (0, "", None, None),
        (2, "YES.", "yes", "yes"),
        (2, "Not sure", "no", None),
        (2, "Yesterday", "yes", None),
        (2, "The answer is yes.", None, "yes"),
        (2, "<b>yes</b>", None, None),
        (3, "Caption B", "Caption B", "Caption B"),
        (3, "B.", "Caption B", "Caption B"),
        (3, "A man eats.", "Caption B", "Caption B"),
        (3, "Caption A: A man runs.", "Caption A", "Caption A"),
        (3, "(B) A man eats.", "Caption B", "Caption B"),
        (3, "Caption B matches better", None, None),
        (3, "B) A man runs.", "Caption A", None),
        (4, "Option 1.", "Option 1", "Option 1"),
        (4, "2", "Option 2", "Option 2"),
        (4, "Option A", None, None),
    ],
)
def test_readings(tmp_path, number, answer, official, strict):
    tested = bench(tmp_path)
    question = tested.load()[number]
    assert tested.read(question, answer, "official") == official
    assert tested.read(question, answer, "strict") == strict


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"7": {"mood": []}}, "7, mood: is no aspect; wanted action"),
        ({"7": {"action": [{"question": "Is it?", "answer": "perhaps"}]}}, "got 'perhaps'"),
        ({"7": {"action": [{"question": "Is it?"}]}}, "question 1: field answer is missing"),
        ({"7": {"action": {}}}, "wanted a list"),
        ([], "wanted an object"),
    ],
)
def test_malformed_files_are_named(tmp_path, content, said):
    with pytest.raises(DataError, match=said):
        bench(tmp_path, yes_no=content).requests()


def test_a_right_answer_must_be_an_option(tmp_path: Path):
    wrong = {"7": {"action": [{"question": CHOICE, "answer": "D. flying"}]}}
    with pytest.raises(DataError, match=r"got 'D\. flying'; wanted A, B, C"):
        bench(tmp_path, **{"multi-choice": wrong}).requests()


def test_a_recipe_names_it(tmp_path: Path):
    one = {"name": "tempcompass", "questions": "q", "videos": "v", "tasks": ["yes_no"]}
    recipe = {"name": "x", "model": {"path": "x"}, "output": "x", "benchmarks": [one]}
    assert validate(recipe, EvalRecipe, "test").benchmarks[0].key == "tempcompass"
