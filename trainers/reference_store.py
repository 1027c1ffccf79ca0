"""The folder of stored reference scores: what is in it, and who may write it.

data/realign_coco/reference/llava-hf-llava-1.5-7b-hf-3f2a91c0/
  key.json                 what the scores are of, in plain words; what they were made with
  rows-00000000.parquet    a few hundred rows from the dataset's first, whole or absent

A row holds its id, the tokens of each candidate, and for every token its log-probability. It also
holds digests of its own token ids and of the files that it names, so that a row that changed is
caught where it is used, whatever the key says.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from mmalign.errors import TrainingError
from mmalign.log import get_logger
from mmalign.store import write_atomically
from trainers.reference_key import differences

logger = get_logger("trainers.reference")

KEY = "key.json"
ELSEWHERE = "set reference_cache to another folder"
ANEW = "`mmalign precompute RECIPE --fresh` makes them anew"


@dataclass(frozen=True, slots=True, kw_only=True)
class RowScores:
    """One row as it is stored. logps, competitor_logps: [K] float32, nats; candidates end to end.

    digest: of its token ids. files: digests of the files that it names by path.
    sizes: tokens of each candidate.
    """

    id: str
    digest: str
    files: str
    sizes: list[int]
    logps: Tensor
    competitor_logps: Tensor | None


class ReferenceCache:
    """One folder of scores, as seen by the process that may write it, and by those that read it."""

    def __init__(self, folder: Path, key: dict[str, Any], about: dict[str, Any]) -> None:
        self.folder, self.key, self.about = folder, key, about
        self._lock: IO[str] | None = None
        self._damaged: list[Path] = []

    @property
    def num_bytes(self) -> int:
        """Size of the scores on disk."""
        return sum(file.stat().st_size for file in self.folder.glob("rows-*.parquet"))

    def check(self) -> None:
        """Raise TrainingError where the scores in the folder are of something else than `key`."""
        file = self.folder / KEY
        if not file.exists():
            if any(self.folder.glob("rows-*.parquet")):
                what = f"holds scores, and no {KEY} that says of what"
                raise TrainingError(what, where=str(self.folder), fix=f"{ANEW}; or {ELSEWHERE}")
            return
        try:
            old = json.loads(file.read_text())["key"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            what = f"cannot be read ({error})"
            raise TrainingError(what, where=str(file), fix=f"{ANEW}; or {ELSEWHERE}") from None
        if changed := list(differences(old, self.key)):
            raise TrainingError(
                f"the reference scores stored here are stale: {'; '.join(changed)}",
                where=str(self.folder),
                fix=f"undo the change; or {ANEW}; or {ELSEWHERE}, to keep both",
            )

    def read(self) -> dict[str, RowScores]:
        """Every stored row by its id. A damaged file is said and counts as absent."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        found: dict[str, RowScores] = {}
        self._damaged = []
        for file in sorted(self.folder.glob("rows-*.parquet")):
            try:
                table = pq.read_table(file, page_checksum_verification=True)
                found |= {row.id: row for row in _rows_of(table)}
            except (OSError, KeyError, RuntimeError, pa.ArrowException) as error:
                reason = str(error).partition("\n")[0]
                logger.warning("%s is damaged (%s): its scores are made again", file, reason)
                self._damaged.append(file)
        return found

    def missing(self, ids: Sequence[str], files: Sequence[str]) -> list[int]:
        """Places of the rows that are not stored.

        Raises TrainingError where the key differs, or a picture that a stored row names by path.
        """
        self.check()
        stored = self.read()
        changed = [
            name
            for name, its in zip(ids, files, strict=True)
            if name in stored and stored[name].files != its
        ]
        if changed:
            more = f" and {len(changed) - 1} more rows" if len(changed) > 1 else ""
            raise TrainingError(
                "the reference scores stored here are stale: pictures or clips were replaced",
                where=str(self.folder),
                got=f"other files for {changed[0]}{more}",
                fix=f"undo the change; or {ANEW}; or {ELSEWHERE}, to keep both",
            )
        return [place for place, name in enumerate(ids) if name not in stored]

    def claim(self, ids: Sequence[str], files: Sequence[str]) -> list[int]:
        """Hold the folder for writing; the rows that are still missing then.

        Raises TrainingError where it cannot be written, or another process is writing it.
        """
        self.hold()
        missing = self.missing(ids, files)
        for file in self._damaged:
            file.unlink()
        if not (self.folder / KEY).exists():
            text = json.dumps({"key": self.key, **self.about}, indent=1, ensure_ascii=False)
            write_atomically(self.folder / KEY, text)
        return missing

    def hold(self) -> None:
        """Keep other processes from writing here, until `release` or the end of this one."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.folder / ".lock", "w")  # noqa: SIM115
        except OSError as error:
            raise TrainingError(
                f"reference scores cannot be written here ({error.strerror})",
                where=str(self.folder),
                fix=f"{ELSEWHERE}, one that can be written",
            ) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise TrainingError(
                "another process is making these reference scores",
                where=str(self.folder),
                fix="wait for it and start again: finished scores are read, not made again",
            ) from None

    def release(self) -> None:
        """Let other processes write here."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def clear(self) -> None:
        """Delete what is stored. Raises TrainingError where another process is writing it."""
        if self.folder.exists():
            self.hold()
            shutil.rmtree(self.folder)
            self.release()

    def write(self, first: int, rows: Sequence[RowScores]) -> None:
        """Write rows as one file, whole or not at all; `first` is the dataset row of the first."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        scores = pa.list_(pa.float32())
        columns = {
            "id": pa.array([row.id for row in rows], pa.string()),
            "digest": pa.array([row.digest for row in rows], pa.string()),
            "files": pa.array([row.files for row in rows], pa.string()),
            "sizes": pa.array([row.sizes for row in rows], pa.list_(pa.int32())),
            "logps": pa.array([row.logps.numpy() for row in rows], scores),
        }
        rivals = [row.competitor_logps for row in rows]
        if None not in rivals:
            columns["competitor_logps"] = pa.array([r.numpy() for r in rivals], scores)  # type: ignore[union-attr]
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table(columns), sink, compression="zstd", write_page_checksum=True)
        name = f"rows-{first:08d}.parquet"
        write_atomically(self.folder / name, sink.getvalue().to_pybytes())


def _rows_of(table: Any) -> list[RowScores]:
    columns = {name: table.column(name).to_pylist() for name in ("id", "digest", "files", "sizes")}
    scores: dict[str, Sequence[Tensor | None]] = {"competitor_logps": [None] * table.num_rows}
    lengths = [sum(sizes) for sizes in columns["sizes"]]
    for name in {"logps", "competitor_logps"} & set(table.column_names) | {"logps"}:
        flat = table.column(name).combine_chunks().flatten().to_numpy(zero_copy_only=False)
        scores[name] = torch.from_numpy(flat.copy()).split(lengths)
    columns |= scores  # type: ignore[arg-type]
    return [
        RowScores(**dict(zip(columns, values, strict=True)))
        for values in zip(*columns.values(), strict=True)
    ]
