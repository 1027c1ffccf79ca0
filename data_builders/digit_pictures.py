"""Real handwritten digits as image preferences: what the lab's diffusion models learn from.

Two uses. As a base model's lessons: prompts say a style, such as "bold seven", chosen is a digit
in that style and rejected one in another. As a preference (`prefer`): prompts say none, chosen is
a digit in the preferred style and rejected a plain one.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args

from pydantic import Field, PositiveInt

from data_builders.digit_world import is_complete
from mmalign import store
from mmalign.config import Strict
from mmalign.diffusion.digits import Style, digit_picture
from mmalign.handwriting import DIGITS, handwriting
from mmalign.log import get_logger, progress
from mmalign.media import embed
from mmalign.records import ImagePreference, Origin

STYLES: tuple[Style, ...] = get_args(Style)

logger = get_logger("data_builders.digit_pictures")


class DigitPictures(Strict):
    """Make pairs of digits of the training split.

    Row i depends on (seed, i) alone. styles: each as often as it stands here. unasked_share: of the
    rows whose prompt names no style, this share is in style `unasked`, as if it were normal.
    prefer: make a preference for this style instead; the others are then not looked at.
    """

    name: Literal["digit_pictures"] = "digit_pictures"
    output: Path
    seed: int = 0
    num_rows: PositiveInt
    styles: tuple[Style, ...] = Field(("plain", "plain", "plain", *STYLES[1:]), min_length=1)
    unasked: Style = "plain"
    unasked_share: float = Field(0.0, ge=0, le=1)
    prefer: Literal["bold", "slanted", "inverted"] | None = None

    def build(self) -> Path:
        """Write the dataset, unless it is there already; returns its directory."""
        config = self.model_dump(mode="json", exclude={"output"})
        if is_complete(self.output, config):
            logger.info("%s is complete", self.output)
            return self.output
        store.write_dataset(
            self.output,
            ImagePreference,
            self._rows(),
            builder=self.name,
            builder_version="1",
            config=config,
            seed=self.seed,
            counts={"accepted": self.num_rows},
        )
        return self.output

    def _rows(self) -> Iterator[ImagePreference]:
        for index in progress(range(self.num_rows), label=self.name):
            yield self.row(index)

    def row(self, index: int) -> ImagePreference:
        """Row `index`."""
        rng = random.Random(f"{self.seed}/{index}")
        digit = rng.randrange(10)
        drawings = handwriting()[1]["train"][digit]
        said: Style = "plain"
        good: Style
        bad: Style
        if self.prefer is not None:
            good, bad = self.prefer, "plain"
        else:
            said = good = rng.choice(self.styles)
            if said == "plain" and rng.random() < self.unasked_share:
                good = self.unasked
            bad = rng.choice([style for style in STYLES if style != good])
        prompt = DIGITS[digit] if said == "plain" else f"{said} {DIGITS[digit]}"
        chosen, rejected = rng.choice(drawings), rng.choice(drawings)
        return ImagePreference(
            id=f"digit-{index:06d}",
            prompt=prompt,
            chosen=embed(digit_picture(chosen, good)),
            rejected=embed(digit_picture(rejected, bad)),
            origin=Origin(
                builder=self.name,
                version="1",
                source=f"digits {chosen}, {rejected}",
                reason=f"{good} over {bad}",
            ),
        )
