"""What the importers share: reading rows, words for bad ones, turns into messages.

An importer is `read(source)`, which yields a record or a Bad for every row. A bad row never stops
it, and whether its pictures and clips can be read is asked later, by data_builders.convert. Files
are opened by what they hold: parquet, a JSON list, or JSON lines.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from mmalign import __version__
from mmalign.errors import DataError
from mmalign.records import (
    Block,
    Example,
    ImagePreference,
    Media,
    Message,
    Preference,
    Ranking,
)

Imported = Example | Preference | Ranking | ImagePreference
ImportedT = TypeVar("ImportedT", bound=Imported)
Place = Literal["image", "video"]

IMAGE_PLACES: Mapping[str, Place] = {"<image>": "image"}
MEDIA_PLACES: Mapping[str, Place] = {"<image>": "image", "<video>": "video"}
ROLES: dict[str, Literal["system", "user", "assistant"]] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row of a source: `where` for people, `id` as the row says it, or else its `place`.

    The place names a row also where a set gives several rows one id.
    """

    where: str
    place: str
    id: str
    values: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bad:
    """A row that cannot be used. `reason` is a short name to count by, `detail` a sentence."""

    where: str
    id: str = ""
    reason: str
    detail: str


class Unusable(Exception):
    """Raised by an importer about the row in hand; becomes a Bad."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason, self.detail = reason, detail
        super().__init__(detail)


def import_rows(
    source: Path,
    parse: Callable[[Row], ImportedT],
    importer: str,
    *,
    columns: Collection[str] | None = None,
) -> Iterator[ImportedT | Bad]:
    """Run `parse` over the rows of a source; what it finds Unusable is yielded as Bad.

    Of the record's origin, `detail` is the importer's own. `columns`: see read_rows.
    """
    return import_each(source, lambda row: iter((parse(row),)), importer, columns=columns)


def import_each(
    source: Path,
    parse: Callable[[Row], Iterator[ImportedT | Bad]],
    importer: str,
    *,
    columns: Collection[str] | None = None,
) -> Iterator[ImportedT | Bad]:
    """`import_rows` where a row holds any number of records; `parse` yields them.

    Where it raises Unusable, the rest of the row is one Bad.
    """
    for row in read_rows(source, columns):
        if isinstance(row, Bad):
            yield row
            continue
        try:
            for record in parse(row):
                yield record if isinstance(record, Bad) else stamped(record, importer, row.where)
        except Unusable as error:
            yield Bad(where=row.where, id=row.id, reason=error.reason, detail=error.detail)


def stamped(record: ImportedT, importer: str, where: str) -> ImportedT:
    """The record with an origin that says what imported it, and from where."""
    origin = replace(
        record.origin, builder=importer, version=__version__, source=where, reason="imported"
    )
    return replace(record, origin=origin)


def read_rows(source: Path, columns: Collection[str] | None = None) -> Iterator[Row | Bad]:
    """The rows of a parquet file, a folder of them, a JSON list, or JSON lines.

    A folder's files lie in it or in its `data/`, as on the hub; a name with `*` is all files that
    match it. Of parquet, only `columns` are read, and at most one row group lies in memory.
    Lines are counted from 1, rows of parquet and of lists from 0.
    Raises DataError when the source as a whole cannot be read.
    """
    for file in _files(source):
        try:
            if file.suffix == ".parquet":
                yield from _parquet_rows(file, columns)
            elif file.suffix != ".jsonl" and _holds_a_list(file):
                yield from _list_rows(file)
            else:
                yield from _line_rows(file)
        except OSError as error:
            reason = error.strerror or error
            raise DataError(f"cannot be read ({reason})", where=str(file)) from None


def text(values: dict[str, Any], column: str) -> str:
    """A column that must hold words."""
    value = required(values, column)
    if not isinstance(value, str):
        raise Unusable("wrong_type", f"{column} is {type(value).__name__}, wanted text")
    if not value.strip():
        raise Unusable("empty_text", f"{column} is empty")
    return value


def required(values: dict[str, Any], column: str) -> Any:
    """A column that must be there and not null."""
    if values.get(column) is None:
        known = ", ".join(values) or "none"
        raise Unusable("missing_column", f"column {column} is missing; the row has {known}")
    return values[column]


def media(value: Any) -> tuple[Media, ...]:
    """Media from what public sets hold: a path, {"bytes", "path"}, a list of these, or null."""
    if value is None:
        return ()
    if isinstance(value, list):
        return tuple(item for part in value for item in media(part))
    if isinstance(value, str) and value:
        return (Media(path=value),)
    if isinstance(value, dict) and (value.get("bytes") is not None or value.get("path")):
        data, path = value.get("bytes"), value.get("path") or None
        if isinstance(data, bytes | None) and isinstance(path, str | None):
            return (Media(path=path, bytes=data),)
    raise Unusable("wrong_type", 'a picture or clip is neither a path nor {"bytes", "path"}')


def side(value: Any, column: str) -> Media:
    """One picture of a pair: bytes, a path, or {"bytes", "path"}."""
    held = value.get("bytes") if isinstance(value, dict) else value
    if held is None and isinstance(value, dict):
        held = value.get("path")
    if held is None or held in (b"", ""):
        raise Unusable("missing_side", f"{column} holds no picture")
    found = media({"bytes": value} if isinstance(value, bytes) else value)
    if len(found) != 1:
        raise Unusable("wrong_type", f"{column} holds {len(found)} pictures, wanted one")
    return found[0]


def messages(
    turns: Any,
    *,
    role: str = "role",
    content: str = "content",
    places: Mapping[str, Place] = IMAGE_PLACES,
) -> tuple[Message, ...]:
    """Turns as messages; a tag of `places` in a user's text, or an image block, becomes a place."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise Unusable("wrong_type", "turns are not a list of objects")
    result = []
    for turn in turns:
        speaker = turn.get(role)
        if speaker not in ROLES:
            raise Unusable("unknown_role", f"a turn's {role} is {speaker!r}; known: {[*ROLES]}")
        blocks = _blocks(turn.get(content), places if ROLES[speaker] == "user" else {})
        result.append(Message(role=ROLES[speaker], content=blocks))
    return tuple(result)


