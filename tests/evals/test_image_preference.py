"""Pictures drawn, judged, compared: win rates by hand, resuming, and the report's grid."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from evals.compare import compare
from evals.image_preference import ImagePreferenceRecipe, evaluate, win_rates
from evals.report import ReportRecipe, collect
from evals.report_page import write
from evals.report_tables import value_tables
from evals.report_words import sentences
from mmalign.cli import run as command
from mmalign.config import dump_yaml, validate
from mmalign.diffusion.sampling import Draw
from mmalign.diffusion.tiny import TinyPipeline
from mmalign.errors import ConfigError, DataError
from mmalign.generate.base import request_seed

JUDGES = [{"name": "digit_style", "style": "bold"}, {"name": "digit_reader"}]
PROMPTS = ("zero", "one", "two", "three")


class Painter:
    """Grey squares, `darker` by so many levels than their noise says."""

    def __init__(self, name: str, darker: int = 0) -> None:
        self.name, self.darker = name, darker
        self.drawn: list[Draw] = []

    def draw(self, draws: list[Draw]) -> list[Image.Image]:
        self.drawn += draws
        greys = [100 + request_seed(one.seed, one.id) % 100 - self.darker for one in draws]
        return [Image.new("RGB", (32, 32), (grey,) * 3) for grey in greys]


class Ink:
    name = "ink"

    def __init__(self) -> None:
        self.seen = 0

    def score(self, prompts: list[str], pictures: list[Image.Image]) -> list[float]:
        self.seen += len(pictures)
        return [-float(np.asarray(picture).mean()) for picture in pictures]


class Reader(Ink):
    name = "reader"

    def score(self, prompts: list[str], pictures: list[Image.Image]) -> list[float]:
        self.seen += len(pictures)
        return [1.0 if prompt == "two" else 0.0 for prompt in prompts]


def recipe(tmp_path: Path, name: str, **changes: Any) -> ImagePreferenceRecipe:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    values = {
        "name": name,
        "model": {"path": name},
        "output": str(tmp_path / name),
        "prompts": str(prompts),
        "per_prompt": 3,
        "sampling": {"num_steps": 1, "guidance": 1.0, "size": 32, "batch_size": 5},
        "judges": JUDGES,
        "bootstrap_samples": 200,
    }
    return validate(values | changes, ImagePreferenceRecipe, "test")


def judges() -> dict[str, Any]:
    return {"digit_style": Ink(), "digit_reader": Reader()}


def evaluated(tmp_path: Path, name: str, darker: int, **changes: Any) -> Path:
    painter: Any = Painter(name, darker)
    return evaluate(recipe(tmp_path, name, **changes), painter, judges())


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def test_every_prompt_is_drawn_so_many_times_and_every_judge_scores_every_picture(tmp_path):
    folder = evaluated(tmp_path, "base", 0)
    suite = results(folder)["suites"][0]
    rows = [json.loads(line) for line in (folder / suite["items"]).read_text().splitlines()]
    assert len(rows) == suite["num_items"] == 12
    assert suite["metrics"]["digit_reader"] == pytest.approx(0.25)
    expected = np.mean([-(100 + request_seed(0, row["id"]) % 100) for row in rows])
    assert suite["metrics"]["digit_style"] == pytest.approx(expected)
    low, high = suite["intervals"]["digit_reader"]
    assert low == 0.0 < high  # Four prompts are drawn, not twelve pictures.
    assert {row["cluster"] for row in rows} == {f"line-{n:05d}" for n in (1, 2, 3, 4)}
    for row in rows:
        assert Image.open(Path(suite["images"]) / row["image"]).size == (32, 32)


def test_win_rates_count_ties_half():
    def rows(*scores: float) -> list[dict[str, Any]]:
        return [{"scores": {"a": score, "b": -score}} for score in scores]

    found = win_rates(rows(1, 2, 3, 4), rows(2, 2, 1, 9))
    assert found["win/a"][1].value == (1 + 0.5 + 0 + 1) / 4
    assert found["win/b"][1].value == (0 + 0.5 + 1 + 0) / 4
    assert found["win/a"][0].value == 0.5
    assert {pair[1].value for pair in win_rates(rows(1, 2), rows(1, 2)).values()} == {0.5}


def test_two_runs_are_compared_on_the_same_prompts_and_noise(tmp_path):
    base, darker = evaluated(tmp_path, "base", 0), evaluated(tmp_path, "darker", 7)
    found = {one.metric: one for one in compare(base, darker)}
    assert set(found) == {"digit_style", "digit_reader", "win/digit_style", "win/digit_reader"}
    assert found["win/digit_style"].b == 1.0
    assert found["win/digit_style"].interval == (0.5, 0.5)
    assert found["win/digit_reader"].b == 0.5
    assert found["digit_style"].difference == pytest.approx(7)
    other = evaluated(tmp_path, "fewer", 0, limit=2)
    with pytest.raises(DataError, match="asked different questions"):
        compare(base, other)


def test_a_killed_run_draws_and_scores_only_what_is_missing(tmp_path):
    folder = evaluated(tmp_path, "base", 0)
    before = results(folder)
    told = folder / "pictures.jsonl"
    lines = told.read_bytes().splitlines(keepends=True)
    told.write_bytes(b"".join(lines[:10]) + lines[10][:9])
    next((folder / "pictures").iterdir()).unlink()
    (folder / "results.json").unlink()
    painter: Any = Painter("base")
    scorers = judges()
    evaluate(recipe(tmp_path, "base"), painter, scorers)
    assert 2 <= len(painter.drawn) <= 3
    assert [one.seen for one in scorers.values()] == [0, 0]
    assert results(folder) == before
    another: Any = Painter("other weights", darker=3)
    evaluate(recipe(tmp_path, "base"), another, judges())
    assert len(another.drawn) == 12
    assert results(folder)["suites"][0]["metrics"] != before["suites"][0]["metrics"]


def test_the_report_shows_scores_wins_and_pictures_side_by_side(tmp_path):
    base = evaluated(tmp_path, "base", 0, split="bold")
    darker = evaluated(tmp_path, "darker", 7, split="bold")
    values = {
        "output": str(tmp_path / "report"),
        "base": str(base),
        "runs": [{"name": "<b>darker</b>", "eval": str(darker)}],
        "gallery": 4,
    }
    found = collect(validate(values, ReportRecipe, "test"))
    (grid,) = value_tables(found)
    assert grid.columns == ["model", "digit_style\u00a0↑", "digit_reader\u00a0↑"]
    assert "better in Image preference bold digit_style" in sentences(found)["<b>darker</b>"]
    html = write(found).read_text()
    assert html.count("data:image/png;base64,") == 8
    assert "<b>darker</b>" not in html
    assert "wins by digit_style" in html
    assert "+50.0 *" in html
    (
        darker
        / "pictures"
        / json.loads((darker / "items/image_preference-bold.jsonl").read_text().splitlines()[0])[
            "image"
        ]
    ).write_bytes(b"no picture")
    assert "darker" in write(found).read_text()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"judges": [*JUDGES, JUDGES[1]]}, "digit_reader stands there twice"),
        ({"judges": []}, "at least 1"),
        ({"judges": [{"name": "taste"}]}, "pick_score"),
    ],
)
def test_judges_that_cannot_be_are_refused(tmp_path, changes, told):
    with pytest.raises(ConfigError, match=told):
        recipe(tmp_path, "base", **changes)


def test_the_command_draws_by_a_real_pipeline_and_prints_scores(tmp_path, capsys):
    folder = TinyPipeline(output=tmp_path / "tiny", words=PROMPTS).build()
    file = tmp_path / "eval.yaml"
    made = recipe(tmp_path, "base", model={"path": str(folder)}, limit=2, per_prompt=1)
    file.write_text(dump_yaml(made))
    assert command(["eval", "image_preference", str(file)]) == 0
    printed = capsys.readouterr().out
    line = next(line for line in printed.splitlines() if "digit_style" in line)
    assert 0 < float(line.split()[2]) < 1  # The score itself, not a hundred times it.
    assert command(["eval", "compare", str(tmp_path / "base"), str(tmp_path / "base")]) == 0
    assert "win/digit_reader" in capsys.readouterr().out
    assert command(["eval", "image_preference", str(file), "prompts=absent.txt"]) == 2
    assert "absent.txt" in capsys.readouterr().err
