"""SDXL with random weights, whole or with all widths divided by one number; what its parts cost."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

VOCAB = 49_408
TOKENS = 77


@dataclass(frozen=True)
class SDXL:
    """SDXL's own config with every width divided by `factor`; layers are kept.

    Channels in a group of a norm stay as they are. An attention head has `head` channels: 64 in
    SDXL, which smaller widths do not divide into.
    """

    factor: int
    head: int

    def parts(self) -> dict[str, Any]:
        """UNet, VAE and both text encoders, on torch's default device, with random weights."""
        from diffusers import AutoencoderKL, UNet2DConditionModel
        from transformers import CLIPTextModel, CLIPTextModelWithProjection

        factor, groups = self.factor, 32 // self.factor
        widths = [width // factor for width in (320, 640, 1280)]
        # diffusers annotates these as tuples of one.
        unet_levels: Any = {
            "block_out_channels": widths,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            # In spite of its name the number of heads. The first level has no attention.
            "attention_head_dim": [max(1, width // self.head) for width in widths],
        }
        vae_levels: Any = {
            "block_out_channels": [width // factor for width in (128, 256, 512, 512)],
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
        }
        return {
            "unet": UNet2DConditionModel(
                **unet_levels,
                sample_size=128,
                layers_per_block=2,
                norm_num_groups=groups,
                cross_attention_dim=2048 // factor,
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=256 // factor,
                projection_class_embeddings_input_dim=2816 // factor,
            ),
            "vae": AutoencoderKL(
                **vae_levels,
                layers_per_block=2,
                latent_channels=4,
                norm_num_groups=groups,
                sample_size=1024,
                scaling_factor=0.13025,
            ),
            "text_encoder": CLIPTextModel(self._text(768, 12, "quick_gelu")),
            "text_encoder_2": CLIPTextModelWithProjection(self._text(1280, 32, "gelu")),
        }

    def build(self, folder: Path, device: str = "cpu") -> Path:
        """Save it as any pipeline. Weights are drawn on `device`, a seed of 0."""
        import torch
        from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

        from mmalign.diffusion.tiny import TinyPipeline

        # For its tokenizers: other words than these are spelled, and captions are short.
        TinyPipeline(output=folder, words=tuple(f"w{n}" for n in range(100))).build()
        small = StableDiffusionXLPipeline.from_pretrained(folder)
        torch.manual_seed(0)
        with torch.device(device):
            parts = self.parts()
        for name in ("text_encoder", "text_encoder_2"):  # Read again when it is loaded.
            for end in ("bos_token_id", "eos_token_id", "pad_token_id"):
                setattr(parts[name].config, end, getattr(small.tokenizer, end))
        kind: Any = StableDiffusionXLPipeline
        kind(
            **parts,
            tokenizer=small.tokenizer,
            tokenizer_2=small.tokenizer_2,
            scheduler=EulerDiscreteScheduler.from_config(small.scheduler.config),
            add_watermarker=False,
        ).save_pretrained(folder)
        return folder

    def _text(self, width: int, layers: int, activation: str) -> Any:
        from transformers import CLIPTextConfig

        return CLIPTextConfig(
            vocab_size=VOCAB // self.factor,
            hidden_size=width // self.factor,
            intermediate_size=4 * width // self.factor,
            projection_dim=width // self.factor,
            num_hidden_layers=layers,
            num_attention_heads=width // self.factor // self.head,
            max_position_embeddings=TOKENS,
            hidden_act=activation,
        )


def costs(model: SDXL, side: int) -> dict[str, tuple[float, float]]:
    """Parameters, and operations of one forward pass, of each part; nothing is computed.

    Of the UNet and the VAE's encoder for one picture of `side` pixels, of the text encoders for
    one prompt.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), torch.no_grad():
        parts = model.parts()
        told = {
            "text_embeds": torch.empty(1, 1280 // model.factor),
            "time_ids": torch.empty(1, 6),
        }
        states = torch.empty(1, TOKENS, 2048 // model.factor)
        latent, ids = torch.empty(1, 4, side // 8, side // 8), torch.zeros(1, TOKENS).long()
        calls = {
            "unet": lambda unet: unet(latent, torch.zeros(1), states, added_cond_kwargs=told),
            "vae": lambda vae: vae.encode(torch.empty(1, 3, side, side)),
            "text_encoder": lambda encoder: encoder(ids),
            "text_encoder_2": lambda encoder: encoder(ids),
        }
        found = {}
        for name, call in calls.items():
            with FlopCounterMode(display=False) as counter:
                call(parts[name])
            size = sum(parameter.numel() for parameter in parts[name].parameters())
            found[name] = float(size), float(counter.get_total_flops())
    return found


REAL = SDXL(factor=1, head=64)
SMALL = SDXL(factor=4, head=32)
# For tests of the benchmarks.
TINY = SDXL(factor=32, head=8)
