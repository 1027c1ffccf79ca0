"""A tiny model, a tiny dataset and a recipe for them, built once for all trainer tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmalign.config import validate
from mmalign.media import embed
from mmalign.models.tiny import TinyModel, Tower
from mmalign.records import Preference, user
from mmalign.store import write_dataset
from trainers.config import Recipe

LORA = {"rank": 4, "alpha": 8, "dropout": 0.1}


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    small = Tower(hidden=32, layers=2, heads=4, mlp=32)
    path = tmp_path_factory.mktemp("model") / "llava"
    return TinyModel(output=str(path), image_size=16, vision=small, text=small).build()


def make_preference(number: int, **changes: Any) -> Preference:
    pixels = np.random.default_rng(number).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    contrast = np.random.default_rng(1000 + number).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    values: dict[str, Any] = {
        "id": f"row-{number}",
        "prompt": user(f"What is it? {number}", images=1),
        "images": (embed(Image.fromarray(pixels)),),
        "chosen": f"It is {number}" + "!" * (number % 4),
        "rejected": "A cat, " + "very " * (number % 3) + "red.",
        "contrast_images": (embed(Image.fromarray(contrast)),),
    }
    return Preference(**(values | changes))


@pytest.fixture(scope="session")
def preference() -> Callable[..., Preference]:
    """Row number n, with a picture and a contrast picture of its own; keywords replace fields."""
    return make_preference


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pairs")
    write_dataset(path, Preference, [make_preference(n) for n in range(10)], builder="test")
    return path


@pytest.fixture
def recipe(tiny_model: Path, pairs: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """A recipe of six steps; keyword arguments are sections whose keys are replaced."""

    def make(**sections: Any) -> Recipe:
        values: dict[str, Any] = {
            "model": {"path": str(tiny_model), "lora": LORA},
            "data": {"path": str(pairs)},
            "loss": {"name": "rdpo"},
            "optim": {"lr": 1e-3, "batch_size": 4, "steps": 6},
            "run": {"output": str(tmp_path / "run"), "log_every_steps": 1},
        }
        for name, section in sections.items():
            if isinstance(section, dict) and "name" not in section:
                values[name] = values.get(name, {}) | section
            else:
                values[name] = section
        if values.get("reference") == "cached":
            # Each run's own, or tests would read each other's scores of the one dataset.
            values.setdefault("reference_cache", values["run"]["output"] + "/reference")
        return validate(values, Recipe, "test recipe")

    return make
