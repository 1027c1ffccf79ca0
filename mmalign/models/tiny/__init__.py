"""Small models from scratch: real architectures and processors, saved like any checkpoint.

Tests, the quickstart and the lab build them, so that the loading code is the one users run.
Nothing is downloaded: weights are random and the tokenizer is made from a word list or from bytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import PositiveInt, model_validator

from mmalign.config import Strict
from mmalign.errors import ModelError
from mmalign.log import quiet_libraries
from mmalign.models.tiny.gemma import gemma3, paligemma
from mmalign.models.tiny.llava import llava15, llava_next, llava_onevision
from mmalign.models.tiny.qwen import qwen2vl, qwen3vl, qwen25vl
from mmalign.models.tiny.tiles import idefics3, internvl, smolvlm
from mmalign.store import write_atomically

# Written last: the settings that a folder's model was made from.
RECIPE = "made_from.json"


class Tower(Strict):
    """Sizes of one transformer."""

    hidden: PositiveInt = 64
    layers: PositiveInt = 2
    heads: PositiveInt = 4
    mlp: PositiveInt = 128


class TinyModel(Strict):
    """A small vision-language model to be made from scratch.

    words: the vocabulary of a one-word-one-token tokenizer; None gives one token per byte, which
        reads any text.
    patch_size: pixels; 8, or 4 in families that merge neighbouring patches into one token.
    pixel_mean, pixel_std: what the image processor subtracts and divides by, after scaling to 0..1.
    """

    output: str
    family: Literal[
        "llava15",
        "llava_next",
        "llava_onevision",
        "qwen2vl",
        "qwen25vl",
        "qwen3vl",
        "gemma3",
        "paligemma",
        "internvl",
        "idefics3",
        "smolvlm",
    ] = "llava15"
    seed: int = 0
    words: tuple[str, ...] | None = None
    image_size: PositiveInt = 32
    patch_size: PositiveInt = 8
    vision: Tower = Tower()
    text: Tower = Tower(layers=3)
    max_tokens: PositiveInt = 4096
    pixel_mean: float = 0.5
    pixel_std: float = 0.5

    @model_validator(mode="before")
    @classmethod
    def _patch_of_family(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("patch_size") is None:
            small = values.get("family") in _MERGING
            values = {**values, "patch_size": 4 if small else 8}
        return values

    @model_validator(mode="after")
    def _heads_fit(self) -> TinyModel:
        head = self.text.hidden // self.text.heads
        if self.family in ("qwen2vl", "qwen25vl") and head % 16:
            raise ValueError(f"{self.family} needs heads of a multiple of 16 wide, not {head}")
        return self

    def build(self) -> Path:
        """Make the model and its processor, save both, and return the folder.

        A folder that holds this very model is left alone. Raises ModelError where it holds another.
        """
        import torch

        path = Path(self.output)
        recipe = self.model_dump_json(exclude={"output"}, indent=2)
        if (path / RECIPE).exists():
            if (path / RECIPE).read_text() == recipe:
                return path
            raise ModelError(
                "holds a model made from other settings",
                where=str(path),
                fix="choose another output, or delete the folder",
            )
        quiet_libraries()
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            model, processor = _MAKE[self.family](self)
            _reset(model)
        path.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(path)
        processor.save_pretrained(path)
        write_atomically(path / RECIPE, recipe)
        return path


def _reset(model: Any) -> None:
    """Xavier for every matrix: transformers' 0.02 learns slowly in a model this small."""
    import torch

    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2 and "embed" not in name:
            torch.nn.init.xavier_uniform_(parameter.data.view(parameter.shape[0], -1))


_MAKE = {
    "llava15": llava15,
    "llava_next": llava_next,
    "llava_onevision": llava_onevision,
    "qwen2vl": qwen2vl,
    "qwen25vl": qwen25vl,
    "qwen3vl": qwen3vl,
    "gemma3": gemma3,
    "paligemma": paligemma,
    "internvl": internvl,
    "idefics3": idefics3,
    "smolvlm": smolvlm,
}

# Families in which two by two patches become one token.
_MERGING = ("qwen2vl", "qwen25vl", "qwen3vl", "gemma3", "internvl", "idefics3", "smolvlm")
