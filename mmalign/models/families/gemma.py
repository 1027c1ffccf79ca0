"""Gemma 3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mmalign.models.families.base import Family, ImageInputs, linear_positions

if TYPE_CHECKING:
    from torch import Tensor


def _gemma3_tokens(inputs: ImageInputs, config: Any) -> int:
    return config.mm_tokens_per_image


def _gemma3_text(made: Mapping[str, Any], processor: Any) -> str:
    """Line breaks, a start, one token for each feature, an end, line breaks."""
    return processor.full_image_sequence


def _picture_types(kinds: Tensor, is_response: Tensor) -> dict[str, Tensor]:
    """Gemma 3 asks which tokens are of a picture: 1, else 0."""
    return {"token_type_ids": (kinds == 1).int()}


GEMMA3 = Family(
    name="gemma3",
    model_types=("gemma3",),
    towers=("siglip_vision_model",),
    vision="vision_tower",
    projector="multi_modal_projector",
    image_inputs=("pixel_values",),
    # Pan and scan would add crops of a wide picture. Gemma 3's processor keeps it off, whatever the
    # image processor's config says.
    image_options={"do_pan_and_scan": False},
    num_image_tokens=_gemma3_tokens,
    picture_text=_gemma3_text,
    positions=linear_positions,
    prompt_attention="picture_blocks",
    token_types=_picture_types,
)
