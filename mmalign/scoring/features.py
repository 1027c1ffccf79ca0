"""Features of pictures, apart from the model that made them and back into what it takes.

Everything that a frozen tower makes of a picture can be kept: the scorer then gives the model
features in the place of pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from mmalign.models.load import base_model
from mmalign.models.reward_head import head_of
from mmalign.scoring.candidates import Features


@dataclass
class _Encoded(ModelOutput):
    """A tower's output, as far as the models read it."""

    pooler_output: Any = None
    deepstack_features: Any = None


def features_of(encoded: Any) -> Features:
    """The features in what `get_image_features` made of one picture.

    Copies, so that they hold no more memory than their own.
    """
    pooled = encoded.pooler_output
    return split_features(encoded, [len(pooled)])[0]


def split_features(encoded: Any, num_pieces: Sequence[int]) -> list[Features]:
    """Each picture's features in what `get_image_features` made of several.

    num_pieces: rows of the tower's output that each picture takes, where they are one tensor.
    Copies, so that they hold no more memory than their own.
    """
    pooled = encoded.pooler_output
    if isinstance(pooled, Tensor):
        pooled = pooled.split(list(num_pieces))
    layers = encoded.get("deepstack_features") or ()
    deeper = zip(*layers, strict=True) if layers else [()] * len(pooled)
    return [
        Features(pooled=own.clone(), deeper=tuple(layer.clone() for layer in others))
        for own, others in zip(pooled, deeper, strict=True)
    ]


def joined_features(pictures: Sequence[Features]) -> Any:
    """Several pictures' features as `get_image_features` gives them for all at once."""
    pooled = [picture.pooled for picture in pictures]
    rows = pooled[0].dim() == 3
    deeper = list(zip(*(picture.deeper for picture in pictures), strict=True))
    return _Encoded(
        pooler_output=torch.cat(pooled) if rows else pooled,
        deepstack_features=[list(layer) for layer in deeper] or None,
    )


def without_pixels(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The processor's tensors without those that the tower alone reads."""
    return {name: value for name, value in inputs.items() if not name.startswith("pixel_values")}


def feature_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """All weights that may take part in a picture's features, by name.

    Those that lie outside the language model, its vocabulary projection and a reward head: beside
    tower and projector also LLaVA-NeXT's `image_newline`, which belongs to neither.
    """
    base = base_model(model)
    others = (base.get_decoder(), base.get_output_embeddings(), head_of(base))
    apart = {id(p) for module in others if module is not None for p in module.parameters()}
    return {name: p for name, p in base.named_parameters() if id(p) not in apart}
