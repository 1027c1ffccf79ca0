"""What a benchmark is: requests for a model, and a score for its answers."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from pydantic import AfterValidator, model_validator

from evals.stats import Ratio
from mmalign.config import Strict
from mmalign.errors import DataError
from mmalign.generate.base import Request
from mmalign.records import Media, user

Row = dict[str, Any]


def _has_place(prompt: str) -> str:
    if "{question}" not in prompt:
        raise ValueError("has no place for the {question}")
    return prompt


def _is_a_name(split: str) -> str:
    if not re.fullmatch(r"[\w.-]+", split) or split in (".", ".."):
        raise ValueError("wanted a name of letters, digits, _, . and -")
    return split


# A part of a suite's key, which names files: a word, and never a way into another folder.
Split = Annotated[str, AfterValidator(_is_a_name)]
# What is asked, with the place of the question.
QuestionPrompt = Annotated[str, AfterValidator(_has_place)]


@dataclass(frozen=True, kw_only=True)
class Suite:
    """The scored answers to one benchmark: a row per item, and metrics made from the rows alone.

    `images` is the folder of the rows' pictures, or `videos` of their clips; a row names its own
    under `image` or `video`. `method` says in words how answers were read.
    A row's `answer` is None where the model gave none, as for a picture that cannot be read.
    `judge` tells who judged the answers, where a language model did.
    """

    key: str
    benchmark: str
    split: str | None
    images: Path | None = None
    videos: Path | None = None
    method: str
    items: list[Row]
    metrics: dict[str, Ratio]
    num_unparsed: int
    judge: dict[str, Any] | None = None


class Benchmark(Protocol):
    """A benchmark is its config: frozen, named, with these methods.

    `key` names the suite in files and reports, such as "pope-adversarial".
    """

    @property
    def max_new_tokens(self) -> int:
        """Where an answer is cut."""
        ...

    @property
    def key(self) -> str:
        """The suite's name, unique inside a recipe."""
        ...

    def requests(self) -> list[Request]:
        """What to ask, at least once; ids are unique, and every request has a media root.

        Raises DataError on files that are missing or wrong.
        """
        ...

    def score(self, answers: Mapping[str, str]) -> Suite:
        """Score answers by request id; a request without an answer counts against the model."""
        ...


class OverMedia(Strict):
    """What benchmarks over pictures and over clips share: a folder of either, and what is asked.

    images: the folder of the pictures. videos: that of the clips. Give one of them, where the
    benchmark's data does not hold pictures itself.
    """

    images: Path | None = None
    videos: Path | None = None

    @model_validator(mode="after")
    def _one_folder(self) -> OverMedia:
        given = sum(folder is not None for folder in (self.images, self.videos))
        if given > 1 or (not given and not self.holds_pictures):
            raise ValueError("give either images or videos")
        return self

    @property
    def holds_pictures(self) -> bool:
        """Whether the data itself has the pictures."""
        return False

    @property
    def medium(self) -> Literal["image", "video"]:
        """What an item is about: the field that names it in files and in rows."""
        return "image" if self.videos is None else "video"

    def request(self, id: str, text: str, media: Media) -> Request:
        """A question about one picture or clip."""
        if self.videos is None:
            return Request(
                id=id, prompt=user(text, images=1), images=(media,), media_root=self.images
            )
        return Request(id=id, prompt=user(text, videos=1), videos=(media,), media_root=self.videos)


def digest(value: Any) -> str:
    """A hash of what JSON can hold, keys in order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def shown(row: Row) -> str:
    """The file of the picture or clip that an item is about."""
    return row["video"] if "video" in row else row["image"]


def cluster_of(row: Row) -> str:
    """What an item is drawn together with in intervals: its `cluster`, or its picture or clip."""
    return row["cluster"] if "cluster" in row else shown(row)


def read_jsonl(path: Path, *, growing: bool = False) -> Iterator[tuple[str, Row]]:
    """Yield ("file, line n", row) for each line that is not blank.

    growing: leave out a last line without its end, which a kill cut short, or which is being
    written. Raises DataError when the file is missing or a line holds no JSON object.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        fix = "check that it is there, and is UTF-8 text"
        raise DataError(f"cannot be read ({error})", where=str(path), fix=fix) from None
    if growing:
        text = text[: text.rfind("\n") + 1]
    # Not splitlines: a JSON string may hold U+2028, which that takes for the end of a line.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"is not JSON ({error})", where=where) from None
        if not isinstance(row, dict):
            raise DataError("is no JSON object", where=where, got=type(row).__name__)
        yield where, row


def text_field(row: Row, name: str, where: str) -> str:
    """A field that must hold text. Raises DataError naming the field and the line."""
    value = row.get(name)
    if not isinstance(value, str):
        raise DataError(
            f"field {name} is missing" if name not in row else f"field {name} is no text",
            where=where,
            got=f"fields {', '.join(row)}" if name not in row else repr(value),
        )
    return value


def check_known(answers: Mapping[str, object], ids: set[str], key: str) -> None:
    """Raise DataError when answers carry ids that the benchmark does not ask."""
    unknown = sorted(set(answers) - ids)
    if unknown:
        raise DataError(
            f"{len(unknown)} answers are to questions it does not ask, such as {unknown[0]}",
            where=key,
            fix="score them with the question file and the limit they were made with",
        )
