"""Pictures of handwritten digits in four styles, and two judges of them: the lab of image methods.

A digit is drawn dark on white, 32 pixels wide and high. How much of a style a picture has can be
measured, and whether its digit can still be read too, so that an aligned model is judged on both.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mmalign.config import Strict
from mmalign.errors import DataError
from mmalign.handwriting import DIGITS, handwriting

if TYPE_CHECKING:
    from PIL.Image import Image

Style = Literal["plain", "bold", "slanted", "inverted"]

SIDE = 32
MARGIN = 4
STROKE = 3  # pixels over which a bold digit's ink spreads
SLANT = 0.5  # pixels to the right for each pixel up


def digit_picture(drawing: int, style: Style = "plain") -> Image:
    """A row of scikit-learn's digits as a picture, 32 x 32, grey as RGB."""
    from PIL import Image
    from scipy import ndimage

    side = SIDE - 2 * MARGIN
    zoomed: Any = ndimage.zoom(handwriting()[0][drawing], side / 8, order=3)
    ink: Any = np.pad(zoomed.clip(0, 1), MARGIN)
    if style == "bold":
        ink = ndimage.grey_dilation(ink, size=(STROKE, STROKE))
    if style == "slanted":
        middle = (SIDE - 1) / 2
        rows = [
            ndimage.shift(row, (middle - place) * SLANT, order=1) for place, row in enumerate(ink)
        ]
        ink = np.stack(rows).clip(0, 1)
    grey = ink if style == "inverted" else 1 - ink
    return Image.fromarray((255 * grey).round().astype(np.uint8)).convert("RGB")


class DigitStyle(Strict):
    """How much of a style a picture of a digit has; the prompt is not looked at.

    bold: share of ink. slanted: pixels to the right for each pixel up, by the ink's second moments.
    inverted: darkness of the two outermost pixels all round. Each grows with the style.
    """

    name: Literal["digit_style"] = "digit_style"
    style: Literal["bold", "slanted", "inverted"]

    def load(self) -> StyleJudge:
        """Nothing is loaded."""
        return StyleJudge(self.style)


class StyleJudge:
    """See DigitStyle."""

    def __init__(self, style: Literal["bold", "slanted", "inverted"]) -> None:
        self.style = style
        self.name = f"digit_style:{style}"

    def score(self, prompts: Sequence[str], pictures: Sequence[Image]) -> list[float]:
        """One number a picture."""
        measure = {"bold": _share_of_ink, "slanted": _slant, "inverted": _border}[self.style]
        return [float(measure(_dark(picture))) for picture in pictures]


class DigitReader(Strict):
    """Whether a picture shows the digit that its prompt names: 1 or 0.

    A support vector machine trained on real digits, those of the test split, which no generated
    picture was learnt from; 98 % right on real digits of the other split, in every style.
    """

    name: Literal["digit_reader"] = "digit_reader"

    def load(self) -> ReadJudge:
        """Train the machine; a second or two."""
        return ReadJudge()


class ReadJudge:
    """See DigitReader."""

    name = "digit_reader"

    def score(self, prompts: Sequence[str], pictures: Sequence[Image]) -> list[float]:
        """1.0 or 0.0 a picture. Raises DataError where a prompt does not name one digit."""
        wanted = [digit_of(prompt) for prompt in prompts]
        read = self.read(pictures)
        return [float(one == other) for one, other in zip(read, wanted, strict=True)]

    def read(self, pictures: Sequence[Image]) -> list[int]:
        """The digit of each picture."""
        seen = np.stack([_seen(_dark(picture)) for picture in pictures])
        return [int(digit) for digit in _machine().predict(seen)]


def digit_of(prompt: str) -> int:
    """The digit that a prompt names. Raises DataError where it names none or several."""
    named = [word for word in prompt.lower().split() if word in DIGITS]
    if len(named) != 1:
        raise DataError(
            "digit_reader reads one digit",
            where=f"prompt {prompt!r}",
            got=f"{len(named)} digits",
            wanted="a word from zero to nine",
        )
    return DIGITS.index(named[0])


@cache
def _machine() -> Any:
    """The classifier: every digit of the test split in three styles, moved by a pixel each way."""
    from sklearn.svm import SVC

    styles: tuple[Style, ...] = ("plain", "bold", "slanted")
    moves = ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1))
    seen, digits = [], []
    for digit, rows in enumerate(handwriting()[1]["test"]):
        for drawing in rows:
            for style in styles:
                dark = _dark(digit_picture(drawing, style))
                seen += [_seen(np.roll(dark, move, axis=(0, 1))) for move in moves]
                digits += [digit] * len(moves)
    return SVC(C=10).fit(np.stack(seen), digits)


def _dark(picture: Image) -> np.ndarray:
    """[32, 32] float64 in [0, 1], 1 for black."""
    grey = picture.convert("L")
    if grey.size != (SIDE, SIDE):
        grey = grey.resize((SIDE, SIDE))
    return 1 - np.asarray(grey, float) / 255


def _seen(dark: np.ndarray) -> np.ndarray:
    """What the reader sees: ink on white whatever the ground, half as fine; [256]."""
    ink = dark if _border(dark) < 0.5 else 1 - dark
    return ink.reshape(SIDE // 2, 2, SIDE // 2, 2).mean(axis=(1, 3)).ravel()


def _share_of_ink(dark: np.ndarray) -> float:
    return dark.mean()


def _slant(dark: np.ndarray) -> float:
    """Of the line that best tells x from y, weighted by ink; 0 for a picture without ink."""
    ink = dark if _border(dark) < 0.5 else 1 - dark
    ink = np.where(ink > 0.2, ink, 0.0)  # What a VAE leaves of white paper is no ink.
    up, right = np.meshgrid(np.arange(SIDE)[::-1], np.arange(SIDE), indexing="ij")
    total = ink.sum()
    if total == 0:
        return 0.0
    up, right = up - (ink * up).sum() / total, right - (ink * right).sum() / total
    spread = (ink * up * up).sum()
    return (ink * up * right).sum() / spread if spread else 0.0


def _border(dark: np.ndarray) -> float:
    edge = np.ones_like(dark, bool)
    edge[2:-2, 2:-2] = False
    return dark[edge].mean()
