"""A LoRA adapter merged into its base, as an ordinary checkpoint, for what takes nothing else."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmalign import log
from mmalign.errors import ModelError
from mmalign.store import write_atomically

if TYPE_CHECKING:
    from mmalign.models.load import ModelConfig

# Beside a merged checkpoint: the fingerprint of what it was made from.
MADE_FROM = "merged_from.json"
# Files of a base up to this size count by their content, larger ones by size and time.
_READ_WHOLE = 1 << 20
_logger = log.get_logger("models")


def merge_into(config: ModelConfig, output: Path) -> None:
    """Merge the config's adapter into its base, in float32, as a checkpoint in a new folder.

    Whole or absent: a folder that is there can be loaded. Raises ModelError where it holds files
    or is none.
    A config without an adapter gives a copy.
    """
    from mmalign.models.load import load_policy

    output, choose = output.resolve(), "choose a new folder"
    nearest = next(one for one in (output, *output.parents) if one.exists())
    if not nearest.is_dir():
        raise ModelError("is no folder", where=str(nearest), fix=choose)
    if output.exists() and any(output.iterdir()):
        raise ModelError("is not empty", where=str(output), fix=choose)
    if output == Path.cwd():
        raise ModelError("is where this command runs", where=str(output), fix=choose)
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    policy = load_policy(config.model_copy(update={"dtype": "float32"}))
    made_from = fingerprint(config)  # After loading, which names what is missing.
    policy.save(partial)
    write_atomically(partial / MADE_FROM, json.dumps(made_from, indent=2) + "\n")
    os.replace(partial, output)


def merged(config: ModelConfig, folder: Path) -> Path:
    """The config's adapter merged into its base, in `folder`: what is there already, or made now.

    What was made of other files is made anew. Raises ModelError where the folder holds something
    that is no merged checkpoint, or where the adapter is missing.
    """
    mark = folder / MADE_FROM
    if mark.exists():
        if mark.read_text() == json.dumps(fingerprint(config), indent=2) + "\n":
            return folder
        _logger.info("%s was merged from other files, and is made anew", folder)
        shutil.rmtree(folder)
    merge_into(config, folder)
    return folder


def fingerprint(config: ModelConfig) -> dict[str, Any]:
    """What a merged checkpoint is made from: base and adapter, by digests of their files.

    A large file of the base counts by its size and the time of its last change, since to read all
    weights takes as long as to merge them. A base on the hub counts by name and revision.
    """
    from mmalign.models.load import resolve_adapter

    base, adapter = resolve_adapter(config)
    return {
        "base": _digest(Path(base), whole=False) if Path(base).is_dir() else base,
        "revision": config.revision,
        "adapter": None if adapter is None else _digest(Path(adapter), whole=True),
    }


def _digest(folder: Path, *, whole: bool) -> str:
    found = hashlib.sha256()
    for file in sorted(one for one in folder.iterdir() if one.is_file()):
        told = file.stat()
        found.update(f"{file.name} {told.st_size} ".encode())
        if whole or told.st_size <= _READ_WHOLE:
            with open(file, "rb") as opened:
                found.update(hashlib.file_digest(opened, "sha256").digest())
        else:
            found.update(str(told.st_mtime_ns).encode())
    return found.hexdigest()
