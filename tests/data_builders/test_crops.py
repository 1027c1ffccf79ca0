"""Contrast pictures by cropping."""

import io
import json
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_builders.config import load_builder
from data_builders.crops import Crops, crop_box
from mmalign.errors import ConfigError
from mmalign.media import embed
from mmalign.records import Preference, user
from mmalign.store import open_dataset, write_dataset


@pytest.fixture
def pairs(tmp_path):
    pixels = np.random.RandomState(0).randint(0, 255, (5, 40, 60, 3), dtype=np.uint8)
    rows = [
        Preference(
            id=f"row-{n}",
            prompt=user("What?", images=n < 4),
            images=(embed(Image.fromarray(pixels[n])),) if n < 4 else (),
            chosen="a cat",
            rejected="a dog",
        )
        for n in range(5)
    ]
    write_dataset(tmp_path / "pairs", Preference, rows, builder="test")
    return tmp_path / "pairs", pixels


def test_every_picture_gets_a_crop_of_itself(pairs, tmp_path):
    source, pixels = pairs
    made = open_dataset(Crops(source=source, output=tmp_path / "out").build(), Preference)
    assert made.manifest.counts == {"accepted": 4, "dropped:no_picture": 1}
    for n, row in enumerate(made):
        (left, top, right, bottom) = json.loads(row.origin.detail)["crops"][0]
        crop = np.asarray(Image.open(io.BytesIO(row.contrast_images[0].bytes)))
        assert np.array_equal(crop, pixels[n][top:bottom, left:right])
        assert (row.chosen, row.rejected) == ("a cat", "a dog")
        assert crop.size < 0.25 * pixels[n].size
    again = open_dataset(
        Crops(source=source, output=tmp_path / "again", shard_rows=2).build(), Preference
    )
    assert [row for row in again] == [row for row in made]


@given(st.integers(1, 50), st.integers(1, 50), st.floats(0.001, 1.0), st.integers(0, 1000))
def test_boxes_lie_inside_and_have_about_the_share(width, height, share, seed):
    left, top, right, bottom = crop_box(
        Image.new("RGB", (width, height)), share, random.Random(seed)
    )
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    side = share**0.5
    assert abs((right - left) - width * side) <= 1
    assert abs((bottom - top) - height * side) <= 1


def test_a_crossed_range_is_refused(tmp_path):
    config = tmp_path / "crops.yaml"
    config.write_text("name: crops\nsource: a\noutput: b\nsmallest: 0.5\n")
    with pytest.raises(ConfigError, match=r"smallest 0\.5 is over largest 0\.2"):
        load_builder(config)
