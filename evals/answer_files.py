"""What an evaluation keeps of a model: its answers, a line each, and which model gave them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from evals.base import read_jsonl
from mmalign.errors import DataError
from mmalign.store import write_atomically

ANSWERS, MODEL = "answers.jsonl", "model.json"


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
        return json.loads((folder / MODEL).read_text())
    except (OSError, ValueError):
        raise DataError(
            f"holds no readable {MODEL}", where=str(folder), fix="run the recipe first"
        ) from None


def write_model(folder: Path, model: dict[str, str]) -> None:
    """What `read_model` reads."""
    write_atomically(folder / MODEL, json.dumps(model, indent=2) + "\n")


def read_answers(folder: Path) -> dict[str, Answer]:
    """A folder's answers by key, the later of two; a line that a kill cut short is removed."""
    path = folder / ANSWERS
    if not path.exists():
        return {}
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        write_atomically(path, whole)
    answers: dict[str, Answer] = {}
    for where, row in read_jsonl(path):
        try:
            answer = Answer(**row)
        except TypeError:
            raise DataError("is no answer", where=where, fix="delete the line") from None
        answers[answer.key] = answer
    return answers


def line_of(answer: Answer) -> str:
    """An answer as a line of answers.jsonl."""
    # ASCII: an answer may hold U+2028, at which many readers would break the line.
    return json.dumps(dataclasses.asdict(answer)) + "\n"
