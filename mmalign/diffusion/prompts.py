"""Prompts to draw pictures for: lines of text, JSON lines, or those of a dataset of pairs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mmalign.errors import DataError
from mmalign.records import ImagePreference
from mmalign.store import open_dataset

COLUMNS = ("prompt", "caption")


@dataclass(frozen=True, slots=True, kw_only=True)
class ImagePrompt:
    """One prompt with the id that its noise is drawn by."""

    id: str
    text: str


def read_prompts(source: Path) -> list[ImagePrompt]:
    """The prompts of a source, each text once, in order.

    .txt: a prompt a line, its id line-00001. .jsonl: {"prompt": …} or {"caption": …}, and its "id"
    or else line-00001. A folder: a dataset of image preferences, whose ids the prompts take.
    Blank lines are passed over.
    Raises DataError where the source cannot be read, a line has no prompt, or an id comes twice.
    """
    found: dict[str, ImagePrompt] = {}
    for prompt in _dataset(source) if source.is_dir() else _lines(source):
        found.setdefault(prompt.text, prompt)
    prompts = list(found.values())
    if not prompts:
        raise DataError("holds no prompt", where=str(source))
    ids = [prompt.id for prompt in prompts]
    if len(set(ids)) < len(ids):
        twice = next(id for id in ids if ids.count(id) > 1)
        raise DataError("two prompts have one id", where=str(source), got=twice)
    return prompts


def _dataset(source: Path) -> Iterator[ImagePrompt]:
    dataset = open_dataset(source, ImagePreference)
    rows = zip(dataset.column("id"), dataset.column("prompt"), strict=True)
    return (ImagePrompt(id=id, text=text) for id, text in rows)


def _lines(source: Path) -> Iterator[ImagePrompt]:
    try:
        lines = source.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"cannot be read ({error})",
            where=str(source),
            wanted="a UTF-8 file of prompts, or a dataset's folder",
        ) from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        id = f"line-{number:05d}"
        if source.suffix == ".jsonl":
            yield _row(line, id, where=f"{source}, line {number}")
        else:
            yield ImagePrompt(id=id, text=line.strip())


def _row(line: str, id: str, where: str) -> ImagePrompt:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"is not JSON ({error})", where=where) from None
    held = row if isinstance(row, dict) else {}
    text = next((held[name] for name in COLUMNS if isinstance(held.get(name), str)), "")
    if not text.strip():
        raise DataError("has no prompt", where=where, wanted='{"prompt": "…"}')
    given = held.get("id")
    return ImagePrompt(id=id if given is None else str(given), text=text.strip())
