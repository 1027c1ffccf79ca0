"""The record kinds, their Arrow schemas (derived from them), and the checks a row must pass.

Builders write records, trainers and evals read them. Spans are characters, not tokens.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from mmalign.errors import DataError

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Media:
    """One image or clip: a path relative to the dataset's media root, or embedded bytes, or both.

    Example: Media(path="train2014/COCO_train2014_000000000009.jpg", sha256="9f2c…")
    """

    path: str | None = None
    bytes: bytes | None = None
    sha256: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One piece of a message: text, or the place where the next image or clip goes.

    Example: Block(type="text", text="Is there a dog in the image?")
    """

    type: Literal["text", "image", "video"]
    text: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn. Example: Message(role="user", content=(Block(type="image"), Block(…)))."""

    role: Literal["system", "user", "assistant"]
    content: tuple[Block, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Characters [start, end) of a response; phrase k of chosen answers phrase k of rejected."""

    start: int
    end: int
    phrase: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where a record came from and why it was kept; `detail` is JSON.

    Example: Origin(builder="realign", version="1", source="n01440764_tench",
                    reason="accepted:rank2", detail='{"similarity": 0.81}')
    """

    builder: str = ""
    version: str = ""
    source: str = ""
    reason: str = ""
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A prompt with its media, and the right answer where one is known."""

    id: str
    prompt: tuple[Message, ...]
    images: tuple[Media, ...] = ()
    videos: tuple[Media, ...] = ()
    answer: str | None = None
    origin: Origin = Origin()


@dataclass(frozen=True, slots=True, kw_only=True)
class Preference:
    """A prompt, its media, and two responses of which one is preferred.

    `contrast_images` is the image under which the chosen answer is wrong (Re-Align's retrieved
    image). `score_gap` is an outside annotator's chosen minus rejected score. `p_target` is the
    probability that chosen is the better one, 0.5 for a tie; `weight` multiplies the row's loss.
    """

    id: str
    prompt: tuple[Message, ...]
    images: tuple[Media, ...] = ()
    videos: tuple[Media, ...] = ()
    chosen: str
    rejected: str
    contrast_images: tuple[Media, ...] = ()
    contrast_videos: tuple[Media, ...] = ()
    chosen_spans: tuple[Span, ...] = ()
    rejected_spans: tuple[Span, ...] = ()
    score_gap: float | None = None
    chosen_critique: str | None = None
    rejected_critique: str | None = None
    p_target: float = 1.0
    weight: float = 1.0
    annotator: str | None = None
    origin: Origin = Origin()


@dataclass(frozen=True, slots=True, kw_only=True)
class RankedResponse:
    """One response of a ranking; rank 0 is the best, equal ranks are ties."""

    text: str
    rank: int
    model: str | None = None
    score: float | None = None
    critique: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """A prompt, its media, and N ranked responses."""

    id: str
    prompt: tuple[Message, ...]
    images: tuple[Media, ...] = ()
    videos: tuple[Media, ...] = ()
    responses: tuple[RankedResponse, ...]
    origin: Origin = Origin()


@dataclass(frozen=True, slots=True, kw_only=True)
class ImagePreference:
    """A text prompt and two images made for it, of which one is preferred."""

    id: str
    prompt: str
    chosen: Media
    rejected: Media
    p_target: float = 1.0
    origin: Origin = Origin()


@dataclass(frozen=True, slots=True, kw_only=True)
class Verifiable:
    """A prompt whose answer a verifier can check: one that `mmalign.verify` names."""

    id: str
    prompt: tuple[Message, ...]
    images: tuple[Media, ...] = ()
    videos: tuple[Media, ...] = ()
    answer: str
    verifier: str
    origin: Origin = Origin()


