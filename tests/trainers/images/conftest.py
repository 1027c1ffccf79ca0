"""A small SDXL, image pairs and recipes for them, for all tests of runs over images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mmalign.config import validate
from mmalign.diffusion.tiny import TinyPipeline
from mmalign.media import embed
from mmalign.records import ImagePreference
from mmalign.store import write_dataset
from trainers.images.config import ImageRecipe
from trainers.loop import Stepped, train

WORDS = ("a", "bold", "seven", "three")


def make_picture(seed: int, width: int = 32, height: int = 32, mode: str = "RGB") -> Image.Image:
    pixels = np.random.RandomState(seed).randint(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def make_pairs(count: int = 6) -> list[ImagePreference]:
    return [
        ImagePreference(
            id=f"{n}",
            prompt=["a bold seven", "a three"][n % 2],
            chosen=embed(make_picture(2 * n, 40 + n, 32)),
            rejected=embed(make_picture(2 * n + 1, 32, 36 + n)),
        )
        for n in range(count)
    ]


def make_recipe(folder: Path, data: Path, output: Path, **changes: Any) -> ImageRecipe:
    values: dict[str, Any] = {
        "model": {"path": str(folder)},
        "data": {"path": str(data), "resolution": 32},
        "loss": {"name": "mapo_released"},
        "optim": {"lr": 1e-3, "batch_size": 4, "steps": 3, "schedule": "constant"},
        "run": {"output": str(output), "log_every_steps": 1},
    }
    for key, value in changes.items():
        part, _, name = key.partition("__")
        if name:
            values[part] = values[part] | {name: value}
        else:
            values[part] = value
    return validate(values, ImageRecipe, "test")


def saved_weights(model: Path) -> dict[str, torch.Tensor]:
    unet = model / "unet/diffusion_pytorch_model.safetensors"
    return load_file(unet if unet.exists() else next(model.glob("*.safetensors")))


def run(recipe: ImageRecipe) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    metrics = [event.metrics for event in train(recipe) if isinstance(event, Stepped)]
    return metrics, saved_weights(recipe.run.output / "model")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A small pipeline of a kind, built once."""
    made: dict[str, Path] = {}

    def build(kind: str) -> Path:
        if kind not in made:
            path = tmp_path_factory.mktemp("tiny") / kind
            made[kind] = TinyPipeline.model_validate(
                {"output": path, "pipeline": kind, "words": WORDS}
            ).build()
        return made[kind]

    return build


@pytest.fixture(scope="session")
def folder(tiny_pipeline: Callable[..., Path]) -> Path:
    return tiny_pipeline("sdxl")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "data", ImagePreference, make_pairs())
    return tmp_path / "data"


@pytest.fixture(scope="session")
def picture() -> Callable[..., Image.Image]:
    return make_picture


@pytest.fixture(scope="session")
def pairs() -> Callable[..., list[ImagePreference]]:
    return make_pairs


@pytest.fixture(scope="session")
def recipe_of() -> Callable[..., ImageRecipe]:
    """(pipeline, dataset, output): keywords replace keys, `section__key` of a section."""
    return make_recipe


@pytest.fixture(scope="session")
def trained() -> Callable[..., tuple[list[dict[str, float]], dict[str, torch.Tensor]]]:
    """Metrics of each log line, and the weights that the run saved."""
    return run


@pytest.fixture(scope="session")
def equal() -> Callable[..., bool]:
    """To the last bit."""
    return same


@pytest.fixture(scope="session")
def weights_of() -> Callable[[Path], dict[str, torch.Tensor]]:
    """What a model/ folder holds of the backbone: all of it, or an adapter."""
    return saved_weights
