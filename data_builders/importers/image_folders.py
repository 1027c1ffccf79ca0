"""Two folders of pictures, `chosen/` and `rejected/`, which belong together by their names.

    photos/chosen/cats/1.png    photos/rejected/cats/1.jpg    photos/prompts.jsonl

A pair's stem, here cats/1, is its path in either folder without the suffix. Its prompt stands in
`prompts.jsonl` ({"id": "cats/1", "prompt": …}, or "file", which may have the suffix) or in
`chosen/cats/1.txt`. Every file is a picture but for .txt and hidden ones; texts beside rejected
pictures are not read.

What is not whole is left out under its stem: `missing_side`, `missing_prompt`, `two_pictures` of
one stem in one folder (a.png, a.jpg), `two_prompts` that differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from data_builders.importers.common import (
    Bad,
    Unusable,
    read_rows,
    required,
    stamped,
    text,
)
from mmalign.errors import DataError
from mmalign.records import ImagePreference, Media

PROMPTS = "prompts.jsonl"
SIDES = ("chosen", "rejected")

Found = dict[str, list[str]]


def read(source: Path) -> Iterator[ImagePreference | Bad]:
    """Image preferences in the order of their stems. Raises DataError where a folder is missing."""
    for name in SIDES:
        if not (source / name).is_dir():
            raise DataError(
                f"holds no folder {name}", where=str(source), wanted="two: chosen, rejected"
            )
    chosen, rejected = (_pictures(source, name) for name in SIDES)
    prompts: Found = {}
    if (source / PROMPTS).exists():
        yield from _read_prompts(source / PROMPTS, {*chosen, *rejected}, prompts)
    for stem in sorted({*chosen, *rejected, *prompts}):
        try:
            sides = [
                _only(found, stem, name)
                for found, name in zip((chosen, rejected), SIDES, strict=True)
            ]
            pair = ImagePreference(
                id=stem,
                prompt=_prompt(source, stem, prompts.get(stem, [])),
                chosen=Media(path=sides[0]),
                rejected=Media(path=sides[1]),
            )
        except Unusable as error:
            yield Bad(where=stem, id=stem, reason=error.reason, detail=error.detail)
            continue
        yield stamped(pair, "import:image_folders", sides[0])


def _pictures(source: Path, side: str) -> Found:
    """The pictures of one side by their stems, as paths from `source`."""
    found: Found = {}
    for file in sorted((source / side).rglob("*")):
        inner = file.relative_to(source / side)
        hidden = any(part.startswith(".") for part in inner.parts)
        if not hidden and file.suffix != ".txt" and file.is_file():
            found.setdefault(_stem(inner.as_posix()), []).append(f"{side}/{inner.as_posix()}")
    return found


def _stem(name: str) -> str:
    return name.removesuffix(PurePosixPath(name).suffix)


def _only(found: Found, stem: str, side: str) -> str:
    paths = found.get(stem, [])
    if not paths:
        raise Unusable("missing_side", f"{side} holds no picture {stem}")
    if len(paths) > 1:
        raise Unusable("two_pictures", f"{', '.join(paths)}: which of them is it?")
    return paths[0]


def _read_prompts(file: Path, stems: set[str], prompts: Found) -> Iterator[Bad]:
    """Fill `prompts`; yields the lines that cannot be used."""
    for row in read_rows(file):
        if isinstance(row, Bad):
            yield row
            continue
        values = row.values
        try:
            column = "file" if values.get("id") is None else "id"
            stem = str(required(values, column))
            if column == "file" and stem not in stems:
                stem = _stem(stem)
            prompts.setdefault(stem, []).append(text(values, "prompt"))
        except Unusable as error:
            yield Bad(where=row.where, reason=error.reason, detail=error.detail)


def _prompt(source: Path, stem: str, listed: list[str]) -> str:
    """The one prompt of a stem, from prompts.jsonl and from the text beside the chosen picture."""
    beside = source / SIDES[0] / f"{stem}.txt"
    try:
        texts = [beside.read_text(encoding="utf-8").strip()] if beside.exists() else []
    except (OSError, UnicodeDecodeError) as error:
        raise Unusable("missing_prompt", f"{beside.name} cannot be read ({error})") from None
    given = {*listed, *filter(None, texts)}
    if not given:
        raise Unusable("missing_prompt", f"{stem} has no prompt in {PROMPTS}, and no {stem}.txt")
    if len(given) > 1:
        raise Unusable("two_prompts", f"{stem} has {len(given)} prompts that differ")
    return given.pop()
