"""What an evaluation keeps of a model: its answers, a line each, and which model gave them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO, TypeVar

from evals.base import read_jsonl
from mmalign.errors import DataError
from mmalign.store import write_atomically

KeptT = TypeVar("KeptT")
ANSWERS, MODEL, RESULTS = "answers.jsonl", "model.json", "results.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """A line of answers.jsonl. `text` is None where the picture could not be read."""

    key: str
    benchmark: str
    id: str
    text: str | None
    num_tokens: int
    finished: bool


def read_model(folder: Path) -> dict[str, str]:
    """Name and fingerprint of the model whose answers a folder holds."""
    try:
        model = json.loads((folder / MODEL).read_text(encoding="utf-8"))
        return {name: str(model[name]) for name in ("name", "fingerprint")}
    except (OSError, ValueError, TypeError, KeyError):
        raise DataError(
            f"holds no readable {MODEL}", where=str(folder), fix="run the recipe first"
        ) from None


def write_model(folder: Path, model: dict[str, str]) -> None:
    """What `read_model` reads."""
    write_atomically(folder / MODEL, json.dumps(model, indent=2) + "\n")


def read_answers(folder: Path) -> dict[str, Answer]:
    """A folder's answers by key, the later of two."""
    return {one.key: one for one in read_kept(folder / ANSWERS, Answer)}


def read_kept(path: Path, kind: type[KeptT]) -> Iterator[KeptT]:
    """The lines of a file that runs append to, if it is there, each as a `kind`.

    It is only read: a last line that a kill cut short is left out, and so is one that another
    process is still writing.
    """
    if not path.exists():
        return
    for where, row in read_jsonl(path, growing=True):
        try:
            yield kind(**row)
        except TypeError:
            raise DataError(
                f"is no {kind.__name__.lower()}", where=where, fix="delete the line"
            ) from None


def appending(path: Path) -> TextIO:
    """Open a file that `read_kept` reads to append lines; a last one that a kill cut is removed."""
    if path.exists():
        with open(path, "rb+") as file:
            file.truncate(file.read().rfind(b"\n") + 1)
    return open(path, "a", encoding="utf-8", newline="\n")


def line_of(answer: Answer) -> str:
    """An answer as a line of answers.jsonl."""
    # ASCII: an answer may hold U+2028, at which many readers would break the line.
    return json.dumps(dataclasses.asdict(answer)) + "\n"
