"""Load a diffusers pipeline in parts: what encodes first, what trains after it has left memory."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from mmalign.diffusion.attention import use_attention
from mmalign.diffusion.backbones import BACKBONES, Backbone, backbone_of
from mmalign.diffusion.config import DiffusionConfig
from mmalign.diffusion.schedule import Schedule, schedule_of
from mmalign.errors import MissingExtra, ModelError
from mmalign.models.lora import first_line

if TYPE_CHECKING:
    import torch
    from torch import nn

INDEX = "model_index.json"
ADAPTER = "pytorch_lora_weights.safetensors"


@dataclass(frozen=True, kw_only=True)
class ImagePolicy:
    """A backbone that trains, and what it takes to ask it and to save it.

    folder: the pipeline it is part of.
    """

    model: nn.Module
    backbone: Backbone
    schedule: Schedule
    folder: Path

    def save(self, path: str | Path, weights: dict[str, Any] | None = None) -> None:
        """Save as diffusers would: with LoRA the adapter for `load_lora_weights`, else a pipeline.

        What did not train is linked from where it was loaded, and copied where it cannot be.
        weights: the whole state dict, where the model itself holds only a share of it.
        """
        path, part = Path(path), self.backbone.part
        if hasattr(self.model, "peft_config"):
            from peft.utils import get_peft_model_state_dict

            layers = get_peft_model_state_dict(self.model, weights)
            metadata = {k: c.to_dict() for k, c in self.model.peft_config.items()}["default"]  # type: ignore[union-attr]
            _pipeline_class(self.folder).save_lora_weights(
                str(path),
                **{f"{part}_lora_layers": layers, f"{part}_lora_adapter_metadata": metadata},
            )
            return
        _link_others(self.folder, path, part)
        if weights is None:
            self.model.save_pretrained(str(path / part))  # type: ignore[operator]
            return
        raise ModelError("a backbone in pieces cannot be saved", where=str(path), fix="use DDP")

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """The backbone as it was before training, for as long as the context lasts."""
        flags = [(p, p.requires_grad) for p in self.model.parameters()]
        self.model.disable_adapters()  # type: ignore[operator]
        try:
            yield
        finally:
            self.model.enable_adapters()  # type: ignore[operator]
            for parameter, trains in flags:
                parameter.requires_grad_(trains)


def pipeline_folder(config: DiffusionConfig) -> Path:
    """The pipeline's folder on this machine, fetched from the hub where it is none.

    Raises ModelError where there is no pipeline, MissingExtra without diffusers.
    """
    diffusers = _diffusers()
    folder = Path(config.path)
    if not folder.is_dir():
        try:
            fetched = diffusers.DiffusionPipeline.download(config.path, revision=config.revision)
        except (OSError, ValueError) as error:
            raise ModelError(
                f"cannot be fetched ({first_line(error)})",
                where=config.path,
                fix="check the folder or the hub name",
            ) from None
        folder = Path(fetched)
    if not (folder / INDEX).exists():
        raise ModelError("holds no pipeline", where=str(folder), wanted=f"a folder with {INDEX}")
    return folder


def load_encoders(config: DiffusionConfig) -> Any:
    """The pipeline without its backbone: text encoders, VAE, scheduler; frozen."""
    folder = pipeline_folder(config)
    part = _backbone(folder).part
    check_texts(folder)
    pipeline = _load(config, folder, **{part: None})
    # Without its third text encoder SD3 asks the absent transformer how wide the states are.
    settings = json.loads((folder / part / "config.json").read_text())
    vars(pipeline)[part] = SimpleNamespace(config=SimpleNamespace(**settings))
    return pipeline


def load_pipeline(config: DiffusionConfig, device: torch.device | str = "cpu") -> Any:
    """The whole pipeline on `device`, with its adapter and its attention, for sampling.

    One of a class that no backbone is known of loads too, as diffusers loads it.
    """
    folder = pipeline_folder(config)
    known = _index(folder).get("_class_name") in {backbone.pipeline for backbone in BACKBONES}
    if known:
        check_texts(folder)
    pipeline = (_load(config, folder) if known else _load_any(config, folder)).to(device)
    pipeline.set_progress_bar_config(disable=True)
    if config.adapter is not None:
        if not (Path(config.adapter) / ADAPTER).exists():
            raise ModelError("holds no adapter", where=config.adapter, wanted=ADAPTER)
        pipeline.load_lora_weights(config.adapter)
    if known:
        model = pipeline.components[_backbone(folder).part]
        use_attention(model, config.attention, pipeline.device, model.dtype)
    return pipeline


def load_around(config: DiffusionConfig, policy: ImagePolicy, device: torch.device | str) -> Any:
    """The pipeline around a backbone that trains, with its VAE on `device`: takes embeddings."""
    index = _index(policy.folder)
    unread = ("text_encoder", "tokenizer", "safety_checker", "feature_extractor", "image_encoder")
    parts: dict[str, Any] = {name: None for name in index if name.startswith(unread)}
    if "requires_safety_checker" in index:
        parts["requires_safety_checker"] = False
    pipeline = _load(config, policy.folder, **parts, **{policy.backbone.part: policy.model})
    pipeline.set_progress_bar_config(disable=True)
    pipeline.vae.to(device)
    return pipeline


def check_texts(folder: Path) -> None:
    """Raise ModelError for a pipeline without what its prompts are encoded by.

    The UNet says how wide the states are that it reads; SDXL's first encoder may be absent where
    the second one's suffice, as in the refiner.
    """
    from transformers import AutoConfig

    backbone, index = _backbone(folder), _index(folder)
    there = {name for name, kind in index.items() if isinstance(kind, list) and kind[0] is not None}
    absent = [part for part in backbone.texts if part not in there]
    if absent:
        raise ModelError(
            f"was saved without {' and '.join(absent)}, and {backbone.pipeline} encodes prompts "
            "with it",
            where=str(folder),
            fix="save the pipeline with all of its parts",
        )
    if backbone.part != "unet":
        return
    encoders = [name for name in ("text_encoder", "text_encoder_2") if name in there]
    try:
        wanted = json.loads((folder / "unet/config.json").read_text())["cross_attention_dim"]
        widths = [AutoConfig.from_pretrained(folder / name).hidden_size for name in encoders]
    except (OSError, ValueError, KeyError) as error:
        raise _damaged(folder, error) from error
    if {sum(widths)} != set(wanted if isinstance(wanted, list) else [wanted]):
        raise ModelError(
            "its text encoders are not those that its UNet was made for",
            where=str(folder),
            got=f"{', '.join(encoders)}, {sum(widths)} wide",
            wanted=f"{wanted}",
            fix="save the pipeline with all of its parts",
        )


def load_policy(config: DiffusionConfig) -> ImagePolicy:
    """The backbone alone, ready to train: all of it, or a fresh adapter.

    Raises ModelError for a damaged folder, or a backbone in 16 bits that would train itself.
    """
    import torch

    if config.lora is None and config.dtype != "float32":
        raise ModelError(
            "the weights that train must be float32, or small updates are rounded away",
            where="model.dtype",
            got=config.dtype,
            fix="use model.dtype=float32 with run.precision=bf16, or train a LoRA: model.lora={}",
        )
    if config.adapter is not None:
        raise ModelError(
            "model.adapter is for sampling and evaluation",
            where=config.adapter,
            fix="merge it into its base first (fuse_lora and save_pretrained of diffusers)",
        )
    folder = pipeline_folder(config)
    check_texts(folder)  # Before anything is encoded, though the backbone alone needs none.
    backbone = _backbone(folder)
    diffusers = _diffusers()
    index = _index(folder)
    try:
        kind = getattr(diffusers, index[backbone.part][1])
        model = kind.from_pretrained(
            folder, subfolder=backbone.part, torch_dtype=getattr(torch, config.dtype)
        )
        scheduler = getattr(diffusers, index["scheduler"][1]).from_pretrained(
            folder, subfolder="scheduler"
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise _damaged(folder, error) from error
    model.requires_grad_(config.lora is None)
    if config.lora is not None:
        from peft import LoraConfig

        model.add_adapter(
            LoraConfig(
                r=config.lora.rank,
                lora_alpha=config.lora.alpha or config.lora.rank,
                init_lora_weights="gaussian",
                target_modules=list(config.lora.targets or backbone.lora_targets),
            )
        )
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    return ImagePolicy(
        model=model, backbone=backbone, schedule=schedule_of(scheduler), folder=folder
    )


def _load(config: DiffusionConfig, folder: Path, **parts: Any) -> Any:
    import torch

    diffusers = _diffusers()
    backbone = _backbone(folder)
    dtypes = {
        "default": getattr(torch, config.encoder_dtype),
        "vae": getattr(torch, config.vae_dtype),
        backbone.part: getattr(torch, config.dtype),
    }
    kind = getattr(diffusers, backbone.pipeline)
    # diffusers wants to hear again of each part that a pipeline was saved without.
    absent = {n: None for n, v in _index(folder).items() if isinstance(v, list) and v[0] is None}
    parts, given = absent | parts, set(parts)
    try:
        if config.vae is not None:
            vae = diffusers.AutoencoderKL.from_pretrained(config.vae, torch_dtype=dtypes["vae"])
            parts |= {"vae": vae}
        pipeline = kind.from_pretrained(folder, torch_dtype=dtypes, **parts)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise _damaged(folder, error) from error
    for name, part in pipeline.components.items():
        if name not in given and hasattr(part, "requires_grad_"):
            part.requires_grad_(False)
    return pipeline


def _load_any(config: DiffusionConfig, folder: Path) -> Any:
    """A pipeline of any class, in the config's dtypes."""
    import torch

    diffusers = _diffusers()
    if config.attention not in ("auto", "sdpa"):
        raise ModelError(
            "the attention of this class of pipeline is not known here",
            where=str(folder),
            got=f"{_index(folder).get('_class_name')}, model.attention={config.attention}",
            fix="use model.attention=auto",
        )
    texts = [name for name in _index(folder) if name.startswith("text_encoder")]
    dtypes = {
        **dict.fromkeys(texts, getattr(torch, config.encoder_dtype)),
        "vae": getattr(torch, config.vae_dtype),
        "default": getattr(torch, config.dtype),
    }
    try:
        parts = {}
        if config.vae is not None:
            kind = diffusers.AutoencoderKL
            parts["vae"] = kind.from_pretrained(config.vae, torch_dtype=dtypes["vae"])
        return diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=dtypes, **parts)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise _damaged(folder, error) from error


