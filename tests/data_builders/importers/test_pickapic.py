"""Pick-a-Pic's rows: who won, who tied, and what cannot be used."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_builders.importers.common import Bad
from data_builders.importers.pickapic import read
from mmalign.errors import DataError
from mmalign.records import Media, check

ROW = {
    "caption": "a cat",
    "jpg_0": b"first",
    "jpg_1": b"second",
    "label_0": 1.0,
    "label_1": 0.0,
    "has_label": True,
    "ranking_id": 17,
    "model_0": "sdxl",
    "model_1": "dreamlike",
    "image_0_uid": "u0",
    "image_1_uid": "u1",
    "image_0_url": "https://nowhere",
    "user_id": 5,
}


def table(path: Path, *rows: dict[str, Any], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), path, **options)
    return path


def one(tmp_path: Path, **changes: Any) -> Any:
    (result,) = read(table(tmp_path / "train.parquet", ROW | changes))
    return result


def test_the_label_decides_which_picture_is_chosen(tmp_path: Path) -> None:
    pair = one(tmp_path)
    assert (pair.id, pair.prompt, pair.p_target) == ("17/train-0", "a cat", 1.0)
    assert (pair.chosen, pair.rejected) == (Media(bytes=b"first"), Media(bytes=b"second"))
    assert list(check(pair)) == []
    other = one(tmp_path, label_0=0.0, label_1=1.0)
    assert (other.chosen.bytes, other.rejected.bytes) == (b"second", b"first")


def test_what_made_the_pictures_is_kept_and_their_urls_are_not(tmp_path: Path) -> None:
    assert json.loads(one(tmp_path, label_0=0.0, label_1=1.0).origin.detail) == {
        "chosen": 1,
        "ranking_id": 17,
        "model_0": "sdxl",
        "model_1": "dreamlike",
        "image_0_uid": "u0",
        "image_1_uid": "u1",
    }


def test_only_the_columns_that_are_wanted_are_read(tmp_path: Path) -> None:
    told = one(tmp_path, caption=None).detail
    assert "jpg_0" in told
    assert "url" not in told
    assert "user_id" not in told


def test_rows_of_pick_style_have_no_more_than_they_need(tmp_path: Path) -> None:
    """Labels are integers, and nothing names the row but its place."""
    row = {name: ROW[name] for name in ("caption", "jpg_0", "jpg_1")}
    (pair,) = read(table(tmp_path / "train.parquet", row | {"label_0": 1, "label_1": 0}))
    assert not isinstance(pair, Bad)
    assert (pair.id, pair.chosen.bytes, pair.p_target) == ("train-0", b"first", 1.0)


@pytest.mark.parametrize(
    ("labels", "chosen", "p_target"),
    [((0.7, 0.3), b"first", 0.7), ((0.25, 0.75), b"second", 0.75)],
)
def test_a_label_between_is_the_probability_that_chosen_is_better(
    tmp_path: Path, labels: tuple[float, float], chosen: bytes, p_target: float
) -> None:
    pair = one(tmp_path, label_0=labels[0], label_1=labels[1])
    assert (pair.chosen.bytes, pair.p_target) == (chosen, p_target)


def test_labels_of_32_bits_add_up(tmp_path: Path) -> None:
    schema = pa.schema(
        [
            ("caption", pa.string()),
            ("jpg_0", pa.binary()),
            ("jpg_1", pa.binary()),
            ("label_0", pa.float32()),
            ("label_1", pa.float32()),
        ]
    )
    row = {name: ROW[name] for name in ("caption", "jpg_0", "jpg_1")}
    rows = pa.Table.from_pylist([row | {"label_0": 0.7, "label_1": 0.3}], schema=schema)
    pq.write_table(rows, tmp_path / "a.parquet")
    (pair,) = read(tmp_path / "a.parquet")
    assert not isinstance(pair, Bad)
    assert pair.p_target == pytest.approx(0.7)


@pytest.mark.parametrize(
    "changes",
    [
        {"label_0": 0.5, "label_1": 0.5},
        {"has_label": False},
        {"has_label": False, "label_0": None, "label_1": None},
    ],
)
def test_a_tie_is_left_out_as_a_tie(tmp_path: Path, changes: dict[str, Any]) -> None:
    bad = one(tmp_path, **changes)
    assert isinstance(bad, Bad)
    assert (bad.reason, bad.where) == ("tie", "train.parquet row 0")


@pytest.mark.parametrize(
    ("label_0", "label_1"),
    [
        (1.0, 1.0),
        (0.0, 0.0),
        (0.7, 0.2),
        (1.0, None),
        (None, None),
        (float("nan"), 1.0),
        (float("nan"), float("nan")),
        (1.5, -0.5),
        (float("inf"), 0.0),
        (True, False),
        ("1", "0"),
    ],
)
def test_labels_that_contradict_each_other_decide_nothing(
    tmp_path: Path, label_0: Any, label_1: Any
) -> None:
    bad = one(tmp_path, label_0=label_0, label_1=label_1)
    assert isinstance(bad, Bad)
    assert bad.reason == "bad_labels"
    assert f"{label_0!r} and {label_1!r}" in bad.detail


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"jpg_0": None}, "missing_side"),
        ({"jpg_1": b""}, "missing_side"),
        ({"jpg_1": {"bytes": None, "path": None}}, "missing_side"),
        ({"jpg_1": {"bytes": b"", "path": "a.jpg"}}, "missing_side"),
        ({"jpg_0": 3}, "wrong_type"),
        ({"caption": None}, "missing_column"),
        ({"caption": ""}, "empty_text"),
        ({"caption": " \n"}, "empty_text"),
    ],
)
def test_what_lacks_a_side_or_a_caption_is_named(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    bad = one(tmp_path, **changes)
    assert isinstance(bad, Bad)
    assert (bad.reason, bad.where) == (reason, "train.parquet row 0")


def test_captions_are_kept_letter_by_letter(tmp_path: Path) -> None:
    caption = " “naïve” 🐈‍⬛ ねこ\u200d\n e\u0301 "
    assert one(tmp_path, caption=caption).prompt == caption


def test_pictures_may_be_bytes_with_a_path(tmp_path: Path) -> None:
    pair = one(tmp_path, jpg_0={"bytes": b"x", "path": "a.jpg"}, jpg_1=b"y")
    assert pair.chosen == Media(bytes=b"x", path="a.jpg")


def test_pairs_of_one_ranking_have_ids_of_their_own(tmp_path: Path) -> None:
    source = table(tmp_path / "t.parquet", ROW, ROW | {"ranking_id": None}, ROW)
    ids = [record.id for record in read(source)]
    assert ids == ["17/t-0", "t-1", "17/t-2"]


# --- files ----------------------------------------------------------------------------------


def test_a_folder_as_on_the_hub_is_read_in_order(tmp_path: Path) -> None:
    for number in (1, 0):
        name = f"train-0000{number}-of-00002-1a2b.parquet"
        table(tmp_path / "set" / "data" / name, ROW | {"ranking_id": number})
    (tmp_path / "set" / "README.md").write_text("# A set")
    found = [record.id for record in read(tmp_path / "set")]
    assert found == [f"{n}/train-0000{n}-of-00002-1a2b-0" for n in (0, 1)]
    assert [record.id for record in read(tmp_path / "set" / "data")] == found


def test_splits_are_not_mixed(tmp_path: Path) -> None:
    for name in ("train-00000-of-00001", "test-00000-of-00001", "test_unique-00000-of-00001"):
        table(tmp_path / "data" / f"{name}.parquet", ROW)
    with pytest.raises(
        DataError, match="3 splits; got test, test_unique, train; wanted one"
    ) as told:
        list(read(tmp_path))
    pattern = tmp_path / "data" / "train-*.parquet"
    assert str(pattern) in str(told.value)
    assert [record.id for record in read(pattern)] == ["17/train-00000-of-00001-0"]
    with pytest.raises(DataError, match="matches no file"):
        list(read(tmp_path / "data" / "valid-*.parquet"))


def test_a_file_of_pictures_is_never_held_whole(tmp_path: Path) -> None:
    """Of 100 row groups of 0.2 MB each, a few at a time; and no column that is not wanted."""
    rows = [
        ROW | {"jpg_0": os.urandom(20_000), "jpg_1": os.urandom(20_000), "image_0_url": "u" * 9000}
        for _ in range(500)
    ]
    source = table(tmp_path / "big.parquet", *rows, row_group_size=5, compression="none")
    del rows
    assert source.stat().st_size > 20_000_000
    before, most, count = pa.total_allocated_bytes(), 0, 0
    for record in read(source):
        assert not isinstance(record, Bad)
        most = max(most, pa.total_allocated_bytes() - before)
        count += 1
    assert count == 500
    assert most < 8_000_000


def test_a_source_that_is_another_format_loses_every_row(tmp_path: Path) -> None:
    source = table(tmp_path / "other.parquet", {"question": "q"}, {"question": "r"})
    assert [type(row) for row in read(source)] == [Bad, Bad]
