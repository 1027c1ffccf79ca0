"""Reading rows: a broken line loses only itself, a broken file is told in a sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_builders.importers.common import Bad, Row, read_rows
from mmalign.errors import DataError


def read(tmp_path: Path, data: bytes, name: str = "a.json") -> list[Row | Bad]:
    (tmp_path / name).write_bytes(data)
    return list(read_rows(tmp_path / name))


def test_json_lists_and_lines_are_told_apart_by_what_they_hold(tmp_path: Path) -> None:
    as_list = read(tmp_path, b'\n [{"a": 1},\n {"a": 2}]')
    as_lines = read(tmp_path, b'{"a": 1}\n\n{"a": 2}')
    assert [row.values for row in as_list if isinstance(row, Row)] == [{"a": 1}, {"a": 2}]
    assert [row.values for row in as_lines if isinstance(row, Row)] == [{"a": 1}, {"a": 2}]
    assert [row.where for row in as_list] == ["a.json row 0", "a.json row 1"]
    assert [row.where for row in as_lines] == ["a.json line 1", "a.json line 3"]


@pytest.mark.parametrize("data", [b'\xef\xbb\xbf[{"a": 1}]', b'\xef\xbb\xbf{"a": 1}'])
def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path: Path, data: bytes) -> None:
    (row,) = read(tmp_path, data)
    assert isinstance(row, Row)
    assert row.values == {"a": 1}


@pytest.mark.parametrize("line", [b'{"a": 1', b"\xff\xfe", b"[" * 100_000, b"3", b"null"])
def test_a_malformed_line_loses_only_itself(tmp_path: Path, line: bytes) -> None:
    rows = read(tmp_path, b'{"a": 1}\n' + line + b'\n{"a": 3}\n')
    assert [type(row) for row in rows] == [Row, Bad, Row]
    assert isinstance(rows[1], Bad)
    assert (rows[1].where, rows[1].reason) == ("a.json line 2", "malformed_json")


def test_a_malformed_list_is_told_with_a_way_out(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.json: is not valid JSON .*one object a line"):
        read(tmp_path, b'[{"a": 1}, {"a"')


@pytest.mark.parametrize("data", [b"", b"\n \n"])
def test_an_empty_file_is_refused(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(DataError, match="is empty"):
        read(tmp_path, data)


def test_what_is_no_parquet_and_a_folder_without_any_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read(tmp_path, b"PAR1 no", "a.parquet")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no parquet file"):
        list(read_rows(tmp_path / "empty"))
