"""Qwen2.5-VL."""

from __future__ import annotations

from typing import Any

from mmalign.models.families.base import Family, ImageInputs, modality_types, mrope_positions


def _qwen_video_tokens(inputs: ImageInputs, config: Any) -> int:
    return int(inputs["video_grid_thw"].prod()) // config.vision_config.spatial_merge_size**2


def _qwen_tokens(inputs: ImageInputs, config: Any) -> int:
    return int(inputs["image_grid_thw"].prod()) // config.vision_config.spatial_merge_size**2


def _qwen_token_pixels(config: Any) -> int:
    return (config.vision_config.patch_size * config.vision_config.spatial_merge_size) ** 2


QWEN25VL = Family(
    name="qwen25vl",
    model_types=("qwen2_5_vl",),
    towers=(),
    vision="visual",
    projector="visual.merger",
    image_inputs=("pixel_values", "image_grid_thw"),
    num_image_tokens=_qwen_tokens,
    video_inputs=("pixel_values_videos", "video_grid_thw", "second_per_grid_ts"),
    num_video_tokens=_qwen_video_tokens,
    positions=mrope_positions,
    token_types=modality_types,
    token_pixels=_qwen_token_pixels,
)
