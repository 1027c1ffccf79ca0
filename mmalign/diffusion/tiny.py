"""Small pipelines with random weights, of the real classes, saved like any other: for tests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveInt

from mmalign.config import Strict
from mmalign.diffusion.fit_vae import VaeLessons

_START, _END = "<|startoftext|>", "<|endoftext|>"
_SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


class TinyPipeline(Strict):
    """A small pipeline of one of the known classes.

    words: become one token each; other text is spelled. channels: width of the backbone's first
    level. vae_channels: widths of the VAE's levels; each but the first halves a latent's sides.
    vae: what the VAE is trained on; random weights where None.
    """

    output: Path
    pipeline: Literal["sdxl", "sd", "sd3"] = "sdxl"
    words: tuple[str, ...] = ()
    channels: PositiveInt = 16
    vae_channels: tuple[PositiveInt, ...] = Field((8, 16), min_length=1)
    vae: VaeLessons | None = None
    image_size: PositiveInt = 32
    prediction: Literal["epsilon", "v_prediction"] = "epsilon"
    seed: int = 0

    @property
    def latent_size(self) -> int:
        """Side of a latent."""
        return self.image_size // 2 ** (len(self.vae_channels) - 1)

    def build(self) -> Path:
        """Write the pipeline to `output`, as `from_pretrained` reads it."""
        import torch

        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            pipeline = {"sdxl": _sdxl, "sd": _sd, "sd3": _sd3}[self.pipeline](self)
            if self.vae is not None:
                self.vae.teach(pipeline.vae, self.seed)
        pipeline.save_pretrained(self.output)
        return self.output


def _sdxl(config: TinyPipeline) -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    tokenizer = _tokenizer(config)
    kind: Any = StableDiffusionXLPipeline  # Annotated without what its own checkpoints leave out.
    return kind(
        vae=_vae(config),
        text_encoder=_text(tokenizer, projected=False, hidden_act="quick_gelu"),
        text_encoder_2=_text(tokenizer, projected=True, hidden_act="gelu"),
        tokenizer=tokenizer,
        tokenizer_2=_tokenizer(config),
        unet=_unet(
            config,
            cross_attention_dim=64,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=32 + 6 * 8,
            transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
        ),
        scheduler=EulerDiscreteScheduler(**_SCHEDULE, prediction_type=config.prediction),
        add_watermarker=False,
    )


def _sd(config: TinyPipeline) -> Any:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    tokenizer = _tokenizer(config)
    kind: Any = StableDiffusionPipeline  # Annotated without what its own checkpoints leave out.
    return kind(
        vae=_vae(config),
        text_encoder=_text(tokenizer, projected=False, hidden_act="quick_gelu"),
        tokenizer=tokenizer,
        unet=_unet(config, cross_attention_dim=32),
        scheduler=DDIMScheduler(
            **_SCHEDULE, prediction_type=config.prediction, clip_sample=False, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sd3(config: TinyPipeline) -> Any:
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    tokenizer = _tokenizer(config)
    transformer = SD3Transformer2DModel(
        sample_size=config.latent_size,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        pos_embed_max_size=config.latent_size // 2,
    )
    kind: Any = StableDiffusion3Pipeline  # Annotated without what its own checkpoints leave out.
    return kind(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(config, shift_factor=0.1),
        text_encoder=_text(tokenizer, projected=True, hidden_act="quick_gelu"),
        tokenizer=tokenizer,
        text_encoder_2=_text(tokenizer, projected=True, hidden_act="gelu"),
        tokenizer_2=_tokenizer(config),
        text_encoder_3=None,
        tokenizer_3=None,
    )


def _vae(config: TinyPipeline, **settings: Any) -> Any:
    from diffusers import AutoencoderKL

    # diffusers annotates these as tuples of one.
    levels: Any = {
        "block_out_channels": config.vae_channels,
        "down_block_types": ("DownEncoderBlock2D",) * len(config.vae_channels),
        "up_block_types": ("UpDecoderBlock2D",) * len(config.vae_channels),
    }
    return AutoencoderKL(
        **levels,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=config.image_size,
        scaling_factor=0.13025,
        use_quant_conv=True,
        use_post_quant_conv=True,
        **settings,
    )


def _unet(config: TinyPipeline, **settings: Any) -> Any:
    from diffusers import UNet2DConditionModel

    width = config.channels
    levels: Any = {
        "block_out_channels": (width, 2 * width),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (2, 4),
    }
    return UNet2DConditionModel(
        **levels,
        sample_size=config.latent_size,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
        **settings,
    )


def _text(tokenizer: Any, *, projected: bool, hidden_act: str) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    kind = CLIPTextModelWithProjection if projected else CLIPTextModel
    return kind(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=77,
            projection_dim=32,
            hidden_act=hidden_act,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _tokenizer(config: TinyPipeline) -> Any:
    """CLIP's byte-level tokenizer with merges for the given words alone."""
    import tempfile

    from transformers import CLIPTokenizer

    vocabulary, merges = _merges(config.words)
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder) / "vocab.json", Path(folder) / "merges.txt"
        files[0].write_text(json.dumps(vocabulary))
        files[1].write_text("\n".join(["#version: 0.2", *merges]) + "\n")
        return CLIPTokenizer(
            str(files[0]), str(files[1]), model_max_length=77, pad_token=_END, unk_token=_END
        )


def _merges(words: Sequence[str]) -> tuple[dict[str, int], list[str]]:
    """A vocabulary of lower-case characters and words, and the merges that spell the words."""
    letters = [chr(n) for n in range(33, 127) if not chr(n).isupper()]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    merges: list[str] = []
    for word in words:
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        whole = pieces[0]
        for piece in pieces[1:]:
            if (merge := f"{whole} {piece}") not in merges:
                merges.append(merge)
                tokens.append(whole + piece)
            whole += piece
    unique = list(dict.fromkeys([*tokens, _START, _END]))
    return {token: number for number, token in enumerate(unique)}, merges
