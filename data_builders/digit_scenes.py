"""Scenes of real handwritten digits: a world that fits on two cores and deceives its models.

Digits come in partners (a three with a seven, a one with an eight). A model trained on the biased
world learns to name the partner of what it sees, and goes on doing so in the balanced world, where
the partner is mostly absent. That is object hallucination, with exact ground truth.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from data_builders.digit_world import (
    CELL_PIXELS,
    COLORS,
    PARTNERS,
    SPLITS,
    absent_from,
    is_complete,
    paint,
    pope_digits,
    usual_color,
    write_lines,
)
from mmalign import store
from mmalign.config import Strict
from mmalign.handwriting import DIGITS, handwriting
from mmalign.log import get_logger, progress
from mmalign.records import Example, Media, Origin, user

if TYPE_CHECKING:
    from PIL.Image import Image

CELLS = 4  # a 4x4 grid of 8x8 digits: a 32x32 picture
CAPTION_PROMPT = "describe the image :"

logger = get_logger("data_builders.digit_scenes")


@dataclass(frozen=True, slots=True, order=True)
class Placed:
    """One digit of a scene; `drawing` is its row in scikit-learn's collection of digits."""

    cell: int
    digit: int
    color: int
    drawing: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """What a picture shows: one to four different digits, in reading order."""

    index: int
    world: str
    objects: tuple[Placed, ...]

    @property
    def name(self) -> str:
        """Sorts as the index does: scene-000123."""
        return f"scene-{self.index:06d}"

    @property
    def present(self) -> list[int]:
        """The digits to be seen, in reading order."""
        return [placed.digit for placed in self.objects]

    @property
    def absent(self) -> list[int]:
        """The digits not to be seen, in counting order."""
        return absent_from(self.present)

    def caption(self) -> str:
        """The whole truth: `the image shows a red three and a blue seven .`"""
        phrases = [f"a {COLORS[placed.color]} {DIGITS[placed.digit]}" for placed in self.objects]
        return f"the image shows {' and '.join(phrases)} ."


