"""Model families: the few facts about each that transformers does not tell. One entry each.

A new family is one `Family` value in FAMILIES; tests/mmalign/scoring runs every entry through both
layouts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmalign.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

ImageInputs = Mapping[str, "Tensor"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What the library must know of one family of vision-language models.

    towers: vision architectures under which the other facts hold; empty for the family's own one.
    vision, projector: module paths under the multimodal body (`model.model`), for freezing and
        for the parameter table; everything else counts as language model.
    image_inputs, video_inputs: what the processor makes of a picture and of a clip; no
        video_inputs where the family takes no clips.
    num_image_tokens, num_video_tokens: placeholder tokens of one processed picture or clip, from
        its own inputs.
    positions: position ids [A, S] of a prompt (A axes: 1, or 3 for M-RoPE).
    token_pixels: pixels that one image token stands for, where a smaller picture gives fewer
        tokens; None where every picture gives as many.
    lora_targets: regular expression of the linear layers that LoRA adapts by default: those of the
        language model; the vision tower and the projector stay as they are.
    max_images: most pictures in one prompt; None for any number.
    """

    name: str
    model_types: tuple[str, ...]
    towers: tuple[str, ...]
    vision: str
    projector: str
    image_inputs: tuple[str, ...]
    num_image_tokens: Callable[[ImageInputs, Any], int]
    video_inputs: tuple[str, ...]
    num_video_tokens: Callable[[ImageInputs, Any], int] | None
    positions: Callable[[Tensor, list[ImageInputs], list[ImageInputs], Any], Tensor]
    token_pixels: Callable[[Any], int] | None
    lora_targets: str
    max_images: int | None = None

    @property
    def num_axes(self) -> int:
        """Rows of the position ids: 3 for M-RoPE, else 1."""
        return 3 if self.positions is mrope_positions else 1


def family_of(config: Any) -> Family:
    """The entry for a transformers config. Raises ModelError naming the known families."""
    for family in FAMILIES:
        if config.model_type in family.model_types and (
            not family.towers or config.vision_config.model_type in family.towers
        ):
            return family
    known = ", ".join(t for family in FAMILIES for t in family.model_types)
    raise ModelError(
        "this model family is not supported yet",
        got=f"model_type {config.model_type}, "
        f"vision {getattr(getattr(config, 'vision_config', None), 'model_type', None)}",
        wanted=known,
        fix="add one entry to mmalign/models/families.py (see CONTRIBUTING.md)",
    )


def linear_positions(
    prompt_ids: Tensor, images: list[ImageInputs], videos: list[ImageInputs], config: Any
) -> Tensor:
    """0, 1, 2, …: [1, S] int64."""
    import torch

    return torch.arange(len(prompt_ids))[None]


def mrope_positions(
    prompt_ids: Tensor, images: list[ImageInputs], videos: list[ImageInputs], config: Any
) -> Tensor:
    """Multimodal rotary positions of a prompt: time, height and width of each token, [3, S] int64.

    Text advances all three axes by one. An image of t x h x w merged patches starts at the next
    free position p: its tokens get (p + time, p + row, p + column), and text resumes at
    p + max(h, w) (Qwen2-VL, arXiv 2409.12191, section 2.1). A clip's time advances by
    tokens_per_second * (seconds per temporal patch), each time cut to a whole number (Qwen2.5-VL,
    arXiv 2502.13923, section 2.1.3). Equal to transformers' get_rope_index; ours runs where batches
    are made, without the model.
    """
    import torch

    merge = config.vision_config.spatial_merge_size
    kinds = (prompt_ids == config.image_token_id) + 2 * (prompt_ids == config.video_token_id)
    result = torch.empty(3, len(prompt_ids), dtype=torch.long)
    index = position = 0
    pictures, clips = iter(images), iter(videos)
    while index < len(prompt_ids):
        if kinds[index] == 0:
            result[:, index] = position
            index, position = index + 1, position + 1
            continue
        if kinds[index] == 1:
            grid_thw, pace = next(pictures)["image_grid_thw"][0], 1
        else:
            clip = next(clips)
            grid_thw = clip["video_grid_thw"][0]
            pace = config.vision_config.tokens_per_second * float(clip["second_per_grid_ts"][0])
        time, height, width = grid_thw.tolist()
        height, width = height // merge, width // merge
        grid = torch.cartesian_prod(
            (torch.arange(time) * pace).long(), torch.arange(height), torch.arange(width)
        ).reshape(-1, 3)
        result[:, index : index + len(grid)] = position + grid.T
        index, position = index + len(grid), position + max(height, width)
    return result


def _onevision_tokens(inputs: ImageInputs, config: Any) -> int:
    """The base view, and the tiles of the best resolution with one newline for each row of them.

    As LlavaOnevisionModel.pack_image_features puts them together: padding of the picture's shape
    is cut off, and more than `vision_aspect_ratio` tiles are shrunk.
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
    most = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))
    ratio = (rows * columns / (most * side**2)) ** 0.5
    if ratio > 1.1:
        rows, columns = int(rows // ratio), int(columns // ratio)
    return side**2 + rows * columns + rows


def _onevision_video_tokens(inputs: ImageInputs, config: Any) -> int:
    """Each frame pooled two by two, and one newline for the clip."""
    side = config.vision_config.image_size // config.vision_config.patch_size
    return inputs["pixel_values_videos"].shape[1] * (-(-side // 2)) ** 2 + 1


def _qwen_video_tokens(inputs: ImageInputs, config: Any) -> int:
    return int(inputs["video_grid_thw"].prod()) // config.vision_config.spatial_merge_size**2


def _llava_tokens(inputs: ImageInputs, config: Any) -> int:
    height, width = inputs["pixel_values"].shape[-2:]
    patch = config.vision_config.patch_size
    whole = config.vision_feature_select_strategy == "full"
    return (height // patch) * (width // patch) + int(whole)


def _qwen_tokens(inputs: ImageInputs, config: Any) -> int:
    return int(inputs["image_grid_thw"].prod()) // config.vision_config.spatial_merge_size**2


def _qwen_token_pixels(config: Any) -> int:
    return (config.vision_config.patch_size * config.vision_config.spatial_merge_size) ** 2


_ATTENTION_AND_MLP = r"(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"

FAMILIES = (
    Family(
        name="llava15",
        model_types=("llava",),
        towers=("clip_vision_model",),
        vision="vision_tower",
        projector="multi_modal_projector",
        image_inputs=("pixel_values",),
        num_image_tokens=_llava_tokens,
        video_inputs=(),
        num_video_tokens=None,
        positions=linear_positions,
        token_pixels=None,
        lora_targets=rf".*language_model.*\.{_ATTENTION_AND_MLP}",
    ),
    Family(
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
        token_pixels=_qwen_token_pixels,
        lora_targets=rf".*language_model.*\.{_ATTENTION_AND_MLP}",
    ),
    Family(
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
        token_pixels=None,
        lora_targets=rf".*language_model.*\.{_ATTENTION_AND_MLP}",
        # With several pictures, this family's processor gives up the tiles of each.
        max_images=1,
    ),
)
