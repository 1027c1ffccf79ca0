"""Answers that were paid for, on disk as they come: one JSON line each, never rewritten.

A line is found again by its key, the hash of all that was asked. Every write is one whole line
under a lock, flushed to the disk before the answer is used, so several processes may share a file
and a crash loses at most answers that were still on their way. A line that a crash cut short is
closed off by the next reader, told of in the log, and asked again.
"""

from __future__ import annotations

import io
import json
import os
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from mmalign.errors import DataError
from mmalign.generate.base import Told
from mmalign.log import get_logger

logger = get_logger("generate.ledger")

# What a line keeps of an answer.
_KEPT = {"text": str, "finish_reason": str, "prompt_tokens": int, "completion_tokens": int}


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a server said; `finish_reason` is "stop" where it came to its own end.

    token_ids, told: where the request asked for token ids; a ledger does not keep them.
    """

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    token_ids: tuple[int, ...] = ()
    told: Told | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """What has been paid for: answers, and their tokens, prompts included."""

    num_answers: int = 0
    num_tokens: int = 0


class Ledger:
    """An append-only file of answers. Raises DataError where the file holds something else."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._places: dict[str, tuple[int, int]] = {}
        self._answers, self._tokens = Counter[str](), Counter[str]()
        self._read_to = 0
        self._mutex = threading.Lock()
        with self._locked():
            path.touch()
            self._catch_up()

    def get(self, key: str) -> Answer | None:
        """The answer under a key, also one that another process wrote since."""
        with self._locked():
            self._catch_up()
            if key not in self._places:
                return None
            start, size = self._places[key]
            with open(self.path, "rb") as file:
                file.seek(start)
                return _entry(json.loads(file.read(size)), str(self.path))[2]

    def add(self, key: str, answer: Answer, *, model: str, request_id: str) -> None:
        """Append an answer; on the disk when this returns. Raises DataError where it cannot be."""
        kept = {name: value for name, value in asdict(answer).items() if name in _KEPT}
        told = {"key": key, "model": model, "id": request_id, **kept}
        line = json.dumps(told, ensure_ascii=False).encode() + b"\n"
        with self._locked():
            self._catch_up()
            with open(self.path, "ab", buffering=0) as file:
                _write_all(file, line)
                os.fsync(file.fileno())
            self._catch_up()

    def spent(self, model: str) -> Spent:
        """What the whole file holds for one model, whichever process or run asked."""
        with self._mutex:
            return Spent(num_answers=self._answers[model], num_tokens=self._tokens[model])

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Threads of this process first, then other processes."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._mutex, FileLock(self.path.with_name(f".{self.path.name}.lock")):
                yield
        except OSError as error:
            raise DataError(
                f"the ledger cannot be used ({error.strerror})",
                where=str(self.path),
                fix="free some space or choose another file; the answers in it are kept",
            ) from None

    def _catch_up(self) -> None:
        """Read the lines that are new since last time, and close a last one that a crash cut."""
        with open(self.path, "rb+", buffering=0) as file:
            file.seek(self._read_to)
            for line in io.BytesIO(file.read()):
                if not line.endswith(b"\n"):
                    file.write(b"\n")
                    line += b"\n"
                self._take(line)
                self._read_to += len(line)

    def _take(self, line: bytes) -> None:
        if not line.strip():
            return
        try:
            row = json.loads(line)
        except ValueError:
            logger.warning(
                "%s: a line at byte %d was cut short; what it answered will be asked again",
                self.path,
                self._read_to,
            )
            return
        key, model, answer = _entry(row, f"{self.path}, byte {self._read_to}")
        self._places.setdefault(key, (self._read_to, len(line)))
        self._answers[model] += 1
        self._tokens[model] += answer.prompt_tokens + answer.completion_tokens


def _entry(row: Any, where: str) -> tuple[str, str, Answer]:
    """Key, model and answer of a line. Raises DataError where it is no ledger's."""
    kinds = {"key": str, "model": str, **_KEPT}
    if not isinstance(row, dict) or any(not isinstance(row.get(k), t) for k, t in kinds.items()):
        raise DataError(
            "is no line of a ledger", where=where, fix="name a file of its own for the answers"
        )
    values = {name: row[name] for name in kinds}
    key, model = values.pop("key"), values.pop("model")
    return key, model, Answer(**values)


def _write_all(file: Any, data: bytes) -> None:
    """A raw write may take a part only, on a disk that is filling up."""
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]
