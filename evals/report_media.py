"""What the report's cards show of an item: its picture, or some frames of its clip."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evals.base import Row, shown
from mmalign.errors import MmalignError
from mmalign.report.page import Strip, thumbnail

# Frames of a clip on its card, evenly spread.
CLIP_FRAMES = 6
_FRAME_SIDE = 160


@dataclass(frozen=True)
class Shown:
    """A picture or the frames of a clip, as a card takes them, or a note why there is neither."""

    images: tuple[str, ...] = ()
    strips: tuple[Strip, ...] = ()
    note: str = ""


class Pictures:
    """The pictures or clips of one suite, by row; each is read once.

    suite: as an evaluation's results describe it. side: most pixels of a picture either way.
    """

    def __init__(self, suite: Mapping[str, Any], side: int) -> None:
        folder = suite.get("videos") or suite.get("images")
        self._root = None if folder is None else Path(folder)
        self._side = side
        self._read: dict[str, Shown] = {}

    def of(self, row: Row) -> Shown:
        """What can be shown of a row, or why it cannot: a card is worth reading without it."""
        if "video" not in row and shown(row) == row["id"] and self._root is None:
            return Shown()  # A question of words alone.
        file, is_clip = shown(row), "video" in row
        if file not in self._read:
            self._read[file] = self._open(file, is_clip=is_clip)
        return self._read[file]

    def _open(self, file: str, *, is_clip: bool) -> Shown:
        from mmalign.media import open_image
        from mmalign.records import Media

        medium = "clip" if is_clip else "picture"
        if self._root is None:
            return Shown(note=f"The {medium} is inside the benchmark's data, and not shown.")
        try:
            if is_clip:
                return Shown(strips=(_strip(file, self._root),))
            picture = open_image(Media(path=file), self._root)
            return Shown(images=(thumbnail(picture, max_side=self._side),))
        except MmalignError as error:
            return Shown(note=f"The {medium} is not shown: {error}")


def shortened(text: str, most: int) -> str:
    """The text, or its beginning and "…" where it has more characters."""
    return text if len(text) <= most else f"{text[:most].rstrip()} …"


def _strip(file: str, root: Path) -> Strip:
    """Frames of a clip, evenly spread, with their times."""
    from PIL import Image

    from mmalign.clips import FrameSampling, open_clip
    from mmalign.records import Media

    clip = open_clip(Media(path=file), root, FrameSampling(num_frames=CLIP_FRAMES))
    frames = (thumbnail(Image.fromarray(frame), max_side=_FRAME_SIDE) for frame in clip.frames)
    times = (f"{seconds:.2f} s" for seconds in clip.timestamps)
    return Strip("clip", tuple(zip(frames, times, strict=True)))