Record = Example | Preference | Ranking | ImagePreference | Verifiable
RecordT = TypeVar("RecordT", Example, Preference, Ranking, ImagePreference, Verifiable)
KINDS: dict[str, type[Any]] = {
    "example": Example,
    "preference": Preference,
    "ranking": Ranking,
    "image_preference": ImagePreference,
    "verifiable": Verifiable,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing wrong with one column of a record, and what to do about it."""

    column: str
    what: str
    fix: str


def user(text: str, *, images: int = 0, videos: int = 0) -> tuple[Message, ...]:
    """A one-turn prompt: `images` image places, `videos` clip places, then the text."""
    blocks = (Block(type="image"),) * images + (Block(type="video"),) * videos
    return (Message(role="user", content=(*blocks, Block(type="text", text=text))),)


def prompt_text(prompt: Sequence[Message]) -> str:
    """The words of a prompt without roles and media places, for reading and for reports."""
    return "\n".join(
        block.text for message in prompt for block in message.content if block.type == "text"
    )


def media_of(record: Record) -> Iterator[tuple[str, Media]]:
    """Yield every image and clip of a record with the column it stands in."""
    if isinstance(record, ImagePreference):
        yield from (("chosen", record.chosen), ("rejected", record.rejected))
        return
    columns = ["images", "videos"]
    if isinstance(record, Preference):
        columns += ["contrast_images", "contrast_videos"]
    for column in columns:
        for media in getattr(record, column):
            yield column, media


def kind_name(kind: type[Any]) -> str:
    """The name of a record class on disk: `Preference` is `preference`."""
    return next(name for name, known in KINDS.items() if known is kind)


def to_row(record: Record) -> dict[str, Any]:
    """A record as plain dicts and lists, ready for Arrow."""
    return _plain(record)


def from_row(kind: type[RecordT], row: dict[str, Any], *, where: str = "row") -> RecordT:
    """A record from a row of plain values. Raises DataError naming the column that does not fit."""
    try:
        return _reader(kind)(row)
    except (TypeError, ValueError) as error:
        name = kind_name(kind)
        raise DataError(f"is no {name} record: {error}", where=where) from None


def arrow_schema(kind: type[Any]) -> Any:
    """The pyarrow schema of a record class."""
    import pyarrow as pa

    return pa.schema(list(_arrow_type(kind)))


def check(record: Record) -> Iterator[Problem]:
    """Yield what is wrong with a record by itself; files are checked by mmalign.media."""
    if not record.id.strip():
        yield Problem(column="id", what="is empty", fix="give every row an id of its own")
    if isinstance(record, ImagePreference):
        if not record.prompt.strip():
            yield Problem(column="prompt", what="is empty", fix="drop the row")
        yield from _check_probability(record.p_target)
        return
    yield from _check_prompt(record)
    match record:
        case Preference():
            yield from _check_pair(record)
        case Ranking():
            if len(record.responses) < 2:
                yield Problem(
                    column="responses",
                    what=f"holds {len(record.responses)} responses",
                    fix="a ranking needs at least two",
                )
            if any(not response.text.strip() for response in record.responses):
                yield Problem(column="responses", what="has an empty text", fix="drop the response")
        case Verifiable() if not record.answer.strip():
            yield Problem(column="answer", what="is empty", fix="drop the row")
        case Example() if record.answer is not None and not record.answer.strip():
            yield Problem(column="answer", what="is empty", fix="use null where none is known")


def _check_prompt(record: Example | Preference | Ranking | Verifiable) -> Iterator[Problem]:
    if not record.prompt:
        yield Problem(column="prompt", what="has no messages", fix="add a user message")
        return
    if record.prompt[-1].role == "assistant":
        yield Problem(
            column="prompt",
            what="ends with an assistant turn",
            fix="move that turn into the response",
        )
    for kind, column in (("image", "images"), ("video", "videos")):
        places = sum(b.type == kind for m in record.prompt for b in m.content)
        found = len(getattr(record, column))
        if places != found:
            yield Problem(
                column=column,
                what=f"has {found} files for {places} places in the prompt",
                fix=f"give one file per {kind} block",
            )


def _check_pair(record: Preference) -> Iterator[Problem]:
    for column in ("chosen", "rejected"):
        text = getattr(record, column)
        if not text.strip():
            yield Problem(column=column, what="is empty", fix="drop the row")
        for span in getattr(record, f"{column}_spans"):
            if not 0 <= span.start < span.end <= len(text):
                yield Problem(
                    column=f"{column}_spans",
                    what=f"[{span.start}, {span.end}) is outside the {len(text)} characters",
                    fix="spans are character offsets into the response",
                )
    if record.chosen.strip() and record.chosen == record.rejected and not record.contrast_images:
        yield Problem(
            column="rejected", what="is the chosen response", fix="drop the row: it teaches nothing"
        )
    for media in ("images", "videos"):
        contrast, own = getattr(record, f"contrast_{media}"), getattr(record, media)
        if contrast and len(contrast) != len(own):
            yield Problem(
                column=f"contrast_{media}",
                what=f"has {len(contrast)} files where {media} has {len(own)}",
                fix="give one contrast file for each, or none",
            )
    if record.weight < 0:
        yield Problem(column="weight", what=f"is {record.weight}", fix="use 0 to leave it out")
    yield from _check_probability(record.p_target)


def _check_probability(value: float) -> Iterator[Problem]:
    if not 0.0 <= value <= 1.0:
        yield Problem(column="p_target", what=f"is {value}", fix="use a probability: 0 to 1")


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


@cache
def _hints(kind: type[Any]) -> dict[str, Any]:
    # The namespaces are given: Media has a field named `bytes`, which would shadow the builtin.
    return typing.get_type_hints(kind, globals(), {})


@cache
def _reader(hint: Any) -> Callable[[Any], Any]:
    """The function that rebuilds a value of this type hint from plain values; made once each."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return _reader(next(arg for arg in get_args(hint) if arg is not type(None)))
    if origin is tuple:
        return partial(_read_tuple, _reader(get_args(hint)[0]))
    if dataclasses.is_dataclass(hint):
        hints = _hints(hint)  # type: ignore[arg-type]
        fields = [
            (f.name, f.default is dataclasses.MISSING, _reader(hints[f.name]))
            for f in dataclasses.fields(hint)
        ]
        return partial(_read_fields, hint, fields)
    if origin is Literal:
        return partial(_read_choice, get_args(hint))
    return partial(_read_plain, (int, float) if hint is float else hint, hint)


def _read_fields(kind: Any, fields: list[tuple[str, bool, Any]], row: Any) -> Any:
    if not isinstance(row, dict):
        raise TypeError(f"wanted a {kind.__name__}, got {type(row).__name__}")
    values = {}
    for name, required, read in fields:
        value = row.get(name)
        if value is None:
            if required:
                raise ValueError(f"column {name} is {'null' if name in row else 'missing'}")
            continue
        try:
            values[name] = read(value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}: {error}") from None
    return kind(**values)


def _read_tuple(read: Callable[[Any], Any], value: Any) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise TypeError(f"wanted a list, got {type(value).__name__}")
    return tuple(map(read, value))


def _read_choice(choices: tuple[str, ...], value: Any) -> str:
    if value not in choices:
        raise ValueError(f"{value!r} is none of {', '.join(map(repr, choices))}")
    return value


def _read_plain(accepted: Any, kind: type[Any], value: Any) -> Any:
    if not isinstance(value, accepted):
        raise TypeError(f"wanted {kind.__name__}, got {type(value).__name__}")
    return kind(value)


def _arrow_type(hint: Any) -> Any:
    import pyarrow as pa

    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return _arrow_type(next(arg for arg in get_args(hint) if arg is not type(None)))
    if origin is tuple:
        return pa.list_(_arrow_type(get_args(hint)[0]))
    if dataclasses.is_dataclass(hint):
        hints = _hints(hint)  # type: ignore[arg-type]
        return pa.struct(
            [pa.field(f.name, _arrow_type(hints[f.name])) for f in dataclasses.fields(hint)]
        )
    if origin is Literal or hint is str:
        return pa.string()
    return {int: pa.int64(), float: pa.float64(), bytes: pa.binary(), bool: pa.bool_()}[hint]
