"""The survey of image pairs: which rows are used, and that a limit counts those alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmalign.config import validate
from mmalign.diffusion.backbones import BACKBONES
from mmalign.errors import TrainingError
from mmalign.media import embed
from mmalign.records import ImagePreference, Media
from mmalign.store import open_dataset, write_dataset
from trainers.images import rows as module
from trainers.images.config import ImageRecipe
from trainers.images.rows import ImageRows
from trainers.rows import Survey
from trainers.setup import new_accelerator


def media(seed: int) -> Media:
    pixels = np.random.RandomState(seed).randint(0, 255, (16, 16, 3), dtype=np.uint8)
    return embed(Image.fromarray(pixels))


def rows_of(folder: Path, limit: int | None, *, with_rejected: bool = True) -> ImageRows:
    values: dict[str, Any] = {
        "model": {"path": "nowhere"},
        "data": {"path": str(folder), "resolution": 16, "limit": limit},
        "loss": {"name": "mapo"},
        "optim": {"lr": 1e-3, "batch_size": 2, "steps": 1},
        "run": {"output": str(folder / "run")},
    }
    recipe = validate(values, ImageRecipe, "test")
    return ImageRows(
        open_dataset(folder), recipe, BACKBONES[0], with_rejected=with_rejected, num_steps=10
    )


def survey(folder: Path, limit: int | None = None, **options: Any) -> Survey:
    return rows_of(folder, limit, **options).survey(new_accelerator())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """t ties, r reversed, b broken, s one picture twice; the others are good."""
    changes: dict[str, dict[str, Any]] = {
        "t0": {"p_target": 0.5},
        "good1": {},
        "t2": {"p_target": 0.5},
        "r3": {"p_target": 0.3},
        "b4": {"rejected": Media(bytes=b"broken")},
        "good5": {"p_target": 0.7},
        "s6": {"chosen": media(99), "rejected": media(99)},
        "t7": {"p_target": 0.5},
        "good8": {},
        "t9": {"p_target": 0.5},
        "good10": {},
        "b11": {"rejected": Media(bytes=b"broken")},
        "t12": {"p_target": 0.5},
    }
    rows = []
    for n, (id, values) in enumerate(changes.items()):
        start = {"prompt": "a", "chosen": media(2 * n), "rejected": media(2 * n + 1)}
        rows.append(ImagePreference(id=id, **(start | values)))
    write_dataset(tmp_path / "d", ImagePreference, rows)
    return tmp_path / "d"


def test_without_a_limit_every_row_is_told(folder: Path) -> None:
    found = survey(folder)
    assert found.ids == ["good1", "good5", "good8", "good10"]
    assert found.rows == [1, 5, 8, 10]
    assert found.dropped == {
        "reversed": ["r3"],
        "same_image": ["s6"],
        "tie": ["t0", "t12", "t2", "t7", "t9"],
        "unreadable_media": ["b11", "b4"],
    }


@pytest.mark.parametrize(
    ("limit", "ids", "dropped"),
    [
        (1, ["good1"], {"tie": ["t0"]}),
        (
            2,
            ["good1", "good5"],
            {"tie": ["t0", "t2"], "reversed": ["r3"], "unreadable_media": ["b4"]},
        ),
        (
            3,
            ["good1", "good5", "good8"],
            {
                "tie": ["t0", "t2", "t7"],
                "reversed": ["r3"],
                "unreadable_media": ["b4"],
                "same_image": ["s6"],
            },
        ),
    ],
)
def test_a_limit_counts_rows_that_can_be_trained_on(
    folder: Path, limit: int, ids: list[str], dropped: dict[str, list[str]]
) -> None:
    """Of the released script's first three rows, one could be trained on."""
    found = survey(folder, limit)
    assert found.ids == ids
    assert found.dropped == dropped


@pytest.mark.parametrize("limit", [4, 5, 100])
def test_a_limit_that_the_data_do_not_fill_takes_all(folder: Path, limit: int) -> None:
    found = survey(folder, limit)
    assert len(found.ids) == 4
    if limit > 4:
        assert found.dropped == survey(folder).dropped


def test_pictures_beyond_the_limit_stay_closed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Media] = []
    plain = module.open_image

    def noted(media: Media, root: Path | None) -> Image.Image:
        opened.append(media)
        return plain(media, root)

    monkeypatch.setattr(module, "open_image", noted)
    survey(folder, 2)
    dataset = open_dataset(folder)
    wanted = [dataset[n] for n in (1, 4, 5)]
    assert opened == [media for row in wanted for media in (row.chosen, row.rejected)]


def test_a_tie_is_a_row_where_only_chosen_images_are_read(folder: Path) -> None:
    found = survey(folder, 3, with_rejected=False)
    assert found.ids == ["t0", "good1", "t2"]
    assert found.dropped == {}


def test_a_dataset_of_ties_is_refused(tmp_path: Path) -> None:
    tie = ImagePreference(id="0", prompt="a", chosen=media(0), rejected=media(1), p_target=0.5)
    write_dataset(tmp_path / "d", ImagePreference, [tie])
    for limit in (None, 1):
        with pytest.raises(TrainingError, match=r"no row can be trained on.*tie 1"):
            survey(tmp_path / "d", limit)
