"""Dataset directories: parquet shards, optional media, and a manifest written last.

    data/realign_coco/
      manifest.json            no manifest, not complete
      shard-00000.parquet      opens with datasets.load_dataset("parquet", data_files=…)
      media/                   optional; rows refer to it by relative path and sha256
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Generic

from mmalign import __version__
from mmalign.errors import DataError, SchemaMismatch
from mmalign.records import (
    KINDS,
    SCHEMA_VERSION,
    RecordT,
    arrow_schema,
    from_row,
    kind_name,
    to_row,
)

MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a complete dataset directory says of itself.

    `media_root` is relative to the directory, or absolute for media that stay where they are.
    `counts` holds the builder's reasons, such as {"accepted": 812, "dropped:no_neighbour": 31}.
    """

    kind: str
    num_records: int
    content_hash: str
    builder: str = ""
    builder_version: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    model: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    media_root: str = "media"
    shards: tuple[str, ...] = ()
    schema_version: int = SCHEMA_VERSION
    mmalign_version: str = __version__


class Dataset(Generic[RecordT]):
    """A complete dataset directory, read row by row into records."""

    def __init__(self, path: Path, manifest: Manifest, table: Any) -> None:
        self.path, self.manifest, self._table = path, manifest, table
        self.kind: type[RecordT] = KINDS[manifest.kind]

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, index: int) -> RecordT:
        row = self._table.slice(index, 1).to_pylist()[0]
        return from_row(self.kind, row, where=f"{self.path}, row {index}")

    def __iter__(self) -> Iterator[RecordT]:
        for index in range(len(self)):
            yield self[index]

    @property
    def media_root(self) -> Path:
        """The folder that media paths are relative to."""
        return (self.path / self.manifest.media_root).resolve()

    def column(self, name: str) -> list[Any]:
        """One column as plain values, without decoding the others."""
        return self._table.column(name).to_pylist()


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write a file so that a reader sees all of it or none of it, also after a crash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise DataError(
            f"cannot be written ({error.strerror})",
            where=str(path),
            fix="free some space or choose another folder; what was complete is kept",
        ) from error


def write_shard(path: Path, kind: type[RecordT], records: Sequence[RecordT]) -> str:
    """Write records as one parquet file, atomically; returns its sha256."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist([to_row(r) for r in records], schema=arrow_schema(kind))
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    data = sink.getvalue().to_pybytes()
    write_atomically(path, data)
    return hashlib.sha256(data).hexdigest()


def write_dataset(
    path: str | Path,
    kind: type[RecordT],
    records: Iterable[RecordT],
    *,
    shard_rows: int = 1000,
    **manifest: Any,
) -> Manifest:
    """Write a whole dataset directory: shards, then the manifest.

    Keyword arguments are the Manifest's own. Builders that run long use mmalign.jobs instead.
    Raises DataError on a repeated id, before anything is written for its shard.
    """
    path = Path(path)
    (path / MANIFEST).unlink(missing_ok=True)
    seen: set[str] = set()
    shards: list[str] = []
    batch: list[RecordT] = []

    def flush() -> None:
        if batch or not shards:
            shards.append(f"shard-{len(shards):05d}.parquet")
            write_shard(path / shards[-1], kind, batch)
            batch.clear()

    for record in records:
        if record.id in seen:
            raise DataError("id appears twice", where=str(path), got=record.id)
        seen.add(record.id)
        batch.append(record)
        if len(batch) == shard_rows:
            flush()
    if batch or not shards:
        flush()
    return write_manifest(
        path,
        Manifest(
            kind=kind_name(kind),
            num_records=len(seen),
            content_hash="",
            shards=tuple(shards),
            **manifest,
        ),
    )


def write_manifest(path: Path, manifest: Manifest) -> Manifest:
    """Complete a directory: hash its shards and write the manifest, last."""
    digest = hashlib.sha256()
    for name in manifest.shards:
        digest.update(hashlib.sha256((path / name).read_bytes()).digest())
    manifest = replace(manifest, content_hash=digest.hexdigest())
    write_atomically(path / MANIFEST, json.dumps(asdict(manifest), indent=2, sort_keys=True))
    return manifest


def read_manifest(path: str | Path) -> Manifest:
    """The manifest of a directory. Raises DataError when it is absent, broken or too new."""
    path = Path(path)
    file = path / MANIFEST
    if not file.exists():
        what = "is not a complete dataset: it has no manifest.json" if path.is_dir() else "no such dataset"
        fix = "run its builder again: it continues where it stopped" if path.is_dir() else (
            "build it first, or correct the path"
        )
        raise DataError(what, where=str(path), fix=fix)
    try:
        data = json.loads(file.read_text())
        data["shards"] = tuple(data["shards"])
        manifest = Manifest(**data)
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"is not a manifest ({error})", where=str(file)) from None
    if manifest.schema_version > SCHEMA_VERSION:
        raise DataError(
            "was written by a newer mmalign",
            where=str(file),
            got=f"schema {manifest.schema_version}",
            wanted=f"at most {SCHEMA_VERSION}",
            fix="upgrade mmalign",
        )
    return manifest


def open_dataset(path: str | Path, kind: type[RecordT] | None = None) -> Dataset[RecordT]:
    """Open a complete directory. Raises SchemaMismatch when it holds another kind than `kind`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(path)
    manifest = read_manifest(path)
    if kind is not None and manifest.kind != kind_name(kind):
        raise SchemaMismatch(
            f"holds {manifest.kind} records", where=str(path), wanted=kind_name(kind)
        )
    schema = arrow_schema(KINDS[manifest.kind])
    tables = []
    for name in manifest.shards:
        try:
            table = pq.read_table(path / name)
        except (OSError, pa.ArrowInvalid) as error:
            raise DataError(f"shard cannot be read ({error})", where=str(path / name)) from None
        missing = [column for column in schema.names if column not in table.column_names]
        if missing:
            raise SchemaMismatch(
                f"column {', '.join(missing)} is missing",
                where=str(path / name),
                fix="rebuild it, or import it with `mmalign data convert`",
            )
        tables.append(table.select(schema.names).cast(schema))
    table = pa.concat_tables(tables) if tables else schema.empty_table()
    return Dataset(path, manifest, table)
