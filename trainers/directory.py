"""The run directory: whose it is, what is complete in it, and folders that are whole or absent.

runs/rdpo/
  recipe.yaml               the resolved recipe
  start.json                what the run started from: dataset, pictures, policy, rows used, dropped
  metrics.jsonl             one line per log step
  samples/step-000500/      pictures of an image run's `validation`
  probe/                    some of the answers that `probe` asks for
  checkpoints/step-000100/  model/ (loads with from_pretrained), state/, recipe.yaml,
                            checkpoint.json (written last)
  model/                    the final model
  run.json                  written last: the run is finished
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from accelerate import Accelerator
from safetensors import SafetensorError

from mmalign.config import read_yaml
from mmalign.errors import TrainingError
from mmalign.log import get_logger, is_main_process
from mmalign.standing import Standing
from mmalign.store import MANIFEST, read_manifest, write_atomically
from trainers.config import Recipe
from trainers.images.config import ImageRecipe

logger = get_logger("trainers.directory")

# Keys that may differ when a run is resumed: none of them changes a weight.
FREE = {
    "run.output", "run.resume", "run.keep_last", "run.save_every_steps", "run.log_every_steps",
    "run.trackers", "data.workers", "data.cache_mb", "reference_cache",
    "features.cap_gb", "features.folder", "validation", "probe",
    # Where a server is and how hard it is asked, not what it is asked.
    *(f"rollouts.generator.{name}" for name in (
        "base_url", "model", "folder", "max_gap", "ready_seconds", "sync_seconds", "api_key_env",
        "concurrency", "timeout_seconds", "max_retries", "backoff_seconds",
    )),
}  # fmt: skip


class RunDirectory:
    """One run's folder, held by one run at a time.

    newest: the last complete checkpoint, or None; what a crash left half-written is skipped.
    recipe_hash: of every key that can change a weight.
    Raises TrainingError where the folder holds progress of another recipe.
    """

    def __init__(self, recipe: Recipe | ImageRecipe) -> None:
        self.path, self.recipe = recipe.run.output, recipe
        self.checkpoints = self.path / "checkpoints"
        self.model = self.path / "model"
        self._lock = self._take() if is_main_process() else None
        self.finished = (self.path / "run.json").exists()
        self.newest = self._newest()
        if self.finished or self.newest:
            _check_same(self.path, recipe)
        binding = {k: v for k, v in _flatten_recipe(recipe).items() if not _free(k)}
        self.recipe_hash = hashlib.sha256(json.dumps(binding).encode()).hexdigest()

    def write(self, name: str, values: Mapping[str, Any]) -> None:
        """Write a JSON file of the run; call it on the main process."""
        write_atomically(self.path / name, json.dumps(values, indent=1))

    def read(self, name: str) -> dict[str, Any]:
        """A JSON file of the run; empty where there is none. Raises TrainingError if damaged."""
        file = self.path / name
        try:
            values = json.loads(file.read_text()) if file.exists() else {}
        except (OSError, ValueError) as error:
            raise damaged(file, str(error)) from None
        if not isinstance(values, dict):
            raise damaged(file, "it holds no mapping")
        return values

    def release(self) -> None:
        """Let another process have the folder."""
        if self._lock is not None:
            self._lock.close()

    def _take(self) -> IO[str]:
        """Hold the folder: two runs in one would ruin each other. A killed process lets go."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = open(self.path / ".lock", "w")  # noqa: SIM115
        except OSError as error:
            raise TrainingError(
                f"cannot be made or written to ({error.strerror})",
                where=str(self.path),
                fix="choose another run.output",
            ) from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise TrainingError(
                "another process is training into this folder",
                where=str(self.path),
                fix="wait for it, stop it, or choose another run.output",
            ) from None
        return lock

    def _newest(self) -> Path | None:
        for folder in sorted(self.checkpoints.glob("*step-*")):
            if not _is_whole(folder):
                logger.info("skipping %s: it is incomplete", folder)
        return _newest(self.checkpoints)


def standing(recipe: Recipe | ImageRecipe) -> Standing:
    """How far a recipe's run is; nothing is written, and nothing locked.

    Raises TrainingError where its folder holds a run of another recipe, or one that is finished and
    was trained on what the dataset no longer is.
    """
    path = recipe.run.output
    finished = (path / "run.json").exists()
    if not finished and _newest(path / "checkpoints") is None:
        return Standing.ABSENT
    _check_same(path, recipe)
    if not finished:
        return Standing.BEGUN
    try:
        trained_on = json.loads((path / "run.json").read_text())["dataset"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise damaged(path / "run.json", str(error)) from None
    there = (recipe.data.path / MANIFEST).exists()  # It may be gone: the run is done with it.
    if there and read_manifest(recipe.data.path).content_hash != trained_on:
        raise TrainingError(
            "the dataset changed since this run was trained",
            where=f"{path}, trained on {recipe.data.path}",
            fix="put it back as it was, or choose another run.output",
        )
    return Standing.COMPLETE


def _newest(checkpoints: Path) -> Path | None:
    """The last complete checkpoint of a run, or None."""
    whole = [folder for folder in sorted(checkpoints.glob("*step-*")) if _is_whole(folder)]
    return whole[-1] if whole else None


def _is_whole(checkpoint: Path) -> bool:
    return (checkpoint / "checkpoint.json").exists() and not checkpoint.name.startswith(".")


def _check_same(path: Path, recipe: Recipe | ImageRecipe) -> None:
    """Raise TrainingError where a run's folder is another recipe's."""
    if recipe.run.resume == "never":
        raise TrainingError(
            "holds a run already, and run.resume=never",
            where=str(path),
            fix="choose another run.output, or continue with run.resume=auto",
        )
    old = _flatten(read_yaml(path / "recipe.yaml"))
    new = _flatten_recipe(recipe)
    changed = [
        f"{key} was {old.get(key)!r} and is {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if not _free(key) and old.get(key) != new.get(key)
    ]
    if changed:
        raise TrainingError(
            f"holds a run of another recipe: {'; '.join(changed)}",
            where=str(path),
            fix="choose another run.output, or undo the change to continue this run",
        )


@contextmanager
def whole_folder(accelerator: Accelerator, final: Path) -> Iterator[Path]:
    """A temporary folder for all processes to write into, then put in the place of `final`.

    After a crash `final` is complete, absent, or what it was before.
    """
    partial = final.with_name(f".{final.name}.partial")
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    try:
        yield partial
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise TrainingError(
            f"cannot be written ({error})",
            where=str(final),
            fix="free some space and start again: the run continues from its last checkpoint",
        ) from error
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        for item in [*partial.rglob("*"), partial]:
            _sync(item)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        _sync(final.parent)
    accelerator.wait_for_everyone()


def damaged(file: Path, why: str) -> TrainingError:
    """The error of a file of the run that cannot be used."""
    return TrainingError(
        f"is damaged ({why})",
        where=str(file),
        fix="put it back from a copy; a run without checkpoints starts anew once it is deleted",
    )


def _free(key: str) -> bool:
    """Whether a key, or the section that it is in, may differ when a run is resumed."""
    return key in FREE or key.partition(".")[0] in FREE


def _flatten_recipe(recipe: Recipe | ImageRecipe) -> dict[str, Any]:
    return _flatten(recipe.model_dump(mode="json"))


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in values.items():
        inner = isinstance(value, dict)
        result |= _flatten(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return result


def _sync(path: Path) -> None:
    """Flush a file or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
