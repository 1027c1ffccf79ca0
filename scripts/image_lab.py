"""The lab of image methods: does MaPO earn its name, and when? Tables and samples of docs/results.md.

python scripts/image_lab.py [--seeds 1 2 3] [--workers 2] [--output runs/image_lab]
"""

from __future__ import annotations

import math
import time
from pathlib import Path

CONFIGS = Path(__file__).parent.parent / "configs" / "lab"


def fit_vae(
    folder: Path, data: Path, *, steps: int = 1000, batch_size: int = 32, seed: int = 0
) -> None:
    """Train a pipeline's VAE on a dataset's chosen pictures, in place, and set its scale.

    Mean squared error and a little KL; the scale makes latents of deviation 1, as SDXL's does.
    """
    import torch
    from diffusers import AutoencoderKL

    from mmalign.diffusion.framing import Frame, framed
    from mmalign.log import get_logger
    from mmalign.media import open_image
    from mmalign.store import open_dataset

    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae").train()
    dataset = open_dataset(data)
    pixels = torch.stack(
        [
            framed(open_image(record.chosen), Frame(), vae.config.sample_size)[0]
            for record in dataset
        ]
    )
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(vae.parameters(), weight_decay=0.0)
    for step in range(steps):
        warm = min(1.0, (step + 1) / (0.05 * steps))
        optimizer.param_groups[0]["lr"] = 3e-3 * warm * (1 + math.cos(math.pi * step / steps)) / 2
        batch = pixels[torch.randint(len(pixels), (batch_size,), generator=generator)]
        found = vae.encode(batch).latent_dist
        noise = torch.randn(found.mean.shape, generator=generator)
        error = (vae.decode(found.mean + found.std * noise).sample - batch).square().mean()
        loss = error + 1e-4 * found.kl().mean() / batch[0].numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            print(step, error.item(), flush=True)
    with torch.no_grad():
        found = vae.eval().encode(pixels[:512]).latent_dist
        error = (vae.decode(found.mean).sample - pixels[:512]).square().mean()
    vae.register_to_config(scaling_factor=1 / float(found.sample(generator).std()))
    vae.save_pretrained(folder / "vae")
    get_logger("image_lab").info("VAE: squared error %.4f", error)


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    t = time.time()
    from mmalign import log

    log.configure()
    from data_builders.digit_pictures import DigitPictures
    from mmalign.diffusion.tiny import TinyPipeline

    out = Path("/tmp/lab/L1")
    d = DigitPictures(output=out / "data", num_rows=6000).build()
    print(time.time() - t)
    p = TinyPipeline(
        output=out / "init",
        words=(
            "a",
            "bold",
            "slanted",
            "inverted",
            "zero",
            "one",
            "two",
            "three",
            "four",
            "five",
            "six",
            "seven",
            "eight",
            "nine",
        ),
        channels=32,
        vae_channels=(8, 16, 16),
    ).build()
    fit_vae(p, d, steps=1000)
    print(time.time() - t)