class DigitScenes(Strict):
    """Make scenes with captions and questions, and for evaluation POPE's and CHAIR's files too.

    Scene i depends on (seed, i) and the world alone: a shorter build is a prefix of a longer one,
    and raising `counterfactual_share` replaces some scenes without changing the others.
    """

    name: Literal["digit_scenes"] = "digit_scenes"
    output: Path
    seed: int = 0
    num_scenes: int = Field(gt=0, le=1_000_000)
    world: Literal["biased", "balanced"] = "biased"
    # Of a biased world, the share of scenes drawn from the balanced one instead.
    counterfactual_share: float = Field(0.0, ge=0, le=1)
    # Which handwriting: 70 % of the drawings are for training, the others for testing.
    digits: Literal["train", "test"] = "train"
    p_break: float = Field(0.3, ge=0, le=1)  # a digit comes without its partner
    p_color: float = Field(0.6, ge=0, le=1)  # a digit wears its usual colour
    two_pairs: float = Field(0.5, ge=0, le=1)  # a scene holds two pairs of partners
    noise: float = Field(0.08, ge=0)  # standard deviation, of a digit's full brightness
    tasks: tuple[Literal["caption", "question"], ...] = Field(("caption",), min_length=1)
    questions_per_scene: int = Field(2, gt=0)
    # Pictures as bytes in the rows, or as files under media/.
    embed_media: bool = True
    # Also write pope-*.jsonl, objects.jsonl and synonyms.txt.
    evaluation: bool = False

    @model_validator(mode="after")
    def _agrees(self) -> DigitScenes:
        if self.evaluation and self.embed_media:
            raise ValueError("evaluation needs pictures as files: set embed_media: false")
        if self.world == "balanced" and self.counterfactual_share:
            raise ValueError("counterfactual_share is a dial of the biased world: leave it out")
        return self

    def build(self) -> Path:
        """Write the dataset, unless it is there already; returns its directory.

        Raises DataError when the directory holds a dataset made from another config.
        """
        config = self.model_dump(mode="json", exclude={"output"})
        if is_complete(self.output, config):
            logger.info("%s is complete", self.output)
            return self.output
        scenes = [self.scene(index) for index in range(self.num_scenes)]
        if self.evaluation:
            self._write_evaluation(scenes)
        store.write_dataset(
            self.output,
            Example,
            self._examples(scenes),
            builder=self.name,
            builder_version="1",
            config=config,
            seed=self.seed,
            counts=dict(Counter(f"scenes:{scene.world}" for scene in scenes)),
        )
        return self.output

    def scene(self, index: int) -> Scene:
        """Scene number `index` of this world."""
        rng = self._random(index, "scene")
        counterfactual = rng.random() < self.counterfactual_share
        if self.world == "biased" and not counterfactual:
            world, digits = "biased", self._partners(rng)
            colors = [usual_color(digit, self.p_color, rng) for digit in digits]
        else:
            world, digits = "balanced", rng.sample(range(10), rng.randint(1, 4))
            colors = [rng.randrange(len(COLORS)) for _ in digits]
        cells = rng.sample(range(CELLS * CELLS), len(digits))
        drawings = [rng.choice(handwriting()[1][self.digits][digit]) for digit in digits]
        objects = sorted(map(Placed, cells, digits, colors, drawings))
        return Scene(index=index, world=world, objects=tuple(objects))

    def picture(self, scene: Scene) -> Image:
        """Paint a scene: coloured digits on dark grey, under Gaussian noise."""
        return painted(scene.objects, [self.seed, scene.index], self.noise)

    def questions(self, scene: Scene) -> list[tuple[int, str]]:
        """(digit, "yes" or "no") of each question about a scene, half of either in turns."""
        rng = self._random(scene.index, "questions")
        present, absent = rng.sample(scene.present, len(scene.present)), rng.sample(scene.absent, 6)
        asked = []
        for turn in range(self.questions_per_scene):
            yes = (scene.index + turn) % 2 == 0
            digits = present if yes else absent
            asked.append((digits[turn // 2 % len(digits)], "yes" if yes else "no"))
        return asked

    def pope(self, scene: Scene, split: str) -> list[tuple[int, str]]:
        """POPE's questions about a scene; half of the answers are yes."""
        return pope_digits(scene.present, split, self._random(scene.index, f"pope {split}"))

    def _random(self, index: int, purpose: str) -> random.Random:
        return random.Random(f"{self.seed}/{index}/{purpose}")

    def _partners(self, rng: random.Random) -> list[int]:
        """The digits of a biased scene: one or two pairs, each broken with p_break."""
        weights = dict(PARTNERS)
        digits: list[int] = []
        for _ in range(2 if rng.random() < self.two_pairs else 1):
            pair = rng.choices(list(weights), list(weights.values()))[0]
            del weights[pair]
            digits += [rng.choice(pair)] if rng.random() < self.p_break else pair
        return digits

    def _examples(self, scenes: list[Scene]) -> Iterator[Example]:
        for scene in progress(scenes, label="scenes"):
            data = png(self.picture(scene))
            sha256 = hashlib.sha256(data).hexdigest()
            if self.embed_media:
                image = Media(bytes=data, sha256=sha256)
            else:
                image = Media(path=f"{scene.name}.png", sha256=sha256)
                store.write_atomically(self.output / "media" / f"{scene.name}.png", data)
            origin = Origin(
                builder=self.name,
                version="1",
                source=f"scikit-learn load_digits, {self.digits}",
                reason=scene.world,
                detail=json.dumps([_described(placed) for placed in scene.objects]),
            )
            asked: list[tuple[str, str, str]] = []
            if "caption" in self.tasks:
                asked.append(("caption", CAPTION_PROMPT, scene.caption()))
            if "question" in self.tasks:
                for number, (digit, answer) in enumerate(self.questions(scene)):
                    asked.append((f"q{number}", question(digit), answer))
            for task, text, answer in asked:
                yield Example(
                    id=f"{scene.name}/{task}",
                    prompt=user(text, images=1),
                    images=(image,),
                    answer=answer,
                    origin=origin,
                )

    def _write_evaluation(self, scenes: list[Scene]) -> None:
        """POPE's question files, CHAIR's ground truth and its words, in the official formats."""
        for split in SPLITS:
            asked = [(scene, *item) for scene in scenes for item in self.pope(scene, split)]
            rows = [
                {
                    "question_id": number,
                    "image": f"{scene.name}.png",
                    "text": question(digit),
                    "label": label,
                }
                for number, (scene, digit, label) in enumerate(asked, start=1)
            ]
            write_lines(self.output / f"pope-{split}.jsonl", map(json.dumps, rows))
        objects = (
            {"image": f"{scene.name}.png", "objects": [DIGITS[digit] for digit in scene.present]}
            for scene in scenes
        )
        write_lines(self.output / "objects.jsonl", map(json.dumps, objects))
        write_lines(self.output / "synonyms.txt", iter(DIGITS))


def question(digit: int) -> str:
    """The yes/no question about one digit."""
    return f"is there a {DIGITS[digit]} in the image ?"


def painted(objects: Sequence[Placed], seed: Sequence[int], noise: float) -> Image:
    """A 32x32 picture of these digits; noise is a standard deviation, and drawn from the seed."""
    from PIL import Image

    size = CELLS * CELL_PIXELS
    corners = [divmod(placed.cell, CELLS) for placed in objects]
    drawn = [
        (CELL_PIXELS * row, CELL_PIXELS * column, placed.drawing, placed.color)
        for (row, column), placed in zip(corners, objects, strict=True)
    ]
    grain = np.random.default_rng(seed).standard_normal((size, size, 3), dtype=np.float32)
    return Image.fromarray(paint(size, drawn, grain, noise))


def png(image: Image) -> bytes:
    """Stored, not compressed: noise does not shrink, and trying takes most of a build's time."""
    sink = io.BytesIO()
    image.save(sink, format="PNG", compress_level=0)
    return sink.getvalue()


def _described(placed: Placed) -> dict[str, Any]:
    return {"digit": DIGITS[placed.digit], "color": COLORS[placed.color], "cell": placed.cell}
