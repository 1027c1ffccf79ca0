"""Rows of benchmark files: JSON, JSON lines, parquet, tables of text, or a dataset of the hub."""

from __future__ import annotations

import base64
import csv
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from evals.base import Row, read_jsonl
from mmalign.errors import DataError, MissingExtra
from mmalign.records import Media

# A hub name, with a revision perhaps: "lmms-lab/MME" or "lmms-lab/MME@main".
_HUB = re.compile(r"[\w.-]+/[\w.-]+(?:@[\w./-]+)?")
# How files of a split are called: "test-00000-of-00001.parquet", or "testmini.parquet".
_SHARD = re.compile(r"([A-Za-z]\w*?)(?:-\d.*)?\.parquet")
_SPLIT = re.compile(r"(?:train|test|val|dev)\w*")
# How files of pictures begin: PNG, JPEG, GIF, WebP, BMP, TIFF in either order of bytes.
_PICTURE = re.compile(
    rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|GIF8[79]a|RIFF.{4}WEBP|BM.{4}\0{4}|II\*\0|MM\0\*", re.DOTALL
)
# Of a path, in characters, as Linux has it.
_LONGEST_PATH = 4096
_TABLES = {".tsv": "\t", ".csv": ","}


def read_rows(
    data: str | Path, *, subset: str | None = None, split: str = "test"
) -> Iterator[tuple[str, Row]]:
    """Yield ("file, row n", row) of a file, of a folder of parquet shards, or of a hub dataset.

    Files: .json (a list of objects), .jsonl, .parquet, .tsv, .csv. A folder: its *.parquet files,
    or those below its folder `subset`, of the split, as in "test-00000-of-00002.parquet", in the
    order of names; all of them where no name tells a split. A hub name such as
    "owner/name@revision" is loaded with `datasets`, with this subset and split, pictures as bytes.
    Raises DataError when there is nothing of the kind, or a file is not what its name says.
    """
    path = Path(data)
    if path.is_dir():
        for shard in _shards(path, subset, split):
            yield from _parquet(shard)
    elif path.exists():
        yield from _file(path)
    elif path.suffix not in _READERS and _HUB.fullmatch(str(data)):
        yield from _hub(str(data), subset, split)
    else:
        raise DataError(
            "is not there",
            where=str(data),
            wanted="a file, a folder of parquet files, or the hub name of a dataset",
        )


def media_of(value: Any, where: str) -> Media:
    """A picture as benchmark files hold one: a file's name, {"bytes", "path"}, or base64.

    Raises DataError on anything else.
    """
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes) and value:
        return Media(bytes=value)
    if isinstance(value, str) and value.strip():
        # A picture in base64 is long; so may be a file's name, even one that base64 could be.
        is_long = len(value) >= 256 or "\n" in value
        if is_long and (picture := _from_base64(value)) is not None:
            return Media(bytes=picture)
        if len(value) <= _LONGEST_PATH and "\n" not in value:
            return Media(path=value)
    raise DataError("holds no picture", where=where, got=repr(value)[:60])


def _from_base64(text: str) -> bytes | None:
    """The picture that a text holds, if it is one in base64, which may be broken into lines."""
    try:
        held = base64.b64decode("".join(text.split()), validate=True)
    except ValueError:
        return None
    return held if _PICTURE.match(held) else None


def read_json(path: Path, kind: type[list[Any]] | type[dict[str, Any]]) -> Any:
    """What a JSON file holds, a list or an object.

    Raises DataError when the file is missing, is no JSON, holds something else, or has a key twice.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_keys_once)
    except (OSError, UnicodeDecodeError) as error:
        fix = "check that it is there, and is UTF-8 text"
        raise DataError(f"cannot be read ({error})", where=str(path), fix=fix) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"is not JSON ({error})", where=str(path)) from None
    return of_kind(found, kind, str(path))


def of_kind(value: Any, kind: type[list[Any]] | type[dict[str, Any]], where: str) -> Any:
    """The value, checked to be a list or an object of JSON. Raises DataError."""
    if not isinstance(value, kind):
        wanted = "a list" if kind is list else "an object"
        raise DataError("is wrong", where=where, got=type(value).__name__, wanted=wanted)
    return value


def _keys_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(k for k in keys if keys.count(k) > 1)} appears twice")
    return found


def _shards(folder: Path, subset: str | None, split: str) -> list[Path]:
    """The parquet files of a subset's split below a folder."""
    inner = folder / subset if subset and (folder / subset).is_dir() else folder
    found = sorted(inner.rglob("*.parquet"))
    if not found:
        raise DataError("holds no .parquet file", where=str(inner))
    names = {one: _SHARD.fullmatch(one.name) for one in found}
    of = {one: match[1] for one, match in names.items() if match}
    if split in of.values():
        return [one for one in found if of.get(one) == split]
    others = sorted({name for name in of.values() if _SPLIT.fullmatch(name)})
    if others:
        raise DataError(
            "holds no .parquet file of the split",
            where=str(inner),
            got=", ".join(others),
            wanted=split,
        )
    return found


def _file(path: Path) -> Iterator[tuple[str, Row]]:
    reader = _READERS.get(path.suffix)
    if reader is None:
        raise DataError("is no kind of file read here", where=str(path), wanted=", ".join(_READERS))
    yield from reader(path)


def _json(path: Path) -> Iterator[tuple[str, Row]]:
    for number, row in enumerate(read_json(path, list), start=1):
        where = f"{path}, row {number}"
        yield where, of_kind(row, dict, where)


def _table(path: Path) -> Iterator[tuple[str, Row]]:
    """The rows of a table with a line of names; an empty cell is left out of its row."""
    # Pictures stand in cells as base64, far beyond the csv module's limit of a field.
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            for number, row in enumerate(csv.DictReader(file, delimiter=_TABLES[path.suffix]), 1):
                if None in row:
                    raise DataError("has more cells than names", where=f"{path}, row {number}")
                yield f"{path}, row {number}", {k: v for k, v in row.items() if v}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot be read ({error})", where=str(path)) from None


def _parquet(path: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        number = 0
        for batch in pq.ParquetFile(path).iter_batches(256):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", row
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"cannot be read ({error})", where=str(path)) from None


def _hub(name: str, subset: str | None, split: str) -> Iterator[tuple[str, Row]]:
    try:
        import datasets
    except ImportError:
        raise MissingExtra(
            f"{name} needs the package datasets", fix="install it: pip install datasets"
        ) from None
    path, _, revision = name.partition("@")
    try:
        rows: Any = datasets.load_dataset(path, subset, split=split, revision=revision or None)
    except Exception as error:  # Whatever the hub, the network or the dataset has to say.
        told = str(error).strip().partition("\n")[0]
        raise DataError(
            f"is no file here, and cannot be loaded from the hub ({told})",
            where=name,
            fix="download its files and name their folder",
        ) from None
    for column, feature in rows.features.items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(column, datasets.Image(decode=False))
    for number, row in enumerate(rows, start=1):
        yield f"{name}, row {number}", row


_READERS = {
    ".json": _json,
    ".jsonl": read_jsonl,
    ".parquet": _parquet,
    ".tsv": _table,
    ".csv": _table,
}