def _backbone(folder: Path) -> Backbone:
    return backbone_of(str(_index(folder).get("_class_name")), str(folder))


def _index(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / INDEX).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise _damaged(folder, error) from None


def _pipeline_class(folder: Path) -> Any:
    return getattr(_diffusers(), _backbone(folder).pipeline)


def _damaged(folder: Path, error: BaseException) -> ModelError:
    return ModelError(
        f"cannot be loaded ({first_line(error)})",
        where=str(folder),
        fix="check the path; a half-copied folder has to be copied again",
    )


def _diffusers() -> Any:
    try:
        import diffusers
    except ImportError:
        raise MissingExtra(
            "diffusion models need diffusers", fix="pip install 'mmalign[diffusion]'"
        ) from None
    if not sys.stderr.isatty():
        diffusers.utils.logging.disable_progress_bar()  # In a file it is noise.
    return diffusers


def _link_others(source: Path, target: Path, part: str) -> None:
    """All files of a pipeline but those of `part`, as further names of the same bytes."""
    for file in sorted(source.rglob("*")):
        place = file.relative_to(source)
        if file.is_dir() or place.parts[0] == part or place.parts[0].startswith("."):
            continue
        (target / place).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(file.resolve(), target / place)
        except OSError:
            shutil.copyfile(file, target / place)
