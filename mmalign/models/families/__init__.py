"""Model families: the few facts about each that transformers does not tell. One entry each.

A new family is one `Family` value in FAMILIES; tests/mmalign/scoring runs every entry through both
layouts.
"""

from __future__ import annotations

from typing import Any

from mmalign.errors import ModelError
from mmalign.models.families.base import (
    Family,
    ImageInputs,
    linear_positions,
    mrope_positions,
)
from mmalign.models.families.gemma import GEMMA3, PALIGEMMA
from mmalign.models.families.llava import LLAVA15, LLAVA_NEXT, LLAVA_ONEVISION
from mmalign.models.families.qwen import QWEN2VL, QWEN3VL, QWEN25VL
from mmalign.models.families.tiles import IDEFICS3, INTERNVL, SMOLVLM

__all__ = [
    "FAMILIES",
    "Family",
    "ImageInputs",
    "family_of",
    "linear_positions",
    "mrope_positions",
]

FAMILIES = (
    LLAVA15,
    LLAVA_NEXT,
    LLAVA_ONEVISION,
    QWEN2VL,
    QWEN25VL,
    QWEN3VL,
    GEMMA3,
    PALIGEMMA,
    INTERNVL,
    IDEFICS3,
    SMOLVLM,
)


def family_of(config: Any) -> Family:
    """The entry for a transformers config. Raises ModelError naming the known families."""
    for family in FAMILIES:
        if (
            config.model_type in family.model_types
            and (not family.towers or config.vision_config.model_type in family.towers)
            and (not family.texts or config.text_config.model_type in family.texts)
        ):
            return family
    known = ", ".join(t for family in FAMILIES for t in family.model_types)
    raise ModelError(
        "this model family is not supported yet",
        got=f"model_type {config.model_type}, "
        f"vision {getattr(getattr(config, 'vision_config', None), 'model_type', None)}, "
        f"text {getattr(getattr(config, 'text_config', None), 'model_type', None)}",
        wanted=known,
        fix="add one entry to mmalign/models/families (see CONTRIBUTING.md)",
    )
