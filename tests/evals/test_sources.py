"""Rows of benchmark files, whatever they are kept in, and pictures however they stand in them."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from evals.sources import media_of, read_rows
from mmalign.errors import DataError
from mmalign.records import Media

ROWS = [{"id": "1", "text": "a\tb"}, {"id": "2", "text": "c\n\u2028d"}]


def written(path: Path) -> Path:
    if path.suffix == ".json":
        path.write_text(json.dumps(ROWS))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    else:
        mark = "\t" if path.suffix == ".tsv" else ","
        cells = ["1", '"a\tb"'], ["2", '"c\n\u2028d"']
        path.write_text("".join(mark.join(line) + "\n" for line in (["id", "text"], *cells)))
    return path


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet", ".tsv", ".csv"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, suffix: str):
    path = written(tmp_path / f"data{suffix}")
    found = list(read_rows(path))
    assert [row for _, row in found] == ROWS
    assert found[1][0] == f"{path}, {'line' if suffix == '.jsonl' else 'row'} 2"
    assert list(read_rows(str(path))) == found


def test_a_folder_gives_its_shards_of_the_split_in_order(tmp_path: Path):
    for name in ("test-00001-of-2", "test-00000-of-2", "train-00000-of-1"):
        pq.write_table(pa.Table.from_pylist([{"id": name}]), tmp_path / f"{name}.parquet")
    ids = [row["id"] for _, row in read_rows(tmp_path)]
    assert ids == ["test-00000-of-2", "test-00001-of-2"]
    with pytest.raises(DataError, match=r"of the split; got test, train; wanted dev"):
        list(read_rows(tmp_path, split="dev"))
    (tmp_path / "sub").mkdir()
    for name in ("testmini", "testmini_text_only", "data"):
        row = {"id": name}
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / "sub" / f"{name}.parquet")
    ((_, only),) = read_rows(tmp_path, subset="sub", split="testmini")
    assert only == {"id": "testmini"}
    (tmp_path / "plain").mkdir()
    pq.write_table(pa.Table.from_pylist([{"id": "1"}]), tmp_path / "plain" / "part.parquet")
    assert len(list(read_rows(tmp_path, subset="plain"))) == 1


def test_an_empty_cell_is_left_out_of_its_row(tmp_path: Path):
    (tmp_path / "a.tsv").write_text("index\tA\tC\n0\tcat\t\n")
    assert next(iter(read_rows(tmp_path / "a.tsv")))[1] == {"index": "0", "A": "cat"}


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("a.json", "{}", r"a.json: is wrong; got dict; wanted a list"),
        ("a.json", "[1]", r"a.json, row 1: is wrong; got int; wanted an object"),
        ("a.json", "[", r"a.json: is not JSON"),
        ("a.tsv", "a\tb\n1\t2\t3\n", r"a.tsv, row 1: has more cells than names"),
        ("a.parquet", "no", r"a.parquet: cannot be read"),
        ("a.txt", "x", r"a.txt: is no kind of file read here; wanted .json, .jsonl"),
    ],
)
def test_a_broken_file_is_told(tmp_path: Path, name: str, text: str, told: str):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=told):
        list(read_rows(tmp_path / name))


def test_what_is_not_there_is_told(tmp_path: Path):
    with pytest.raises(DataError, match=r"none.json: is not there; wanted a file, a folder"):
        list(read_rows(tmp_path / "none.json"))
    with pytest.raises(DataError, match=r"holds no .parquet file"):
        list(read_rows(tmp_path))


def test_a_hub_name_is_loaded_with_its_revision_and_pictures_as_bytes(
    monkeypatch: pytest.MonkeyPatch,
):
    datasets = pytest.importorskip("datasets")
    asked: list[Any] = []
    features = datasets.Features({"id": datasets.Value("string"), "image": datasets.Image()})
    made = datasets.Dataset.from_list(
        [{"id": "1", "image": {"bytes": b"png", "path": None}}], features=features
    )

    def load(*args: Any, **kwargs: Any) -> Any:
        asked.append((args, kwargs))
        return made

    monkeypatch.setattr(datasets, "load_dataset", load)
    ((where, row),) = read_rows("owner/name@v2", subset="en", split="val")
    assert asked == [(("owner/name", "en"), {"split": "val", "revision": "v2"})]
    assert where == "owner/name@v2, row 1"
    assert media_of(row["image"], where) == Media(bytes=b"png")

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise ConnectionError("no network\nmore of it")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match=r"cannot be loaded from the hub \(no network\)"):
        list(read_rows("owner/name"))


def test_pictures_stand_in_rows_in_several_ways():
    picture = b"\x89PNG\r\n\x1a\n" + bytes(range(256))
    long = base64.b64encode(picture).decode()
    broken = base64.encodebytes(picture).decode()
    assert media_of("a/b.jpg", "x") == Media(path="a/b.jpg")
    assert media_of({"bytes": b"1", "path": "c.png"}, "x") == Media(bytes=b"1")
    assert media_of({"bytes": None, "path": "c.png"}, "x") == Media(path="c.png")
    assert media_of(long, "x") == media_of(broken, "x") == Media(bytes=picture)
    assert media_of(b"1", "x") == Media(bytes=b"1")
    assert media_of({"bytes": b"", "path": "c.png"}, "x") == Media(path="c.png")
    no_base64 = f"{long[:-1]}\n%"
    for nothing in (None, "", {}, {"bytes": None}, {"bytes": b""}, 3, no_base64, "a" * 5000):
        with pytest.raises(DataError, match="x: holds no picture"):
            media_of(nothing, "x")


@pytest.mark.parametrize(
    "start",
    [
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff\xe0",
        b"GIF87a",
        b"RIFF\1\2\3\4WEBP",
        b"BM\1\2\3\4\0\0\0\0",
        b"II*\0",
        b"MM\0*",
    ],
)
def test_a_long_text_is_a_picture_only_if_it_begins_as_one(start: bytes):
    held = start + b"\n" * 300
    assert media_of(base64.b64encode(held).decode(), "x") == Media(bytes=held)
    path = "/data/" + "a" * 297 + "/jpg0"
    assert base64.b64decode(path, validate=True)
    assert media_of(path, "x") == Media(path=path)


def test_a_mark_of_the_order_of_bytes_is_no_part_of_the_rows(tmp_path: Path):
    (tmp_path / "a.json").write_text('[{"a": 1}]', encoding="utf-8-sig")
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n', encoding="utf-8-sig")
    for name in ("a.json", "a.jsonl"):
        assert [row for _, row in read_rows(tmp_path / name)] == [{"a": 1}]


@pytest.mark.parametrize("name", ["deep.json", "deep.jsonl"])
def test_json_nested_beyond_reason_is_told(tmp_path: Path, name: str):
    (tmp_path / name).write_text("[" * 100_000)
    with pytest.raises(DataError, match=r"is not JSON \("):
        list(read_rows(tmp_path / name))
