"""RLHF-V's parquet, with the columns of the published set, and its older JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_builders.importers.common import Bad
from data_builders.importers.rlhf_v import read
from mmalign.records import Media, Preference, user

PAIR = {"question": "What is it?", "chosen": "A cat.", "rejected": "A dog."}


def one(tmp_path: Path, row: Any) -> Any:
    file = tmp_path / "rlhf_v.json"
    file.write_text(json.dumps([row]))
    (result,) = read(file)
    return result


def test_the_published_parquet(tmp_path: Path) -> None:
    columns = {
        "ds_name": ["RLHF-V"] * 2,
        "image": [{"bytes": b"1", "path": "a.jpg"}, {"bytes": b"2", "path": "a.jpg"}],
        "text": [json.dumps(PAIR), json.dumps(PAIR | {"chosen": ""})],
        "origin_dataset": ["coco"] * 2,
        "origin_split": ['{"model": "Muffin"}'] * 2,
        "idx": [0, 0],
        "image_path": ["a.jpg"] * 2,
    }
    pq.write_table(pa.table(columns), tmp_path / "train.parquet")
    pair, bad = read(tmp_path / "train.parquet")
    assert isinstance(pair, Preference)
    assert pair.prompt == user("What is it?", images=1)
    assert (pair.chosen, pair.rejected) == ("A cat.", "A dog.")
    assert pair.images == (Media(path="a.jpg", bytes=b"1"),)
    assert pair.id == "train-0"
    assert isinstance(bad, Bad)
    assert bad.reason == "empty_text"


@pytest.mark.parametrize(
    "row",
    [
        {"image": "a.jpg", "text": PAIR},
        {"image": "a.jpg", **PAIR},
        {"image": None, "image_path": "a.jpg", "text": json.dumps(PAIR)},
    ],
)
def test_older_files(tmp_path: Path, row: Any) -> None:
    pair = one(tmp_path, row)
    assert pair.images == (Media(path="a.jpg"),)
    assert (pair.prompt, pair.chosen) == (user("What is it?", images=1), "A cat.")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"image": "a.jpg", "text": '{"question": "What'}, "malformed_text"),
        ({"image": "a.jpg", "text": "[" * 100_000}, "malformed_text"),
        ({"image": "a.jpg", "text": '["What"]'}, "wrong_type"),
        ({"image": "a.jpg", "text": 3}, "wrong_type"),
        ({"image": "a.jpg", "text": {"question": "What?", "chosen": "A"}}, "missing_column"),
        ({"image": "a.jpg", "text": PAIR | {"question": " "}}, "empty_text"),
        ({"image": 3, "text": PAIR}, "wrong_type"),
        ({"text": PAIR}, "missing_column"),
        ({"image": "a.jpg"}, "missing_column"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: Any, reason: str) -> None:
    bad = one(tmp_path, row)
    assert isinstance(bad, Bad)
    assert (bad.reason, bad.where) == (reason, "rlhf_v.json row 0")
    assert bad.detail
