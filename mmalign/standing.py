"""How far the output of a config is: what `--check` says of a build, a training run, an evaluation.

Each package tells it from its own marks on disk; what runs several of them in order asks by verb.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path


class Standing(StrEnum):
    """absent: nothing to go on from. begun: the same command goes on. complete: nothing to do."""

    ABSENT = "absent"
    BEGUN = "begun"
    COMPLETE = "complete"

    def told(self, folder: Path) -> str:
        """The line that a verb prints; its first word is the standing."""
        return f"{self}  {folder}"
