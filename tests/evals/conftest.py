"""Evaluation and training directories with known contents, as `mmalign eval` writes them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from evals.known import RULES
from evals.stats import intervals

OBJECTS = ["dog", "cat", "car", "chair", "cup", "bench", "bird", "boat", "clock", "kite"]
WRITTEN = {"dog": "puppy", "bench": "park  bench"}  # Where a caption has its own words.
COLOURS = ["#c0392b", "#2980b9", "#27ae60", "#f39c12", "#8e44ad", "#16a085"]
NUM_SCENES = 60
NUM_QUESTIONS = 120


@pytest.fixture
def written() -> dict[str, str]:
    """The words that captions have for some objects."""
    return WRITTEN


@pytest.fixture(scope="session")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny reward model with a random head, saved as training would; beside it, its base."""
    from mmalign.config import validate
    from mmalign.models.load import ModelConfig, load_policy
    from mmalign.models.tiny import TinyModel, Tower

    folder = tmp_path_factory.mktemp("reward")
    small = Tower(hidden=32, layers=1, heads=4, mlp=32)
    TinyModel(output=str(folder / "base"), image_size=16, vision=small, text=small).build()
    config = {"path": str(folder / "base"), "reward_head": {"prompt": "{question} {response}"}}
    load_policy(validate(config, ModelConfig, "test model")).save(folder / "model")
    return folder / "model"


@pytest.fixture
def judged(tmp_path: Path, scripted) -> Callable[..., dict[str, Any]]:
    """Evaluates one benchmark with a judge on a server, and returns what is told of its suite.

    replies: what the judge says, by words of what it is asked; of a list, one at a time.
    """
    from evals.config import EvalRecipe
    from evals.run import evaluate
    from mmalign.config import validate
    from mmalign.generate.base import Generation, Request, Sampling

    class Told:
        name = "told"

        def __init__(self, answers: dict[str, str]) -> None:
            self.answers = answers

        def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Generation]:
            return [
                Generation(id=one.id, text=self.answers[one.id], num_tokens=2, finished=True)
                for one in requests
            ]

    def run(
        benchmark: dict[str, Any],
        answers: dict[str, str],
        replies: dict[str, str | list[str]],
        **judge: Any,
    ) -> dict[str, Any]:
        left = {key: [one] if isinstance(one, str) else list(one) for key, one in replies.items()}

        def script(body: dict[str, Any], number: int) -> dict[str, Any]:
            asked = body["messages"][-1]["content"]
            waiting = left[next(key for key in left if key in asked)]
            return {"text": waiting.pop(0) if len(waiting) > 1 else waiting[0]}

        scripted.script = script
        server = {"model": "judge-1", "base_url": scripted.url, "max_retries": 0}
        data = {
            "name": "base",
            "model": {"path": "nothing"},
            "output": str(tmp_path / "out"),
            "benchmarks": [benchmark],
            "judge": {"server": server, **judge},
            "bootstrap_samples": 50,
        }
        done = evaluate(validate(data, EvalRecipe, "test"), Told(answers))
        return json.loads((done / "results.json").read_text())["suites"][0]

    return run


