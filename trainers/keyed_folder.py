"""A folder of what was computed once, and the key that says of what.

Where a recipe's key differs from the folder's in any value, what is stored is stale: an error that
names the values, never a silent reuse.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any, ClassVar

from safetensors import SafetensorError, safe_open

from mmalign.errors import TrainingError
from mmalign.log import get_logger
from mmalign.store import write_atomically
from trainers.reference_key import differences

logger = get_logger("trainers.keyed_folder")

KEY = "key.json"


def tensors_in(
    files: Iterable[Path], *, lost: str
) -> tuple[dict[str, tuple[Path, list[str]]], list[Path]]:
    """Which safetensors file holds what, for tensors named `digest/part`; and damaged files.

    Returns the file and the parts of each digest. A file that is cut short is said, with what that
    means (`lost`), and what it held counts as absent.
    """
    index: dict[str, tuple[Path, list[str]]] = {}
    damaged: list[Path] = []
    for file in sorted(files):
        try:
            with safe_open(file, "pt") as stored:
                names = list(stored.keys())
        except (SafetensorError, OSError) as error:
            logger.warning("%s is damaged (%s): %s", file, error, lost)
            damaged.append(file)
            continue
        for name in names:
            digest, _, part = name.partition("/")
            index.setdefault(digest, (file, []))[1].append(part)
    return index, damaged


class KeyedFolder:
    """Files under one key, written by one process at a time.

    kept: what is stored, as a phrase for errors. pattern: of its files. anew, elsewhere: what a
    user may do to have it made again, or in another place.
    """

    kept: ClassVar[str]
    pattern: ClassVar[str]
    anew: ClassVar[str]
    elsewhere: ClassVar[str]

    def __init__(self, folder: Path, key: dict[str, Any], about: dict[str, Any]) -> None:
        self.folder, self.key, self.about = folder, key, about
        self._lock: IO[str] | None = None

    @property
    def num_bytes(self) -> int:
        """Size of what is stored on disk."""
        return sum(file.stat().st_size for file in self.folder.glob(self.pattern))

    def check(self) -> None:
        """Raise TrainingError where the files in the folder are of something else than `key`."""
        file = self.folder / KEY
        way_out = f"{self.anew}; or {self.elsewhere}"
        if not file.exists():
            if any(self.folder.glob(self.pattern)):
                what = f"holds {self.kept}, and no {KEY} that says of what"
                raise TrainingError(what, where=str(self.folder), fix=way_out)
            return
        try:
            old = json.loads(file.read_text())["key"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            what = f"cannot be read ({error})"
            raise TrainingError(what, where=str(file), fix=way_out) from None
        if changed := list(differences(old, self.key)):
            raise TrainingError(
                f"the {self.kept} stored here are stale: {'; '.join(changed)}",
                where=str(self.folder),
                fix=f"undo the change; or {way_out}, to keep both",
            )

    def hold(self) -> None:
        """Keep other processes from writing here, until `release` or the end of this one."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.folder / ".lock", "w")  # noqa: SIM115
        except OSError as error:
            raise TrainingError(
                f"{self.kept} cannot be written here ({error.strerror})",
                where=str(self.folder),
                fix=f"{self.elsewhere}, one that can be written",
            ) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise TrainingError(
                f"another process is making these {self.kept}",
                where=str(self.folder),
                fix="wait for it and start again: what is finished is read, not made again",
            ) from None

    def release(self) -> None:
        """Let other processes write here."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def write_key(self) -> None:
        """Say what is stored here, where nothing says it yet."""
        if not (self.folder / KEY).exists():
            text = json.dumps({"key": self.key, **self.about}, indent=1, ensure_ascii=False)
            write_atomically(self.folder / KEY, text)

    def clear(self) -> None:
        """Delete what is stored. Raises TrainingError where another process is writing it."""
        if self.folder.exists():
            self.hold()
            shutil.rmtree(self.folder)
            self.release()
