"""Acc and Acc+ of reward models, on official files and on datasets of ours."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evals.benchmarks.reward_bench import RewardBench, metrics
from evals.compare import compare
from evals.config import EvalRecipe
from evals.reward_pairs import RewardAnswers
from evals.run import evaluate, rescore
from mmalign.cli import run
from mmalign.config import dump_yaml, validate
from mmalign.errors import ConfigError, DataError, ModelError
from mmalign.media import embed
from mmalign.records import Media, Origin, Preference, user
from mmalign.reward import Critics, Judged
from mmalign.store import write_dataset


def row(name, question, correct, category=None, **changes):
    values = {"id": name, "question": question, "image": question, "correct": correct}
    categories = [category] if category else []
    return values | {"categories": categories, "num_written": 0, "num_cut": 0} | changes


def values(items):
    return {name: metric.value for name, metric in metrics(items).items()}


def test_acc_counts_pairs_and_acc_plus_questions():
    items = [
        row("a/0", "a", True, "mcq"),
        row("b/0", "b", True, "long"),
        row("a/1", "a", True, "mcq"),
        row("b/1", "b", False, "long"),
        row("c/0", "c", False, "mcq"),
    ]
    found = values(items)
    assert found["acc"] == pytest.approx(3 / 5)
    assert found["acc_plus"] == pytest.approx(1 / 3)
    assert found["acc/mcq"] == pytest.approx(2 / 3)
    assert found["acc_plus/mcq"] == pytest.approx(1 / 2)
    assert (found["acc/long"], found["acc_plus/long"]) == (1 / 2, 0)
    assert found.keys().isdisjoint({"acc/video", "cut_rate"})


def test_one_pair_a_question_makes_both_equal():
    found = values([row(str(i), str(i), i % 3 > 0) for i in range(30)])
    assert found["acc"] == found["acc_plus"] == pytest.approx(2 / 3)


def test_acc_plus_is_at_most_acc_and_falls_as_two_to_the_number_of_pairs():
    toss = random.Random(0)
    items = [row(f"{q}/{n}", str(q), toss.random() < 0.5) for q in range(4000) for n in range(3)]
    found = values(items)
    assert found["acc"] == pytest.approx(1 / 2, abs=0.03)
    assert found["acc_plus"] == pytest.approx(1 / 8, abs=0.03)


def test_cut_critiques_are_counted_where_the_model_wrote_them():
    items = [row("a", "a", True, num_written=2, num_cut=1), row("b", "b", True, num_written=2)]
    assert values(items)["cut_rate"] == 1 / 4


def official(folder: Path, **changes) -> Path:
    Image.new("RGB", (8, 8), "red").save(folder / "mcq_long_1.png")
    rows = [
        {
            "id": 7,
            "prompt": "<image>\nWhich?",
            "image": "mcq_long_1.png",
            "chosen": "A",
            "rejected": rejected,
            "chosen_reason": "right",
            "rejected_reason": "wrong",
        }
        | changes
        for rejected in ("B", "C")
    ]
    file = folder / "bench.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return file


def reward(value: float, **changes) -> str:
    return json.dumps({"reward": value, "critiques": [], "num_written": 0, "num_cut": 0} | changes)


def test_the_official_file_is_read_and_equal_rewards_are_wrong(tmp_path):
    bench = RewardBench(data=official(tmp_path), critiques="given")
    requests = bench.requests()
    assert [r.id for r in requests] == ["7/0/chosen", "7/0/rejected", "7/1/chosen", "7/1/rejected"]
    assert json.loads(requests[0].prefill) == ["A", "right"]
    assert requests[0].prompt == user("Which?", images=1)
    assert requests[0].media_root == tmp_path
    found = dict(zip([r.id for r in requests], map(reward, (1.5, 0.5, 2, 2)), strict=True))
    suite = bench.score(found)
    assert (suite.metrics["acc"].value, suite.metrics["acc_plus"].value) == (0.5, 0)
    assert [item["categories"] for item in suite.items] == [["mcq"], ["mcq"]]
    assert [item["question"] for item in suite.items] == ["7", "7"]
    assert suite.items[0]["answer"] == "1.5000 against 0.5000"
    missing = bench.score({name: text for name, text in found.items() if name != "7/0/chosen"})
    assert [item["correct"] for item in missing.items] == [False, False]
    assert missing.items[0]["answer"] is None
    with pytest.raises(DataError, match="is no reward; got 'Yes, it is'"):
        bench.score({"7/0/chosen": "Yes, it is"})


def test_questions_of_our_datasets_are_what_pairs_were_made_of(tmp_path):
    origins = [
        Origin(builder="pairs", source="q1"),
        Origin(builder="pairs", source="q1"),
        Origin(),
        Origin(builder="import:mm_rlhf", source="pairs.jsonl, line 1", detail='{"id": "q9"}'),
        Origin(builder="import:trl", source="rows.jsonl, line 1", detail=""),
    ]
    rows = [
        Preference(id=f"folder/{n}", prompt=user("?"), chosen="A", rejected="B", origin=origin)
        for n, origin in enumerate(origins)
    ]
    write_dataset(tmp_path, Preference, rows, builder="test")
    suite = RewardBench(data=tmp_path).score({})
    questions = [item["question"] for item in suite.items]
    assert questions == ["q1", "q1", "folder/2", "q9", "folder/4"]


def test_keys_tell_suites_apart(tmp_path):
    def key(**settings):
        return RewardBench(data=tmp_path, **settings).key

    assert key() == "reward_bench-self"
    assert key(split="lab", critiques="none") == "reward_bench-lab-none"
    assert key(num_critics=3) == "reward_bench-self-3"


def test_what_cannot_be_asked_is_told_before_a_model_is_loaded(tmp_path):
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(DataError, match="holds no pair"):
        RewardBench(data=tmp_path / "none.jsonl").requests()
    bare = RewardBench(data=official(tmp_path, rejected_reason=None), critiques="given")
    with pytest.raises(DataError, match=r"7/0: no critique of the rejected.*self or none"):
        bare.requests()
    assert len(bare.model_copy(update={"critiques": "self"}).requests()) == 4
    (tmp_path / "half.jsonl").write_text('{"id": 1, "prompt": "?"}')
    with pytest.raises(DataError, match="field chosen is missing"):
        RewardBench(data=tmp_path / "half.jsonl").requests()
    several = {"data": tmp_path, "critiques": "none", "num_critics": 2}
    with pytest.raises(ConfigError, match="num_critics above 1"):
        validate(several, RewardBench, "test")


class Shown:
    """Remembers what it is shown; `family` is that of the model it stands for."""

    name = "shown"

    def __init__(self, video_inputs: tuple[str, ...]) -> None:
        family = type("Family", (), {"video_inputs": video_inputs})
        self.policy = type("Policy", (), {"family": family})
        self.items = []

    def judge(self, items, critics: Critics):
        self.items += items
        return [Judged(id=item.id, reward=1.0, critiques=("c",), num_cut=1) for item in items]


@pytest.fixture
def framed(tmp_path):
    (tmp_path / "clip").mkdir()
    for number in range(25):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / "clip" / f"{number:03d}.png")
    return RewardBench(data=official(tmp_path, image=None, video="clip"))


PLACES = [0, 2, 5, 8, 10, 13, 16, 18, 21, 24]


def test_a_folder_of_frames_is_a_clip_to_models_that_take_clips(framed):
    model = Shown(("pixel_values_videos",))
    RewardAnswers(model, Critics()).generate(framed.requests()[:1], None)
    (item,) = model.items
    assert item.prompt == user("Which?", videos=1)
    assert item.images == ()
    assert item.videos[0].frames[:, 0, 0, 0].tolist() == PLACES


def test_a_folder_of_frames_is_ten_pictures_to_other_models(framed):
    model = Shown(())
    RewardAnswers(model, Critics()).generate(framed.requests()[:1], None)
    (item,) = model.items
    assert item.prompt == user("Which?", images=10)
    assert item.images == tuple(Media(path=f"clip/{n:03d}.png") for n in PLACES)
    assert item.videos == ()


def test_answers_hold_the_critiques_and_what_was_cut(framed):
    requests = framed.requests()[:1]
    for source, written in (("self", 1), ("given", 0)):
        answers = RewardAnswers(Shown(()), Critics(critiques=source))
        (made,) = answers.generate(requests, None)
        assert not made.finished
        assert json.loads(made.text) == json.loads(
            reward(1.0, critiques=["c"], num_written=written, num_cut=1)
        )


@pytest.fixture
def pairs(tmp_path):
    pixels = np.random.RandomState(0).randint(0, 255, (3, 16, 16, 3), dtype=np.uint8)
    rows = [
        Preference(
            id=f"pair-{n}",
            prompt=user("Which?", images=1),
            images=(embed(Image.fromarray(pixels[n // 2])),),
            chosen=f"the {n}",
            rejected=f"not {n}",
            chosen_critique="good",
            rejected_critique="bad",
            origin=Origin(builder="pairs", source=f"q{n // 2}"),
        )
        for n in range(6)
    ]
    write_dataset(tmp_path / "pairs", Preference, rows, builder="test")
    return tmp_path / "pairs"


@pytest.fixture
def recipe(reward_model, pairs, tmp_path):
    def make(name, **changes):
        benchmarks = [
            {"name": "reward_bench", "data": str(pairs), "critiques": source, "max_new_tokens": 4}
            for source in ("self", "given", "none")
        ]
        data = {
            "name": name,
            "model": {"path": str(reward_model)},
            "output": str(tmp_path / name),
            "bootstrap_samples": 100,
            "benchmarks": benchmarks,
        }
        return validate(data | changes, EvalRecipe, "test")

    return make


def test_a_model_is_run_resumed_rescored_and_compared(recipe):
    folder = evaluate(recipe("one"))
    results = json.loads((folder / "results.json").read_text())
    assert [s["key"] for s in results["suites"]] == [
        "reward_bench-self", "reward_bench-given", "reward_bench-none"
    ]  # fmt: skip
    for suite in results["suites"]:
        items = [json.loads(line) for line in (folder / suite["items"]).read_text().splitlines()]
        right = [item["chosen_reward"] > item["rejected_reward"] for item in items]
        assert suite["metrics"]["acc"] == pytest.approx(sum(right) / 6)
        both = [all(right[i : i + 2]) for i in (0, 2, 4)]
        assert suite["metrics"]["acc_plus"] == pytest.approx(sum(both) / 3)
        low, high = suite["intervals"]["acc"]
        assert low <= suite["metrics"]["acc"] <= high
        own = suite["key"] == "reward_bench-self"
        assert ("cut_rate" in suite["metrics"]) == own
        assert all((item["num_tokens"] > 0) == own for item in items)
    answers = folder / "answers.jsonl"
    lines = answers.read_text().splitlines(keepends=True)
    assert len(lines) == 36
    answers.write_text("".join(lines[:20]))
    (folder / "results.json").unlink()
    evaluate(recipe("one"))
    assert answers.read_text().splitlines(keepends=True)[:20] == lines[:20]
    assert json.loads((folder / "results.json").read_text()) == results
    rescore(folder, recipe("one"))
    assert json.loads((folder / "results.json").read_text()) == results
    found = compare(folder, evaluate(recipe("two")))
    assert {c.metric: c.test for c in found} == {"acc": "mcnemar", "acc_plus": "bootstrap"}
    assert all(c.difference == 0 for c in found)


def test_a_picture_that_cannot_be_read_makes_its_pairs_wrong(recipe, tmp_path):
    file = official(tmp_path)
    row = json.loads(file.read_text().splitlines()[0])
    lost = row | {"id": 8, "image": "lost.png"}
    file.write_text("".join(json.dumps(one) + "\n" for one in (row, lost)))
    bench = {"name": "reward_bench", "data": str(file), "critiques": "given"}
    folder = evaluate(recipe("lost", benchmarks=[bench]))
    (suite,) = json.loads((folder / "results.json").read_text())["suites"]
    assert suite["num_missing"] == 1
    items = [json.loads(line) for line in (folder / suite["items"]).read_text().splitlines()]
    assert [item["answer"] is None for item in items] == [False, True]
    assert items[1]["correct"] is False


def test_the_command_evaluates_and_a_policy_is_no_reward_model(recipe, reward_model, tmp_path):
    (tmp_path / "eval.yaml").write_text(dump_yaml(recipe("cli")))
    assert run(["eval", "run", str(tmp_path / "eval.yaml")]) == 0
    assert (tmp_path / "cli" / "results.json").exists()
    base = str(reward_model.parent / "base")
    with pytest.raises(ModelError, match="has no reward head"):
        evaluate(recipe("base", model={"path": base}))
