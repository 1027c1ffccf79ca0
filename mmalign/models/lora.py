"""Low-rank adapters: their settings, the layers they adapt, and a saved one put on its base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import NonNegativeFloat, PositiveInt

from mmalign.config import Strict
from mmalign.errors import ModelError
from mmalign.models.families import Family


class Lora(Strict):
    """Low-rank adapters on linear layers.

    targets: None for the family's (every one of the language model), names of the language model's
    layers such as [q_proj, v_proj], or a regular expression over the whole model's module names.
    """

    rank: PositiveInt = 64
    alpha: PositiveInt = 128
    dropout: NonNegativeFloat = 0.0
    targets: str | tuple[str, ...] | None = None


def lora_pattern(lora: Lora, family: Family) -> str:
    """The regular expression that a module's whole name must match to be adapted."""
    if lora.targets is None or isinstance(lora.targets, str):
        return lora.targets or family.lora_targets
    return family.language_layers(lora.targets)


def with_adapter(model: Any, adapter: str) -> Any:
    """The model with a saved adapter on it. Raises ModelError where a tensor finds no place."""
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    file = Path(adapter) / "adapter_model.safetensors"
    if not file.exists():
        raise ModelError("holds no adapter", where=adapter, wanted="adapter_model.safetensors")
    try:
        model = PeftModel.from_pretrained(model, adapter)
        with safe_open(file, "pt") as stored:
            names = set(stored.keys())
    except (RuntimeError, ValueError, KeyError) as error:
        raise ModelError(f"does not fit its base ({first_line(error)})", where=adapter) from error
    if odd := names ^ set(get_peft_model_state_dict(model)):
        raise ModelError(
            "does not fit its base: peft would skip some of it",
            where=adapter,
            got=f"{len(odd)} tensors without a place, {min(odd)} among them",
        )
    return model


def first_line(error: BaseException) -> str:
    """An error of another library in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
