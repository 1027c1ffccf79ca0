"""Every picture of a source with its nearest neighbours: what Re-Align retrieves from."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import Field

from data_builders.base import Source
from mmalign.config import Strict
from mmalign.errors import MediaError
from mmalign.log import progress
from mmalign.media import media_key, open_image, read_bytes
from mmalign.records import Media
from mmalign.retrieval import (
    FeatureSource,
    ImageEncoder,
    Index,
    Neighbour,
    OpenClipEncoder,
    PolicyVisionEncoder,
    neighbours,
)

if TYPE_CHECKING:
    from PIL.Image import Image

ENCODE_AT_ONCE = 32


class OpenClip(Strict):
    """Retrieve by an open_clip model. `pretrained: null`, random weights, must be written out."""

    name: Literal["open_clip"] = "open_clip"
    model: str = "ViT-L-14-quickgelu"
    pretrained: str | None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"

    def load(self, policy: FeatureSource) -> ImageEncoder:
        """Load the encoder, onto the GPU if there is one."""
        return OpenClipEncoder(self.model, pretrained=self.pretrained, precision=self.precision)


class PolicyVision(Strict):
    """Retrieve by what the policy sees, as the paper's text says."""

    name: Literal["policy"] = "policy"

    def load(self, policy: FeatureSource) -> ImageEncoder:
        """The policy is loaded already."""
        return PolicyVisionEncoder(policy)


Encoder = Annotated[OpenClip | PolicyVision, Field(discriminator="name")]


@dataclass(frozen=True)
class Gallery:
    """Every readable picture of the source, and its neighbours, nearest first."""

    pictures: list[Media]
    near: list[list[Neighbour]]
    row: dict[str, int]
    unreadable: dict[str, str]


def make_gallery(
    source: Source, encoder: ImageEncoder, k: int, *, near_duplicate: float, index: Index
) -> Gallery:
    """Embed every picture once and find its neighbours; unreadable ones stand aside."""
    found = {media_key(media): media for e in source.examples for media in e.images}
    pictures: list[Media] = []
    rows: list[np.ndarray] = []
    unreadable: dict[str, str] = {}
    items = list(found.items())
    batches = [items[i : i + ENCODE_AT_ONCE] for i in range(0, len(items), ENCODE_AT_ONCE)]
    with ThreadPoolExecutor() as pool:
        for batch in progress(batches, label=f"embedding {len(found)} pictures, in batches"):
            opened = pool.map(partial(_open, media_root=source.media_root), [m for _, m in batch])
            images: list[Image] = []
            for (key, _), result in zip(batch, opened, strict=True):
                if isinstance(result, MediaError):
                    unreadable[key] = str(result)
                else:
                    pictures.append(result[0])
                    images.append(result[1])
            if images:
                rows.append(encoder.encode(images))
    near = neighbours(
        np.concatenate(rows) if rows else np.zeros((0, 1), np.float32),
        k,
        index=index,
        near_duplicate=near_duplicate,
        keys=[picture.sha256 or "" for picture in pictures],
    )
    readable = [key for key in found if key not in unreadable]
    row = {key: number for number, key in enumerate(readable)}
    return Gallery(pictures, near, row, unreadable)


def _open(media: Media, media_root: Path) -> tuple[Media, Image] | MediaError:
    """The picture, and its media with the hash of the file."""
    try:
        data = read_bytes(media, media_root)
        image = open_image(replace(media, bytes=data))
    except MediaError as error:
        return error
    return replace(media, sha256=hashlib.sha256(data).hexdigest()), image
