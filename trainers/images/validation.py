"""Pictures drawn during training, to look at: by the policy as it stands, from stored prompts.

runs/X/samples/step-000500/
  0.png 1.png …    one for each prompt
  settings.json    what they were drawn by; written last: the folder is complete
"""

from __future__ import annotations

import hashlib
import io
import json
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from mmalign.diffusion.load import ImagePolicy, load_around
from mmalign.errors import TrainingError
from mmalign.log import get_logger
from mmalign.models.lora import first_line
from mmalign.store import write_atomically
from trainers.average import Average
from trainers.images.config import ImageRecipe, ValidationConfig
from trainers.images.encode import check_vae
from trainers.images.store import EncodedStore, prompt_digest
from trainers.precision import AUTOCAST
from trainers.randomness import untouched_randomness
from trainers.together import from_first
from trainers.tracking import Tracker

logger = get_logger("trainers.images")

SETTINGS = "settings.json"


def prompts_of(config: ValidationConfig) -> dict[str, str]:
    """The texts that must be encoded, by digest."""
    return {prompt_digest(text): text for text in (*config.prompts, config.negative_prompt)}


def noise_of(config: ValidationConfig, number: int) -> torch.Generator:
    """Where the noise of prompt `number`, from 0, comes from: the same at every step."""
    digest = hashlib.sha256(f"{config.seed}/validation/{number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@dataclass(frozen=True, kw_only=True)
class Validation:
    """Draws a recipe's validation pictures; of all that trains, nothing is changed by it.

    average: whose weights draw, where the run keeps one; the main process has it.
    run_hash: of all that decides the weights; pictures of another run are drawn again.
    """

    recipe: ImageRecipe
    config: ValidationConfig
    policy: ImagePolicy
    store: EncodedStore
    average: Average | None
    accelerator: Accelerator
    run_hash: str

    def due(self, step: int, num_steps: int) -> bool:
        """Whether pictures are drawn after step `step`, counted from 1."""
        return step % self.config.every_steps == 0 or step == num_steps

    def show(self, step: int, tracker: Tracker | None) -> dict[str, float]:
        """Draw on the main process what does not lie there yet, and show it; others wait.
        Returns no numbers.

        Raises TrainingError where the backbone or the VAE gives numbers that are not finite.
        """

        def make() -> None:
            folder = self.recipe.run.output / "samples" / f"step-{step:06d}"
            files = [folder / f"{number}.png" for number in range(len(self.config.prompts))]
            if not self._stands(folder):
                self._draw(folder, files)
                logger.info("%d validation pictures in %s", len(files), folder)
            if tracker is not None:
                tracker.show(step, self.config.prompts, [Image.open(file) for file in files])

        from_first(self.accelerator, make)
        return {}

    @property
    def _settings(self) -> dict[str, Any]:
        drawn = self.config.model_dump(mode="json", exclude={"every_steps"})
        return {**drawn, "run": self.run_hash}

    def _stands(self, folder: Path) -> bool:
        file = folder / SETTINGS
        try:
            return json.loads(file.read_text()) == self._settings
        except (OSError, ValueError):
            return False

    def _draw(self, folder: Path, files: list[Path]) -> None:
        (folder / SETTINGS).unlink(missing_ok=True)
        device, precision = self.accelerator.device, self.recipe.run.precision
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(untouched_randomness())
            if self.average is not None:
                stack.enter_context(self.average.in_place())
            pipeline = load_around(self.recipe.model, self.policy, device)
            latents = []
            for number in range(len(files)):
                with torch.autocast(
                    device.type, AUTOCAST.get(precision), enabled=precision in AUTOCAST
                ):
                    latents.append(self._latent(pipeline, number))
            for file, latent in zip(files, latents, strict=True):
                write_atomically(file, self._decoded(pipeline, latent))
        if device.type == "cuda":
            del pipeline
            torch.cuda.empty_cache()  # What decoding took is given back, whole, to training.
        write_atomically(folder / SETTINGS, json.dumps(self._settings, indent=1))

    def _latent(self, pipeline: Any, number: int) -> Tensor:
        """The clean latent of one prompt, [1, C, h, w]; one at a time, beside what trains."""
        config, size = self.config, self.recipe.data.resolution
        told = self._embeds(config.prompts[number], "")
        refused = self._embeds(config.negative_prompt, "negative_")
        zeros = pipeline.config.get("force_zeros_for_empty_prompt", False)
        if zeros and not config.negative_prompt:
            refused = {name: torch.zeros_like(values) for name, values in refused.items()}
        try:
            latent: Tensor = pipeline(
                **told,
                **refused,
                height=size,
                width=size,
                num_inference_steps=config.num_steps,
                guidance_scale=config.guidance,
                generator=noise_of(config, number),
                output_type="latent",
            ).images
        except ValueError as error:
            raise TrainingError(
                f"the pipeline draws no such pictures ({first_line(error)})",
                got=f"data.resolution={size}, validation.num_steps={config.num_steps}",
                fix="change these, or drop validation",
            ) from error
        if not latent.isfinite().all():
            raise TrainingError(
                "the backbone draws pictures that are not finite",
                where=f"validation prompt {config.prompts[number]!r}",
                got=f"run.precision={self.recipe.run.precision}",
                fix="use run.precision=bf16 or float32, or drop validation",
            )
        return latent

    def _embeds(self, prompt: str, prefix: str) -> dict[str, Tensor]:
        stored = self.store.read(prompt_digest(prompt))
        device = self.accelerator.device
        return {
            f"{prefix}{argument}": stored[name][None].to(device, torch.float32)
            for argument, name in self.policy.backbone.embeds
        }

    def _decoded(self, pipeline: Any, latent: Tensor) -> bytes:
        """A PNG. Outside of autocast: the VAE is in its own precision."""
        vae = pipeline.vae
        clean = latent.float() / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
        pixels = vae.decode(clean.to(vae.dtype), return_dict=False)[0]
        check_vae(pixels, self.recipe.model)
        buffer = io.BytesIO()
        pipeline.image_processor.postprocess(pixels.float())[0].save(buffer, "PNG")
        return buffer.getvalue()
