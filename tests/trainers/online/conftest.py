"""A tiny model of words, prompts with answers to check, and a recipe of online DPO on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmalign.config import validate
from mmalign.generate.base import Generation
from mmalign.media import embed
from mmalign.models.tiny import TinyModel, Tower
from mmalign.records import Verifiable, user
from mmalign.rewards import Rewards, RewardsConfig, Rollout
from mmalign.store import open_dataset, write_dataset
from mmalign.verify import Verifiers
from trainers.config import Recipe
from trainers.directory import RunDirectory
from trainers.setup import Parts, set_up

SIZE = 4
WORDS = ("what", "is", "it", "?", "yes", "no", "red", "blue", "one", "two", "cat", "dog")


class Own:
    """A reward of a test's own."""

    name, weight = "accuracy", 1.0

    def __init__(self, worth: Callable[[Rollout], float]) -> None:
        self.worth = worth

    def __call__(self, rollout: Rollout, verifiers: Verifiers) -> float:
        return self.worth(rollout)


def by_letters(rollout: Rollout) -> float:
    """A worth that differs between random texts."""
    return float(sum(map(ord, rollout.text)) % 7)


@pytest.fixture
def reward(monkeypatch):
    """Lets a test say what a rollout is worth."""

    def worth(function: Callable[[Rollout], float]) -> None:
        monkeypatch.setattr(
            RewardsConfig, "load", lambda self: Rewards([Own(function)], Verifiers())
        )

    worth(by_letters)
    return worth


@pytest.fixture(scope="session")
def wordy(tmp_path_factory) -> Path:
    """A tiny model whose tokens are words."""
    small = Tower(hidden=32, layers=2, heads=4, mlp=32)
    path = tmp_path_factory.mktemp("model") / "wordy"
    return TinyModel(output=str(path), image_size=16, vision=small, text=small, words=WORDS).build()


def row(number: int) -> Verifiable:
    pixels = np.random.default_rng(number).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    return Verifiable(
        id=f"row-{number}",
        prompt=user("what is it ?" + " cat" * number, images=1),
        images=(embed(Image.fromarray(pixels)),),
        answer="yes",
        verifier="exact",
    )


@pytest.fixture(scope="session")
def prompts(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("prompts")
    write_dataset(path, Verifiable, [row(n) for n in range(6)])
    return path


@pytest.fixture
def recipe(wordy: Path, prompts: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """A recipe of three steps; `source` and other keywords replace keys of their sections."""

    def make(name: str = "run", source: dict[str, Any] | None = None, **sections: Any) -> Recipe:
        decoding = {"max_new_tokens": 4}
        rollouts = {"name": "rollouts", "group_size": SIZE, "decoding": decoding} | (source or {})
        values: dict[str, Any] = {
            "model": {"path": str(wordy)},
            "data": {"path": str(prompts), "online": {"source": rollouts}},
            "loss": {"name": "dpo"},
            "optim": {"lr": 1e-2, "batch_size": 2, "steps": 3, "schedule": "constant"},
            "run": {"output": str(tmp_path / name), "log_every_steps": 1},
        }
        for key, value in sections.items():
            old = values.get(key)
            merged = isinstance(old, dict) and isinstance(value, dict) and key != "loss"
            values[key] = old | value if merged else value
        return validate(values, Recipe, "test")

    return make


@pytest.fixture
def set_up_as(recipe):
    """The parts of a run before its first step, with what its generator says kept."""

    def make(**sections: Any) -> tuple[Parts, list[list[Generation]]]:
        whole = recipe(**sections)
        parts = set_up(whole, open_dataset(whole.data.path), RunDirectory(whole))
        said: list[list[Generation]] = []
        real = parts.online.generator.generate

        def generate(requests, sampling):
            said.append(real(requests, sampling))
            return said[-1]

        parts.online.generator.generate = generate
        return parts, said

    return make


@pytest.fixture
def finishing(monkeypatch):
    """Untrained, the model hardly ever ends a turn: what the limit cuts counts as finished."""
    from mmalign.generate.local import LocalGenerator

    real = LocalGenerator._finish
    monkeypatch.setattr(
        LocalGenerator, "_finish", lambda *args: replace(real(*args), finished=True)
    )
