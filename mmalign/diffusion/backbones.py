"""Diffusion backbones: one entry a pipeline class, and all that differs between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from mmalign.errors import ModelError

# Prediction of a backbone: (module, noised latents [N, C, h, w], times [N], conditions of a pair's
# prompt and size by name, each [N, ...]) to [N, C, h, w].
Predict = Callable[[nn.Module, Tensor, Tensor, dict[str, Tensor]], Tensor]
# Conditions of prompts by name, each [N, ...], by the pipeline's own text encoders.
Encode = Callable[[Any, list[str]], dict[str, Tensor]]

SIZES = "time_ids"


@dataclass(frozen=True, slots=True, kw_only=True)
class Backbone:
    """What is known of one pipeline class.

    pipeline: its name in model_index.json. part: the attribute that trains.
    sizes: whether the backbone is told picture sizes and crops, as `time_ids`.
    texts: parts without which no prompt can be encoded.
    embeds: conditions by the name that the pipeline's call knows them by; a negative prompt's are
        the same with `negative_` before them.
    lora_targets: layers that an adapter sits on, as in diffusers' own training scripts.
    """

    pipeline: str
    part: Literal["unet", "transformer"]
    encode: Encode
    predict: Predict
    sizes: bool
    texts: tuple[str, ...]
    embeds: tuple[tuple[str, str], ...]
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")


def _encode_sdxl(pipeline: Any, prompts: list[str]) -> dict[str, Tensor]:
    states, _, pooled, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)
    return {"encoder_hidden_states": states, "text_embeds": pooled}


def _encode_sd(pipeline: Any, prompts: list[str]) -> dict[str, Tensor]:
    states, _ = pipeline.encode_prompt(
        prompts, pipeline._execution_device, 1, do_classifier_free_guidance=False
    )
    return {"encoder_hidden_states": states}


def _encode_sd3(pipeline: Any, prompts: list[str]) -> dict[str, Tensor]:
    states, _, pooled, _ = pipeline.encode_prompt(
        prompts, prompts, prompts, do_classifier_free_guidance=False
    )
    return {"encoder_hidden_states": states, "pooled_projections": pooled}


def _predict_sdxl(
    unet: Any, noised: Tensor, times: Tensor, conditions: dict[str, Tensor]
) -> Tensor:
    added = {name: conditions[name] for name in ("text_embeds", SIZES)}
    states = conditions["encoder_hidden_states"]
    return unet(noised, times, states, added_cond_kwargs=added, return_dict=False)[0]


def _predict_sd(unet: Any, noised: Tensor, times: Tensor, conditions: dict[str, Tensor]) -> Tensor:
    return unet(noised, times, conditions["encoder_hidden_states"], return_dict=False)[0]


def _predict_sd3(
    transformer: Any, noised: Tensor, times: Tensor, conditions: dict[str, Tensor]
) -> Tensor:
    return transformer(hidden_states=noised, timestep=times, **conditions, return_dict=False)[0]


BACKBONES: tuple[Backbone, ...] = (
    Backbone(
        pipeline="StableDiffusionXLPipeline",
        part="unet",
        encode=_encode_sdxl,
        predict=_predict_sdxl,
        sizes=True,
        texts=("text_encoder_2", "tokenizer_2"),
        embeds=(
            ("prompt_embeds", "encoder_hidden_states"),
            ("pooled_prompt_embeds", "text_embeds"),
        ),
    ),
    Backbone(
        pipeline="StableDiffusionPipeline",
        part="unet",
        encode=_encode_sd,
        predict=_predict_sd,
        sizes=False,
        texts=("text_encoder", "tokenizer"),
        embeds=(("prompt_embeds", "encoder_hidden_states"),),
    ),
    Backbone(
        pipeline="StableDiffusion3Pipeline",
        part="transformer",
        encode=_encode_sd3,
        predict=_predict_sd3,
        sizes=False,
        texts=("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
        embeds=(
            ("prompt_embeds", "encoder_hidden_states"),
            ("pooled_prompt_embeds", "pooled_projections"),
        ),
    ),
)


def backbone_of(pipeline: str, where: str, known: Sequence[Backbone] = BACKBONES) -> Backbone:
    """The entry of a pipeline class. Raises ModelError where there is none."""
    for backbone in known:
        if backbone.pipeline == pipeline:
            return backbone
    raise ModelError(
        "is a pipeline of a class that is not known here",
        where=where,
        got=pipeline,
        wanted=", ".join(backbone.pipeline for backbone in known),
        fix="add an entry to mmalign/diffusion/backbones.py (CONTRIBUTING.md)",
    )