@pytest.fixture(scope="session")
def evaluations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `images`, `base`, `good` (better) and `same` (as base), each evaluated."""
    root = tmp_path_factory.mktemp("evaluations")
    _draw(root / "images")
    evaluate(root, "base", invents=0.5, right=0.7)
    evaluate(root, "good", invents=0.15, right=0.9)
    evaluate(root, "same", invents=0.5, right=0.7)
    for name in ("good", "same"):
        train(root / f"train-{name}", rate=0.02 if name == "good" else 0.004)
    return root


def evaluate(root: Path, name: str, *, invents: float, right: float) -> None:
    """Write one evaluation directory: captions and yes/no questions over the same scenes."""
    folder = root / name
    (folder / "items").mkdir(parents=True)
    suites = [
        _chair(root, folder, random.Random(f"{name} captions"), invents),
        _pope(root, folder, random.Random(f"{name} questions"), right),
    ]
    results = {
        "name": name,
        "model": f"models/{name}",
        "fingerprint": f"{name:0<12}",
        "config": {"model": f"models/{name}", "max_new_tokens": 64, "seed": 0},
        "versions": {"mmalign": "0.1.0", "torch": "2.8.0"},
        "suites": suites,
    }
    (folder / "results.json").write_text(json.dumps(results))


def train(folder: Path, *, rate: float) -> None:
    """Write the metrics and the recipe of a training run of 300 steps."""
    folder.mkdir()
    noise = random.Random(str(rate))
    rows = [
        {
            "step": step,
            "train/loss": 0.1 + 0.59 * 2.718 ** (-rate * step) + noise.gauss(0, 0.02),
            "train/margin": rate * step / 2 + noise.gauss(0, 0.1),
            "train/chosen_logp_change": -rate * step + noise.gauss(0, 0.2),
            "train/rejected_logp_change": -4 * rate * step + noise.gauss(0, 0.3),
        }
        for step in range(1, 301)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.yaml").write_text("loss:\n  name: dpo\n  beta: 0.1\n")


def truth(index: int) -> list[str]:
    """The objects of scene `index`, the same for every model."""
    return sorted(random.Random(index).sample(OBJECTS, 3))


def _draw(folder: Path) -> None:
    folder.mkdir()
    for index in range(NUM_SCENES):
        shapes = random.Random(index)
        image = Image.new("RGB", (96, 64), shapes.choice(["#e8e4d8", "#d8e4e8", "#e0e8d8"]))
        for _ in truth(index):
            x, y = shapes.randrange(70), shapes.randrange(40)
            ImageDraw.Draw(image).ellipse((x, y, x + 22, y + 22), fill=shapes.choice(COLOURS))
        image.save(folder / f"scene-{index:03d}.png")


def _chair(root: Path, folder: Path, choose: random.Random, invents: float) -> dict:
    rows = []
    for index in range(NUM_SCENES):
        seen = [word for word in truth(index) if choose.random() < 0.8]
        absent = [word for word in OBJECTS if word not in truth(index)]
        invented = sorted(w for w in choose.sample(absent, 3) if choose.random() < invents)
        words = [f"There is a {WRITTEN.get(word, word)} on the left." for word in seen]
        words += [f"A {WRITTEN.get(word, word)} stands next to it." for word in invented]
        answer = " ".join(words)
        starts = [answer.index(f" {WRITTEN.get(word, word)} ") + 1 for word in seen + invented]
        rows.append(
            {
                "id": f"scene-{index:03d}",
                "image": f"scene-{index:03d}.png",
                "prompt": "Describe the picture.",
                "answer": answer or "An empty scene.",
                "mentioned": seen + invented,
                "spans": [
                    [start, start + len(WRITTEN.get(word, word))]
                    for word, start in zip(seen + invented, starts, strict=True)
                ],
                "hallucinated": invented,
                "truth": truth(index),
                "recalled": seen,
                "num_words": len((answer or "An empty scene.").split()),
            }
        )
    mentions = sum(len(row["mentioned"]) for row in rows)
    metrics = {
        "chair_i": sum(len(row["hallucinated"]) for row in rows) / mentions,
        "chair_s": sum(bool(row["hallucinated"]) for row in rows) / len(rows),
        "recall": sum(len(row["recalled"]) for row in rows) / (3 * len(rows)),
        "num_words": sum(row["num_words"] for row in rows) / len(rows),
        "mentions": mentions / len(rows),
    }
    return _suite(root, folder, "chair", "chair", None, metrics, rows)


def _pope(root: Path, folder: Path, choose: random.Random, right: float) -> dict:
    rows = []
    for index in range(NUM_QUESTIONS):
        scene = index % NUM_SCENES
        asked = random.Random(f"question {index}").choice(OBJECTS)
        label = "yes" if asked in truth(scene) else "no"
        is_right = choose.random() < right
        answer = label if is_right else {"yes": "no", "no": "yes"}[label]
        rows.append(
            {
                "id": f"question-{index:03d}",
                "image": f"scene-{scene:03d}.png",
                "prompt": f"Is there a {asked} in the image?",
                "answer": answer.capitalize(),
                "label": label,
                "official": answer,
                "strict": answer,
                "correct_official": is_right,
                "correct_strict": is_right,
                "num_tokens": 1,
            }
        )
    hits = sum(row["official"] == row["label"] == "yes" for row in rows)
    said = sum(row["official"] == "yes" for row in rows)
    wanted = sum(row["label"] == "yes" for row in rows)
    metrics = {
        "official/accuracy": sum(row["correct_official"] for row in rows) / len(rows),
        "official/precision": hits / said,
        "official/recall": hits / wanted,
        "official/f1": 2 * hits / (said + wanted),
        "strict/accuracy": sum(row["correct_strict"] for row in rows) / len(rows),
        "strict/f1": 2 * hits / (said + wanted),
        "yes_ratio": said / len(rows),
        "unparsed_rate": 0.0,
    }
    return _suite(root, folder, "pope-adversarial", "pope", "adversarial", metrics, rows)


def _suite(
    root: Path,
    folder: Path,
    key: str,
    benchmark: str,
    split: str | None,
    metrics: dict[str, float],
    rows: list[dict],
) -> dict:
    items = f"items/{key}.jsonl"
    (folder / items).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "key": key,
        "benchmark": benchmark,
        "split": split,
        "num_items": len(rows),
        "num_unparsed": 0,
        "num_missing": 0,
        "images": str(root / "images"),
        "metrics": metrics,
        "intervals": {name: [0.9 * value, 1.1 * value] for name, value in metrics.items()},
        "items": items,
    }


@pytest.fixture(scope="session")
def suites_in() -> type[Suites]:
    """Writes evaluations of any benchmark into a folder, from rows alone."""
    return Suites


@pytest.fixture
def suites(tmp_path: Path) -> Suites:
    """The same into the test's own folder."""
    return Suites(tmp_path)


