"""Make the latents and prompts of a run that are not stored yet."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from mmalign.diffusion.backbones import SIZES, Backbone
from mmalign.diffusion.config import DiffusionConfig
from mmalign.diffusion.framing import Frame, framed
from mmalign.diffusion.load import load_encoders, pipeline_folder
from mmalign.errors import TrainingError
from mmalign.log import get_logger, progress
from mmalign.media import open_image
from mmalign.records import Media
from trainers.images.config import ImageRecipe
from trainers.images.store import EncodedStore
from trainers.reference_key import digest_of
from trainers.together import from_first

logger = get_logger("trainers.images")

AT_ONCE = 8  # Pictures in one pass of the VAE, as in the released code.
SHARD = 128  # Pictures or prompts in one file.
# Parts of a pipeline that neither latents nor prompts depend on.
NOT_ENCODING = ("unet", "transformer", "scheduler", "safety_checker", "image_encoder")


def store_of(recipe: ImageRecipe) -> EncodedStore:
    """The recipe's store, not yet looked into."""
    model, data = recipe.model, recipe.data
    folder = pipeline_folder(model)
    key = {
        "model": str(folder.resolve()),
        "files": _files(folder),
        "model.vae": model.vae,
        "vae's files": _files(Path(model.vae)) if model.vae and Path(model.vae).is_dir() else None,
        "model.vae_dtype": model.vae_dtype,
        "model.encoder_dtype": model.encoder_dtype,
        "data.resolution": data.resolution,
    }
    root = data.encoded or data.path / "encoded"
    name = "-".join(folder.resolve().parts[-2:])
    place = digest_of({"model": key["model"], "resolution": data.resolution})
    return EncodedStore(root / f"{name}-{place[:8]}", json.loads(json.dumps(key)), {})


def make_encoded(
    recipe: ImageRecipe,
    backbone: Backbone,
    store: EncodedStore,
    pictures: dict[str, tuple[Media, Frame]],
    prompts: dict[str, str],
    root: Path | None,
    accelerator: Accelerator,
) -> None:
    """Encode what `store` lacks of these pictures and prompts, by digest, on the first process.

    Raises TrainingError where the VAE gives no finite numbers, or the store cannot be written.
    """

    def make() -> None:
        wanted = [*pictures, *prompts]
        if not store.missing(wanted):
            return
        todo = set(store.claim(wanted))
        try:
            store.write_key()
            pipeline = load_encoders(recipe.model).to(accelerator.device)
            started = time.perf_counter()
            of_pictures = [digest for digest in pictures if digest in todo]
            _in_shards(
                store,
                of_pictures,
                lambda digests: _pictures(
                    pipeline, recipe, [pictures[digest] for digest in digests], root
                ),
                label="latents",
            )
            of_prompts = [digest for digest in prompts if digest in todo]
            _tell_truncated(pipeline, [prompts[digest] for digest in of_prompts])
            _in_shards(
                store,
                of_prompts,
                lambda digests: _prompts(pipeline, backbone, [prompts[d] for d in digests]),
                label="prompts",
            )
            logger.info(
                "encoded %d pictures and %d prompts in %.1f s; %.3g GB in %s",
                len(of_pictures), len(of_prompts), time.perf_counter() - started,
                store.num_bytes / 10**9, store.folder,
            )  # fmt: skip
        finally:
            store.release()

    from_first(accelerator, make)
    store.look()


def _in_shards(
    store: EncodedStore,
    digests: Sequence[str],
    encode: Callable[[Sequence[str]], list[dict[str, Tensor]]],
    *,
    label: str,
) -> None:
    shard: dict[str, dict[str, Tensor]] = {}
    batches = [digests[start : start + AT_ONCE] for start in range(0, len(digests), AT_ONCE)]
    for batch in progress(batches, label=label, total=len(batches)):
        shard |= dict(zip(batch, encode(batch), strict=True))
        if len(shard) >= SHARD:
            store.write(shard)
            shard = {}
    if shard:
        store.write(shard)


@torch.no_grad()
def _pictures(
    pipeline: Any, recipe: ImageRecipe, items: Sequence[tuple[Media, Frame]], root: Path | None
) -> list[dict[str, Tensor]]:
    """Mean and deviation of each latent as the backbone knows it, float32, and its sizes."""
    made = [framed(open_image(m, root), f, recipe.data.resolution) for m, f in items]
    vae = pipeline.vae
    pixels = torch.stack([pixels for pixels, _ in made]).to(vae.device, vae.dtype)
    found = vae.encode(pixels).latent_dist
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor or 0.0
    mean, deviation = (found.mean.float() - shift) * scale, found.std.float() * scale
    check_vae(mean, recipe.model)
    check_vae(deviation, recipe.model)
    return [
        {"mean": m, "deviation": d, SIZES: sizes}
        for m, d, (_, sizes) in zip(mean, deviation, made, strict=True)
    ]


def check_vae(made: Tensor, config: DiffusionConfig) -> None:
    """Raise TrainingError where what the VAE made is not finite."""
    if not made.isfinite().all():
        raise TrainingError(
            "the VAE gave numbers that are not finite",
            where=config.vae or config.path,
            got=f"model.vae_dtype={config.vae_dtype}",
            fix="use model.vae_dtype=float32, or a VAE made for 16 bits as model.vae, such as "
            "madebyollin/sdxl-vae-fp16-fix",
        )


@torch.no_grad()
def _prompts(pipeline: Any, backbone: Backbone, prompts: list[str]) -> list[dict[str, Tensor]]:
    conditions = backbone.encode(pipeline, prompts)
    return [
        {name: values[place] for name, values in conditions.items()}
        for place in range(len(prompts))
    ]


def _tell_truncated(pipeline: Any, prompts: Sequence[str]) -> None:
    """Say how many prompts are longer than the text encoder reads."""
    tokenizer = pipeline.tokenizer or pipeline.tokenizer_2
    most = tokenizer.model_max_length
    long = sum(len(tokenizer(prompt, truncation=False).input_ids) > most for prompt in prompts)
    if long:
        logger.warning("%d of %d prompts are cut at %d tokens", long, len(prompts), most)


def _files(folder: Path) -> dict[str, str]:
    """Hashes of the files that encode, so that other weights are noticed."""
    found = {}
    for file in sorted(folder.rglob("*")):
        place = file.relative_to(folder)
        if file.is_file() and place.parts[0] not in NOT_ENCODING and len(place.parts) > 1:
            with open(file, "rb") as stream:
                found[str(place)] = hashlib.file_digest(stream, "sha256").hexdigest()[:16]
    return found
