"""MME in each of its formats: pairs of questions, scores that are sums over tasks, bad files."""

from __future__ import annotations

from pathlib import Path

import pytest

from evals.benchmarks.mme import COGNITION, PERCEPTION, Mme, metrics, official, score_results_folder
from evals.config import EvalRecipe
from evals.known import is_number
from evals.stats import intervals
from mmalign.config import validate
from mmalign.errors import DataError
from mmalign.records import Media


@pytest.fixture
def released(tmp_path: Path) -> Path:
    """Two pictures of existence, one of artwork in folders of its own, one of code_reasoning."""
    root = tmp_path / "released"
    pairs = {
        "existence/1": "existence/1.jpg",
        "existence/2": "existence/2.png",
        "artwork/questions_answers_YN/3": "artwork/images/3.jpg",
        "code_reasoning/4": "code_reasoning/4.PNG",
    }
    for questions, picture in pairs.items():
        file = root / f"{questions}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("Is it? Please answer yes or no.\tYes\nIs it not?\tNo\n\n")
        (root / picture).parent.mkdir(exist_ok=True)
        (root / picture).write_bytes(b"a picture")
    return root


# existence: 3 of 4 right, 1 of 2 pictures; artwork: both; code_reasoning: 1 of 2, no picture.
ANSWERS = {
    "existence/1.jpg/1": "Yes",
    "existence/1.jpg/2": "no.",
    "existence/2.png/1": "The answer is yes",
    "existence/2.png/2": "No",
    "artwork/3.jpg/1": " yes, it is",
    "artwork/3.jpg/2": "No, it is not",
    "code_reasoning/4.PNG/1": "Yes.",
    "code_reasoning/4.PNG/2": "Yes.",
}


def test_the_released_folder_in_both_of_its_layouts(released: Path):
    bench = Mme(data=str(released))
    requests = {request.id: request for request in bench.requests()}
    assert sorted(requests) == sorted(ANSWERS)
    assert requests["existence/2.png/2"].images == (Media(path="existence/2.png"),)
    assert requests["artwork/3.jpg/1"].images == (Media(path="artwork/images/3.jpg"),)
    assert requests["code_reasoning/4.PNG/1"].media_root == released
    assert requests["existence/1.jpg/1"].prompt[0].content[-1].text == (
        "Is it? Please answer yes or no."
    )


def test_scores_by_hand(released: Path):
    suite = Mme(data=str(released)).score(ANSWERS)
    values = {name: metric.value for name, metric in suite.metrics.items()}
    assert values["official/perception/existence"] == pytest.approx(100 * 3 / 4 + 100 * 1 / 2)
    assert values["official/perception/artwork"] == pytest.approx(200)
    assert values["official/cognition/code_reasoning"] == pytest.approx(50)
    assert values["official/perception"] == pytest.approx(125 + 200)
    assert values["official/cognition"] == pytest.approx(50)
    assert values["official/accuracy"] == pytest.approx(6 / 8)
    # The strict reading finds "The answer is yes".
    assert values["strict/perception"] == pytest.approx(400)
    assert values["yes_ratio"] == pytest.approx(4 / 8)
    assert values["unparsed_rate"] == 0.0
    assert [row["official"] for row in suite.items][2] is None
    assert metrics(suite.items).keys() == suite.metrics.keys()
    # Commands print scores as they are, and shares in percent.
    scores = {name for name in values if "perception" in name or "cognition" in name}
    assert {name for name in values if is_number(name)} == scores


def test_a_sum_of_tasks_is_drawn_again_without_leaving_its_bounds(released: Path):
    """All right is 400 in every draw, whatever number of pictures of a task it holds."""
    bench = Mme(data=str(released))
    right = {question.id: str(question.truth) for question in bench.load()}
    suite = bench.score(right)
    clusters = [row["cluster"] for row in suite.items]
    assert len(set(clusters)) == 4
    spread = intervals(
        {"official/perception": suite.metrics["official/perception"]}, clusters, samples=200
    )
    low, high = spread["official/perception"]
    # 0 where a draw has no picture of these tasks at all, 1 in 4 ** 4.
    assert high == pytest.approx(400)
    assert low == pytest.approx(400)
    part = bench.score(ANSWERS)
    low, high = intervals({"x": part.metrics["official/perception"]}, clusters, samples=500)["x"]
    assert 0 <= low < part.metrics["official/perception"].value < high <= 400


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("yes", "yes"),
        ("No", "no"),
        ("\nYes, it is", "yes"),
        ("eyes", "yes"),
        ("None of it", "no"),
        ("Noyes", "no"),
        ("it is yes", None),
        ("", None),
    ],
)
def test_the_rule_of_four_characters(answer: str, said: str | None):
    assert official(answer) == said


