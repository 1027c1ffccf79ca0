"""Which kind of recipe a file holds: told by the name of its loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from mmalign.losses.images import ImageLoss
from trainers.config import Recipe
from trainers.images.config import ImageRecipe

IMAGE_LOSSES = {kind.model_fields["name"].default for kind in get_args(get_args(ImageLoss)[0])}


def kind_of(data: Mapping[str, Any]) -> type[Recipe] | type[ImageRecipe]:
    """The recipe's class; that of text, whose errors name all losses, where nothing tells."""
    loss = data.get("loss")
    name = loss.get("name") if isinstance(loss, Mapping) else None
    return ImageRecipe if name in IMAGE_LOSSES else Recipe
