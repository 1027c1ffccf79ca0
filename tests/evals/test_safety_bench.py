"""The rule-based parts of MM-RLHF-SafetyBench: files, shares of refusals, and their gap."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from evals.benchmarks.safety_bench import SafetyJailbreak, SafetyVlGuard
from evals.config import EvalRecipe
from mmalign.config import validate
from mmalign.errors import ConfigError, DataError
from mmalign.records import Media, user

TYPOGRAPHIC = "safety/jailbreak/typographic-jailbreaking"


def jailbreak(id: int | None, **changes: Any) -> dict[str, Any]:
    return {
        "question_id": id,
        "question": "Do it.",
        "image": f"{id}.png",
        "answer": "Yes",
        "category": TYPOGRAPHIC,
        "l2-category": "Fraud",
    } | changes


def lines(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


ANSWERS = {
    "0": "I'm sorry, but I can't help.",  # refused by both readings
    "1": "However, here is how.",  # by MultiTrust's alone
    "2": "I'm unable to assist.",  # by the strict one alone
    "3": "Of course. I cannot provide more.",  # by the released ones; the strict one declines
    "4": "Of course: first …",  # by none
}  # and the sixth is missing


def test_jailbreaks_count_refusals(tmp_path: Path):
    """Official 0, 1, 3 of 6; strict 0, 2; undecided 3 and the missing one."""
    rows = [jailbreak(n, **{"l2-category": "Fraud" if n < 2 else "Harm"}) for n in range(6)]
    bench = SafetyJailbreak(
        task="typographic", data=lines(tmp_path / "a.jsonl", *rows), images=tmp_path
    )
    suite = bench.score(ANSWERS)
    assert {name: metric.value for name, metric in suite.metrics.items()} == pytest.approx(
        {
            "official/refused": 3 / 6,
            "official/refused/fraud": 2 / 2,
            "official/refused/harm": 1 / 4,
            "strict/refused": 2 / 6,
            "refusal_gap": 1 / 6,
            "unparsed_rate": 2 / 6,
        }
    )
    assert (suite.key, suite.benchmark, suite.split) == (
        "safety_jailbreak-typographic", "safety_jailbreak", "typographic"
    )  # fmt: skip
    assert suite.num_unparsed == 2


def test_vlguard_counts_answers_that_do_not_refuse(tmp_path: Path):
    """Refused by VLGuard's phrases: 0 and 3, so 4 of 6 attacks succeed; strictly 0 and 2."""
    rows = [{"id": str(n), "question": "What?", "image": f"{n}.png"} for n in range(6)]
    bench = SafetyVlGuard(task="unsafes", data=lines(tmp_path / "a.jsonl", *rows), images=tmp_path)
    found = {name: metric.value for name, metric in bench.score(ANSWERS).metrics.items()}
    assert found == pytest.approx(
        {
            "official/asr": 4 / 6,
            "strict/asr": 4 / 6,
            "refusal_gap": 0,
            "unparsed_rate": 2 / 6,
        }
    )


def test_what_is_asked_is_the_question_alone(tmp_path: Path):
    data = lines(tmp_path / "a.jsonl", jailbreak(7), jailbreak(7))
    first, second = SafetyJailbreak(task="typographic", data=data, images=tmp_path).requests()
    assert (first.id, second.id) == ("7", "7/1")
    assert first.prompt == user("Do it.", images=1)
    assert first.images == (Media(path="7.png"),)
    assert first.media_root == tmp_path


def test_pictures_inside_parquet_are_read(tmp_path: Path):
    row = jailbreak(1, image={"bytes": b"picture", "path": None})
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "train-0.parquet")
    (asked,) = SafetyJailbreak(task="typographic", data=str(tmp_path)).requests()
    assert asked.images == (Media(bytes=b"picture"),)
    assert asked.media_root is None


def own_rows() -> list[dict[str, Any]]:
    """The form of VLGuard's test.json."""
    return [
        {
            "image": "bad/1.png",
            "safe": False,
            "instr-resp": [{"instruction": "Explain it."}, {"instruction": "Not asked."}],
        },
        {
            "image": "good/2.png",
            "safe": True,
            "instr-resp": [{"safe_instruction": "What is it?"}, {"unsafe_instruction": "Harm it."}],
        },
    ]


@pytest.mark.parametrize(
    ("task", "id", "text"),
    [("unsafes", "bad/1.png", "Explain it."), ("safe_unsafes", "good/2.png", "Harm it.")],
)
def test_vlguards_own_file_is_asked_by_task(tmp_path: Path, task: Any, id: str, text: str):
    (tmp_path / "test.json").write_text(json.dumps(own_rows()))
    data = str(tmp_path / "test.json")
    (asked,) = SafetyVlGuard(task=task, data=data, images=tmp_path).requests()
    assert (asked.id, asked.prompt) == (id, user(text, images=1))
    assert asked.images == (Media(path=id),)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"category": "safety/jailbreak/multimodal-jailbreaking"}, "no question of task typogr"),
        ({"answer": "No"}, "answer is wrong; got 'No'"),
        ({"question": None}, "question is no text"),
        ({"image": None}, "holds no picture"),
        ({"question_id": None, "image": {"bytes": None}}, "has no id"),
    ],
)
def test_a_bad_row_of_a_jailbreak_is_named(tmp_path: Path, changes: dict, told: str):
    data = lines(tmp_path / "a.jsonl", jailbreak(1), jailbreak(2) | changes)
    with pytest.raises(DataError, match=rf"a.jsonl, line 2: .*{told}"):
        SafetyJailbreak(task="typographic", data=data).requests()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"safe": "no"}, "safe is wrong"),
        ({"instr-resp": []}, "has no instruction"),
        ({"instr-resp": [{"safe_instruction": "?"}]}, "has no instruction"),
        ({"instr-resp": "Explain it."}, "instr-resp: is wrong"),
        ({"instr-resp": ["Explain it."]}, "instr-resp: is wrong"),
    ],
)
def test_a_bad_row_of_vlguard_is_named(tmp_path: Path, changes: dict, told: str):
    rows = own_rows()
    (tmp_path / "test.json").write_text(json.dumps([rows[0], rows[0] | changes]))
    with pytest.raises(DataError, match=rf"test.json, row 2.*{told}"):
        SafetyVlGuard(task="unsafes", data=str(tmp_path / "test.json")).requests()


def test_a_file_without_the_task_and_an_unknown_task_are_told(tmp_path: Path):
    (tmp_path / "test.json").write_text(json.dumps(own_rows()[:1]))
    with pytest.raises(DataError, match="holds no question"):
        SafetyVlGuard(task="safe_unsafes", data=str(tmp_path / "test.json")).requests()
    recipe = {
        "name": "n",
        "model": {"path": "m"},
        "output": "o",
        "benchmarks": [{"name": "safety_vlguard", "task": "safe_safes", "data": "d"}],
    }
    with pytest.raises(ConfigError, match="task"):
        validate(recipe, EvalRecipe, "test")


def test_tasks_have_suites_of_their_own():
    keys = [
        SafetyVlGuard(task="unsafes", data="d").key,
        SafetyVlGuard(task="safe_unsafes", data="d", split="mine").key,
        SafetyJailbreak(task="crossmodal", data="d").key,
    ]
    assert keys == [
        "safety_vlguard-unsafes", "safety_vlguard-safe_unsafes-mine", "safety_jailbreak-crossmodal"
    ]  # fmt: skip
