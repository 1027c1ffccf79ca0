"""HallusionBench on one set of each kind: what is asked, what groups count, verdicts, bad files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evals.benchmarks.hallusion_bench import (
    RULES,
    HallusionBench,
    official,
    score_verdicts_file,
)
from evals.config import EvalRecipe
from mmalign.config import validate
from mmalign.errors import DataError
from mmalign.records import Media

VERDICT = "gpt4v_output_gpt_check"


def row(
    side: str, kind: str, figure: int, question: int, truth: str, verdict: str = "1"
) -> dict[str, Any]:
    seen = side == "VD" or figure > 0
    return {
        "category": side,
        "subcategory": kind,
        "visual_input": "1" if seen else "0",
        "set_id": "0",
        "figure_id": str(figure),
        "sample_note": "x",
        "question_id": str(question),
        "question": f"Is it {question}?",
        "gt_answer_details": "it is",
        "gt_answer": truth,
        "filename": f"./hallusion_bench/{side}/{kind}/0_{figure}.png" if seen else None,
        VERDICT: verdict,
    }


# VD: two questions about a figure and about its edited copy. VS: one without a figure, with two.
ROWS = [
    row("VD", "illusion", 0, 0, "1"),
    row("VD", "illusion", 0, 1, "0"),
    row("VD", "illusion", 1, 0, "0", verdict="0"),
    row("VD", "illusion", 1, 1, "1"),
    row("VS", "chart", 0, 0, "1", verdict="2"),
    row("VS", "chart", 1, 0, "1"),
    row("VS", "chart", 2, 0, "0", verdict="2"),
]


def bench(folder: Path, rows: list[dict[str, Any]] = ROWS, **fields: Any) -> HallusionBench:
    (folder / "HallusionBench.json").write_text(json.dumps(rows))
    return HallusionBench(data=str(folder / "HallusionBench.json"), **{"images": folder, **fields})


# Right: both VD questions of figure 0, VD 1/1, VS 0. Wrong: VD 1/0 says yes; VS 1 unread; VS 2 yes.
ANSWERS = {
    "VD/illusion/0/0/0": "Yes.",
    "VD/illusion/0/0/1": "No, it is not.",
    "VD/illusion/0/1/0": "Yes",
    "VD/illusion/0/1/1": "yes",
    "VS/chart/0/0/0": "Yes",
    "VS/chart/0/1/0": "I cannot tell.",
    "VS/chart/0/2/0": "Yes!",
}


def test_an_answer_is_not_cut_short(tmp_path: Path):
    """The official rule reads more than its beginning."""
    assert bench(tmp_path).max_new_tokens == 1024


def test_figures_are_shown_and_questions_without_one_are_not(tmp_path: Path):
    requests = {request.id: request for request in bench(tmp_path).requests()}
    assert list(requests) == list(ANSWERS)
    with_figure, without = requests["VD/illusion/0/1/0"], requests["VS/chart/0/0/0"]
    assert with_figure.images == (Media(path="hallusion_bench/VD/illusion/0_1.png"),)
    assert with_figure.media_root == tmp_path
    assert [block.type for block in with_figure.prompt[0].content] == ["image", "text"]
    assert without.images == ()
    assert [block.text for block in without.prompt[0].content] == [
        "Is it 0?\nPlease answer yes or no."
    ]


def test_numbers_by_hand(tmp_path: Path):
    suite = bench(tmp_path).score(ANSWERS)
    values = {name: metric.value for name, metric in suite.metrics.items()}
    assert values["official/accuracy"] == pytest.approx(4 / 7)
    # Figures: VD 0 right, VD 1 not, VS 1 and VS 2 not; VS 0 is no figure.
    assert values["official/figures"] == pytest.approx(1 / 4)
    # Pairs: VD question 0 wrong on figure 1, question 1 right on both, VS question 0 wrong.
    assert values["official/pairs"] == pytest.approx(1 / 3)
    assert values["official/easy"] == 1.0
    # Other figures: VD question 0 wrong, VD 1 right, VS wrong on both.
    assert values["official/hard"] == pytest.approx(1 / 3)
    assert values["official/accuracy/VD"] == pytest.approx(3 / 4)
    assert values["official/accuracy/VS/chart"] == pytest.approx(1 / 3)
    # Five say yes; four are yes. Three are wrong, and two of these say yes.
    assert values["yes_difference"] == pytest.approx((5 - 4) / 7)
    assert values["false_positive"] == pytest.approx(2 / 3)
    assert values["unparsed_rate"] == pytest.approx(1 / 7)
    assert suite.num_unparsed == 1
    assert suite.items[0]["cluster"] == "VD/illusion/0"


def test_a_figure_counts_once_and_where_its_first_row_is(tmp_path: Path):
    suite = bench(tmp_path).score(ANSWERS)
    figures = suite.metrics["official/figures"]
    assert figures.denominator.tolist() == [1, 0, 1, 0, 0, 1, 1]
    assert figures.numerator.tolist() == [1, 0, 0, 0, 0, 0, 0]
    # From rows alone, in any order.
    shuffled = RULES.metrics(suite.items[::-1])
    assert {name: one.value for name, one in shuffled.items()} == {
        name: one.value for name, one in suite.metrics.items()
    }


def test_a_limit_keeps_sets_whole(tmp_path: Path):
    assert len(bench(tmp_path, limit=1).requests()) == 4


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("Yes", "yes"),
        ("NO.", "no"),
        ("The answer is yes, since it is.", "yes"),
        ("yes,it is", "yes"),
        ("There is no dog", "no"),
        ("Yes and no", None),
        ("**Yes**", None),
        ("Yes: it is", None),
        ("nope", None),
        ("It has 1,000 dots (no)", "no"),
        # A mark beside a blank vanishes everywhere, so that words grow together.
        ("a-b yes-no - x", None),
        # The first 32 full stops vanish, so that "yes." behind 32 of them is no yes.
        (". " * 31 + "yes.", "yes"),
        (". " * 32 + "yes.", None),
        (". " * 32 + "yes. no", "no"),
        ("", None),
    ],
)
def test_the_rule_of_words(answer: str, said: str | None):
    assert official(answer) == said


def test_verdicts_count_as_in_the_released_script(tmp_path: Path):
    path = tmp_path / "judged.json"
    path.write_text(json.dumps(ROWS))
    # Unclear is right for VS 0 alone: 5 of 7 are right.
    found = score_verdicts_file(path)
    assert found["accuracy"] == pytest.approx(5 / 7)
    assert found["figures"] == pytest.approx(2 / 4)
    assert found["pairs"] == pytest.approx(1 / 3)
    assert found["easy"] == 1.0
    assert found["hard"] == pytest.approx(1 / 3)
    assert found["VD"]["accuracy"] == pytest.approx(3 / 4)
    assert found["VS"] == {
        "accuracy": pytest.approx(2 / 3),
        "figures": 0.5,
        "pairs": 0.0,
        "easy": 1.0,
        "hard": 0.0,
    }
    numbers = [one | {VERDICT: int(one[VERDICT]), "set_id": 0} for one in ROWS]
    path.write_text(json.dumps(numbers))
    assert score_verdicts_file(path) == found
    path.write_text(json.dumps([{**one, "mine": one[VERDICT]} for one in ROWS]))
    assert score_verdicts_file(path, "mine") == found


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "holds no row"),
        ([{**ROWS[0], VERDICT: "yes"}], "row 1: gpt4v_output_gpt_check is wrong; got yes"),
        ([ROWS[0], ROWS[0]], "a question stands there twice; got VD/illusion/0/0/0"),
        ([{"category": "VD"}], "field subcategory is missing"),
        (["x"], "row 1: is wrong; got str; wanted an object"),
    ],
)
def test_judged_files_that_are_wrong_are_named(tmp_path: Path, rows: list[Any], said: str):
    (tmp_path / "judged.json").write_text(json.dumps(rows))
    with pytest.raises(DataError, match=said):
        score_verdicts_file(tmp_path / "judged.json")


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "holds no question"),
        ([{**ROWS[0], "gt_answer": "2"}], "row 1: gt_answer is wrong; got 2; wanted 0 or 1"),
        ([{**ROWS[0], "gt_answer": None}], "field gt_answer is no text"),
        ([{**ROWS[0], "category": "XX"}], "category is wrong; got XX; wanted VD or VS"),
        ([ROWS[0], ROWS[0]], "two questions share an id"),
        ([{**ROWS[0], "filename": None}], "field filename is no text"),
    ],
)
def test_question_files_that_are_wrong_are_named(tmp_path: Path, rows: list[Any], said: str):
    with pytest.raises(DataError, match=said):
        bench(tmp_path, rows).requests()


def test_figures_by_file_need_their_folder(tmp_path: Path):
    with pytest.raises(DataError, match="needs images, the folder of the figures"):
        bench(tmp_path, images=None).requests()


def test_a_folder_of_the_hubs_two_splits(tmp_path: Path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    picture = {"bytes": b"a picture", "path": None}
    for name, rows in (
        ("image", [ROWS[0] | {"image": picture}]),
        ("non_image", [ROWS[4] | {"image": None}]),
    ):
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{name}-00000-of-00001.parquet")
    first, second = HallusionBench(data=str(tmp_path)).requests()
    assert first.images == (Media(bytes=b"a picture"),)
    assert (second.id, second.images) == ("VS/chart/0/0/0", ())


def test_recipes_name_it():
    recipe = {
        "name": "x",
        "model": {"path": "x"},
        "output": "x",
        "benchmarks": [{"name": "hallusion_bench", "data": "x.json", "images": "x"}],
    }
    assert validate(recipe, EvalRecipe, "test").benchmarks[0].key == "hallusion_bench"
