"""Pictures by a diffusion pipeline, each from noise that is its own."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import NonNegativeFloat, PositiveInt

from mmalign.config import Strict
from mmalign.diffusion.config import DiffusionConfig
from mmalign.errors import ModelError
from mmalign.generate.base import request_seed

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor


class ImageSampling(Strict):
    """How pictures are drawn, by the pipeline's own scheduler.

    guidance: of classifier-free guidance; 1 and less is none, as in diffusers. size: side in
    pixels; null for the pipeline's own. batch_size: pictures at once.
    """

    num_steps: PositiveInt = 25
    guidance: NonNegativeFloat = 5.0
    size: PositiveInt | None = None
    negative_prompt: str = ""
    batch_size: PositiveInt = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """One picture to draw. Its noise depends on (seed, id) alone: two prompts may share it."""

    id: str
    prompt: str
    seed: int = 0


class ImageSampler:
    """A pipeline that draws. name: what manifests call it."""

    def __init__(self, pipeline: Any, sampling: ImageSampling, name: str) -> None:
        self.pipeline, self.sampling, self.name = pipeline, sampling, name

    @classmethod
    def from_checkpoint(cls, config: DiffusionConfig, sampling: ImageSampling) -> ImageSampler:
        """Load the pipeline with its adapter, onto the GPU if there is one."""
        import torch

        from mmalign.diffusion.load import load_pipeline

        pipeline = load_pipeline(config, "cuda" if torch.cuda.is_available() else "cpu")
        return cls(pipeline, sampling, name=named(config))

    def draw(self, draws: Sequence[Draw]) -> list[Image]:
        """A picture for each, in order. Raises ModelError where the VAE gives no finite numbers."""
        size = self.sampling.batch_size
        batches = [draws[start : start + size] for start in range(0, len(draws), size)]
        return [picture for batch in batches for picture in self._batch(batch)]

    def _batch(self, draws: Sequence[Draw]) -> list[Image]:
        import torch

        sampling = self.sampling
        optional: dict[str, Any] = {}
        if sampling.size is not None:
            optional |= {"height": sampling.size, "width": sampling.size}
        if sampling.negative_prompt:
            optional["negative_prompt"] = [sampling.negative_prompt] * len(draws)
        # On the CPU, so that the noise is the same on every device.
        noise = [torch.Generator().manual_seed(request_seed(one.seed, one.id)) for one in draws]
        try:
            made = self.pipeline(
                prompt=[one.prompt for one in draws],
                num_inference_steps=sampling.num_steps,
                guidance_scale=sampling.guidance,
                generator=noise,
                output_type="pt",
                **optional,
            ).images
        except TypeError as error:
            raise ModelError(
                f"the pipeline cannot be asked so ({error})",
                where=self.name,
                got=type(self.pipeline).__name__,
                wanted="a pipeline from text to pictures",
            ) from None
        return [
            picture_of(pixels, where=f"{self.name}, {one.id}")
            for pixels, one in zip(made, draws, strict=True)
        ]


def named(config: DiffusionConfig) -> str:
    """Paths or hub names of pipeline, adapter and VAE, with a hash of local weights."""
    from mmalign.generate.local import fingerprint

    def told(path: str) -> str:
        folder = Path(path)
        if not folder.is_dir():
            return f"{path}@{config.revision}" if config.revision else path
        parts = [folder, *sorted(part for part in folder.iterdir() if part.is_dir())]
        hashes = "".join(f"{part.name}:{fingerprint(str(part))};" for part in parts[1:])
        whole = hashlib.sha256(f"{fingerprint(path)};{hashes}".encode()).hexdigest()[:16]
        return f"{path}@{whole}"

    return "+".join(told(path) for path in (config.path, config.adapter, config.vae) if path)


def picture_of(pixels: Tensor, where: str) -> Image:
    """A picture from [3, H, W] in [0, 1]. Raises ModelError where numbers are not finite."""
    from PIL import Image

    if not pixels.isfinite().all():
        raise ModelError(
            "a decoded picture holds numbers that are not finite",
            where=where,
            fix="use vae_dtype=float32, or a VAE made for 16 bits, such as "
            "madebyollin/sdxl-vae-fp16-fix",
        )
    levels = (pixels.float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
    return Image.fromarray(levels.cpu().numpy())
