"""The recipe of a training run over images."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from mmalign.config import Strict
from mmalign.diffusion.config import DiffusionConfig
from mmalign.losses.base import Need
from mmalign.losses.images import ImageLoss
from trainers.config import OptimConfig, RunConfig


class ImageDataConfig(Strict):
    """Which dataset of image preferences, and how its pictures are framed.

    resolution: side of the square that is cut from each picture, shorter side first.
    flip: see each row flipped half of the time. random_crops: cut at that many places, drawn once
    for each row, in place of the centre.
    limit: use only the first so many rows that can be trained on.
    encoded: where latents and prompts are stored; null: in `encoded/` of the dataset's folder.
    """

    path: Path
    resolution: PositiveInt
    flip: bool = True
    random_crops: PositiveInt | None = None
    limit: PositiveInt | None = None
    encoded: Path | None = None


class DenoiserConfig(Strict):
    """How images are scored.

    min_snr_gamma: weighs errors by their timestep (arXiv 2303.09556). sample: whether a latent is
    drawn from the VAE's distribution anew at each step, as in the released code, or is its mean.
    """

    min_snr_gamma: PositiveFloat | None = None
    sample: bool = True


class EmaConfig(Strict):
    """A running average of the weights that train, which is then what is saved and shown."""

    decay: float = Field(default=0.9999, ge=0, lt=1)


class ValidationConfig(Strict):
    """Pictures to look at, drawn of these prompts before training, at intervals and at the end.

    The noise is the same every time. guidance: 1 and less is without. An empty negative_prompt is
    what the pipeline does when it is given none. None of these changes a weight.
    """

    every_steps: PositiveInt = 500
    prompts: tuple[str, ...] = Field(min_length=1)
    num_steps: PositiveInt = 25
    guidance: NonNegativeFloat = 5.0
    seed: NonNegativeInt = 0
    negative_prompt: str = ""


class ImageRecipe(Strict):
    """One training run over images. `reference` is what `diffusion_dpo` compares the policy with:

    adapter_off: the same weights with the LoRA adapter off; costs no memory.
    frozen_copy: a second copy of the initial backbone.
    auto: adapter_off with LoRA, else frozen_copy.
    """

    model: DiffusionConfig
    data: ImageDataConfig
    loss: ImageLoss
    reference: Literal["auto", "adapter_off", "frozen_copy"] = "auto"
    denoiser: DenoiserConfig = DenoiserConfig()
    ema: EmaConfig | None = None
    validation: ValidationConfig | None = None
    optim: OptimConfig
    run: RunConfig

    @model_validator(mode="after")
    def _fits_together(self) -> ImageRecipe:
        if self.reference == "adapter_off" and self.model.lora is None:
            raise ValueError(
                "reference=adapter_off needs an adapter to switch off, and model.lora is not set; "
                "use frozen_copy"
            )
        if self.model.dtype != "float32" and self.run.precision == "float32":
            raise ValueError(
                f"model.dtype={self.model.dtype} keeps weights in 16 bits, which are computed with "
                "in 16 bits: set run.precision=bf16 or fp16, or model.dtype=float32"
            )
        return self

    def reference_kind(self) -> Literal["none", "adapter_off", "frozen_copy"]:
        """`reference` with auto decided; none where the loss reads none."""
        if Need.REFERENCE not in self.loss.needs:
            return "none"
        if self.reference == "auto":
            return "frozen_copy" if self.model.lora is None else "adapter_off"
        return self.reference
