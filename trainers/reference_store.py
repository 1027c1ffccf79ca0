"""The folder of stored reference scores: what is in it, and who may write it.

data/realign_coco/reference/llava-hf-llava-1.5-7b-hf-3f2a91c0/
  key.json                 what the scores are of, in plain words; what they were made with
  rows-00000000.parquet    a few hundred rows from the dataset's first, whole or absent

A row holds its id, the tokens of each candidate, and for every token its log-probability. It also
holds digests of its own token ids and of the files that it names, so that a row that changed is
caught where it is used, whatever the key says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmalign.errors import TrainingError
from mmalign.log import get_logger
from mmalign.store import write_atomically
from trainers.keyed_folder import KeyedFolder

logger = get_logger("trainers.reference")

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


class ReferenceCache(KeyedFolder):
    """One folder of scores, as seen by the process that may write it, and by those that read it."""

    kept = "reference scores"
    pattern = "rows-*.parquet"
    anew = ANEW
    elsewhere = ELSEWHERE

    def __init__(self, folder: Path, key: dict[str, Any], about: dict[str, Any]) -> None:
        super().__init__(folder, key, about)
        self._damaged: list[Path] = []

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
        self.write_key()
        return missing

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
