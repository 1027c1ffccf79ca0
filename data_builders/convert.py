"""Another tool's file into a dataset directory: what is good goes in, what is bad is written down.

out/manifest.json       counts: {"imported": 812, "quarantined:missing_column": 3}
out/shard-00000.parquet
out/quarantine.jsonl    one line for each row left out: where, id, reason, detail
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from data_builders.importers.common import Bad
from mmalign import __version__
from mmalign.errors import DataError, MediaError
from mmalign.log import progress
from mmalign.media import open_image, read_bytes
from mmalign.records import Example, Media, Preference, check, to_row
from mmalign.store import MANIFEST, Manifest, write_atomically, write_dataset

QUARANTINE = "quarantine.jsonl"

Imported = Example | Preference


def convert(
    source: Path,
    out: Path,
    read: Callable[[Path], Iterator[Imported | Bad]],
    *,
    images_root: Path | None = None,
    embed_media: bool = False,
) -> Manifest:
    """Import `source` through `read` into the directory `out`.

    Media paths are taken relative to `images_root`, by default the source's folder, and stay where
    they are unless `embed_media`. Of two rows with one id, the first is kept.
    Raises DataError when `out` is a dataset already, the source cannot be read, or no row is good.
    """
    if not source.exists():
        raise DataError("no such file or folder", where=str(source))
    if (out / MANIFEST).exists():
        raise DataError("is a dataset already", where=str(out), fix="delete it or choose another")
    root = (images_root or (source if source.is_dir() else source.parent)).resolve()
    settle = lru_cache(maxsize=64)(partial(_settled, root=root, embed_media=embed_media))
    counts = {"imported": 0}
    bad: list[Bad] = []

    def good() -> Iterator[Imported]:
        seen: set[str] = set()
        for row in progress(read(source), label="importing"):
            verdict = row if isinstance(row, Bad) else _admitted(row, seen, settle)
            if isinstance(verdict, Bad):
                bad.append(verdict)
                reason = f"quarantined:{verdict.reason}"
                counts[reason] = counts.get(reason, 0) + 1
                continue
            seen.add(verdict.id)
            counts["imported"] += 1
            yield verdict
        lines = [json.dumps(asdict(row), ensure_ascii=True) + "\n" for row in bad]
        write_atomically(out / QUARANTINE, "".join(lines))

    records: Iterator[Any] = good()
    first = next(records, None)
    if first is None:
        raise DataError(
            f"has no usable row among {len(bad)}",
            where=str(source),
            got=told(counts) or "an empty source",
            fix=f"read {out / QUARANTINE}, which says for each row what is wrong",
        )
    return write_dataset(
        out,
        type(first),
        itertools.chain([first], records),
        builder="convert",
        builder_version=__version__,
        config={"source": str(source), "importer": first.origin.builder},
        counts=counts,  # filled while the records are written
        media_root="media" if embed_media else str(root),
    )


def told(counts: dict[str, int]) -> str:
    """The quarantine counts as words: "3 missing_column, 1 duplicate_id"."""
    reasons = {key.partition(":")[2]: count for key, count in counts.items() if ":" in key}
    return ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))


def _admitted(record: Imported, seen: set[str], settle: Callable[[Media], Media]) -> Imported | Bad:
    """The record with its pictures checked and hashed, or why it is left out."""
    bad = partial(Bad, where=record.origin.source, id=record.id)
    if record.id in seen:
        return bad(reason="duplicate_id", detail="an earlier row has this id")
    problems = [f"{problem.column} {problem.what}" for problem in check(record)]
    if problems:
        return bad(reason="invalid_record", detail="; ".join(problems))
    try:
        json.dumps(to_row(record), ensure_ascii=False, default=len).encode()
    except UnicodeEncodeError:
        return bad(reason="not_unicode", detail="a text holds half of a surrogate pair")
    try:
        changes: dict[str, Any] = {"images": tuple(map(settle, record.images))}
        if isinstance(record, Preference):
            changes["contrast_images"] = tuple(map(settle, record.contrast_images))
    except MediaError as error:
        return bad(reason="unreadable_media", detail=str(error))
    return replace(record, **changes)


def _settled(media: Media, *, root: Path, embed_media: bool) -> Media:
    """A picture that is known to decode, with its hash, and its bytes where they are wanted."""
    data = read_bytes(media, root)
    open_image(Media(path=media.path, bytes=data))
    keep = embed_media or media.bytes is not None
    return Media(
        path=media.path, bytes=data if keep else None, sha256=hashlib.sha256(data).hexdigest()
    )
