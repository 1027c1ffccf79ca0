"""From a picture of any size to the square that a model sees, and what SDXL is told of it.

Both pictures of a pair are flipped together and cropped at the same place, as a share of the room
that each has, so that pictures of one size are cut alike to the pixel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """How a pair is framed. left, top: where the crop begins, as shares of the room, in [0, 1]."""

    left: float = 0.5
    top: float = 0.5
    flip: bool = False


def frames_of(
    *, flip: bool, random_crops: int | None, generator: torch.Generator
) -> tuple[Frame, ...]:
    """The frames that a row is seen in during training, drawn once so that they can be cached.

    Centred crops by default; `random_crops` of them at random places. With `flip`, each stands
    there twice, flipped and not, so that a flip has its exact probability of one half.
    """
    crops = [Frame()]
    if random_crops is not None:
        places = torch.rand(random_crops, 2, generator=generator).tolist()
        crops = [Frame(left=left, top=top) for left, top in places]
    if not flip:
        return tuple(crops)
    flipped = [Frame(left=crop.left, top=crop.top, flip=True) for crop in crops]
    return (*crops, *flipped)


def framed(picture: Image, frame: Frame, resolution: int) -> tuple[Tensor, Tensor]:
    """A picture's square pixels and SDXL's size conditioning.

    Returns [3, R, R] float32 in [-1, 1], R the resolution, and [6] float32: original height and
    width, top and left of the crop after resizing, and R twice. The shorter side is resized to R.
    A flip leaves the crop's place as it is, as in the released code.
    """
    from PIL import Image

    width, height = picture.size
    shorter = min(width, height)
    size = (
        max(resolution, round(width * resolution / shorter)),
        max(resolution, round(height * resolution / shorter)),
    )
    # The filter looks at a wider surrounding where it shrinks, so nothing is aliased.
    resized = picture if size == picture.size else picture.resize(size, Image.Resampling.LANCZOS)
    left = round(frame.left * (size[0] - resolution))
    top = round(frame.top * (size[1] - resolution))
    cut = np.asarray(resized.crop((left, top, left + resolution, top + resolution)))
    pixels = torch.from_numpy(cut.copy()).permute(2, 0, 1).float() / 127.5 - 1
    if frame.flip:
        pixels = pixels.flip(-1)
    told = [height, width, top, left, resolution, resolution]
    return pixels.contiguous(), torch.tensor(told, dtype=torch.float32)
