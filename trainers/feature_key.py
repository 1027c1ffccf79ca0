"""What pictures' features depend on, and whether they may be stored at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from mmalign.errors import TrainingError
from mmalign.models.load import Policy, base_model, resolve_adapter
from mmalign.scoring.features import feature_parameters
from trainers.config import Recipe
from trainers.reference_key import LOADING, digest_of, place_of, tensors_hash, without

# Parts of a model's config that no picture's features depend on.
LANGUAGE = {"text_config", "quantization_config"}


def features_folder(recipe: Recipe) -> Path:
    """Where the features lie: in `features.folder`, by default beside the dataset."""
    assert recipe.features is not None
    found = features_address(recipe)
    root = recipe.features.folder or recipe.data.path / "features"
    name = "-".join(Path(found["adapter"] or found["model"]).parts[-2:])
    return root / f"{name}-{digest_of(found)[:8]}"


def features_address(recipe: Recipe) -> dict[str, Any]:
    """What has a folder of its own: the model by name."""
    path, adapter = resolve_adapter(recipe.model)
    return {
        "model": place_of(path),
        "revision": recipe.model.revision,
        "adapter": None if adapter is None else place_of(adapter),
    }


def features_key(recipe: Recipe, policy: Policy) -> dict[str, Any]:
    """All that features depend on, but for the pictures, which are told apart one by one.

    Takes the policy as it was loaded, whole.
    """
    weights = feature_parameters(policy.model)
    if pieces := [name for name, parameter in weights.items() if parameter.numel() == 0]:
        raise TrainingError(
            "the weights are in pieces, so that stored features cannot be told to be theirs",
            got=f"{pieces[0]}, empty on this process",
            fix="drop features, or use no ZeRO-3",
        )
    found = {
        "weights of tower and projector": tensors_hash(weights),
        "model.config": without(base_model(policy.model).config.to_diff_dict(), LOADING | LANGUAGE),
        "model.dtype": sorted({str(p.dtype).removeprefix("torch.") for p in weights.values()}),
        "run.precision": recipe.run.precision,
        "image processor": policy.processor.image_processor.to_dict(),
        "model.max_pixels": recipe.model.max_pixels,
    }
    return json.loads(json.dumps(found, default=str))


def check_frozen(policy: Policy) -> None:
    """Raise TrainingError where a weight that features depend on trains, or has an adapter.

    Policy and reference may then use the same features: with its adapter off the model has the
    same tower, a copy of the initial policy has it too, and training never changes it.
    """
    weights = feature_parameters(policy.model)
    moving = [name for name, p in weights.items() if p.requires_grad]
    moving += [name for name in weights if "lora_" in name or "modules_to_save" in name]
    if moving:
        raise TrainingError(
            "features can be stored only where everything that makes them stays as it is",
            got=f"{len(moving)} weights that train, such as {moving[0]}",
            fix="train a LoRA adapter of the language model alone, or drop features",
        )


def same_tower(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    """Whether two models make the same features of a picture, by their weights."""
    here, there = feature_parameters(one), feature_parameters(other)
    return here.keys() == there.keys() and all(torch.equal(here[n], there[n]) for n in here)
