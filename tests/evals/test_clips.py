"""Benchmarks over clips: what is asked, scored, compared and shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evals.base import Benchmark
from evals.benchmarks.chair import Chair
from evals.benchmarks.pope import Pope
from evals.compare import compare
from evals.config import EvalRecipe
from evals.report import ReportRecipe, collect
from evals.report_page import write
from evals.run import evaluate
from mmalign.clips import FrameSampling
from mmalign.config import validate
from mmalign.errors import ConfigError, DataError, MediaError
from mmalign.generate.base import Generation
from mmalign.records import Media

CLIPS = ("a.mov", "b.mov")
TRUTH = {"a.mov": ["seven", "three", "one"], "b.mov": ["three"]}


class Told:
    """Answers each request as told; reads none of the clips but those it is told to refuse."""

    name = "told"

    def __init__(self, answers: dict[str, str], unreadable: str | None = None) -> None:
        self.answers, self.unreadable, self.asked = answers, unreadable, []

    def generate(self, requests, sampling):
        for request in requests:
            assert not request.images
            if request.videos[0].path == self.unreadable:
                raise MediaError("cannot be decoded", where=request.id)
        self.asked += requests
        return [
            Generation(id=request.id, text=self.answers[request.id], num_tokens=1, finished=True)
            for request in requests
        ]


RIGHT = {
    "1": "yes",
    "2": "no",
    "3": "yes",
    "a.mov": "a seven , a three , a one",
    "b.mov": "a three",
}


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EvalRecipe:
    monkeypatch.chdir(tmp_path)
    Path("media").mkdir()
    for number, name in enumerate(CLIPS):
        write_clip(Path("media") / name, red=250 * number)
    asked = [("a.mov", "three", "yes"), ("b.mov", "one", "no"), ("b.mov", "three", "yes")]
    rows: list[dict[str, Any]] = [
        {"question_id": number, "video": video, "text": f"is there a {word} ?", "label": label}
        for number, (video, word, label) in enumerate(asked, start=1)
    ]
    Path("questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"video": video, "objects": objects} for video, objects in TRUTH.items()]
    Path("objects.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("synonyms.txt").write_text("one\nthree\nseven\n")
    return named("base")


def named(name: str) -> EvalRecipe:
    data = {
        "name": name,
        "model": {"path": "none/such", "frames": {"num_frames": 6}},
        "output": name,
        "bootstrap_samples": 200,
        "benchmarks": [
            {"name": "pope", "split": "random", "questions": "questions.jsonl", "videos": "media"},
            {"name": "chair", "videos": "media", "objects": "objects.jsonl"}
            | {"synonyms": "synonyms.txt"},
        ],
    }
    return validate(data, EvalRecipe, "recipe")


def write_clip(path: Path, *, red: int) -> None:
    import av

    with av.open(str(path), "w", format="mov") as container:
        stream: Any = container.add_stream("rawvideo", rate=4)
        stream.height, stream.width, stream.pix_fmt = 32, 32, "rgb24"
        for number in range(6):
            frame = np.full((32, 32, 3), (red, 40 * number, 0), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_clip_is_asked_about_as_a_clip(recipe: EvalRecipe):
    pope, chair = recipe.benchmarks
    request = pope.requests()[1]
    assert [block.type for block in request.prompt[0].content] == ["video", "text"]
    assert (request.images, request.videos) == ((), (Media(path="b.mov"),))
    assert request.media_root == Path("media")
    assert [request.id for request in chair.requests()] == list(CLIPS)
    assert chair.requests()[0].videos == (Media(path="a.mov"),)
    assert recipe.model.frames == FrameSampling(num_frames=6)


def test_results_name_clips(recipe: EvalRecipe, tmp_path: Path):
    folder = evaluate(recipe, Told(RIGHT))
    pope, chair = json.loads((folder / "results.json").read_text())["suites"]
    assert pope["videos"] == chair["videos"] == str(tmp_path / "media")
    assert "images" not in pope
    assert pope["metrics"]["official/accuracy"] == 1.0
    assert chair["metrics"]["recall"] == 1.0
    for suite in (pope, chair):
        for row in read_lines(folder / suite["items"]):
            assert row["video"] in CLIPS
            assert "image" not in row


def test_order_is_of_the_first_mentions_of_what_is_there(recipe: EvalRecipe):
    def metrics(caption: str, other: str = "a three") -> dict[str, float]:
        suite = recipe.benchmarks[1].score({"a.mov": caption, "b.mov": other})
        return {name: metric.value for name, metric in suite.metrics.items()}

    # Clip a shows a seven, then a three, then a one: three pairs, and clip b none.
    assert metrics("seven three one")["order"] == 1.0
    assert metrics("one three seven")["order"] == 0.0
    assert metrics("three seven one")["order"] == pytest.approx(2 / 3)
    # Only the seven and the one are told of, and the seven first; telling it again is no matter.
    assert metrics("seven one seven")["order"] == 1.0
    assert metrics("three")["order"] == 0.0
    # What is not there has no place in the order; it is a hallucination.
    invented = metrics("seven", "one three")
    assert (invented["order"], invented["chair_i"]) == (0.0, pytest.approx(1 / 3))


def test_another_clip_asks_again_and_an_unreadable_one_stays_unanswered(recipe: EvalRecipe):
    folder = evaluate(recipe, Told(RIGHT, unreadable="a.mov"))
    chair = json.loads((folder / "results.json").read_text())["suites"][1]
    assert chair["num_missing"] == 1
    evaluate(recipe, mended := Told(RIGHT))
    assert [request.id for request in mended.asked] == ["1", "a.mov"]
    rows = read_lines(Path("questions.jsonl"))
    rows[1]["video"] = "a.mov"
    Path("questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluate(recipe, changed := Told(RIGHT))
    assert [request.id for request in changed.asked] == ["2"]


def test_a_wrong_folder_of_clips_is_no_score_of_zero(recipe: EvalRecipe):
    Path("media").rename("elsewhere")
    with pytest.raises(DataError, match="the folder of clips does not exist; got media"):
        evaluate(recipe, told := Told(RIGHT))
    assert told.asked == []


def test_runs_over_clips_are_compared_and_shown(recipe: EvalRecipe):
    evaluate(recipe, Told(RIGHT))
    worse = RIGHT | {"2": "yes", "a.mov": "a three , a seven", "b.mov": "a one"}
    evaluate(named("worse"), Told(worse))
    found = {(c.suite, c.metric): c for c in compare("base", "worse", samples=200)}
    assert found["chair", "order"].difference == -1.0
    assert found["chair", "chair_i"].b == pytest.approx(1 / 3)
    assert found["pope-random", "official/accuracy"].difference == pytest.approx(-1 / 3)
    data = {"output": "page", "base": "base", "runs": [{"name": "worse", "eval": "worse"}]}
    page = write(collect(validate(data, ReportRecipe, "report"))).read_text()
    (card,) = [card for card in page.split("<article>") if "<h3>Broken: b.mov</h3>" in card]
    assert card.count("<img") == 6
    assert "<small>1.25 s</small>" in card
    assert "in the clip" in card
    assert "picture" not in card
    Path("media/b.mov").unlink()
    page = write(collect(validate(data, ReportRecipe, "report"))).read_text()
    assert "The clip is not shown: " in page


def test_runs_over_different_clips_are_not_compared(recipe: EvalRecipe):
    evaluate(recipe, Told(RIGHT))
    text = Path("questions.jsonl").read_text()
    Path("questions.jsonl").write_text(text.replace('"a.mov"', '"b.mov"'))
    evaluate(named("other"), Told(RIGHT))
    with pytest.raises(DataError, match="different questions: 1 differ, such as 1"):
        compare("base", "other")


@pytest.mark.parametrize("kind", [Pope, Chair])
def test_a_benchmark_is_over_pictures_or_over_clips(kind: type[Benchmark]):
    told = {"split": "x", "questions": "q.json"}
    files = told if kind is Pope else {"objects": "o", "synonyms": "s"}
    for folders in ({}, {"images": "p", "videos": "v"}):
        with pytest.raises(ConfigError, match="give either images or videos"):
            validate(files | folders, kind, "recipe")  # type: ignore[type-var]


def test_files_must_name_clips_where_clips_are_asked_about(recipe: EvalRecipe):
    for name in ("questions.jsonl", "objects.jsonl"):
        Path(name).write_text(Path(name).read_text().replace('"video"', '"image"'))
    for benchmark in recipe.benchmarks:
        with pytest.raises(DataError, match="field video is missing"):
            benchmark.requests()


def test_boxes_of_pictures_are_no_truth_of_clips():
    data = {"videos": "v", "instances": "i.json", "synonyms": "s"}
    with pytest.raises(ConfigError, match="instances are of pictures"):
        validate(data, Chair, "recipe")
