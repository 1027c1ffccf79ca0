"""Train a small pipeline's VAE on a dataset's pictures, so that its latents mean something."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from pydantic import PositiveFloat, PositiveInt

from mmalign.config import Strict
from mmalign.diffusion.framing import Frame, framed
from mmalign.log import get_logger, progress
from mmalign.media import open_image
from mmalign.records import ImagePreference
from mmalign.store import open_dataset

logger = get_logger("diffusion.fit_vae")

KL_WEIGHT = 1e-4
WARMUP = 0.05


class VaeLessons(Strict):
    """What a VAE is trained on: the chosen pictures of a dataset of image preferences."""

    data: Path
    steps: PositiveInt = 1000
    batch_size: PositiveInt = 32
    lr: PositiveFloat = 3e-3
    limit: PositiveInt = 4096

    def teach(self, vae: Any, seed: int) -> None:
        """Train `vae`, an AutoencoderKL, in place, and set its scale.

        L = mean squared error + 1e-4 KL per pixel; AdamW, cosine after a warm-up. The scale gives
        latents deviation 1, as that of SDXL's VAE does.
        """
        import torch

        dataset = open_dataset(self.data, ImagePreference)
        root, side = dataset.media_root, vae.config.sample_size
        count = min(self.limit, len(dataset))
        pictures = (open_image(dataset[row].chosen, root) for row in range(count))
        pixels = torch.stack([framed(picture, Frame(), side)[0] for picture in pictures])
        generator = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.AdamW(vae.parameters(), weight_decay=0.0)
        vae.train()
        for step in progress(range(self.steps), label="VAE", total=self.steps):
            warm = min(1.0, (step + 1) / (WARMUP * self.steps))
            cosine = (1 + math.cos(math.pi * step / self.steps)) / 2
            optimizer.param_groups[0]["lr"] = self.lr * warm * cosine
            batch = pixels[torch.randint(count, (self.batch_size,), generator=generator)]
            found = vae.encode(batch).latent_dist
            noise = torch.randn(found.mean.shape, generator=generator)
            error = (vae.decode(found.mean + found.std * noise).sample - batch).square().mean()
            loss = error + KL_WEIGHT * found.kl().mean() / batch[0].numel()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        vae.eval()
        with torch.no_grad():
            found = vae.encode(pixels[:512]).latent_dist
            error = (vae.decode(found.mean).sample - pixels[:512]).square().mean()
            deviation = (found.mean.square() + found.std.square()).mean().sqrt()
        vae.register_to_config(scaling_factor=1 / float(deviation))
        logger.info("VAE: mean squared error %.4f of pixels from -1 to 1", float(error))