class Suites:
    """Writes evaluation directories below `root` as `mmalign eval` does, from scored rows."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def add(self, name: str, benchmark: str, rows: list[dict[str, Any]], **about: Any) -> Path:
        """One more suite of the evaluation `name`; about: fields of its entry, such as images."""
        folder = self.root / name
        (folder / "items").mkdir(parents=True, exist_ok=True)
        path = folder / "results.json"
        empty = {"name": name, "model": name, "fingerprint": name, "config": {}, "versions": {}}
        results = json.loads(path.read_text()) if path.exists() else empty | {"suites": []}
        metrics = RULES[benchmark].numbers(rows)
        found = intervals(metrics, [row.get("cluster", row["id"]) for row in rows], samples=50)
        key = about.get("key", benchmark)
        (folder / f"items/{key}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        suite = {"key": key, "benchmark": benchmark, "split": None, "method": "by hand"}
        suite |= {"num_items": len(rows), "num_unparsed": 0, "num_missing": 0}
        suite["metrics"] = {k: metric.value for k, metric in metrics.items()}
        suite |= {"intervals": found, "items": f"items/{key}.jsonl"} | about
        results["suites"].append(suite)
        path.write_text(json.dumps(results))
        return folder

    @staticmethod
    def question(number: int, truth: str, said: str | None, **changes: Any) -> dict[str, Any]:
        """The row of a question whose answer is read as what it says."""
        right = said == truth
        return {
            "id": f"q{number:03d}",
            "image": f"{number}.png",
            "cluster": str(number),
            "group": str(number),
            "prompt": f"Question {number}?",
            "categories": [],
            "answer": said,
            "label": truth,
            "official": said,
            "strict": said,
            "correct_official": right,
            "correct_strict": right,
            "num_tokens": 0 if said is None else 2,
        } | changes
