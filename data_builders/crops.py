"""Contrast pictures by cropping: what mDPO compares the chosen response under (arXiv 2406.11839).

A dataset of preferences gets, for every picture, a contrast picture that is a random crop of it
covering `smallest` to `largest` of its area (the paper: 0 to 20 %), in the picture's own shape: too
little to tell what the chosen response tells. Everything else of a row stays. Existing contrast
pictures are replaced.

Launch: mmalign build config.yaml with `name: crops`
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, PositiveInt, model_validator

from mmalign.config import Strict
from mmalign.engines import AnyEngine, LocalEngine
from mmalign.jobs import Outcome, run_job
from mmalign.media import embed, open_image
from mmalign.records import Media, Preference
from mmalign.store import open_dataset, read_manifest

if TYPE_CHECKING:
    from PIL.Image import Image

VERSION = "1"


class Crops(Strict):
    """Settings of the builder; the defaults are the paper's.

    smallest is above the paper's 0, where nothing would be left to see.
    """

    name: Literal["crops"] = "crops"
    source: Path
    output: Path
    seed: int = 0
    smallest: float = Field(default=0.01, gt=0, le=1)
    largest: float = Field(default=0.2, gt=0, le=1)
    shard_rows: PositiveInt = 256
    engine: AnyEngine = Field(default=LocalEngine(), exclude=True)

    @model_validator(mode="after")
    def _ordered(self) -> Crops:
        if self.smallest > self.largest:
            raise ValueError(f"smallest {self.smallest} is over largest {self.largest}")
        return self

    def build(self) -> Path:
        """Write the dataset; returns its directory."""
        made_from = read_manifest(self.source)
        dataset = open_dataset(self.source, Preference)
        rows, root = list(dataset), dataset.media_root

        def work(records: list[Preference]) -> list[Outcome]:
            return [self._cropped(record, root) for record in records]

        run_job(
            rows,
            work,
            self.output,
            Preference,
            shard_rows=self.shard_rows,
            engine=self.engine,
            builder=self.name,
            builder_version=VERSION,
            config=self.model_dump(mode="json", exclude={"output"}),
            seed=self.seed,
            model={"source": made_from.content_hash},
            media_root=str(root),
        )
        return self.output

    def _cropped(self, record: Preference, root: Path) -> Outcome:
        if not record.images:
            return Outcome(id=record.id, reason="dropped:no_picture")
        rng = random.Random(f"{self.seed}/{record.id}")
        made: list[Media] = []
        boxes: list[tuple[int, int, int, int]] = []
        for media in record.images:
            picture = open_image(media, root)
            boxes.append(crop_box(picture, rng.uniform(self.smallest, self.largest), rng))
            made.append(embed(picture.crop(boxes[-1])))
        detail = json.loads(record.origin.detail or "{}") | {"crops": boxes}
        origin = replace(record.origin, detail=json.dumps(detail))
        cropped = replace(record, contrast_images=tuple(made), origin=origin)
        return Outcome(id=record.id, record=cropped, reason="accepted")


def crop_box(picture: Image, share: float, rng: random.Random) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a crop of this share of the area, in the picture's shape.

    At least one pixel; sides are rounded to whole pixels.
    """
    width = max(1, round(picture.width * math.sqrt(share)))
    height = max(1, round(picture.height * math.sqrt(share)))
    left, top = rng.randint(0, picture.width - width), rng.randint(0, picture.height - height)
    return left, top, left + width, top + height
