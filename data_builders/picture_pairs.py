"""The numbers of image preferences: ties, sizes, colour modes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from mmalign.errors import MediaError
from mmalign.media import media_key, picture_header
from mmalign.records import ImagePreference

# A set of photographs may have a size for each; people read the first few.
MOST_SIZES = 10


class PicturePairs:
    """Counts over image preferences. Pictures are read, but not decoded."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._sizes: Counter[str] = Counter()
        self._modes: Counter[str] = Counter()

    def add(self, record: ImagePreference, root: Path) -> None:
        """Count one pair."""
        self._counts["pairs"] += 1
        self._counts["ties"] += record.p_target == 0.5
        self._counts["reversed"] += record.p_target < 0.5
        sizes: list[tuple[int, int]] = []
        for media in (record.chosen, record.rejected):
            try:
                header = picture_header(media, root)
            except MediaError:
                continue
            sizes.append((header.width, header.height))
            self._sizes[f"{header.width}x{header.height}"] += 1
            self._modes[header.mode] += 1
        self._counts["unreadable"] += len(sizes) < 2
        self._counts["different_sizes"] += len(set(sizes)) > 1

    def numbers(self) -> dict[str, Any] | None:
        """Plain values, the most frequent sizes and modes first; None where there was no pair."""
        if not self._counts["pairs"]:
            return None
        names = ("ties", "reversed", "different_sizes", "unreadable")
        return {
            **{name: self._counts[name] for name in names},
            "sizes": dict(self._sizes.most_common(MOST_SIZES)),
            "num_sizes": len(self._sizes),
            "colour_modes": dict(self._modes.most_common()),
        }


def same_picture(record: ImagePreference) -> bool:
    """Whether chosen and rejected are the same bytes, as far as the row tells."""
    return media_key(record.chosen) == media_key(record.rejected)


def numbers_text(numbers: dict[str, Any] | None) -> list[str]:
    """`PicturePairs.numbers` for people."""
    if numbers is None:
        return []
    more = numbers["num_sizes"] - len(numbers["sizes"])
    sizes = [f"{count} of {size}" for size, count in numbers["sizes"].items()]
    sizes += [f"{more} sizes more"] if more > 0 else []
    modes = [f"{count} {mode}" for mode, count in numbers["colour_modes"].items()]
    return [
        f"ties: {numbers['ties']}; reversed (p_target below 0.5): {numbers['reversed']}",
        f"pairs of two sizes: {numbers['different_sizes']}",
        f"pairs with a picture that cannot be read: {numbers['unreadable']}",
        f"sizes of pictures: {', '.join(sizes) or 'none known'}",
        f"colour modes of the files: {', '.join(modes) or 'none known'}",
    ]
