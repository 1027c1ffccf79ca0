"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmalign.models.families.base import (
    Family,
    ImageInputs,
    modality_types,
    mrope_positions,
    mrope_positions_by_frame,
)


def _qwen_video_tokens(inputs: ImageInputs, config: Any) -> int:
    return int(inputs["video_grid_thw"].prod()) // config.vision_config.spatial_merge_size**2


def _qwen_tokens(inputs: ImageInputs, config: Any) -> int:
    return int(inputs["image_grid_thw"].prod()) // config.vision_config.spatial_merge_size**2


def _qwen_token_pixels(config: Any) -> int:
    return (config.vision_config.patch_size * config.vision_config.spatial_merge_size) ** 2


def _timed_frames(made: Mapping[str, Any], processor: Any) -> str:
    """Every frame by itself, after its time in seconds."""
    return processor.replace_video_token(made, 0)


QWEN2VL = Family(
    name="qwen2vl",
    model_types=("qwen2_vl",),
    towers=(),
    vision="visual",
    projector="visual.merger",
    image_inputs=("pixel_values", "image_grid_thw"),
    num_image_tokens=_qwen_tokens,
    video_inputs=("pixel_values_videos", "video_grid_thw"),
    num_video_tokens=_qwen_video_tokens,
    positions=mrope_positions,
    token_types=modality_types,
    token_pixels=_qwen_token_pixels,
)

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

QWEN3VL = Family(
    name="qwen3vl",
    model_types=("qwen3_vl",),
    towers=(),
    vision="visual",
    # Its DeepStack mergers, visual.deepstack_merger_list, count as vision.
    projector="visual.merger",
    image_inputs=("pixel_values", "image_grid_thw"),
    num_image_tokens=_qwen_tokens,
    video_inputs=("pixel_values_videos", "video_grid_thw"),
    num_video_tokens=_qwen_video_tokens,
    video_text=_timed_frames,
    positions=mrope_positions_by_frame,
    token_types=modality_types,
    token_pixels=_qwen_token_pixels,
)
