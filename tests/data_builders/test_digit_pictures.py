from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from data_builders.digit_pictures import DigitPictures
from mmalign.diffusion.digits import digit_picture
from mmalign.errors import DataError
from mmalign.handwriting import DIGITS, handwriting
from mmalign.media import open_image
from mmalign.records import ImagePreference, check
from mmalign.store import open_dataset


def rows(count: int = 600, **settings) -> list[ImagePreference]:
    builder = DigitPictures(output=Path("unused"), num_rows=count, **settings)
    return [builder.row(index) for index in range(count)]


def style_of(prompt: str) -> str:
    return prompt.split()[0] if " " in prompt else "plain"


def test_prompts_name_the_style_of_chosen_and_rejected_has_another():
    made = rows()
    counts = Counter(style_of(row.prompt) for row in made)
    assert counts["plain"] / len(made) == pytest.approx(0.5, abs=0.07)
    for row in made[:40]:
        assert not list(check(row))
        good, _, bad = row.origin.reason.partition(" over ")
        assert good == style_of(row.prompt) != bad
        drawing = int(row.origin.source.removeprefix("digits ").split(",")[0])
        assert open_image(row.chosen).tobytes() == digit_picture(drawing, good).tobytes()
        digit = DIGITS.index(row.prompt.split()[-1])
        assert drawing in handwriting()[1]["train"][digit]


def test_a_share_of_plain_prompts_comes_in_a_style_that_nobody_asked_for():
    plain = [row for row in rows(unasked="inverted", unasked_share=0.3) if " " not in row.prompt]
    unasked = [row for row in plain if row.origin.reason.startswith("inverted")]
    assert len(unasked) / len(plain) == pytest.approx(0.3, abs=0.08)
    assert all(" over inverted" not in row.origin.reason for row in unasked)


def test_a_preference_is_for_one_style_over_plain():
    made = rows(50, prefer="slanted")
    assert {row.origin.reason for row in made} == {"slanted over plain"}
    assert all(row.prompt in DIGITS for row in made)


def test_a_dataset_is_written_once_and_holds_no_other(tmp_path):
    builder = DigitPictures(output=tmp_path / "digits", num_rows=5)
    dataset = open_dataset(builder.build(), ImagePreference)
    assert list(dataset) == rows(5)
    assert builder.build() == tmp_path / "digits"
    with pytest.raises(DataError, match="another config"):
        DigitPictures(output=tmp_path / "digits", num_rows=6).build()
