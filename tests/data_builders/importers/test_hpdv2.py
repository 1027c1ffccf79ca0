"""HPDv2: pairs from rankings, with preference bits and ranks told apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_builders.importers.common import Bad, Unusable
from data_builders.importers.hpdv2 import levels_of, read
from mmalign.records import ImagePreference, Media, check

TRAIN = {"prompt": "a cat", "image_path": ["a.jpg", "b.jpg"], "human_preference": [0, 1]}
TEST = {
    "prompt": "a dog",
    "image_path": ["a.jpg", "b.jpg", "c.jpg"],
    "rank": [2, 1, 3],
    "raw_annotations": [{"rank": [2, 1, 3], "user_hash": "x"}],
}


def source(tmp_path: Path, *rows: Any) -> Path:
    (tmp_path / "test.json").write_text(json.dumps(list(rows)))
    return tmp_path / "test.json"


def pairs(tmp_path: Path, row: Any) -> list[Any]:
    return list(read(source(tmp_path, row)))


def sides(records: list[Any]) -> list[tuple[str, str | None, str | None]]:
    return [(record.id, record.chosen.path, record.rejected.path) for record in records]


def test_a_bit_says_which_of_two_is_preferred(tmp_path: Path) -> None:
    found = pairs(tmp_path, TRAIN)
    assert sides(found) == [("test-0/1-0", "b.jpg", "a.jpg")]
    assert (found[0].prompt, found[0].p_target) == ("a cat", 1.0)
    assert found[0].origin.source == "test.json row 0"
    assert list(check(found[0])) == []
    turned = TRAIN | {"human_preference": [1, 0]}
    assert sides(pairs(tmp_path, turned)) == [("test-0/0-1", "a.jpg", "b.jpg")]


def test_the_lowest_rank_is_the_best_and_each_two_are_a_pair(tmp_path: Path) -> None:
    assert sides(pairs(tmp_path, TEST)) == [
        ("test-0/1-0", "b.jpg", "a.jpg"),
        ("test-0/0-2", "a.jpg", "c.jpg"),
        ("test-0/1-2", "b.jpg", "c.jpg"),
    ]


def test_two_pictures_with_ranks_are_no_bits(tmp_path: Path) -> None:
    """The same two numbers in the two columns say the opposite."""
    ranked = TRAIN | {"rank": [0, 1], "human_preference": None}
    assert sides(pairs(tmp_path, ranked)) == [("test-0/0-1", "a.jpg", "b.jpg")]


def test_pictures_of_one_rank_are_no_pair_and_are_counted(tmp_path: Path) -> None:
    found = pairs(tmp_path, TEST | {"rank": [1, 1, 2]})
    assert [type(record) for record in found] == [Bad, ImagePreference, ImagePreference]
    assert (found[0].id, found[0].reason) == ("test-0/0-1", "tie")
    (tie,) = pairs(tmp_path, TRAIN | {"human_preference": [1, 1]})
    assert (tie.reason, tie.where) == ("tie", "test.json row 0")


def test_ids_begin_with_the_rows_own(tmp_path: Path) -> None:
    assert sides(pairs(tmp_path, TRAIN | {"id": 7}))[0][0] == "7/1-0"


def test_older_files_and_embedded_pictures_are_read(tmp_path: Path) -> None:
    old = {"prompt": "a cat", "file_path": ["x.jpg", "y.jpg"], "human_preference": [1, 0]}
    assert sides(pairs(tmp_path, old))[0][1:] == ("x.jpg", "y.jpg")
    held = {
        "prompt": "a cat",
        "image": [{"bytes": b"x", "path": "x.jpg"}, {"bytes": b"y", "path": "y.jpg"}],
        "image_path": ["x.jpg", "y.jpg"],
        "human_preference": [0, 1],
        "rank": [],
    }
    pq.write_table(pa.Table.from_pylist([held]), tmp_path / "train.parquet")
    (pair,) = read(tmp_path / "train.parquet")
    assert not isinstance(pair, Bad)
    assert pair.chosen == Media(bytes=b"y", path="y.jpg")


def test_every_line_of_a_file_of_lines_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(TRAIN)}\n{{broken\n{json.dumps(TEST)}\n")
    found = list(read(tmp_path / "a.jsonl"))
    assert [type(record).__name__ for record in found] == [
        "ImagePreference",
        "Bad",
        *["ImagePreference"] * 3,
    ]


@pytest.mark.parametrize(
    ("count", "values", "levels"),
    [
        (2, {"human_preference": [0, 1]}, [1, 0]),
        (2, {"human_preference": [1.0, 0.0]}, [0, 1]),
        (2, {"human_preference": [0, 0]}, [0, 0]),
        (2, {"rank": [0, 1]}, [0, 1]),
        (2, {"rank": [1, 2], "human_preference": [1, 0]}, [0, 1]),
        (3, {"human_preference": [3, 1, 2]}, [2, 0, 1]),
        (3, {"human_preference": [0, 2, 1]}, [0, 2, 1]),
        (3, {"human_preference": [1, 2, 2]}, [0, 1, 1]),
        (3, {"human_preference": [1, 1, 3]}, [0, 0, 1]),
        (3, {"rank": [0, 1, 0]}, [0, 1, 0]),
        (3, {"rank": [4.5, 1.25, 9]}, [1, 0, 2]),
        (3, {"rank": [3, 1, 2], "human_preference": [3, 1, 2]}, [2, 0, 1]),
    ],
)
def test_levels_by_hand(count: int, values: dict[str, Any], levels: list[int]) -> None:
    assert levels_of(values, count) == levels


@pytest.mark.parametrize(
    ("count", "values", "reason"),
    [
        (2, {}, "missing_column"),
        (2, {"rank": [], "human_preference": None}, "missing_column"),
        (2, {"human_preference": [1, 2]}, "bad_ranking"),  # ranks, or scores
        (2, {"human_preference": [0.3, 0.7]}, "bad_ranking"),
        (3, {"human_preference": [0, 0, 1]}, "bad_ranking"),  # one preferred, or two firsts
        (3, {"human_preference": [1, 1, 1]}, "bad_ranking"),
        (3, {"human_preference": [7, 9, 8]}, "bad_ranking"),
        (3, {"human_preference": [1, 2, 9]}, "bad_ranking"),
        (3, {"human_preference": [1, 2.5, 3]}, "bad_ranking"),
        (3, {"human_preference": [-1, 0, 1]}, "bad_ranking"),
        (2, {"rank": [1, 2], "human_preference": [0, 1]}, "bad_ranking"),  # they contradict
        (2, {"rank": [1, None]}, "bad_ranking"),
        (2, {"rank": [True, False]}, "bad_ranking"),
        (2, {"rank": ["1", "2"]}, "bad_ranking"),
        (2, {"rank": [1, float("nan")]}, "bad_ranking"),
        (2, {"rank": [1, float("inf")]}, "bad_ranking"),
        (2, {"rank": [1, 2, 3]}, "wrong_length"),
        (3, {"human_preference": [1, 0]}, "wrong_length"),
        (2, {"human_preference": 1}, "wrong_length"),
    ],
)
def test_what_fits_neither_form_is_refused(count: int, values: dict[str, Any], reason: str) -> None:
    with pytest.raises(Unusable) as error:
        levels_of(values, count)
    assert error.value.reason == reason


@given(st.lists(st.integers(0, 5), min_size=2, max_size=6))
def test_every_pair_of_different_ranks_comes_once(ranks: list[int]) -> None:
    levels = levels_of({"rank": ranks}, len(ranks))
    for i, j in ((i, j) for i in range(len(ranks)) for j in range(len(ranks))):
        assert (levels[i] < levels[j]) == (ranks[i] < ranks[j])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"image_path": ["a.jpg"]}, "wrong_length"),
        ({"image_path": "a.jpg"}, "wrong_length"),
        ({"image_path": None}, "missing_column"),
        ({"image_path": ["a.jpg", None]}, "missing_side"),
        ({"image_path": ["", "b.jpg"]}, "missing_side"),
        ({"image_path": ["a.jpg", 3]}, "wrong_type"),
        ({"prompt": ""}, "empty_text"),
        ({"prompt": None}, "missing_column"),
        ({"human_preference": [1, 2]}, "bad_ranking"),
    ],
)
def test_a_bad_row_is_one_bad(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    (bad,) = pairs(tmp_path, TRAIN | changes)
    assert isinstance(bad, Bad)
    assert (bad.reason, bad.where, bad.id) == (reason, "test.json row 0", "test-0")
