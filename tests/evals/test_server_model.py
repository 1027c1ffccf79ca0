"""A model behind a server as the one under test: POPE asked over loopback, end to end."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from evals.config import EvalRecipe
from evals.run import evaluate, rescore
from mmalign.config import validate
from mmalign.errors import ConfigError, DataError, ModelError

ANSWERS = {"dog": "Yes.", "cat": "No, there is none.", "car": "Yes", "cup": "It is dark."}
LABELS = {"dog": "yes", "cat": "no", "car": "no", "cup": "yes"}
KEY = "a-key-that-is-told-to-nobody"


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8), "red").save(tmp_path / "images" / "a.png")
    rows = [
        {"question_id": n, "image": "a.png", "text": f"Is there a {thing}?", "label": label}
        for n, (thing, label) in enumerate(LABELS.items())
    ]
    (tmp_path / "pope.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "name": "pope",
        "split": "random",
        "questions": str(tmp_path / "pope.json"),
        "images": str(tmp_path / "images"),
    }


def recipe(data: dict[str, Any], folder: Path, url: str, **model: Any) -> EvalRecipe:
    settings = {
        "engine": "server",
        "model": "served",
        "base_url": url,
        "max_retries": 0,
        "backoff_seconds": 0.01,
        "api_key_env": "SECRET_OF_A_SERVER",
    }
    return validate(
        {
            "name": "base",
            "model": settings | model,
            "output": str(folder / "out"),
            "benchmarks": [data],
            "bootstrap_samples": 50,
        },
        EvalRecipe,
        "test",
    )


def words(body: dict[str, Any]) -> str:
    return next(part["text"] for part in body["messages"][-1]["content"] if "text" in part)


def thing_of(body: dict[str, Any]) -> str:
    return words(body).partition("Is there a ")[2].partition("?")[0]


def by_thing(body: dict[str, Any], number: int) -> dict[str, Any]:
    return {"text": ANSWERS[thing_of(body)]}


def answers(folder: Path) -> dict[str, str | None]:
    rows = (folder / "items" / "pope-random.jsonl").read_text().splitlines()
    return {row["id"]: row["answer"] for row in map(json.loads, rows)}


def suite(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())["suites"][0]


def test_answers_are_those_of_the_server(data, tmp_path: Path, scripted):
    """Right are dog and cat; "It is dark." is a yes officially, and nothing strictly."""
    scripted.script = by_thing
    done = evaluate(recipe(data, tmp_path, scripted.url))
    assert answers(done) == {str(n): text for n, text in enumerate(ANSWERS.values())}
    assert suite(done)["metrics"]["official/accuracy"] == 0.75
    assert suite(done)["metrics"]["strict/accuracy"] == 0.5
    assert suite(done)["num_missing"] == 0
    assert {(body["model"], body["temperature"]) for body in scripted.bodies} == {("served", 0.0)}
    assert {body["max_completion_tokens"] for body in scripted.bodies} == {16}
    for body in scripted.bodies:
        assert words(body).endswith("\nAnswer with a single word or phrase.")
        picture = next(part for part in body["messages"][-1]["content"] if "image_url" in part)
        assert picture["image_url"]["url"].startswith("data:image/")


def test_nothing_is_asked_twice(data, tmp_path: Path, scripted):
    scripted.script = by_thing
    plan = recipe(data, tmp_path, scripted.url)
    first = (evaluate(plan) / "results.json").read_bytes()
    assert (evaluate(plan) / "results.json").read_bytes() == first
    assert (rescore(plan.output, plan) / "results.json").read_bytes() == first
    assert len(scripted.bodies) == 4


def test_a_question_that_the_server_leaves_out_is_asked_again(
    data, tmp_path: Path, scripted, caplog
):
    def without_cat(body: dict[str, Any], number: int) -> dict[str, Any]:
        return {"status": 500} if thing_of(body) == "cat" else by_thing(body, number)

    scripted.script = without_cat
    plan = recipe(data, tmp_path, scripted.url)
    with caplog.at_level(logging.WARNING, logger="mmalign.evals"):
        done = evaluate(plan)
    assert answers(done)["1"] is None
    assert suite(done)["num_missing"] == 1
    # Dog and "It is dark." are right; what is missing is wrong.
    assert suite(done)["metrics"]["official/accuracy"] == 0.5
    (told,) = [one.getMessage() for one in caplog.records if "unanswered" in one.getMessage()]
    assert told.startswith("1 stays unanswered")
    assert "500" in told
    scripted.script = by_thing
    scripted.bodies.clear()
    again = evaluate(plan)
    assert [thing_of(body) for body in scripted.bodies] == ["cat"]
    assert answers(again)["1"] == ANSWERS["cat"]
    assert suite(again)["metrics"]["official/accuracy"] == 0.75


def test_a_server_that_is_down_stops_the_run(data, tmp_path: Path, scripted):
    scripted.script = lambda body, number: {"status": 500}
    with pytest.raises(ModelError, match="3 requests in a row got no answer"):
        evaluate(recipe(data, tmp_path, scripted.url))
    assert not (tmp_path / "out" / "results.json").exists()


def test_neither_key_nor_address_is_written(data, tmp_path: Path, scripted, monkeypatch):
    monkeypatch.setenv("SECRET_OF_A_SERVER", KEY)
    scripted.script = by_thing
    done = evaluate(recipe(data, tmp_path, scripted.url))
    assert set(scripted.keys) == {f"Bearer {KEY}"}
    files = [path for path in done.rglob("*") if path.is_file()]
    assert {"results.json", "answers.jsonl", "model.json"} <= {path.name for path in files}
    for path in files:
        text = path.read_text()
        assert [word for word in (KEY, "SECRET_OF", "base_url", "127.0.0.1") if word in text] == []
    assert json.loads((done / "model.json").read_text())["name"] == "server:served"


def test_where_it_stands_is_not_what_it_says(data, tmp_path: Path, scripted):
    """The same model at another address has the same answers; another model has its own."""
    scripted.script = by_thing
    evaluate(recipe(data, tmp_path, scripted.url))
    evaluate(recipe(data, tmp_path, "http://127.0.0.1:9/v1", concurrency=1))
    assert len(scripted.bodies) == 4
    with pytest.raises(DataError, match=r"results of another model.*model.model=served"):
        evaluate(recipe(data, tmp_path, scripted.url, model="another"))
    (tmp_path / "out" / "results.json").unlink()
    evaluate(recipe(data, tmp_path, scripted.url, model="another"))
    assert len(scripted.bodies) == 8


@pytest.mark.parametrize("name", ["temperature", "top_p", "max_new_tokens"])
def test_how_answers_are_drawn_is_set_by_benchmarks(data, tmp_path: Path, name: str):
    with pytest.raises(ConfigError, match=f"{name} is set by each benchmark; leave it out here"):
        recipe(data, tmp_path, "http://127.0.0.1:9/v1", **{name: 1})


def test_a_server_without_its_engine_is_told_so(data, tmp_path: Path):
    plan = {
        "name": "base",
        "model": {"model": "served", "base_url": "http://127.0.0.1:9/v1"},
        "output": str(tmp_path / "out"),
        "benchmarks": [data],
    }
    with pytest.raises(ConfigError, match="say engine: server as well"):
        validate(plan, EvalRecipe, "test")
