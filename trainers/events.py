"""What a run tells its caller while it goes on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Stepped:
    """A log line was written; means since the last one, rates per second."""

    step: int
    metrics: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Validated:
    """The policy was looked at as it stands after `step`; without numbers where only pictures were
    drawn."""

    step: int
    metrics: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """A complete checkpoint stands at `path`."""

    step: int
    path: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The final model stands at `path`, for from_pretrained."""

    path: Path


Event = Stepped | Validated | Saved | Finished
