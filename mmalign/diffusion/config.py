"""Where a diffusion pipeline comes from, as recipes say it. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt

from mmalign.config import Strict

BackboneAttention = Literal["auto", "sdpa", "flash", "xformers"]
Dtype = Literal["float32", "bfloat16", "float16"]


class ImageLora(Strict):
    """A low-rank adapter on the backbone's attention; scaled by alpha / rank, alpha = rank if None.

    targets: None for the backbone's own (query, key, value and output projections).
    """

    rank: PositiveInt = 8
    alpha: PositiveInt | None = None
    targets: tuple[str, ...] | None = None


class DiffusionConfig(Strict):
    """Where a diffusion pipeline comes from and how it is loaded.

    path: a local folder, or a hub name. adapter: a folder with a LoRA to put on it, for sampling.
    vae: another VAE, such as the SDXL one that float16 does not overflow.
    dtype: of the backbone; what trains itself must be float32. encoder_dtype: of the text encoders.
    vae_dtype: float32 unless the VAE is known to bear less.
    attention: of the backbone; see `mmalign.diffusion.attention`.
    """

    path: str
    revision: str | None = None
    adapter: str | None = None
    vae: str | None = None
    dtype: Dtype = "float32"
    encoder_dtype: Dtype = "float32"
    vae_dtype: Dtype = "float32"
    lora: ImageLora | None = None
    gradient_checkpointing: bool = False
    attention: BackboneAttention = "auto"
