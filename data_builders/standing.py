"""How far a build is, told from the marks that it leaves; no model is loaded."""

from __future__ import annotations

import json
from typing import Any

from data_builders.config import AnyBuilder
from mmalign.errors import DataError
from mmalign.jobs import JOB
from mmalign.standing import Standing
from mmalign.store import MANIFEST, read_manifest


def standing(builder: AnyBuilder) -> Standing:
    """complete with a manifest, begun with a job that has none yet.

    Raises DataError where the folder holds what was built with other settings. Whether the source
    is still the same, only the build itself can tell.
    """
    out = builder.output
    if (out / MANIFEST).exists():
        found, stored = Standing.COMPLETE, read_manifest(out).config
    elif (out / JOB).exists():
        found, stored = Standing.BEGUN, _started(builder)
    else:
        return Standing.ABSENT
    told = builder.model_dump(mode="json")
    changed = [
        f"{key} was {stored.get(key)!r}, is {told.get(key)!r}"
        for key in sorted(stored.keys() | (told.keys() - {"output", "shard"}))
        if stored.get(key) != told.get(key)
    ]
    if changed:
        raise DataError(
            f"was built with other settings: {'; '.join(changed)}",
            where=str(out),
            fix="take the old settings back, or choose another output",
        )
    return found


def _started(builder: AnyBuilder) -> dict[str, Any]:
    file = builder.output / JOB
    try:
        return json.loads(file.read_text())["config"]
    except (ValueError, KeyError, TypeError):
        raise DataError(
            "is no job of a build", where=str(file), fix="delete the folder, and build it again"
        ) from None
