"""Which kind of recipe a file holds: told by the name of its loss."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

from mmalign.config import apply_overrides, read_yaml, validate
from mmalign.errors import ConfigError
from mmalign.losses.images import ImageLoss
from trainers.config import Recipe
from trainers.images.config import ImageRecipe

IMAGE_LOSSES = {kind.model_fields["name"].default for kind in get_args(get_args(ImageLoss)[0])}


def kind_of(data: Mapping[str, Any]) -> type[Recipe] | type[ImageRecipe]:
    """The recipe's class; that of text, whose errors name its losses, where nothing tells."""
    loss = data.get("loss")
    name = loss.get("name") if isinstance(loss, Mapping) else None
    return ImageRecipe if name in IMAGE_LOSSES else Recipe


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe | ImageRecipe:
    """A recipe of either kind; see `load_config`."""
    data = apply_overrides(read_yaml(path), overrides, str(path))
    return validate(data, kind_of(data), str(path))


def load_text_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """A recipe over text. Raises ConfigError for one over images."""
    data = apply_overrides(read_yaml(path), overrides, str(path))
    if kind_of(data) is ImageRecipe:
        raise ConfigError(
            "is for text; a recipe over images encodes what it needs when it trains",
            where=str(path),
            got=f"loss.name={data['loss']['name']}",
            fix="start it with `mmalign train`",
        )
    recipe = validate(data, Recipe, str(path))
    if recipe.from_prompts:
        raise ConfigError(
            "is for responses that are there before training; those of rollouts are not",
            where=str(path),
            got="data.online.source.name=rollouts"
            if recipe.rollouts is None
            else f"loss.name={recipe.loss.name}",
            fix="start it with `mmalign train`",
        )
    return recipe
