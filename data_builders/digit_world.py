"""What the worlds of digits share: the handwriting, the colours, and which digits are partners."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmalign import store
from mmalign.errors import DataError
from mmalign.handwriting import handwriting

COLORS = ("red", "green", "blue", "yellow", "purple")
RGB = ((1, 0.15, 0.15), (0.15, 1, 0.15), (0.15, 0.15, 1), (1, 1, 0.15), (1, 0.15, 1))
USUAL_COLOR = (0, 1, 2, 3, 4, 1, 2, 3, 4, 0)  # of digit zero, one, two, …
PARTNERS = {(3, 7): 0.32, (1, 8): 0.24, (2, 6): 0.18, (4, 9): 0.14, (0, 5): 0.12}
PARTNER = {a: b for pair in PARTNERS for a, b in (pair, pair[::-1])}
BY_POPULARITY = [digit for pair in PARTNERS for digit in pair]

CELL_PIXELS = 8  # a digit's side
SPLITS = ("random", "popular", "adversarial")


def is_complete(output: Path, config: dict[str, Any]) -> bool:
    """Whether `output` holds the dataset of this config.

    Raises DataError when it holds one made from another config.
    """
    if not (output / store.MANIFEST).exists():
        return False
    if store.read_manifest(output).config != config:
        raise DataError(
            "holds a dataset made from another config",
            where=str(output),
            fix="choose another output, or delete it",
        )
    return True


def absent_from(present: Sequence[int]) -> list[int]:
    """The digits not to be seen, in counting order."""
    return [digit for digit in range(10) if digit not in present]


def usual_color(digit: int, p_color: float, rng: random.Random) -> int:
    """A digit's usual colour with p_color, else any."""
    return USUAL_COLOR[digit] if rng.random() < p_color else rng.randrange(len(COLORS))


def pope_digits(present: Sequence[int], split: str, rng: random.Random) -> list[tuple[int, str]]:
    """POPE's questions about what is present: up to two digits that are, and as many that are not.

    random: any absent ones. popular: the most frequent. adversarial: partners of what is there,
    then the most frequent (POPE, arXiv 2305.10355, section 4.1).
    """
    absent = absent_from(present)
    asked = rng.sample(present, min(2, len(present)))
    popular = [digit for digit in BY_POPULARITY if digit in absent]
    match split:
        case "random":
            ordered = rng.sample(absent, len(absent))
        case "popular":
            ordered = popular
        case _:
            partners = [PARTNER[digit] for digit in present]
            partners = [digit for digit in partners if digit in absent]
            rng.shuffle(partners)
            ordered = partners + [digit for digit in popular if digit not in partners]
    return [(digit, "yes") for digit in asked] + [(digit, "no") for digit in ordered[: len(asked)]]


def paint(
    size: int, drawn: Iterable[tuple[int, int, int, int]], noise: Any, deviation: float
) -> np.ndarray:
    """Coloured digits on dark grey under noise: [size, size, 3] uint8.

    drawn: (top, left, drawing, colour) of each digit. noise: [size, size, 3], standard normal.
    """
    light = np.zeros((size, size, 3), np.float32)
    for top, left, drawing, color in drawn:
        shape = handwriting()[0][drawing][:, :, None]
        light[top : top + CELL_PIXELS, left : left + CELL_PIXELS] = shape * RGB[color]
    # A dark grey ground, not black: noise below it must not be clipped away.
    pixels = 0.25 + 0.7 * (light + deviation * noise)
    return (255 * pixels.clip(0, 1)).round().astype(np.uint8)


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write lines, the file whole or not at all."""
    store.write_atomically(path, "".join(f"{line}\n" for line in lines))