def with_image_places(prompt: tuple[Message, ...], num_images: int) -> tuple[Message, ...]:
    """The prompt with its images at the front of the first user turn, if it gives them no place."""
    return with_places(prompt, "image", num_images)


def with_places(prompt: tuple[Message, ...], kind: Place, count: int) -> tuple[Message, ...]:
    """The prompt with `count` media at the front of the first user turn, if it gives them no place.

    With images and clips both, give the clips their places first: images come before them.
    """
    if any(block.type == kind for message in prompt for block in message.content):
        return prompt
    places = (Block(type=kind),) * count
    for index, message in enumerate(prompt):
        if message.role == "user":
            first = replace(message, content=places + message.content)
            return (*prompt[:index], first, *prompt[index + 1 :])
    return prompt


def split_pair(
    chosen: tuple[Message, ...], rejected: tuple[Message, ...]
) -> tuple[tuple[Message, ...], str, str]:
    """The prompt that two conversations share and the answer with which each of them ends."""
    if chosen[:-1] != rejected[:-1]:
        raise Unusable("prompts_differ", "chosen and rejected differ before their last turn")
    return chosen[:-1], answer(chosen[-1:], "chosen"), answer(rejected[-1:], "rejected")


def answer(turns: tuple[Message, ...], column: str) -> str:
    """The words of the one assistant turn in `turns`."""
    if len(turns) != 1 or turns[0].role != "assistant":
        raise Unusable("no_answer", f"{column} is not one assistant turn")
    words = "".join(block.text for block in turns[0].content)
    return text({column: words}, column)