def test_a_folder_of_lists(released: Path, tmp_path: Path):
    lists = tmp_path / "lists"
    lists.mkdir()
    (lists / "existence.txt").write_text("1.jpg\tIs it?\tYes\n1.jpg\tIs it not?\tNo\tyes\n")
    (lists / "artwork.txt").write_text("3.jpg\tIs it?\tYes\n3.jpg\tIs it not?\tNo\n")
    requests = Mme(data=str(lists), images=released).requests()
    assert [request.id for request in requests] == [
        "existence/1.jpg/1",
        "existence/1.jpg/2",
        "artwork/3.jpg/1",
        "artwork/3.jpg/2",
    ]
    assert requests[0].images == (Media(path="existence/1.jpg"),)
    assert requests[2].images == (Media(path="artwork/images/3.jpg"),)
    assert requests[0].media_root == released
    with pytest.raises(DataError, match="needs images"):
        Mme(data=str(lists)).requests()


def test_rows_of_the_hub(tmp_path: Path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {
            "question_id": "OCR/0001.jpg",
            "image": {"bytes": b"a picture", "path": None},
            "question": "Is it?",
            "answer": answer,
            "category": "OCR",
        }
        for answer in ("Yes", "No")
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "test.parquet")
    first, second = Mme(data=str(tmp_path / "test.parquet")).requests()
    assert (first.id, second.id) == ("OCR/0001.jpg/1", "OCR/0001.jpg/2")
    assert first.images == (Media(bytes=b"a picture"),)
    rows[0]["category"] = "golf"
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "test.parquet")
    with pytest.raises(DataError, match="category is no task; got golf"):
        Mme(data=str(tmp_path / "test.parquet")).requests()


def test_the_released_script_on_a_folder_of_answers(tmp_path: Path):
    for task in (*PERCEPTION, *COGNITION):
        # The first picture both right, the second one of two; responses keep their line's end.
        lines = [("1.jpg", "Yes", "yes"), ("1.jpg", "No", "No.")]
        lines += [("2.jpg", "Yes", "Yes, it is"), ("2.jpg", "No", "I say no")]
        text = "".join(f"{name}\tIs it?\t{truth}\t{said}\n" for name, truth, said in lines)
        (tmp_path / f"{task}.txt").write_text(text)
    found = score_results_folder(tmp_path)
    assert found["perception"] == pytest.approx(10 * (75 + 50))
    assert found["cognition"] == pytest.approx(4 * (75 + 50))
    assert found["tasks"]["OCR"] == pytest.approx(125)
    with open(tmp_path / "code_reasoning.txt", "a") as file:
        file.write("3.jpg\tIs it?\tYes\tyes\n")
    with pytest.raises(DataError, match="odd number of lines"):
        score_results_folder(tmp_path)
    (tmp_path / "OCR.txt").unlink()
    with pytest.raises(DataError, match=r"OCR.txt: cannot be read"):
        score_results_folder(tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Is it? Yes\n", r"1.txt, line 1: has too few cells; got 1; wanted 2, with tabs"),
        ("Is it?\tperhaps\n", "line 1: answer is wrong; got perhaps; wanted Yes or No"),
        ("Is it?\tYes\n", "existence/1.jpg: asks no two questions of a picture; got 1"),
        ("Is it?\tYes\n" * 3, "asks no two questions of a picture; got 3"),
    ],
)
def test_question_files_that_are_wrong_are_named(released: Path, text: str, said: str):
    (released / "existence/1.txt").write_text(text)
    with pytest.raises(DataError, match=said):
        Mme(data=str(released)).requests()


def test_a_picture_that_is_missing_is_named(released: Path):
    (released / "existence/1.jpg").unlink()
    with pytest.raises(DataError, match=r"1.txt: has no picture"):
        Mme(data=str(released)).requests()


def test_a_limit_keeps_pictures_whole(released: Path):
    assert len(Mme(data=str(released), limit=3).requests()) == 4


def test_recipes_name_it():
    recipe = {
        "name": "x",
        "model": {"path": "x"},
        "output": "x",
        "benchmarks": [{"name": "mme", "data": "lmms-lab/MME"}],
    }
    assert validate(recipe, EvalRecipe, "test").benchmarks[0].key == "mme"
