"""Probes: what is asked and counted, and that training does not know of them."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmalign.config import validate
from mmalign.errors import ConfigError, MediaError, SchemaMismatch, TrainingError
from mmalign.generate.base import Generation
from mmalign.generate.local import LocalGenerator
from mmalign.media import embed
from mmalign.records import Media, Verifiable, user
from mmalign.store import write_dataset
from trainers.config import Recipe
from trainers.loop import Saved, Stepped, Validated, train

LORA = {"rank": 4, "alpha": 8}
RIGHT = "<think> seen </think> <answer> \\boxed{7} </answer>"
# Form, and what the verifier says of it.
ANSWERS = [
    RIGHT,
    RIGHT.replace("7", "8"),  # in form, wrong
    "it is \\boxed{7}",  # right, in no form
    "seven",  # neither
    RIGHT.replace("7", "x"),  # in form, and cannot be told
]


def question(number: int, wording: str, **changes: Any) -> Verifiable:
    pixels = np.random.default_rng(number).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    values = {
        "id": f"row-{number}",
        "prompt": user(f"{wording} {number}?", images=1),
        "images": (embed(Image.fromarray(pixels)),),
        "answer": "7",
        "verifier": "number",
    }
    return Verifiable(**(values | changes))


@pytest.fixture
def asked(tmp_path: Path) -> dict[str, str]:
    """Datasets of ten questions each: `id`, and `ood`, of which one has no readable answer."""
    rows = [question(n, "What is") for n in range(10)]
    write_dataset(tmp_path / "id", Verifiable, rows)
    rows = [question(n, "So, what is", answer="cat" if n == 9 else "7") for n in range(10)]
    write_dataset(tmp_path / "ood", Verifiable, rows)
    return {name: str(tmp_path / name) for name in ("id", "ood")}


@pytest.fixture
def probe(asked) -> dict[str, Any]:
    return {
        "every_steps": 2,
        "id": {"data": asked["id"], "num_rows": 5},
        "ood": {"data": asked["ood"], "num_rows": 10},
        "decoding": {"max_new_tokens": 6, "batch_size": 4},
    }


@pytest.fixture
def made(recipe, asked, tmp_path: Path) -> Callable[..., Recipe]:
    """A recipe of three steps for one of three kinds of training."""

    def of(kind: str, name: str = "run", **changes: Any) -> Recipe:
        values: dict[str, Any] = {
            "optim": {"lr": 1e-2, "batch_size": 2, "steps": 3},
            "run": {"output": str(tmp_path / name), "log_every_steps": 1, "save_every_steps": 2},
        }
        if kind == "grpo":
            values["data"] = {"path": asked["id"]}
            values["rollouts"] = {"group_size": 2, "decoding": {"max_new_tokens": 4}}
        return recipe(loss={"name": kind}, **(values | changes))

    return of


def lines(made: Recipe) -> list[dict[str, float]]:
    return [json.loads(one) for one in (made.run.output / "metrics.jsonl").read_text().splitlines()]


def weights(made: Recipe) -> bytes:
    (file,) = (made.run.output / "model").glob("*.safetensors")
    return file.read_bytes()


def said(monkeypatch, answer: Callable[[int, str], str]) -> list[list[str]]:
    """Lets a test answer the probes' questions: by the number of the probe and the question's id.

    Returns the ids that were asked for, a list for each kind of each probe.
    """
    asked: list[list[str]] = []
    times: list[str] = []

    def generate(self: Any, requests: Any, sampling: Any) -> list[Generation]:
        asked.append([request.id for request in requests])
        times.append(requests[0].id.split("/")[1])
        turn = times.count(times[-1]) - 1
        return [
            Generation(id=r.id, text=answer(turn, r.id), num_tokens=3, finished=True,
                       token_ids=(1, 2, 3, 4))
            for r in requests
        ]  # fmt: skip

    monkeypatch.setattr(LocalGenerator, "generate", generate)
    return asked


@pytest.mark.parametrize("kind", ["sft", "dpo", "grpo"])
def test_training_is_the_same_to_the_bit_with_a_probe(made, probe, kind):
    probe["decoding"]["temperature"] = 1.0  # Draws random numbers.
    bare, probed = made(kind, "bare"), made(kind, "probed", probe=probe)
    for one in (bare, probed):
        events = list(train(one))
    assert weights(bare) == weights(probed)
    assert [e.step for e in events if isinstance(e, Validated)] == [0, 2, 3]
    found = lines(probed)
    assert [line["step"] for line in found] == [0, 1, 2, 2, 3, 3]
    assert [e.step for e in events if isinstance(e, Stepped)] == [1, 2, 3]
    for line in found:
        assert ("train/loss" in line) != ("probe/id/format" in line)
    shown = [line for line in found if "probe/id/format" in line]
    assert [{"step": e.step, **e.metrics} for e in events if isinstance(e, Validated)] == shown
    for line in shown:
        rates = {k: v for k, v in line.items() if "tokens" not in k and k != "step"}
        assert all(0 <= rate <= 1 for rate in rates.values())
        assert set(rates) == {
            *(f"probe/{name}/{key}" for name in ("id", "ood")
              for key in ("format", "finished", "accuracy", "undecided")),
            "gf/raw", "gf/relative",
        }  # fmt: skip
        assert 1 <= line["probe/id/response_tokens"] <= 6
    # All but timings: a probe's own time is no training's.
    loss = [line["train/loss"] for line in lines(bare)]
    assert loss == [line["train/loss"] for line in found if "train/loss" in line]


def test_rates_and_factors_by_hand(made, probe, monkeypatch, caplog):
    """id is answered in all five ways; ood with one right answer, then with more."""

    def answer(turn: int, id: str) -> str:
        number = int(id.rpartition("-")[2])
        if "/id/" in id:
            return ANSWERS[number // 2]
        return RIGHT if number < (2, 4, 8)[turn] else "no"

    asked = said(monkeypatch, answer)
    recipe = made("sft", probe=probe)
    with caplog.at_level(logging.INFO, logger="mmalign"):
        first, second, last = [e.metrics for e in train(recipe) if isinstance(e, Validated)]
    # Spread evenly, and the same at every step.
    assert asked[0] == [f"probe/id/row-{n}" for n in (0, 2, 4, 6, 8)]
    assert asked[1] == [f"probe/ood/row-{n}" for n in range(10)]
    assert asked[2:] == asked[:2] * 2
    assert first["probe/id/format"] == pytest.approx(3 / 5)
    assert first["probe/id/accuracy"] == pytest.approx(2 / 5)
    assert first["probe/id/undecided"] == pytest.approx(1 / 5)
    assert first["probe/id/response_tokens"] == 4
    assert first["probe/ood/format"] == pytest.approx(2 / 10)
    # The tenth question has no answer to compare with.
    assert last["probe/ood/accuracy"] == pytest.approx(8 / 9)
    assert first["gf/raw"] == pytest.approx(5 * 0.6 * 0.2 / (4 * 0.6 + 0.2))
    assert first["gf/relative"] == 0
    assert second["gf/raw"] == pytest.approx(5 * 0.6 * 0.4 / (4 * 0.6 + 0.4))
    assert second["gf/relative"] == 0  # In distribution nothing was gained.
    assert "10 rows of" in caplog.text
    assert "9 of them with an answer that can be checked" in caplog.text
    assert "id/format 0.6000  id/accuracy 0.4000  ood/format 0.2000" in caplog.text
    written = (recipe.run.output / "probe" / "step-000000.jsonl").read_text().splitlines()
    told = [json.loads(line) for line in written]
    assert len(told) == 5 + 8
    assert [one["correct"] for one in told[:5]] == [True, False, True, False, None]
    assert told[4]["reason"] == "unread"
    assert told[2] == {
        "step": 0, "set": "id", "id": "row-4", "response": ANSWERS[2], "format": 0.0,
        "correct": True, "reason": "equal",
    }  # fmt: skip


def test_gains_count_from_the_first_probe_also_after_a_resume(made, probe, monkeypatch, caplog):
    def answer(turn: int, id: str) -> str:
        return RIGHT if int(id.rpartition("-")[2]) < (2, 4, 8)[turn] else "no"

    said(monkeypatch, answer)
    whole = made("dpo", "whole", probe=probe)
    gained = [e.metrics["gf/relative"] for e in train(whole) if isinstance(e, Validated)]
    # id: rows 0, 2, 4, 6, 8, so 1, 2, 4 of 5. ood: 2, 4, 8 of 10.
    assert gained == pytest.approx([0, 0.2, 0.6])

    said(monkeypatch, answer)
    stopped = made("dpo", "stopped", probe=probe)
    for event in train(stopped):
        if isinstance(event, Saved):
            break
    said(monkeypatch, lambda turn, id: answer(2, id))
    assert [e.step for e in train(stopped) if isinstance(e, Validated)] == [3]
    assert [x.get("gf/relative") for x in lines(stopped)] == [
        x.get("gf/relative") for x in lines(whole)
    ]
    assert weights(stopped) == weights(whole)
    assert "no first probe" not in caplog.text


def test_another_probe_counts_its_gains_from_its_own_first(made, probe, monkeypatch, caplog):
    """A probe changes no weight, so a resumed run may have another one, or its first."""
    said(monkeypatch, lambda turn, id: RIGHT if turn else "no")
    for event in train(made("sft")):
        if isinstance(event, Saved):
            break
    with caplog.at_level(logging.WARNING, logger="mmalign"):
        (last,) = [e for e in train(made("sft", probe=probe)) if isinstance(e, Validated)]
    assert last.metrics["gf/relative"] == 0
    assert "no first probe by these settings" in caplog.text
    assert "gf/relative counts from step 3 on" in caplog.text


def test_damaged_first_probe_is_an_error(made, probe, monkeypatch):
    said(monkeypatch, lambda turn, id: "no")
    recipe = made("sft", probe=probe)
    for event in train(recipe):
        if isinstance(event, Saved):
            break
    (recipe.run.output / "probe" / "first.json").write_text("{}")
    with pytest.raises(TrainingError, match=r"first\.json: is damaged"):
        list(train(recipe))


def test_without_questions_out_of_distribution_there_is_no_factor(made, probe, monkeypatch):
    said(monkeypatch, lambda turn, id: "no")
    del probe["ood"]
    recipe = made("sft", probe=probe)
    (*_, last) = [e.metrics for e in train(recipe) if isinstance(e, Validated)]
    assert not [name for name in last if name.startswith(("gf/", "probe/ood"))]
    assert not (recipe.run.output / "probe" / "first.json").exists()


def test_bad_input_is_told_before_training(made, probe, asked, pairs, tmp_path):
    probe["id"]["num_rows"] = 11
    with pytest.raises(SchemaMismatch, match=r"probe.id asks for more rows .*got 10 rows"):
        list(train(made("sft", probe=probe)))
    probe["id"] = {"data": str(pairs), "num_rows": 5}
    with pytest.raises(SchemaMismatch, match="holds preference records"):
        list(train(made("sft", probe=probe)))
    broken = [question(0, "What", images=(Media(bytes=b"no picture"),))]
    write_dataset(tmp_path / "broken", Verifiable, broken)
    probe["id"] = {"data": str(tmp_path / "broken"), "num_rows": 1}
    with pytest.raises(MediaError, match=r"broken: a picture of probe.id cannot be shown"):
        list(train(made("sft", probe=probe)))
    values = made("sft", probe=probe).model_dump(mode="json") | {"loss": {"name": "reward"}}
    with pytest.raises(ConfigError, match="loss 'reward' trains a reward model"):
        validate(values, Recipe, "test")
