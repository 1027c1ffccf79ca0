"""RLAIF-V's parquet, with the columns of the published set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_builders.importers.common import Bad
from data_builders.importers.rlaif_v import read
from mmalign.records import Media, user


def write(tmp_path: Path, **changes: Any) -> Path:
    columns = {
        "ds_name": ["RLAIF-V"] * 2,
        "image": [{"bytes": b"1", "path": "a.jpg"}, {"bytes": b"2", "path": "a.jpg"}],
        "question": ["What?", "Where?"],
        "chosen": ["A cat.", "Here."],
        "rejected": ["A dog.", "There."],
        "idx": ["0", "0"],
    }
    pq.write_table(pa.table(columns | changes), tmp_path / "train.parquet")
    return tmp_path / "train.parquet"


def test_rows_become_pairs_with_their_bytes(tmp_path: Path) -> None:
    pairs: list[Any] = list(read(write(tmp_path)))
    assert [pair.prompt for pair in pairs] == [user("What?", images=1), user("Where?", images=1)]
    assert pairs[0].images == (Media(path="a.jpg", bytes=b"1"),)
    assert (pairs[1].chosen, pairs[1].rejected) == ("Here.", "There.")


def test_ids_differ_even_where_idx_repeats(tmp_path: Path) -> None:
    assert [pair.id for pair in read(write(tmp_path))] == ["train-0", "train-1"]


def test_bad_rows_are_named_and_the_others_kept(tmp_path: Path) -> None:
    bad, pair = read(write(tmp_path, image=[None, {"bytes": b"2", "path": "a.jpg"}]))
    assert isinstance(bad, Bad)
    assert bad.reason == "missing_column"
    assert not isinstance(pair, Bad)
    bad, pair = read(write(tmp_path, rejected=["", "There."]))
    assert isinstance(bad, Bad)
    assert bad.reason == "empty_text"


def test_a_missing_column_makes_every_row_bad(tmp_path: Path) -> None:
    file = write(tmp_path)
    pq.write_table(pq.read_table(file).drop_columns(["question"]), file)
    for bad in read(file):
        assert isinstance(bad, Bad)
        assert "column question is missing; the row has ds_name" in bad.detail