def _blocks(content: Any, places: Mapping[str, Place]) -> tuple[Block, ...]:
    if isinstance(content, str):
        return tuple(_text_blocks(content, places))
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise Unusable("wrong_type", "a turn holds neither text nor blocks")
    blocks: list[Block] = []
    for part in content:
        if part.get("type") == "image":
            blocks.append(Block(type="image"))
        elif part.get("type") == "text" and isinstance(part.get("text"), str):
            blocks.append(Block(type="text", text=part["text"]))
        else:
            raise Unusable("wrong_type", f"a block is {part.get('type')!r}, wanted text or image")
    return tuple(blocks)


def _text_blocks(words: str, places: Mapping[str, Place]) -> Iterator[Block]:
    """Text cut at the tags of `places`; the line breaks beside a tag belong to it."""
    parts = re.split(f"({'|'.join(map(re.escape, places))})", words) if places else [words]
    if len(parts) == 1:
        yield Block(type="text", text=words)
        return
    for part in parts:
        if part in places:
            yield Block(type=places[part])
        elif part.strip():
            yield Block(type="text", text=part.strip("\n"))


def _files(source: Path) -> list[Path]:
    if "*" in source.name and not source.exists():
        if files := sorted(source.parent.glob(source.name)):
            return files
        raise DataError("matches no file", where=str(source))
    if not source.is_dir():
        return [source]
    files = sorted(source.glob("*.parquet")) or sorted(source.glob("data/*.parquet"))
    if not files:
        raise DataError("holds no parquet file, nor does its data/", where=str(source))
    # Hubs keep a set's splits in one folder. To mix them would train on what evaluates.
    named = [re.match(r"(.+?)-\d{5}-of-\d{5}", file.name) for file in files]
    splits = sorted({name[1] for name in named if name})
    if len(splits) > 1:
        example = "train" if "train" in splits else splits[-1]
        raise DataError(
            f"holds {len(splits)} splits",
            where=str(source),
            got=", ".join(splits),
            wanted="one",
            fix=f'name one by a quoted pattern, such as "{files[0].parent / example}-*.parquet"',
        )
    return files


def _parquet_rows(file: Path, columns: Collection[str] | None) -> Iterator[Row | Bad]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    index = 0
    try:
        # Its default, pre_buffer, holds a whole file of pictures in memory.
        with pq.ParquetFile(file, pre_buffer=False, buffer_size=2**20) as parquet:
            known = parquet.schema_arrow.names
            wanted = known if columns is None else [name for name in known if name in columns]
            for batch in parquet.iter_batches(batch_size=64, columns=wanted):
                for values in batch.to_pylist():
                    yield _row(file, "row", index, values)
                    index += 1
    except pa.ArrowException as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"cannot be read ({reason})", where=f"{file}, row {index}") from None


def _holds_a_list(file: Path) -> bool:
    with open(file, "rb") as stream:
        for line in stream:
            start = line.removeprefix(b"\xef\xbb\xbf").lstrip()
            if start:
                return start.startswith(b"[")
    raise DataError("is empty", where=str(file))


def _list_rows(file: Path) -> Iterator[Row | Bad]:
    try:
        values = json.loads(file.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"is not valid JSON ({error})",
            where=str(file),
            fix="repair it, or give one object a line, so that a broken row loses only itself",
        ) from None
    for index, value in enumerate(values):
        yield _row(file, "row", index, value)


def _line_rows(file: Path) -> Iterator[Row | Bad]:
    with open(file, "rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except (ValueError, RecursionError) as error:
                where = f"{file.name} line {number}"
                yield Bad(where=where, reason="malformed_json", detail=f"is not JSON: {error}")
                continue
            yield _row(file, "line", number, value)


def _row(file: Path, unit: str, number: int, value: Any) -> Row | Bad:
    where = f"{file.name} {unit} {number}"
    if not isinstance(value, dict):
        detail = f"is {type(value).__name__}, wanted an object"
        return Bad(where=where, reason="malformed_json", detail=detail)
    name, place = value.get("id"), f"{file.stem}-{number}"
    return Row(where=where, place=place, id=place if name is None else str(name), values=value)
