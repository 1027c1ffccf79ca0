"""Acc and Acc+ of reward models, on official files and on datasets of ours."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from evals.compare import compare
from evals.config import EvalRecipe
from evals.reward_bench import RewardBench, metrics
from evals.run import evaluate, rescore
from mmalign.config import validate
from mmalign.errors import DataError
from mmalign.media import embed
from mmalign.models.load import ModelConfig, load_policy
from mmalign.models.tiny import TinyModel, Tower
from mmalign.records import Preference, user
from mmalign.store import write_dataset


def row(id, question, correct, category=None):
    return {"id": id, "image": question, "correct": correct, "category": category}


def values(items):
    return {name: metric.value for name, metric in metrics(items).items()}


def test_acc_counts_pairs_and_acc_plus_questions():
    items = [
        row("a/0", "a", True, "mcq"),
        row("a/1", "a", True, "mcq"),
        row("b/0", "b", True, "long"),
        row("b/1", "b", False, "long"),
        row("c/0", "c", False, "mcq"),
    ]
    found = values(items)
    assert found["acc"] == pytest.approx(3 / 5)
    assert found["acc_plus"] == pytest.approx(1 / 3)
    assert found["acc/mcq"] == pytest.approx(2 / 3)
    assert found["acc_plus/mcq"] == pytest.approx(1 / 2)
    assert found["acc_plus/long"] == 0
    assert "acc/video" not in found


def test_one_pair_a_question_makes_both_equal():
    found = values([row(str(i), str(i), i % 3 > 0) for i in range(30)])
    assert found["acc"] == found["acc_plus"] == pytest.approx(2 / 3)


def official(tmp_path, **changes):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "mcq_1.png")
    rows = [
        {
            "id": 7,
            "prompt": "<image>\nWhich?",
            "image": "mcq_1.png",
            "chosen": "A",
            "rejected": rejected,
            "chosen_reason": "right",
            "rejected_reason": "wrong",
        }
        | changes
        for rejected in ("B", "C")
    ]
    file = tmp_path / "bench.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return file


def test_the_official_file_is_read_and_ties_are_wrong(tmp_path):
    bench = RewardBench(data=official(tmp_path))
    requests = bench.requests()
    assert [r.id for r in requests] == ["7/0/chosen", "7/0/rejected", "7/1/chosen", "7/1/rejected"]
    assert json.loads(requests[0].prefill)[:2] == ["A", "right"]
    assert requests[0].prompt == user("Which?", images=1)
    rewards = {"7/0/chosen": "1.5", "7/0/rejected": "0.5", "7/1/chosen": "2", "7/1/rejected": "2"}
    suite = bench.score(rewards)
    assert suite.metrics["acc"].value == 0.5
    assert suite.metrics["acc_plus"].value == 0
    assert [item["category"] for item in suite.items] == ["mcq", "mcq"]
    missing = bench.score({name: text for name, text in rewards.items() if name != "7/0/chosen"})
    assert [item["correct"] for item in missing.items] == [False, False]
    assert missing.items[0]["answer"] is None


def test_a_folder_of_frames_becomes_ten_pictures(tmp_path):
    (tmp_path / "clip").mkdir()
    for number in range(25):
        (tmp_path / "clip" / f"{number:03d}.jpg").write_bytes(b"")
    file = official(tmp_path, image=None, video="clip")
    (first, *_) = RewardBench(data=file).requests()
    assert [m.path for m in first.images] == [
        f"clip/{n:03d}.jpg" for n in np.linspace(0, 24, 10).astype(int)
    ]


def test_an_empty_file_is_told(tmp_path):
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(DataError, match="holds no pair"):
        RewardBench(data=tmp_path / "none.jsonl").requests()


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    """A tiny reward model with a random head, saved as training would."""
    folder = tmp_path_factory.mktemp("reward")
    small = Tower(hidden=32, layers=1, heads=4, mlp=32)
    TinyModel(output=str(folder / "base"), image_size=16, vision=small, text=small).build()
    head = {"prompt": "{question} {response}"}
    config = validate(
        {"path": str(folder / "base"), "reward_head": head}, ModelConfig, "test model"
    )
    load_policy(config).save(folder / "model")
    return folder / "model"


@pytest.fixture
def pairs(tmp_path):
    pixels = np.random.RandomState(0).randint(0, 255, (3, 16, 16, 3), dtype=np.uint8)
    rows = [
        Preference(
            id=f"q{n // 2}/{n}",
            prompt=user("Which?", images=1),
            images=(embed(Image.fromarray(pixels[n // 2])),),
            chosen=f"the {n}",
            rejected=f"not {n}",
            chosen_critique="good",
            rejected_critique="bad",
        )
        for n in range(6)
    ]
    write_dataset(tmp_path / "pairs", Preference, rows, builder="test")
    return tmp_path / "pairs"


def test_a_model_is_run_resumed_rescored_and_compared(reward_model, pairs, tmp_path):
    benchmarks = [
        {"name": "reward_bench", "data": str(pairs), "critiques": source, "max_new_tokens": 4}
        for source in ("self", "given", "none")
    ]

    def recipe(name):
        return validate(
            {
                "name": name,
                "model": {"path": str(reward_model)},
                "output": str(tmp_path / name),
                "benchmarks": benchmarks,
            },
            EvalRecipe,
            "test",
        )

    folder = evaluate(recipe("one"))
    results = json.loads((folder / "results.json").read_text())
    assert [s["key"] for s in results["suites"]] == [
        "reward_bench-self", "reward_bench-given", "reward_bench-none"
    ]  # fmt: skip
    for suite in results["suites"]:
        items = [json.loads(line) for line in (folder / suite["items"]).read_text().splitlines()]
        right = [item["chosen_reward"] > item["rejected_reward"] for item in items]
        assert suite["metrics"]["acc"] == pytest.approx(sum(right) / 6)
        low, high = suite["intervals"]["acc"]
        assert low <= suite["metrics"]["acc"] <= high
    written = (folder / "answers.jsonl").read_text()
    evaluate(recipe("one"))
    assert (folder / "answers.jsonl").read_text() == written
    rescore(folder, recipe("one"))
    assert json.loads((folder / "results.json").read_text())["suites"] == results["suites"]
    other = evaluate(recipe("two"))
    found = compare(folder, other)
    assert {c.metric for c in found} == {"acc", "acc_plus"}
    assert all(c.difference == 0 for c in found)
