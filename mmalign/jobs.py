"""Run records through a function: in shards, resumable after any crash, over many processes.

    data/realign_coco/
      job.json                    what is being built, from what; a resume must agree with it
      shard-00003.parquet         the records of chunk 3
      progress/shard-00003.json   chunk 3 is finished: counts by reason, and who was left out
      quarantine.jsonl            inputs that could not be used, and why
      manifest.json               written last

Inputs are sorted by id and cut into chunks of `shard_rows`; chunk c belongs to process c % n. A
chunk's shard is renamed into place first and its progress file after it, so that progress file is
the commit: a process killed before it does the whole chunk again, one killed after it never does.
Chunks do not depend on the number of processes, nor on the engine that runs them
(mmalign/engines.py), so neither does a byte of the result.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from filelock import FileLock

from mmalign.engines import LocalEngine, RayEngine
from mmalign.errors import DataError, MediaError
from mmalign.log import get_logger, progress
from mmalign.records import Record, RecordT, check, kind_name
from mmalign.store import (
    MANIFEST,
    Manifest,
    read_manifest,
    write_atomically,
    write_manifest,
    write_shard,
)

logger = get_logger("jobs")

JOB = "job.json"
QUARANTINE = "quarantine.jsonl"


class Input(Protocol):
    """Anything with an id of its own, such as a record; its repr tells whether it has changed."""

    @property
    def id(self) -> str:
        """The name that no other input has."""
        ...


InputT = TypeVar("InputT", bound=Input)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one input: a record, or the reason why there is none.

    Example: Outcome(id="coco-7", reason="dropped:no_neighbour_accepted", detail="lowest 0.97")
    """

    id: str
    record: Record | None = None
    reason: str
    detail: str = ""


