"""InternVL, Idefics3 and SmolVLM: pictures cut into tiles, each with as many tokens as any other.

Clips are not taken: to these models they are frames between texts with their times, which a run of
placeholders does not say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mmalign.errors import MediaError
from mmalign.models.families.base import Family, ImageInputs, linear_positions


def _processors_text(made: Mapping[str, Any], processor: Any) -> str:
    """A picture's placeholders and what stands between them, as its processor writes them."""
    return processor.replace_image_token(made, 0)


def _internvl_tiles(inputs: ImageInputs) -> int:
    return inputs["pixel_values"].shape[0]


def _internvl_tokens(inputs: ImageInputs, config: Any) -> int:
    """Of each tile, patches shuffled into fewer and deeper ones; the thumbnail is a tile too."""
    tiles, _, height, width = inputs["pixel_values"].shape
    patch_height, patch_width = config.vision_config.patch_size
    ratio = config.downsample_ratio
    return tiles * int(height // patch_height * ratio) * int(width // patch_width * ratio)


def _idefics_tokens(inputs: ImageInputs, config: Any) -> int:
    """Of each tile, patches shuffled into fewer and deeper ones; the whole picture is a tile too.

    Raises MediaError for a tile that is zero everywhere: the model takes such tiles for padding
    and makes no features of them. Checkpoints that scale pixels to -1..1 never have one, since no
    whole number from 0 to 255 becomes 0; one that does not subtract a mean has one where a picture
    is black.
    """
    pixels = inputs["pixel_values"]
    _, tiles, _, height, width = pixels.shape
    if not bool(pixels.flatten(2).any(-1).all()):
        raise MediaError(
            "a tile of a picture is 0 everywhere, which this family's models take for padding",
            fix="give the image processor an image_mean that no pixel value equals, such as 0.5",
        )
    patch = config.vision_config.patch_size
    return tiles * (height // patch) * (width // patch) // config.scale_factor**2


INTERNVL = Family(
    name="internvl",
    model_types=("internvl",),
    towers=(),
    vision="vision_tower",
    projector="multi_modal_projector",
    image_inputs=("pixel_values",),
    image_options={"crop_to_patches": True},
    num_image_tokens=_internvl_tokens,
    picture_text=_processors_text,
    markers=r"</?img>|<video>",
    num_pieces=_internvl_tiles,
    positions=linear_positions,
    # No token_pixels: tiles follow a picture's shape, and its size only between shapes as near.
)

# One entry would do for both but for the tests, which go through the entries: SmolVLM's processor
# and model are a copy of Idefics3's with changes.
IDEFICS3 = Family(
    name="idefics3",
    model_types=("idefics3",),
    towers=(),
    vision="vision_model",
    projector="connector",
    language_model="text_model",
    # Not pixel_attention_mask: every tile is a full square, so that the mask says nothing.
    image_inputs=("pixel_values",),
    image_options={"return_row_col_info": True},
    num_image_tokens=_idefics_tokens,
    picture_text=_processors_text,
    markers=r"<fake_token_around_image>|<global-img>|<row_\d+_col_\d+>|<video>",
    positions=linear_positions,
)
SMOLVLM = replace(IDEFICS3, name="smolvlm", model_types=("smolvlm",))
