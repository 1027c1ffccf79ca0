"""TempCompass's captioning: what the judge sees of a caption, and how its answer is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evals.benchmarks.tempcompass_captioning import TempCompassCaptioning
from evals.compare import compare
from evals.config import EvalRecipe
from evals.judging import Judged
from evals.run import evaluate
from mmalign.config import validate
from mmalign.errors import ConfigError, DataError
from mmalign.generate.base import Generation
from mmalign.records import Media

CHOICE = "What is done?\nA. eating\nB. running\nC. running home"
SPEED = "How fast?\nA. fast\nB. slow"
CHOICES = {
    "7": {
        "action": [
            {"question": CHOICE, "answer": "B. running"},
            {"question": "What else?\nA. running\nB. eating", "answer": "A. running"},
        ],
        "speed": [{"question": SPEED, "answer": "A. fast"}],
    }
}
ASK = "Write a caption.\nInformation A: {'subject': 'man'}\nGenerated Caption:"
CAPTIONS = {
    "7": {
        # The letter is that of the information, not of the question that the judge is asked.
        "action": [{"question": ASK, "answer": "C. running"}, {"question": f"Briefly. {ASK}"}],
        "speed": [{"question": ASK, "answer": "B. fast"}],
    }
}
IDS = ["7/action/1", "7/action/2", "7/speed/1"]
SAID = dict(zip(IDS, ["A man runs.", "A man eats {choices}.", "It is fast."], strict=True))


def bench(root: Path, **settings: Any) -> TempCompassCaptioning:
    content = {"captioning": CAPTIONS, "multi-choice": CHOICES}
    for name in content:
        changed = settings.pop(name.replace("-", "_"), content[name])
        (root / f"{name}.json").write_text(json.dumps(changed))
    return TempCompassCaptioning(questions=root, videos=root / "videos", **settings)


def values(suite: Any) -> dict[str, float]:
    return {name: metric.value for name, metric in suite.metrics.items()}


def test_captions_are_asked_for_in_the_released_words(tmp_path: Path):
    asked = bench(tmp_path).requests()
    assert [one.id for one in asked] == IDS
    assert asked[0].videos == (Media(path="7.mp4"),)
    assert asked[0].media_root == tmp_path / "videos"
    assert asked[0].prompt[0].content[-1].text == ASK
    assert len(bench(tmp_path, limit=2).requests()) == 2


def test_the_judge_sees_the_caption_and_the_first_question(tmp_path: Path):
    tested = bench(tmp_path)
    asked = {one.id: one for one in tested.verdict_requests(SAID)}
    first = asked["7/action/2"]
    assert first.images == first.videos == ()
    text = first.prompt[0].content[-1].text
    assert f"]\n{CHOICE}\n[END question" in text
    assert "]\nA man eats {choices}.\n[END description" in text
    assert "Information A" not in text
    assert "What else?" not in text
    assert f"]\n{SPEED}\n[END" in asked["7/speed/1"].prompt[0].content[-1].text
    assert [one.id for one in tested.verdict_requests({IDS[1]: "x"})] == [IDS[1]]


def test_the_released_prompt_can_be_given(tmp_path: Path):
    file = tmp_path / "prompt.txt"
    file.write_text("Reasoning: [why]\nVideo Description:{answer}\nMulti-Choice:\n{choices}\n")
    (first, *_) = bench(tmp_path, judge_prompt=file).verdict_requests(SAID)
    assert first.prompt[0].content[-1].text == (
        f"Reasoning: [why]\nVideo Description:A man runs.\nMulti-Choice:\n{CHOICE}\n"
    )
    file.write_text("{answer} {contents}")
    with pytest.raises(ConfigError, match="wanted answer, choices, code"):
        bench(tmp_path, judge_prompt=file).verdict_requests(SAID)


@pytest.mark.parametrize(
    ("reply", "official", "strict"),
    [
        ("Reasoning: he runs.\nAnswer: B. running", 1, 1),
        ("Reasoning: he eats.\nAnswer: A. eating", 0, 0),
        ("Answer: None of the choices are correct", 0, 0),
        ("B. running", 1, None),
        # The script wants the letter and ". ", with one letter in all.
        ("Answer: B", 0, 1),
        ("Answer: (B) running", 0, 1),
        ("Answer: B.", 0, 1),
        ("**Answer:** B. running", 0, 1),
        ("Answer: A. eating or B. running", 0, None),
        ("Answer: B. running\nAnswer: C. running home", 0, None),
        ("Answer: A. eating\nThe Answer: B. running", 0, 0),
        ("Answer: A. eating\nAnswer: B. running", 1, None),
        ("Answer: B. running, not A. eating", 0, None),
        ("Answer: running", 0, 1),
        ("Answer: C. running", 0, None),
        ("", 0, None),
        ("<script>Answer</script>", 0, None),
    ],
)
def test_replies_are_read(tmp_path: Path, reply: str, official: int, strict: int | None):
    tested = bench(tmp_path)
    question = tested.load()[0]
    assert tested.read_verdict(question, reply, "official") == official
    assert tested.read_verdict(question, reply, "strict") == strict


def test_accuracy_is_counted_by_hand(tmp_path: Path):
    """Official 1, 0, 1 of three; strictly 1 and 0, the prose reply left out."""
    replies = ["Answer: B. running", "Answer: None of the choices are correct", "A. fast"]
    judged = Judged(
        texts={id: [reply] for id, reply in zip(IDS, replies, strict=True)}, told={"model": "m"}
    )
    suite = bench(tmp_path).score(SAID, judged)
    assert values(suite) == {
        "official/accuracy": pytest.approx(2 / 3),
        "official/accuracy/action": 0.5,
        "official/accuracy/speed": 1,
        "strict/accuracy": 0.5,
        "unjudged_rate": pytest.approx(1 / 3),
        "judge_disagreement": 0,
    }
    assert suite.videos == tmp_path / "videos"
    assert suite.items[0]["video"] == "7.mp4"
    # A caption that is missing is wrong officially, and left out strictly.
    judged.texts.pop(IDS[2])
    found = values(bench(tmp_path).score({id: SAID[id] for id in IDS[:2]}, judged))
    assert (found["official/accuracy"], found["strict/accuracy"]) == (pytest.approx(1 / 3), 0.5)


def test_repeats_are_averaged(tmp_path: Path):
    both = ["Answer: B. running", "Answer: A. eating"]
    judged = Judged(texts={IDS[0]: both}, told={})
    suite = bench(tmp_path, limit=1).score({IDS[0]: "A man runs."}, judged)
    assert values(suite)["official/accuracy"] == values(suite)["strict/accuracy"] == 0.5
    assert values(suite)["judge_disagreement"] == 1


class Told:
    """A model that gives the captions it was told."""

    name = "told"

    def __init__(self, given: dict[str, str]) -> None:
        self.given = given

    def generate(self, requests, sampling):
        return [
            Generation(id=one.id, text=self.given[one.id], num_tokens=2, finished=True)
            for one in requests
        ]


def test_runs_are_judged_by_a_server_and_compared(tmp_path: Path, scripted):
    (tmp_path / "videos").mkdir()

    def script(body: dict[str, Any], number: int) -> dict[str, Any]:
        text = body["messages"][-1]["content"]
        letter = "A. fast" if "It is fast." in text else "B. running" if "runs" in text else "None"
        return {"text": f"So it says.\nAnswer: {letter}"}

    scripted.script = script
    recipe = {
        "name": "base",
        "model": {"path": "nothing"},
        "output": str(tmp_path / "a"),
        "benchmarks": [bench(tmp_path).model_dump(mode="json")],
        "judge": {"server": {"model": "judge-1", "base_url": scripted.url}},
        "bootstrap_samples": 50,
    }
    plan = validate(recipe, EvalRecipe, "test")
    a = evaluate(plan, Told(SAID))
    better = SAID | {IDS[1]: "He runs."}
    b = evaluate(plan.model_copy(update={"output": tmp_path / "b"}), Told(better))
    found = {one.metric: one.difference for one in compare(a, b, samples=50)}
    assert found["official/accuracy"] == pytest.approx(1 / 3)
    assert found["strict/accuracy"] == pytest.approx(1 / 3)
    with pytest.raises(ConfigError, match="tempcompass_captioning takes a judge"):
        validate({**recipe, "judge": None}, EvalRecipe, "test")


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"captioning": {"8": CAPTIONS["7"]}}, "8, action: has no question, which captions need"),
        ({"captioning": {"7": {"order": [{"question": ASK}]}}}, "7, order: has no question"),
        ({"captioning": {"7": {"mood": []}}}, "mood: is no aspect; wanted action, direction"),
        ({"captioning": {"7": {"action": [{}]}}}, "action, question 1: field question is missing"),
        ({"captioning": {"7": {"action": "x"}}}, "action: is wrong; got str"),
        ({"captioning": {"7": []}}, "7: is wrong; got list"),
        ({"captioning": {}}, "holds no question"),
        ({"multi_choice": {"7": {"action": [{"question": CHOICE}]}}}, "field answer is missing"),
        (
            {"multi_choice": {"7": {"action": [{"question": CHOICE, "answer": "D. x"}]}}},
            "answer is wrong; got 'D. x'; wanted A, B, C",
        ),
        ({"multi_choice": {"7": {"action": ["x"]}}}, "action: is wrong; got str"),
        ({"multi_choice": {"7": "x"}}, "7: is wrong; got str"),
    ],
)
def test_malformed_files_are_named(tmp_path: Path, changed: dict[str, Any], told: str):
    with pytest.raises(DataError, match=told):
        bench(tmp_path, **changed).requests()
