"""Another tool's file into a dataset directory: what is good goes in, what is bad is written down.

out/manifest.json       counts: {"imported": 812, "quarantined:missing_column": 3}
out/shard-00000.parquet
out/quarantine.jsonl    one line for each row left out: where, id, reason, detail

A clip that is a folder holds frames, and becomes pictures: NUM_FRAMES of them, evenly spread, as
MM-RLHF's loader takes them.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_builders.importers.common import Bad, Imported
from mmalign import __version__
from mmalign.errors import DataError, MediaError
from mmalign.log import progress
from mmalign.media import open_image, read_bytes, resolve
from mmalign.records import (
    Block,
    Example,
    ImagePreference,
    Media,
    Message,
    Preference,
    Ranking,
    check,
    kind_name,
    to_row,
)
from mmalign.store import MANIFEST, Manifest, write_atomically, write_dataset

if TYPE_CHECKING:
    from mmalign.clips import ClipReader

QUARANTINE = "quarantine.jsonl"

NUM_FRAMES = 10


def convert(
    source: Path,
    out: Path,
    read: Callable[[Path], Iterator[Any]],
    *,
    media_root: Path | None = None,
    embed_media: bool = False,
    limit: int | None = None,
) -> Manifest:
    """Import `source` through `read` into the directory `out`.

    Media paths are taken relative to `media_root`, by default the source's folder, and stay where
    they are unless `embed_media`. Of two rows with one id, the first is kept; what is of another
    kind than the first record is left out. After `limit` good records nothing more is read: ties
    and bad rows do not count.
    Raises DataError when `out` is a dataset already, the source cannot be read, or no row is good.
    """
    if not source.exists() and "*" not in source.name:
        raise DataError("no such file or folder", where=str(source))
    if (out / MANIFEST).exists():
        raise DataError("is a dataset already", where=str(out), fix="delete it or choose another")
    root = (media_root or (source if source.is_dir() else source.parent)).resolve()
    counts = {"imported": 0}
    bad: list[Bad] = []

    def good(settle: _Settler) -> Iterator[Imported]:
        seen: set[str] = set()
        kind: type[Imported] | None = None
        for row in progress(read(source), label="importing"):
            verdict = row if isinstance(row, Bad) else _admitted(row, kind, seen, settle)
            if isinstance(verdict, Bad):
                bad.append(verdict)
                reason = f"quarantined:{verdict.reason}"
                counts[reason] = counts.get(reason, 0) + 1
                continue
            kind = type(verdict)
            seen.add(verdict.id)
            counts["imported"] += 1
            yield verdict
            if counts["imported"] == limit:
                break
        lines = [json.dumps(asdict(row), ensure_ascii=True) + "\n" for row in bad]
        write_atomically(out / QUARANTINE, "".join(lines))

    with closing(_Settler(root, embed_media)) as settle:
        records: Iterator[Any] = good(settle)
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
            config={
                "source": str(source),
                "importer": first.origin.builder,
                "limit": limit,
            },
            counts=counts,  # filled while the records are written
            media_root="media" if embed_media else str(root),
        )


def told(counts: dict[str, int]) -> str:
    """The quarantine counts as words: "3 missing_column, 1 duplicate_id"."""
    reasons = {key.partition(":")[2]: count for key, count in counts.items() if ":" in key}
    return ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))


def with_frames(
    record: Example | Preference | Ranking, root: Path
) -> Example | Preference | Ranking:
    """The record with each clip that is a folder of frames as pictures in the clip's place.

    Of n frames in the order of their names, those at floor(i (n - 1) / (NUM_FRAMES - 1)) are taken,
    the first and the last among them; fewer than NUM_FRAMES are taken once each, where the released
    loader repeats them. Raises MediaError for a folder that is empty or cannot be read.
    """
    frames = [_frames(clip, root) for clip in record.videos]
    if not any(frames):
        return record
    clips, pictures = iter(zip(record.videos, frames, strict=True)), iter(record.images)
    prompt: list[Message] = []
    images: list[Media] = []
    for message in record.prompt:
        blocks: list[Block] = []
        for block in message.content:
            taken = next(clips)[1] if block.type == "video" else ()
            if block.type == "image":
                images.append(next(pictures))
            images += taken
            blocks += [Block(type="image")] * len(taken) or [block]
        prompt.append(replace(message, content=tuple(blocks)))
    return replace(
        record,
        prompt=tuple(prompt),
        images=tuple(images),
        videos=tuple(c for c, taken in zip(record.videos, frames, strict=True) if not taken),
    )


def _frames(clip: Media, root: Path) -> tuple[Media, ...]:
    """The frames of a clip that is a folder; none of one that is a file."""
    if clip.path is None or clip.bytes is not None:
        return ()
    folder = resolve(clip, root)
    try:
        if not folder.is_dir():
            return ()
        names = sorted(f.name for f in folder.iterdir() if f.is_file() and f.name[0] != ".")
    except OSError as error:
        raise MediaError(f"cannot be read ({error.strerror})", where=str(folder)) from None
    if not names:
        raise MediaError("is a folder without frames", where=str(folder), fix="drop the row")
    at = sorted({i * (len(names) - 1) // (NUM_FRAMES - 1) for i in range(NUM_FRAMES)})
    return tuple(Media(path=f"{clip.path.rstrip('/')}/{names[index]}") for index in at)


def _admitted(
    record: Imported, kind: type[Imported] | None, seen: set[str], settle: _Settler
) -> Imported | Bad:
    """The record with its media checked and hashed, or why it is left out."""
    bad = partial(Bad, where=record.origin.source, id=record.id)
    if kind is not None and type(record) is not kind:
        detail = f"is a {kind_name(type(record))}, those before it a {kind_name(kind)}"
        return bad(reason="another_kind", detail=detail)
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
        record = _settled(record, settle)
    except MediaError as error:
        return bad(reason="unreadable_media", detail=str(error))
    if isinstance(record, ImagePreference) and record.chosen.sha256 == record.rejected.sha256:
        return bad(reason="same_image", detail="chosen and rejected are one picture")
    return record


def _settled(record: Imported, settle: _Settler) -> Imported:
    """The record with its media checked and hashed. Raises MediaError."""
    if isinstance(record, ImagePreference):
        chosen, rejected = settle.picture(record.chosen), settle.picture(record.rejected)
        return replace(record, chosen=chosen, rejected=rejected)
    record = with_frames(record, settle.root)
    columns = ["images", "videos"]
    if isinstance(record, Preference):
        columns += ["contrast_images", "contrast_videos"]
    changes: dict[str, Any] = {
        column: tuple(map(settle.clip if column.endswith("videos") else settle.picture, media))
        for column in columns
        if (media := getattr(record, column))
    }
    return replace(record, **changes)


class _Settler:
    """Media that are known to decode, with their hash, and their bytes where they are wanted.

    The last ones are remembered: rows of one picture or clip often follow each other.
    """

    def __init__(self, root: Path, embed_media: bool) -> None:
        self.root, self.embed_media = root, embed_media
        self.picture = lru_cache(maxsize=64)(self._picture)
        self.clip = lru_cache(maxsize=64)(self._clip)
        self._reader: ClipReader | None = None

    def close(self) -> None:
        """End the process that reads clips, if there is one."""
        if self._reader is not None:
            self._reader.close()

    def _picture(self, media: Media) -> Media:
        data = read_bytes(media, self.root)
        open_image(Media(path=media.path, bytes=data))
        return self._kept(media, data)

    def _clip(self, media: Media) -> Media:
        if self._reader is None:
            from mmalign.clips import ClipReader, FrameSampling

            self._reader = ClipReader(sampling=FrameSampling())
        # In a child with a time limit: nobody vouches for these files, and one may hang a decoder.
        self._reader.probe(media, self.root)
        if media.bytes is not None:
            return self._kept(media, media.bytes)
        path = resolve(media, self.root)
        try:
            if self.embed_media:
                return self._kept(media, path.read_bytes())
            with open(path, "rb") as file:
                return replace(media, sha256=hashlib.file_digest(file, "sha256").hexdigest())
        except OSError as error:
            raise MediaError(f"cannot be read ({error.strerror})", where=str(path)) from None

    def _kept(self, media: Media, data: bytes) -> Media:
        keep = self.embed_media or media.bytes is not None
        return Media(
            path=media.path, bytes=data if keep else None, sha256=hashlib.sha256(data).hexdigest()
        )
