"""Multiple choice about clips: each format, both readings, and how categories are averaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from evals.benchmarks.video_choices import (
    MLVU,
    MVBENCH,
    TVBENCH,
    LongVideoBench,
    Mlvu,
    MvBench,
    TvBench,
)
from evals.benchmarks.videomme import VideoMme, subtitle_text
from evals.config import EvalRecipe
from evals.stats import intervals
from mmalign.config import load_config, validate
from mmalign.errors import DataError
from mmalign.records import Media

ROOT = Path(__file__).resolve().parents[2]


def row(**changes: Any) -> dict[str, Any]:
    values = {
        "video": "v.mp4",
        "question": "What?",
        "candidates": ["a cat", "a dog", "three"],
        "answer": "a dog",
        "start": 2,
        "end": 7.5,
    }
    return {**values, **changes}


def tasks(root: Path, kind: Any, names: Any, **contents: Any) -> Any:
    for name in names:
        (root / f"{name}.json").write_text(json.dumps(contents.get(name, [])))
    return kind(data=root, videos=root / "video")


def values(suite: Any) -> dict[str, float]:
    return {name: metric.value for name, metric in suite.metrics.items()}


def text_of(bench: Any, place: int = 0) -> str | None:
    return bench.requests()[place].prompt[0].content[-1].text


def test_tvbench_asks_for_the_part_of_a_bounded_clip(tmp_path: Path):
    bench = tasks(tmp_path, TvBench, TVBENCH, action_count=[row()], action_sequence=[row()])
    whole, part = bench.requests()
    assert whole.id == "action_count/1"
    assert whole.videos == (Media(path="action_count/v.mp4"),)
    assert part.videos == (Media(path="action_sequence/v_2.00_7.50.mp4"),)
    assert text_of(bench) == (
        "Question: What?\nOptions:\n(A) a cat\n(B) a dog\n(C) three\nOnly give the best option."
    )


def test_mvbench_is_over_questions_and_mlvu_over_tasks(tmp_path: Path):
    """One task with one of two right, one with one of one: 2/3 over questions, 3/4 over tasks."""
    mvbench = tasks(
        tmp_path, MvBench, MVBENCH, action_count=[row(), row()], state_change=[row(answer="three")]
    )
    assert mvbench.requests()[2].videos == (Media(path="perception/videos/v.mp4"),)
    found = values(
        mvbench.score({"action_count/1": "B", "action_count/2": "A", "state_change/1": "(C)"})
    )
    assert found["official/accuracy"] == found["strict/accuracy"] == pytest.approx(2 / 3)
    assert found["official/accuracy/action_count"] == pytest.approx(1 / 2)
    assert found["official/accuracy/state_change"] == 1

    contents = {"4_count": [row(), row()], "3_ego": [row(answer="three")]}
    mlvu = tasks(tmp_path, Mlvu, MLVU, **contents)
    suite = mlvu.score({"4_count/1": "B", "4_count/2": "A", "3_ego/1": "(C)"})
    assert values(suite)["official/accuracy"] == pytest.approx(3 / 4)
    assert values(suite)["official/accuracy/4_count"] == pytest.approx(1 / 2)
    assert set(intervals(suite.metrics, samples=10)) == set(suite.metrics)


@pytest.mark.parametrize(
    ("answer", "official", "strict"),
    [
        ("B", "B", "B"),
        ("(B) a dog", "B", "B"),
        ("b", "B", None),
        ("The answer is B.", "T", "B"),
        ("a dog", "A", "B"),
        ("2. B", "B", None),
        ("B. a cat", "B", None),
        ("A or B", "A", None),
        ("It is not a dog", "I", None),
        ("3", None, "C"),
        ("", None, None),
        ("<script>B</script>", "S", None),
    ],
)
def test_readings(tmp_path, answer, official, strict):
    bench = tasks(tmp_path, TvBench, TVBENCH, action_count=[row()])
    question = bench.load()[0]
    assert bench.read(question, answer, "official") == official
    assert bench.read(question, answer, "strict") == strict


def test_missing_answers_are_wrong_and_unknown_ones_refused(tmp_path: Path):
    bench = tasks(tmp_path, TvBench, TVBENCH, action_count=[row(), row()])
    suite = bench.score({"action_count/2": "B"})
    assert values(suite)["official/accuracy"] == 0.5
    assert (suite.num_unparsed, suite.items[0]["answer"]) == (1, None)
    with pytest.raises(DataError, match="action_count/3"):
        bench.score({"action_count/3": "B"})


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (row(answer="a bird"), "question 1: answer is none of the candidates; got a bird"),
        (row(candidates="a"), "candidates: is wrong; got str"),
        (row(candidates=["a dog"]), "got 1; wanted 2 to 26"),
        (row(start=9), "got 9, 7.5; wanted start < end"),
        (row(end=None), "start and end are wrong"),
        ({"question": "?"}, "candidates: is wrong; got NoneType"),
        ("text", "question 1: is wrong"),
    ],
)
def test_malformed_rows_are_named(tmp_path, broken, said):
    with pytest.raises(DataError, match=said):
        tasks(tmp_path, TvBench, TVBENCH, action_sequence=[broken]).requests()


LONG = {
    "id": "x_0",
    "video_path": "x.mp4",
    "question": "Who?",
    "candidates": ["one", "two"],
    "correct_choice": 1,
    "question_category": "S2E",
    "duration_group": 60,
}


def long(root: Path, *rows: Any) -> LongVideoBench:
    (root / "lvb_val.json").write_text(json.dumps(rows))
    return LongVideoBench(data=root / "lvb_val.json", videos=root)


def test_longvideobench(tmp_path: Path):
    bench = long(tmp_path, LONG, {**LONG, "id": "x_1", "correct_choice": 0})
    assert text_of(bench) == (
        "Question: Who?\nOptions:\nA. one\nB. two\n"
        "Answer with the option's letter from the given choices directly."
    )
    found = values(bench.score({"x_0": "B", "x_1": "B"}))
    assert found["official/accuracy"] == found["official/accuracy/60 s"] == 0.5
    assert found["official/accuracy/S2E"] == 0.5


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{**LONG, "correct_choice": 2}], "got 2; wanted 0 to 1.*lvb_val"),
        ([{k: v for k, v in LONG.items() if k != "correct_choice"}], "correct_choice is wrong"),
        ([LONG, LONG], "two questions share an id; got x_0"),
        ([{**LONG, "duration_group": None}], "duration_group is no number"),
        ([], "holds no question"),
    ],
)
def test_longvideobench_refuses_broken_files(tmp_path, rows, said):
    with pytest.raises(DataError, match=said):
        long(tmp_path, *rows).requests()


def mme(number: int, duration: str = "short", **changes: Any) -> dict[str, Any]:
    values = {
        "video_id": "001",
        "duration": duration,
        "domain": "Knowledge",
        "sub_category": "Law",
        "videoID": f"clip{number}",
        "question_id": f"001-{number}",
        "task_type": "OCR Problems",
        "question": "What?",
        "options": ["A. a cat", "B. a dog", "C. a bird", "D. none"],
        "answer": "B",
    }
    return {**values, **changes}


def videomme(root: Path, rows: list[dict[str, Any]], **settings: Any) -> VideoMme:
    pq.write_table(pa.Table.from_pylist(rows), root / "test.parquet")
    return VideoMme(data=root / "test.parquet", videos=root, **settings)


def test_videomme_leaves_answers_without_a_letter_out_of_the_official_count(tmp_path: Path):
    """Right, unread, missing, read only officially: 2 of 3 there, strictly 1 of 4."""
    bench = videomme(tmp_path, [mme(1), mme(2), mme(3), mme(4, "long")])
    suite = bench.score({"001-1": "B", "001-2": "no idea", "001-4": "Best option: C"})
    found = values(suite)
    assert found["official/accuracy"] == pytest.approx(2 / 3)
    assert found["official/accuracy/short"] == pytest.approx(1 / 2)
    assert found["official/accuracy/long"] == 1  # The B of "Best".
    assert found["official/accuracy/Knowledge"] == pytest.approx(2 / 3)
    assert found["strict/accuracy"] == pytest.approx(1 / 4)
    assert found["official/unparsed_rate"] == 0.5
    none = bench.score(dict.fromkeys(["001-1", "001-2", "001-3", "001-4"], "no"))
    assert values(none)["official/accuracy"] == 0


@pytest.mark.parametrize(
    ("answer", "official", "strict"),
    [
        ("The best answer is B.", "B", None),
        ("The answer is D", "D", "D"),
        ("Answer: B", "A", "B"),
        ("a dog", None, "B"),
        ("I C a dog", "C", "B"),
        ("", None, None),
    ],
)
def test_videomme_readings(tmp_path, answer, official, strict):
    bench = videomme(tmp_path, [mme(1)])
    question = bench.load()[0]
    assert bench.read(question, answer, "official") == official
    assert bench.read(question, answer, "strict") == strict


SRT = (
    "1\n00:00:00,000 --> 00:00:02,000\n"
    '<font color="white" size=".72c">Good day</font>\nall\n\n'
    "2\n00:00:02,000 --> 00:00:03,000\n7\n\n"
)


def test_videomme_asks_with_and_without_subtitles(tmp_path: Path):
    plain = videomme(tmp_path, [mme(1), mme(2)])
    choose = (
        "Select the best answer to the following multiple-choice question based on the video. "
        "Respond with only the letter (A, B, C, or D) of the correct option."
    )
    lines = "A. a cat\nB. a dog\nC. a bird\nD. none"
    assert text_of(plain) == f"What?\n{choose}\n{lines}"
    (tmp_path / "srt").mkdir()
    told = videomme(tmp_path, [mme(1), mme(2)], subtitles=tmp_path / "srt")
    with pytest.raises(DataError, match=r"holds no \.srt file"):
        told.requests()
    (tmp_path / "srt" / "clip1.srt").write_text(SRT)
    assert text_of(told) == (
        f"This video's subtitles are listed below:\nGood day all\n7\n{choose}\nWhat?\n{lines}"
    )
    assert text_of(told, 1) == text_of(plain, 1)
    assert (plain.key, told.key) == ("videomme", "videomme-subtitles")
    assert (plain.score({}).split, told.score({}).split) == (None, "subtitles")
    assert told.requests()[0].videos == (Media(path="clip1.mp4"),)
    (tmp_path / "srt" / "clip1.srt").write_text("\n\n")
    with pytest.raises(DataError, match="holds no subtitle"):
        subtitle_text(tmp_path / "srt" / "clip1.srt")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"answer": "E"}, "row 1: options or answer are wrong"),
        ({"options": ["a cat", "B. a dog"]}, "options or answer are wrong"),
        ({"options": "A. a cat"}, "options: is wrong; got str"),
        ({"duration": None}, "row 1: field duration is no text"),
    ],
)
def test_videomme_refuses_broken_rows(tmp_path, changes, said):
    with pytest.raises(DataError, match=said):
        videomme(tmp_path, [mme(1, **changes)]).requests()


def test_videomme_reads_json_lines_and_refuses_what_is_no_parquet(tmp_path: Path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(mme(1)))
    assert len(VideoMme(data=tmp_path / "rows.jsonl", videos=tmp_path).requests()) == 1
    (tmp_path / "bad.parquet").write_text("text")
    with pytest.raises(DataError, match=r"bad\.parquet: cannot be read"):
        VideoMme(data=tmp_path / "bad.parquet", videos=tmp_path).requests()


def test_recipes_name_them(tmp_path: Path):
    names = ["tvbench", "mvbench", "mlvu", "longvideobench", "videomme"]
    benchmarks = [{"name": name, "data": "d", "videos": "v"} for name in names]
    recipe = {"name": "x", "model": {"path": "x"}, "output": "x", "benchmarks": benchmarks}
    assert [one.key for one in validate(recipe, EvalRecipe, "test").benchmarks] == names


def test_the_recipe_of_all_benchmarks_over_clips_holds_together():
    found = load_config(ROOT / "configs/eval/clips.yaml", EvalRecipe)
    assert [one.key for one in found.benchmarks][-2:] == ["videomme", "videomme-subtitles"]
