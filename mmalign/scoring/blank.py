"""A no-op visual input: a black picture whose features count for nothing.

Where the tower's weights or gradients are spread over processes, each process waits for all others
whenever a layer of the tower runs. A process whose micro-batch has no picture therefore runs the
tower on a blank one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmalign.clips import Clip
from mmalign.encode import MediaEncoder
from mmalign.media import embed
from mmalign.prepare import Preparer

# About a patch: processors enlarge it to what they need.
SIDE_PIXELS = 32
# Qwen's towers take frames two by two.
NUM_FRAMES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Blank:
    """Processor tensors of a blank picture and of a blank clip; empty where none is needed."""

    images: dict[str, Tensor]
    videos: dict[str, Tensor]


NO_BLANK = Blank(images={}, videos={})


def blank_inputs(
    preparer: Preparer, *, images: bool, videos: bool, device: torch.device | str = "cpu"
) -> Blank:
    """A blank picture and a blank clip, where asked, as the checkpoint's processor makes them."""
    encoder = MediaEncoder(preparer.processor, preparer.config, preparer.family)
    picture = embed(Image.new("RGB", (SIDE_PIXELS, SIDE_PIXELS)))
    clip = Clip(
        frames=np.zeros((NUM_FRAMES, SIDE_PIXELS, SIDE_PIXELS, 3), dtype=np.uint8),
        indices=tuple(range(NUM_FRAMES)),
        timestamps=tuple(number / NUM_FRAMES for number in range(NUM_FRAMES)),
        source_fps=NUM_FRAMES,
        num_source_frames=NUM_FRAMES,
        duration_seconds=1.0,
        key="blank",
    )
    made = (
        encoder.image(picture, None, None).inputs if images else {},
        encoder.clip(clip, None, None, preparer.frames).inputs if videos else {},
    )
    moved = [{name: tensor.to(device) for name, tensor in inputs.items()} for inputs in made]
    return Blank(images=moved[0], videos=moved[1])


def image_features(body: Any, inputs: Mapping[str, Tensor]) -> Any:
    """The tower's output for processed pictures."""
    return body.get_image_features(**inputs, return_dict=True)


def video_features(body: Any, inputs: Mapping[str, Tensor]) -> Any:
    """The tower's output for processed clips; their time scale is read by positions alone."""
    seen = {name: tensor for name, tensor in inputs.items() if name != "second_per_grid_ts"}
    return body.get_video_features(**seen, return_dict=True)


def counted_as_nothing(encoded: Any) -> Tensor:
    """Zero, as a function of all features.

    Added to hidden states it changes neither them nor a gradient, but the backward pass runs
    through projector and tower.
    """
    deeper = encoded.get("deepstack_features")
    features = [*_flat(encoded.pooler_output), *(t for one in deeper or () for t in _flat(one))]
    return sum(0.0 * tensor.float().sum() for tensor in features)  # type: ignore[return-value]


def _flat(features: Any) -> list[Tensor]:
    return [features] if isinstance(features, torch.Tensor) else list(features)
