"""VL-RewardBench and Multimodal RewardBench: their files, categories, and means over these."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from evals.benchmarks import multimodal_reward_bench, vl_reward_bench
from evals.benchmarks.multimodal_reward_bench import MultimodalRewardBench
from evals.benchmarks.vl_reward_bench import VlRewardBench, category
from evals.compare import compare
from evals.config import EvalRecipe
from evals.reward_pairs import RewardPairs
from evals.run import evaluate
from evals.stats import intervals
from mmalign.config import validate
from mmalign.errors import DataError
from mmalign.records import Media, user


def png(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), colour).save(buffer, "PNG")
    return buffer.getvalue()


def vl_row(**changes: Any) -> dict[str, Any]:
    return {
        "id": "RLAIF-V-14",
        "query": "<image>\nWhat is it?",
        "response": ["a cat", "a dog"],
        "human_ranking": [0, 1],
    } | changes


def mm_row(**changes: Any) -> dict[str, Any]:
    return {
        "ID": "nocaps_1",
        "Category": "open_generation/correctness_task",
        "Text": "Describe it.",
        "Image": "images/nocaps/1.jpg",
        "Output1": "a cat",
        "Output2": "a dog",
        "Better": "Output2",
    } | changes


def lines(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def score(bench: RewardPairs, *right: bool) -> dict[str, float]:
    """Metrics where the pairs are right or wrong as said."""
    answers = {}
    for pair, good in zip(bench.load(), right, strict=True):
        for side, reward in (("chosen", int(good)), ("rejected", 0)):
            found = {"reward": reward, "critiques": [], "num_written": 0, "num_cut": 0}
            answers[f"{pair.id}/{side}"] = json.dumps(found)
    return {name: metric.value for name, metric in bench.score(answers).metrics.items()}


@pytest.mark.parametrize(
    ("id", "path", "wanted"),
    [
        ("LRVInstruction-000000007746", "images/vlfeedback/x.jpg", "general"),
        ("RLAIF-V-14", "images/rlaif-v/RLAIF-V-14.jpg", "hallucination"),
        ("hallucination_pair-3921", "images/povid/COCO_1.jpg", "hallucination"),
        ("wildvision-battle-542", "images/wildvision-battle/x.jpg", "general"),
        ("mathverse_3414", "images/reasoning_tasks/mathverse_3414.png", "reasoning"),
        ("mmmu_pro_test_Energy_and_Power_312", "images/reasoning_tasks/x.png", "reasoning"),
    ],
)
def test_path_and_id_tell_the_same_category(id: str, path: str, wanted: str):
    """Ids and paths are those of the released data.jsonl."""
    assert category(id) == category(id, path) == wanted


def test_the_path_decides_and_other_collections_are_none():
    assert category("RLAIF-V-14", "images/vlfeedback/x.jpg") == "general"
    assert category("RLHF-V-3") == "hallucination"
    assert category("RLAIF-V-14", "images/other/x.jpg") is None


def test_a_row_of_the_released_file_becomes_two_requests(tmp_path: Path):
    first = vl_row(image_path="images/rlaif-v/RLAIF-V-14.jpg")
    second = vl_row(id="mathverse_1", image_path="images/reasoning_tasks/a.png")
    data = lines(tmp_path / "data.jsonl", first, second | {"human_ranking": [1, 0]})
    bench = VlRewardBench(data=data, critiques="none")
    asked = bench.requests()
    assert [one.id for one in asked] == [
        "RLAIF-V-14/chosen", "RLAIF-V-14/rejected", "mathverse_1/chosen", "mathverse_1/rejected"
    ]  # fmt: skip
    assert asked[0].prompt == user("What is it?", images=1)
    assert asked[0].images == (Media(path="images/rlaif-v/RLAIF-V-14.jpg"),)
    assert asked[0].media_root == tmp_path
    assert [json.loads(one.prefill)[0] for one in asked] == ["a cat", "a dog", "a dog", "a cat"]
    assert bench.key == "vl_reward_bench-none"
    elsewhere = VlRewardBench(data=data, media_root=tmp_path / "pictures")
    assert elsewhere.requests()[0].media_root == tmp_path / "pictures"


def test_acc_counts_pairs_and_macro_acc_categories(tmp_path: Path):
    """General 1 of 1, hallucination 1 of 4, reasoning 1 of 2: 3 / 7, and 1.75 / 3."""
    ids = ["LRV-1", "RLAIF-V-1", "RLHF-V-2", "hallucination_pair-3", "RLHF-V-4", "mmmu_1", "mmmu_2"]
    data = lines(tmp_path / "data.jsonl", *(vl_row(id=id, image=f"{id}.png") for id in ids))
    found = score(VlRewardBench(data=data), True, True, False, False, False, True, False)
    assert found == pytest.approx(
        {
            "acc": 3 / 7,
            "acc/general": 1,
            "acc/hallucination": 1 / 4,
            "acc/reasoning": 1 / 2,
            "macro_acc": 1.75 / 3,
        }
    )


@pytest.mark.parametrize("reward", [float("nan"), float("inf")])
def test_a_reward_that_is_no_number_is_none(tmp_path: Path, reward: float):
    bench = VlRewardBench(data=lines(tmp_path / "a.jsonl", vl_row(image_path="rlaif-v/1.jpg")))
    rewards = {"chosen": reward, "rejected": 0.0}
    told = {"critiques": [], "num_written": 0, "num_cut": 0}
    given = {f"RLAIF-V-14/{s}": json.dumps(told | {"reward": r}) for s, r in rewards.items()}
    (row,) = bench.score(given).items
    assert (row["answer"], row["chosen_reward"], row["correct"]) == (None, None, False)


def test_a_category_without_a_pair_is_left_out_of_the_mean(tmp_path: Path):
    ids = ["LRV-1", "RLAIF-V-1", "RLAIF-V-2"]
    data = lines(tmp_path / "data.jsonl", *(vl_row(id=id, image=f"{id}.png") for id in ids))
    assert score(VlRewardBench(data=data), True, False, False)["macro_acc"] == 1 / 2


def test_the_second_pair_of_an_id_gets_a_number(tmp_path: Path):
    twice = [vl_row(id="mathverse_1063", image="a.png") for _ in range(3)]
    data = lines(tmp_path / "data.jsonl", *twice)
    names = [pair.id for pair in VlRewardBench(data=data).load()]
    assert names == ["mathverse_1063", "mathverse_1063/1", "mathverse_1063/2"]
    repeated = [mm_row(), mm_row(Better="Output1")]
    (tmp_path / "all_data.json").write_text(json.dumps(repeated))
    pairs = MultimodalRewardBench(data=str(tmp_path / "all_data.json")).load()
    assert [pair.id for pair in pairs] == ["nocaps_1", "nocaps_1/1"]
    assert [pair.chosen for pair in pairs] == ["a dog", "a cat"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"image_path": "images/other/a.jpg"}, "lies in no collection"),
        ({"response": ["a cat"]}, "response does not hold two texts"),
        ({"response": ["a cat", 2]}, "response does not hold two texts"),
        ({"human_ranking": [0, 0]}, "human_ranking is wrong"),
        ({"human_ranking": [False, True]}, "human_ranking is wrong"),
        ({"human_ranking": None}, "human_ranking is wrong"),
        ({"query": None}, "query is no text"),
        ({"id": 3}, "id is no text"),
        ({}, "holds no picture"),
    ],
)
def test_a_bad_row_of_vl_reward_bench_is_named(tmp_path: Path, changes: dict, told: str):
    data = lines(tmp_path / "data.jsonl", vl_row(image="a.png"), vl_row(**changes))
    with pytest.raises(DataError, match=rf"data.jsonl, line 2: .*{told}"):
        VlRewardBench(data=data).requests()


@pytest.mark.parametrize(
    ("id", "released", "wanted"),
    [
        ("nocaps_1", "open_generation/correctness_task", ["correctness"]),
        ("visitbench_2", "open_generation/preference_task", ["preference"]),
        ("mmmu-s_3", "knowledge", ["knowledge"]),
        ("MathVista_4", "reasoning", ["reasoning", "math"]),
        ("EMMA-Coding_5", "reasoning", ["reasoning", "coding"]),
        ("PAIRS_6", "safety", ["safety", "bias"]),
        ("memes_7", "safety", ["safety", "toxicity"]),
        ("SEED-Bench_8", "vqa", ["vqa"]),
    ],
)
def test_the_released_script_names_the_areas(tmp_path: Path, id: str, released: str, wanted: list):
    data = lines(tmp_path / "rows.jsonl", mm_row(ID=id, Category=released))
    (item,) = MultimodalRewardBench(data=data).score({}).items
    assert item["categories"] == wanted


def test_macro_acc_is_the_mean_of_areas_not_of_their_parts(tmp_path: Path):
    """Reasoning 1 of 3 (math 1 of 1, coding 0 of 2), vqa 1 of 1: acc 2 / 4, macro 2 / 3."""
    ids = {"mathvista_1": "reasoning", "EMMA_2": "reasoning", "EMMA_3": "reasoning", "q_4": "vqa"}
    rows = [mm_row(ID=id, Category=area) for id, area in ids.items()]
    data = lines(tmp_path / "rows.jsonl", *rows)
    found = score(MultimodalRewardBench(data=data), True, False, False, True)
    assert found == pytest.approx(
        {
            "acc": 1 / 2,
            "acc/reasoning": 1 / 3,
            "acc/math": 1,
            "acc/coding": 0,
            "acc/vqa": 1,
            "macro_acc": 2 / 3,
        }
    )


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"Category": "open_generation"}, "Category is wrong"),
        ({"Better": "Output3"}, "Better is wrong"),
        ({"Text": " "}, "has no prompt.*0_download_data"),
        ({"Text": None}, "has no prompt"),
        ({"Output1": None}, "Output1 is no text"),
        ({"Image": None}, "holds no picture"),
    ],
)
def test_a_bad_row_of_multimodal_reward_bench_is_named(tmp_path: Path, changes: dict, told: str):
    (tmp_path / "all_data.json").write_text(json.dumps([mm_row(), mm_row(ID="x", **changes)]))
    with pytest.raises(DataError, match=rf"all_data.json, row 2: .*{told}"):
        MultimodalRewardBench(data=str(tmp_path / "all_data.json")).requests()


def test_nothing_to_ask_and_critiques_that_are_not_there_are_told(tmp_path: Path):
    (tmp_path / "all_data.json").write_text("[]")
    with pytest.raises(DataError, match="holds no pair"):
        MultimodalRewardBench(data=str(tmp_path / "all_data.json")).requests()
    given = VlRewardBench(data=lines(tmp_path / "d.jsonl", vl_row(image="a")), critiques="given")
    with pytest.raises(DataError, match=r"no critique of the chosen response.*self or none"):
        given.requests()
    with pytest.raises(DataError, match="is not there"):
        VlRewardBench(data=str(tmp_path / "lost.parquet")).requests()


def test_a_mean_over_categories_lies_in_its_interval():
    rows = [
        {"categories": [name], "correct": place % 3 > 0, "num_written": 0, "num_cut": 0}
        for name, count in (("general", 10), ("reasoning", 50))
        for place in range(count)
    ]
    metrics = vl_reward_bench.metrics(rows)
    low, high = intervals(metrics, samples=200)["macro_acc"]
    assert low < metrics["macro_acc"].value < high
    assert metrics.keys() == multimodal_reward_bench.metrics(rows).keys()


def test_a_reward_model_is_run_on_both_and_compared(reward_model: Path, tmp_path: Path):
    """One with its pictures inside the data, one with files; a lost picture makes a pair wrong."""
    rows = [vl_row(id="RLAIF-V-1"), vl_row(id="mmmu_1"), vl_row(id="LRV-1", human_ranking=[1, 0])]
    colours = ("red", "green", "blue")
    table = [
        row | {"image": {"bytes": png(c), "path": None}}
        for row, c in zip(rows, colours, strict=True)
    ]
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "test-0.parquet")
    (tmp_path / "images" / "nocaps").mkdir(parents=True)
    (tmp_path / "images" / "nocaps" / "1.jpg").write_bytes(png("white"))
    lost = mm_row(ID="lost", Image="images/nocaps/2.jpg")
    (tmp_path / "all_data.json").write_text(json.dumps([mm_row(), lost]))
    benchmarks = [
        {"name": "vl_reward_bench", "data": str(tmp_path / "test-0.parquet"), "critiques": "none"},
        {
            "name": "multimodal_reward_bench",
            "data": str(tmp_path / "all_data.json"),
            "critiques": "none",
        },
    ]

    def run(name: str) -> Path:
        data = {"name": name, "model": {"path": str(reward_model)}, "benchmarks": benchmarks}
        data |= {"output": str(tmp_path / name), "bootstrap_samples": 50}
        return evaluate(validate(data, EvalRecipe, "test"))

    folder = run("one")
    results = json.loads((folder / "results.json").read_text())
    embedded, files = results["suites"]
    assert [suite["key"] for suite in results["suites"]] == [
        "vl_reward_bench-none", "multimodal_reward_bench-none"
    ]  # fmt: skip
    items = [json.loads(line) for line in (folder / embedded["items"]).read_text().splitlines()]
    right = [item["chosen_reward"] > item["rejected_reward"] for item in items]
    assert embedded["metrics"]["acc"] == pytest.approx(sum(right) / 3)
    assert embedded["metrics"]["macro_acc"] == pytest.approx(sum(right) / 3)
    assert len({item["image"] for item in items}) == 3
    assert files["num_missing"] == 1
    assert files["metrics"]["acc"] in (0, 1 / 2)
    found = compare(folder, run("two"))
    assert [(c.metric, c.test) for c in found] == [
        ("acc", "mcnemar"), ("macro_acc", "bootstrap")
    ] * 2  # fmt: skip
    assert all(c.difference == 0 for c in found)


def test_other_pictures_are_other_questions(reward_model: Path, tmp_path: Path):
    """Answers are kept by what may change them; of embedded pictures that is the bytes."""
    recipe = {"name": "n", "model": {"path": str(reward_model)}, "output": str(tmp_path / "out")}
    bench = {"name": "vl_reward_bench", "data": str(tmp_path / "a.parquet"), "critiques": "none"}
    counts = []
    for colour in ("red", "red", "blue"):
        row = vl_row(image={"bytes": png(colour), "path": None})
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
        evaluate(validate(recipe | {"benchmarks": [bench]}, EvalRecipe, "test"))
        counts.append(len((tmp_path / "out" / "answers.jsonl").read_text().splitlines()))
    assert counts == [2, 2, 4]
