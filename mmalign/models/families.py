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
    num_image_tokens: placeholder tokens of one processed image, from its own inputs.
    positions: position ids [A, S] of a prompt (A axes: 1, or 3 for M-RoPE).
    token_pixels: pixels that one image token stands for, where a smaller picture gives fewer
        tokens; None where every picture gives as many.
    lora_targets: regular expression of the linear layers that LoRA adapts by default: those of the
        language model; the vision tower and the projector stay as they are.
    """

    name: str
    model_types: tuple[str, ...]
    towers: tuple[str, ...]
    vision: str
    projector: str
    image_inputs: tuple[str, ...]
    num_image_tokens: Callable[[ImageInputs, Any], int]
    positions: Callable[[Tensor, list[ImageInputs], Any], Tensor]
    token_pixels: Callable[[Any], int] | None
    lora_targets: str

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


def linear_positions(prompt_ids: Tensor, images: list[ImageInputs], config: Any) -> Tensor:
    """0, 1, 2, …: [1, S] int64."""
    import torch

    return torch.arange(len(prompt_ids))[None]


def mrope_positions(prompt_ids: Tensor, images: list[ImageInputs], config: Any) -> Tensor:
    """Multimodal rotary positions of a prompt: time, height and width of each token, [3, S] int64.

    Text advances all three axes by one. An image of t x h x w merged patches starts at the next
    free position p: its tokens get (p + time, p + row, p + column), and text resumes at
    p + max(h, w) (Qwen2-VL, arXiv 2409.12191, section 2.1). Equal to transformers' get_rope_index;
    ours runs where batches are made, without the model.
    """
    import torch

    merge = config.vision_config.spatial_merge_size
    is_image = prompt_ids == config.image_token_id
    result = torch.empty(3, len(prompt_ids), dtype=torch.long)
    index = position = 0
    grids = iter(images)
    while index < len(prompt_ids):
        if not is_image[index]:
            result[:, index] = position
            index, position = index + 1, position + 1
            continue
        time, height, width = next(grids)["image_grid_thw"][0].tolist()
        height, width = height // merge, width // merge
        grid = torch.cartesian_prod(
            torch.arange(time), torch.arange(height), torch.arange(width)
        ).reshape(-1, 3)
        result[:, index : index + len(grid)] = position + grid.T
        index, position = index + len(grid), position + max(height, width)
    return result


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
        positions=mrope_positions,
        token_pixels=_qwen_token_pixels,
        lora_targets=rf".*language_model.*\.{_ATTENTION_AND_MLP}",
    ),
)
