"""The lab's digits: each style measured by its judge, each digit read by the reader."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from mmalign.diffusion.digits import DigitReader, DigitStyle, digit_of, digit_picture
from mmalign.errors import DataError
from mmalign.handwriting import DIGITS, handwriting

STYLES = ("plain", "bold", "slanted", "inverted")
UNSEEN = [(digit, row) for digit, rows in enumerate(handwriting()[1]["train"]) for row in rows[:20]]


@pytest.mark.parametrize("style", STYLES)
def test_the_reader_reads_real_digits_that_it_never_saw_in_every_style(style):
    pictures = [digit_picture(row, style) for _, row in UNSEEN]
    prompts = [f"{style} {DIGITS[digit]}" for digit, _ in UNSEEN]
    assert np.mean(DigitReader().load().score(prompts, pictures)) > 0.96
    wrong = [DIGITS[(digit + 1) % 10] for digit, _ in UNSEEN]
    assert np.mean(DigitReader().load().score(wrong, pictures)) < 0.04


@pytest.mark.parametrize("style", STYLES[1:])
def test_a_style_shows_in_its_own_measure(style):
    judge = DigitStyle(style=style).load()
    plain = judge.score(["x"] * len(UNSEEN), [digit_picture(row) for _, row in UNSEEN])
    styled = judge.score(["x"] * len(UNSEEN), [digit_picture(row, style) for _, row in UNSEEN])
    assert all(more > less for more, less in zip(styled, plain, strict=True))


def test_measures_have_the_values_of_their_definitions():
    """A line from the lower left to the upper right rises a pixel for each pixel to the right."""
    pixels = np.full((32, 32), 255, np.uint8)
    for place in range(6, 26):
        pixels[31 - place, place] = 0
    line = Image.fromarray(pixels)
    judges = [DigitStyle(style=style).load() for style in ("bold", "slanted", "inverted")]
    ink, slant, border = (judge.score(["x"], [line])[0] for judge in judges)
    assert ink == pytest.approx(20 / 1024)
    assert slant == pytest.approx(1.0)
    assert border == 0
    white, black = Image.new("RGB", (32, 32), "white"), Image.new("RGB", (32, 32))
    assert judges[1].score(["x"], [white]) == [0.0]
    assert judges[2].score(["x"], [black]) == [1.0]


def test_a_prompt_names_one_digit():
    assert digit_of("Bold Seven") == 7
    for prompt in ("a cat", "one two"):
        with pytest.raises(DataError, match="reads one digit"):
            digit_of(prompt)