def run_job(
    inputs: Sequence[InputT],
    work: Callable[[list[InputT]], list[Outcome]],
    out: str | Path,
    kind: type[RecordT],
    *,
    shard_rows: int = 256,
    shard: tuple[int, int] = (0, 1),
    engine: LocalEngine | RayEngine = LocalEngine(),
    **manifest: Any,
) -> Manifest | None:
    """Run `work` over every chunk of this process; complete the directory if it was the last.

    `work` gets the inputs of a chunk and returns one Outcome for each. When it raises MediaError
    it is called again on each half, down to the input at fault, which is quarantined. Any other
    exception stops the job and keeps what is complete. `shard` is (i, n): process i of n. With
    `engine` chunks are worked on elsewhere, in any order: `work` is pickled (its models belong into
    a Deferred), and `out` must be the same folder on every machine. Other keyword arguments are the
    Manifest's own. Returns None while chunks of others are missing.
    Raises DataError on a repeated id, and when `out` holds another job or another dataset.
    """
    out = Path(out)
    rows = sorted(inputs, key=lambda row: row.id)
    for one, other in itertools.pairwise(rows):
        if one.id == other.id:
            raise DataError("id appears twice among the inputs", where=str(out), got=one.id)
    num_chunks = max(1, -(-len(rows) // shard_rows))
    _claim(out, _fingerprint(rows, kind, shard_rows, manifest))
    if (out / MANIFEST).exists():
        logger.info("%s is complete already", out)
        return read_manifest(out)

    index, num_processes = shard
    todo = [
        chunk
        for chunk in range(index, num_chunks, num_processes)
        if not _marker(out, chunk).exists()
    ]
    batches = [(chunk, rows[chunk * shard_rows : (chunk + 1) * shard_rows]) for chunk in todo]

    def told(item: tuple[int, list[InputT]]) -> str:
        chunk, batch = item
        return f"shard {chunk} stopped at {_names(batch)}; what is complete is kept in {out}"

    num_rows, started = 0, time.monotonic()
    done = engine.run(_Chunks(work=work, out=out, kind=kind), batches, told)
    for count in progress(done, label=f"{out.name}: shards", total=len(todo)):
        num_rows += count
    seconds = time.monotonic() - started
    if num_rows:
        rate = num_rows / seconds
        logger.info("%s: %d inputs in %.1f s, %.2f per second", out, num_rows, seconds, rate)
    return _complete(out, num_chunks, kind, manifest)


@dataclass(frozen=True, kw_only=True)
class _Chunks:
    """Works on a chunk and commits it, in whichever process; returns its number of inputs."""

    work: Callable[[list[Any]], list[Outcome]]
    out: Path
    kind: type[Any]

    def __call__(self, item: tuple[int, list[Any]]) -> int:
        chunk, batch = item
        # A worker may die between its commit and its reply; then another gets the chunk.
        if not _marker(self.out, chunk).exists():
            _commit(self.out, chunk, self.kind, batch, _attempt(self.work, batch))
        return len(batch)


def _attempt(work: Callable[[list[InputT]], list[Outcome]], rows: list[InputT]) -> list[Outcome]:
    """Work on `rows`, halving them on a MediaError until it has one input to blame."""
    if not rows:
        return []
    try:
        return work(rows)
    except MediaError as error:
        if len(rows) == 1:
            return [Outcome(id=rows[0].id, reason="quarantined:unreadable", detail=str(error))]
        half = len(rows) // 2
        return _attempt(work, rows[:half]) + _attempt(work, rows[half:])


def _commit(
    out: Path,
    chunk: int,
    kind: type[RecordT],
    batch: Sequence[Input],
    outcomes: Sequence[Outcome],
) -> None:
    assert [o.id for o in outcomes] == [row.id for row in batch], "one outcome per input, in order"
    outcomes = [_checked(outcome) for outcome in outcomes]
    records: list[Any] = [o.record for o in outcomes if o.record is not None]
    write_shard(out / _shard(chunk), kind, records)
    summary = {
        "num_records": len(records),
        "counts": dict(Counter(outcome.reason for outcome in outcomes)),
        "left_out": [
            {"id": o.id, "reason": o.reason, "detail": o.detail}
            for o in outcomes
            if o.record is None
        ],
    }
    write_atomically(_marker(out, chunk), json.dumps(summary, indent=1, sort_keys=True))


def _checked(outcome: Outcome) -> Outcome:
    """The outcome, or a quarantined one where its record would not pass `records.check`."""
    problems = [] if outcome.record is None else list(check(outcome.record))
    if not problems:
        return outcome
    detail = "; ".join(f"{p.column} {p.what}: {p.fix}" for p in problems)
    return Outcome(id=outcome.id, reason="quarantined:invalid", detail=detail)


def _complete(
    out: Path, num_chunks: int, kind: type[Any], manifest: Mapping[str, Any]
) -> Manifest | None:
    """Write the quarantine and the manifest, if every chunk is committed."""
    markers = [_marker(out, chunk) for chunk in range(num_chunks)]
    num_missing = sum(not marker.exists() for marker in markers)
    if num_missing:
        logger.info("%s: %d of %d shards still missing", out, num_missing, num_chunks)
        return None
    summaries = [json.loads(marker.read_text()) for marker in markers]
    counts: Counter[str] = Counter()
    for summary in summaries:
        counts.update(summary["counts"])
    left_out = [row for summary in summaries for row in summary["left_out"]]
    quarantine = [row for row in left_out if row["reason"].startswith("quarantined")]
    with _lock(out):
        lines = [json.dumps(row, sort_keys=True, ensure_ascii=False) + "\n" for row in quarantine]
        write_atomically(out / QUARANTINE, "".join(lines))
        return write_manifest(
            out,
            Manifest(
                kind=kind_name(kind),
                num_records=sum(summary["num_records"] for summary in summaries),
                content_hash="",
                counts=dict(sorted(counts.items())),
                shards=tuple(_shard(chunk) for chunk in range(num_chunks)),
                **manifest,
            ),
        )


def _fingerprint(
    rows: Sequence[Input], kind: type[Any], shard_rows: int, manifest: Mapping[str, Any]
) -> dict[str, Any]:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(hashlib.sha256(repr(row).encode()).digest())
    told = {
        "kind": kind_name(kind),
        "num_inputs": len(rows),
        "inputs": digest.hexdigest(),
        "shard_rows": shard_rows,
        **manifest,
    }
    return json.loads(json.dumps(told))


def _claim(out: Path, fingerprint: dict[str, Any]) -> None:
    """Start the job in `out`, or make sure that the one started there is this one."""
    file = out / JOB
    with _lock(out):
        if not file.exists():
            if (out / MANIFEST).exists():
                fix = "choose another output"
                raise DataError("holds a dataset that no job wrote", where=str(out), fix=fix)
            write_atomically(file, json.dumps(fingerprint, indent=1, sort_keys=True))
        started = json.loads(file.read_text())
    if differences := list(_differences(started, fingerprint)):
        raise DataError(
            f"was started with other settings: {'; '.join(differences)}",
            where=str(out),
            fix="take the old settings back to continue it, or choose another output",
        )


def _differences(old: Any, new: Any, name: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(key), new.get(key), f"{name}.{key}".lstrip("."))
    elif old != new:
        yield f"{name} was {old}, is {new}"


def _lock(out: Path) -> FileLock:
    """Held while a file is written that more than one process may write."""
    out.mkdir(parents=True, exist_ok=True)
    return FileLock(out / ".lock")


def _shard(chunk: int) -> str:
    return f"shard-{chunk:05d}.parquet"


def _marker(out: Path, chunk: int) -> Path:
    return out / "progress" / f"shard-{chunk:05d}.json"


def _names(batch: Sequence[Input]) -> str:
    """Which records: all of a few, the first and the last of many."""
    ids = [row.id for row in batch]
    return ", ".join(ids) if len(ids) <= 8 else f"{ids[0]} … {ids[-1]} ({len(ids)} records)"
