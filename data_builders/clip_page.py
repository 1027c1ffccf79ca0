"""Clips on a preview page: their frames in a strip, and below it those frames when spoilt."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from data_builders.perturb import Step, replay, sources, told
from mmalign.clips import Clip, ClipReader, FrameSampling
from mmalign.config import validate
from mmalign.errors import MmalignError
from mmalign.records import Media, Record, media_of
from mmalign.report.page import Strip, thumbnail

# Two rows of a wide page; longer clips are thinned evenly.
MOST_FRAMES = 16
FRAME_PIXELS = 128
# Of clips about which no builder says how it saw them.
PLAIN = FrameSampling(num_frames=8)


class ClipArtist:
    """Draws the clips of records; they are decoded in a child process, under a time limit."""

    def __init__(self, timeout_seconds: float = 30.0) -> None:
        self._timeout_seconds = timeout_seconds
        self._stack = ExitStack()
        self._readers: dict[FrameSampling, ClipReader] = {}

    def __enter__(self) -> ClipArtist:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def strips(self, record: Record, root: Path) -> tuple[tuple[Strip, ...], list[str]]:
        """The strips of all clips of a record, and what is wrong with those that have none.

        Where the record's origin tells of a perturbation, it is done again, for a second strip.
        """
        drawn: list[Strip] = []
        problems: list[str] = []
        for column, media in media_of(record):
            if column.endswith("videos"):
                try:
                    drawn.extend(self._drawn(record, media, root))
                except MmalignError as error:
                    problems.append(str(error))
        return tuple(drawn), problems

    def _drawn(self, record: Record, media: Media, root: Path) -> Iterator[Strip]:
        detail = detail_of(record)
        sampling = PLAIN
        if "frames" in detail:
            sampling = validate(detail["frames"], FrameSampling, f"frames of {record.id}")
        clip = self._reader(sampling).open(media, root)
        yield clean_strip(clip)
        if isinstance(steps := detail.get("perturbation"), list):
            yield spoilt_strip(clip, steps)

    def _reader(self, sampling: FrameSampling) -> ClipReader:
        if sampling not in self._readers:
            reader = ClipReader(sampling=sampling, timeout_seconds=self._timeout_seconds)
            self._readers[sampling] = self._stack.enter_context(reader)
        return self._readers[sampling]


def clean_strip(clip: Clip) -> Strip:
    """The clip as it is, frames numbered from 1."""
    numbers = [str(number) for number in range(1, len(clip.frames) + 1)]
    label = f"clip, {len(clip.frames)} frames of {clip.duration_seconds:.1f} s"
    return _strip(label, clip, numbers)


def spoilt_strip(clip: Clip, steps: Sequence[Step]) -> Strip:
    """The clip after `steps`; under each frame the number that it has in the clean strip."""
    spoilt = replay(clip, steps)
    numbers = [str(number + 1) for number in sources(len(clip.frames), steps)]
    return _strip(f"as it was shown ({'; '.join(map(told, steps))})", spoilt, numbers)


def detail_of(record: Record) -> dict[str, Any]:
    """What the record's builder noted down, {} where that is no JSON object."""
    try:
        detail = json.loads(record.origin.detail or "{}")
    except ValueError:
        return {}
    return detail if isinstance(detail, dict) else {}


def _strip(label: str, clip: Clip, numbers: Sequence[str]) -> Strip:
    from PIL import Image

    count = len(clip.frames)
    kept = min(count, MOST_FRAMES)
    slots = [i * count // kept for i in range(kept)]
    label += "" if kept == count else f", {kept} of them shown"
    return Strip(
        label,
        tuple(
            (thumbnail(Image.fromarray(clip.frames[slot]), FRAME_PIXELS), numbers[slot])
            for slot in slots
        ),
    )
