"""Answers from two workers on Ray, of which one is killed: the results are those of local."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from evals.config import EvalRecipe
from evals.run import evaluate
from mmalign.config import validate
from mmalign.engines import LocalEngine, RayEngine
from mmalign.errors import MediaError
from mmalign.generate.base import Generation

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="needs the extra ray")
RAY = RayEngine(workers=2)
NUM_QUESTIONS = 24


@pytest.fixture(scope="module", autouse=True)
def two_workers() -> Iterator[None]:
    with RAY.open():
        from ray import cloudpickle

        # Workers cannot import a test module.
        cloudpickle.register_pickle_by_value(sys.modules[__name__])
        yield
        cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


class Parrot:
    """Answers from the question's hash; dies or fails once at questions, and tells what it did."""

    name = "parrot"

    def __init__(self, folder: Path, *, dies_at: str = "", fails_at: str = "") -> None:
        self.folder, self.dies_at, self.fails_at = folder, dies_at, fails_at

    def generate(self, requests, sampling):
        ids = [request.id for request in requests]
        if self.dies_at in ids and not (self.folder / "died").exists():
            (self.folder / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fails_at in ids:
            raise RuntimeError("out of memory")
        if any(request.images[0].path == "2.jpg" for request in requests):
            raise MediaError("cannot be decoded", where="2.jpg")
        with open(self.folder / "asked", "a") as file:
            file.write("".join(f"{id} " for id in ids))
        return [self._answer(id) for id in ids]

    def _answer(self, id: str) -> Generation:
        pick = hashlib.sha256(id.encode()).digest()[0]
        return Generation(id=id, text=["Yes.", "No."][pick % 2], num_tokens=pick, finished=True)

    def asked(self) -> list[str]:
        return (self.folder / "asked").read_text().split()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: a recipe's paths are relative to it, in workers too."""
    monkeypatch.chdir(tmp_path)
    Path("p").mkdir()
    rows = [
        {"question_id": i, "image": f"{i // 3}.jpg", "text": f"Is there a {i}?"}
        | {"label": "yes" if i % 2 else "no"}
        for i in range(NUM_QUESTIONS)
    ]
    Path("questions.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("objects.jsonl").write_text('{"image": "0.jpg", "objects": ["dog"]}\n')
    Path("synonyms.txt").write_text("dog, puppy\n")
    return tmp_path


def recipe(output: str, engine: LocalEngine | RayEngine) -> EvalRecipe:
    pope = {"name": "pope", "split": "random", "questions": "questions.json", "images": "p"}
    chair = {"name": "chair", "images": "p", "objects": "objects.jsonl", "synonyms": "synonyms.txt"}
    data = {
        "name": "trial",
        "model": {"path": "none/such"},
        "output": output,
        "batch_size": 1,
        "bootstrap_samples": 50,
        "benchmarks": [pope, chair],
        "engine": engine,
    }
    return validate(data, EvalRecipe, "recipe")


def scores(folder: Path) -> dict[str, bytes]:
    files = [folder / "results.json", folder / "model.json", *sorted(folder.glob("items/*"))]
    return {file.name: file.read_bytes().replace(folder.name.encode(), b"output") for file in files}


def lines(folder: Path) -> list[str]:
    return sorted((folder / "answers.jsonl").read_text().splitlines())


def test_a_killed_worker_changes_no_score(folder: Path) -> None:
    local = evaluate(recipe("local", LocalEngine()), Parrot(folder))
    ray = evaluate(recipe("ray", RAY), Parrot(folder, dies_at="9"))
    assert (folder / "died").exists()
    assert scores(ray) == scores(local)
    assert lines(ray) == lines(local)
    suite = json.loads((ray / "results.json").read_text())["suites"][0]
    assert (suite["num_items"], suite["num_missing"]) == (NUM_QUESTIONS, 3)


def test_what_was_answered_before_an_error_is_kept(folder: Path) -> None:
    with pytest.raises(RuntimeError, match="out of memory") as caught:
        evaluate(recipe("ray", RAY), Parrot(folder, fails_at="17"))
    (note,) = caught.value.__notes__
    assert note == "pope-random stopped at 16 … 19; the answers so far are kept in ray"
    answered = {row["id"] for line in lines(Path("ray")) if (row := json.loads(line))["text"]}
    assert answered

    (folder / "asked").unlink()
    evaluate(recipe("ray", LocalEngine()), again := Parrot(folder))
    assert not answered & set(again.asked())
    local = evaluate(recipe("local", LocalEngine()), Parrot(folder))
    assert scores(Path("ray")) == scores(local)
