"""Gemma 3 and PaliGemma."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mmalign.models.families.base import Family, ImageInputs, linear_positions

if TYPE_CHECKING:
    from torch import Tensor

# What PaliGemma's processor makes of a question by itself: pictures, <bos>, the question, a line
# break. An answer follows as it is. Prompts without a picture are rendered alike, though the
# processor takes none.
PALIGEMMA_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}"
    "{% for block in message['content'] if block['type'] == 'image' %}{{ '<image>' }}{% endfor %}"
    "{{ bos_token }}"
    "{% for block in message['content'] if block['type'] == 'text' %}"
    "{{ block['text'] }}{% endfor %}"
    "{{ '\n' }}"
    "{% else %}"
    "{% for block in message['content'] if block['type'] == 'text' %}"
    "{{ block['text'] }}{% endfor %}"
    "{% endif %}"
    "{% endfor %}"
)


def _gemma3_tokens(inputs: ImageInputs, config: Any) -> int:
    return config.mm_tokens_per_image


def _gemma3_text(made: Mapping[str, Any], processor: Any) -> str:
    """Line breaks, a start, one token for each feature, an end, line breaks."""
    return processor.full_image_sequence


def _picture_types(kinds: Tensor, is_response: Tensor) -> dict[str, Tensor]:
    """Gemma 3 asks which tokens are of a picture: 1, else 0."""
    return {"token_type_ids": (kinds == 1).int()}


def _paligemma_tokens(inputs: ImageInputs, config: Any) -> int:
    return (config.vision_config.image_size // config.vision_config.patch_size) ** 2


def _suffix_types(kinds: Tensor, is_response: Tensor) -> dict[str, Tensor]:
    """PaliGemma asks which tokens see only what precedes them: those of the response, 1."""
    return {"token_type_ids": is_response.int()}


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

PALIGEMMA = Family(
    name="paligemma",
    model_types=("paligemma",),
    towers=("siglip_vision_model",),
    # PaliGemma 2 is of the same model type. Its Gemma 2 caps attention scores and logits, and the
    # scorer does not.
    texts=("gemma",),
    vision="vision_tower",
    projector="multi_modal_projector",
    image_inputs=("pixel_values",),
    num_image_tokens=_paligemma_tokens,
    chat_template=PALIGEMMA_TEMPLATE,
    positions=linear_positions,
    first_position=1,
    prompt_attention="bidirectional",
    token_types=_suffix_types,
)
