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
from contextlib import suppress
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
    media_of,
    to_row,
)

MANIFEST = "manifest.json"
READ_ROWS = 256
SHARD_BYTES = 256 * 2**20
REBUILD = (
    "delete the directory and build it again, or convert its source with `mmalign data convert`"
)


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
        index = range(len(self))[index]
        return self._record(index, self._table.slice(index, 1).to_pylist()[0])

    def __iter__(self) -> Iterator[RecordT]:
        for start in range(0, len(self), READ_ROWS):
            rows = self._table.slice(start, READ_ROWS).to_pylist()
            for index, row in enumerate(rows, start):
                yield self._record(index, row)

    def _record(self, index: int, row: dict[str, Any]) -> RecordT:
        return from_row(self.kind, row, where=f"{self.path}, row {index}")

    @property
    def media_root(self) -> Path:
        """The folder that media paths are relative to."""
        return (self.path / self.manifest.media_root).resolve()

    def column(self, name: str) -> list[Any]:
        """One column as plain values, without decoding the others."""
        return self._table.column(name).to_pylist()


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write a file so that a reader sees all of it or none of it, also after a crash."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        with suppress(OSError):
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

    A shard ends at `shard_rows` rows or SHARD_BYTES of embedded media, whichever comes first.
    Keyword arguments are the Manifest's own. Builders that run long use mmalign.jobs instead.
    Raises DataError on a repeated id, before anything is written for its shard.
    """
    path = Path(path)
    (path / MANIFEST).unlink(missing_ok=True)
    for stale in path.glob("shard-*.parquet"):
        stale.unlink()
    seen: set[str] = set()
    shards: list[str] = []
    batch: list[RecordT] = []
    batch_bytes = 0

    def flush() -> None:
        nonlocal batch_bytes
        shards.append(f"shard-{len(shards):05d}.parquet")
        write_shard(path / shards[-1], kind, batch)
        batch.clear()
        batch_bytes = 0

    for record in records:
        if record.id in seen:
            raise DataError("id appears twice", where=str(path), got=record.id)
        seen.add(record.id)
        batch.append(record)
        batch_bytes += sum(len(media.bytes or b"") for _, media in media_of(record))
        if len(batch) == shard_rows or batch_bytes >= SHARD_BYTES:
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
    manifest = replace(manifest, content_hash=content_hash(path, manifest.shards))
    write_atomically(path / MANIFEST, json.dumps(asdict(manifest), indent=2, sort_keys=True))
    return manifest


def content_hash(path: Path, shards: Iterable[str]) -> str:
    """The sha256 over the shards' own, in order: two datasets share it only if their rows do."""
    digest = hashlib.sha256()
    for name in shards:
        digest.update(hashlib.sha256((path / name).read_bytes()).digest())
    return digest.hexdigest()


def read_manifest(path: str | Path) -> Manifest:
    """The manifest of a directory. Raises DataError when it is absent, broken or too new."""
    path = Path(path)
    file = path / MANIFEST
    if not path.is_dir():
        raise DataError("no such dataset", where=str(path), fix="build it, or correct the path")
    if not file.exists():
        raise DataError(
            "is not a complete dataset: it has no manifest.json",
            where=str(path),
            fix="run its builder again: it continues where it stopped",
        )
    try:
        data = json.loads(file.read_text())
        version = data["schema_version"]
        if version <= SCHEMA_VERSION:
            data["shards"] = tuple(data["shards"])
            return Manifest(**data)
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"is not a manifest ({error})",
            where=str(file),
            fix="delete it and run the builder again: it keeps the shards that are complete",
        ) from None
    raise DataError(
        "was written by a newer mmalign",
        where=str(file),
        got=f"schema {version}",
        wanted=f"at most {SCHEMA_VERSION}",
        fix="upgrade mmalign",
    )


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
    if manifest.kind not in KINDS:
        raise DataError(
            f"holds {manifest.kind!r} records", where=str(path), wanted=f"one of {', '.join(KINDS)}"
        )
    schema = arrow_schema(KINDS[manifest.kind])
    tables = []
    for name in manifest.shards:
        try:
            table = pq.read_table(path / name)
            missing = [column for column in schema.names if column not in table.column_names]
            if not missing:
                table = table.select(schema.names).cast(schema)
        except (OSError, pa.ArrowException) as error:
            reason = str(error).partition("\n")[0]
            raise DataError(
                f"shard cannot be read ({reason})", where=str(path / name), fix=REBUILD
            ) from None
        if missing:
            raise SchemaMismatch(
                f"column {', '.join(missing)} is missing", where=str(path / name), fix=REBUILD
            )
        tables.append(table)
    table = pa.concat_tables(tables) if tables else schema.empty_table()
    if table.num_rows != manifest.num_records:
        raise DataError(
            "shards and manifest disagree",
            where=str(path),
            got=f"{table.num_rows} rows",
            wanted=f"{manifest.num_records}",
            fix=REBUILD,
        )
    return Dataset(path, manifest, table)
