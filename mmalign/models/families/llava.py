"""LLaVA-1.5, LLaVA-NeXT and LLaVA-OneVision."""

from __future__ import annotations

from typing import Any

from mmalign.models.families.base import Family, ImageInputs, linear_positions


def _llava_tokens(inputs: ImageInputs, config: Any) -> int:
    height, width = inputs["pixel_values"].shape[-2:]
    patch = config.vision_config.patch_size
    whole = config.vision_feature_select_strategy == "full"
    return (height // patch) * (width // patch) + int(whole)


def _tile_grid(inputs: ImageInputs, config: Any) -> tuple[int, int]:
    """Rows and columns of patches of a picture's tiles, the padding of its shape cut off.

    As `unpad_image` of transformers cuts it; the tiles are those of the best resolution.
    """
    from transformers.image_processing_utils import select_best_resolution

    side = config.vision_config.image_size // config.vision_config.patch_size
    height, width = inputs["image_sizes"][0].tolist()
    best = select_best_resolution((height, width), config.image_grid_pinpoints)
    rows, columns = (n // config.vision_config.image_size * side for n in best)
    if width / height > columns / rows:
        rows -= (rows - int(round(height * (columns / width), 7))) // 2 * 2
    else:
        columns -= (columns - int(round(width * (rows / height), 7))) // 2 * 2
    return rows, columns


def _next_tokens(inputs: ImageInputs, config: Any) -> int:
    """The base view, and the tiles with one newline for each row of their patches."""
    side = config.vision_config.image_size // config.vision_config.patch_size
    rows, columns = _tile_grid(inputs, config)
    return side**2 + rows * columns + rows


def _onevision_tokens(inputs: ImageInputs, config: Any) -> int:
    """As LLaVA-NeXT's, but tiles of more than `vision_aspect_ratio` views are shrunk."""
    side = config.vision_config.image_size // config.vision_config.patch_size
    rows, columns = _tile_grid(inputs, config)
    most = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))
    ratio = (rows * columns / (most * side**2)) ** 0.5
    if ratio > 1.1:
        rows, columns = int(rows // ratio), int(columns // ratio)
    return side**2 + rows * columns + rows


def _onevision_video_tokens(inputs: ImageInputs, config: Any) -> int:
    """Each frame pooled two by two, and one newline for the clip."""
    side = config.vision_config.image_size // config.vision_config.patch_size
    return inputs["pixel_values_videos"].shape[1] * (-(-side // 2)) ** 2 + 1


LLAVA15 = Family(
    name="llava15",
    model_types=("llava",),
    towers=("clip_vision_model",),
    vision="vision_tower",
    projector="multi_modal_projector",
    image_inputs=("pixel_values",),
    num_image_tokens=_llava_tokens,
    positions=linear_positions,
)

LLAVA_NEXT = Family(
    name="llava_next",
    model_types=("llava_next",),
    towers=("clip_vision_model",),
    vision="vision_tower",
    projector="multi_modal_projector",
    image_inputs=("pixel_values", "image_sizes"),
    num_image_tokens=_next_tokens,
    positions=linear_positions,
)

LLAVA_ONEVISION = Family(
    name="llava_onevision",
    model_types=("llava_onevision",),
    towers=("siglip_vision_model",),
    vision="vision_tower",
    projector="multi_modal_projector",
    image_inputs=("pixel_values", "image_sizes"),
    num_image_tokens=_onevision_tokens,
    video_inputs=("pixel_values_videos",),
    num_video_tokens=_onevision_video_tokens,
    positions=linear_positions,
    # With several pictures, this family's processor gives up the tiles of each.
    max_images=1,
)
