"""Load a policy: model, processor, adapters; say which of its parts will train."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import PositiveInt

from mmalign.attention import AttentionName
from mmalign.clips import FrameSampling
from mmalign.config import Strict
from mmalign.errors import ModelError
from mmalign.log import quiet_libraries
from mmalign.models import quantization, reward_head
from mmalign.models.families import Family, family_of
from mmalign.models.lora import Lora, first_line, lora_pattern, with_adapter
from mmalign.models.quantization import Quantization, loading_options, num_weights
from mmalign.models.reward_head import RewardHeadConfig
from mmalign.prepare import Preparer, TokenLimits

if TYPE_CHECKING:
    from torch import nn


class TrainParts(Strict):
    """Which parts of the model get gradients. With LoRA, `language_model` means its adapters."""

    vision: bool = False
    projector: bool = False
    language_model: bool = True


class ModelConfig(Strict):
    """Where a model comes from and how it is loaded.

    path: a local folder, or a hub name. adapter: a folder with a LoRA to put on it.
    max_pixels: larger pictures, and frames of clips, are shrunk to this many pixels.
    frames: which frames of a clip the model sees.
    attention: how the language model attends in training: `auto` is the first that works here of
        those that need no mask, else sdpa. Towers and generation attend by sdpa, or eager.
    Both hold in building, training and evaluation alike.
    quantization: 4-bit weights under the adapter. None for those of the adapter's own base, which
        its folder tells, or none.
    reward_head: a fresh head for a reward model; a checkpoint's own is loaded without being asked.
    """

    path: str
    revision: str | None = None
    adapter: str | None = None
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    attention: AttentionName = "auto"
    trust_remote_code: bool = False
    max_pixels: PositiveInt | None = None
    frames: FrameSampling = FrameSampling()
    lora: Lora | None = None
    quantization: Quantization | None = None
    train: TrainParts = TrainParts()
    gradient_checkpointing: bool = False
    reward_head: RewardHeadConfig | None = None


@dataclass(frozen=True, kw_only=True)
class Part:
    """One row of the table of what trains."""

    name: str
    num_parameters: int
    num_trainable: int


@dataclass(frozen=True, kw_only=True)
class Policy:
    """A loaded model with what it takes to feed it."""

    model: nn.Module
    preparer: Preparer
    family: Family

    @property
    def processor(self) -> Any:
        """The transformers processor."""
        return self.preparer.processor

    def save(self, path: str | Path, weights: dict[str, Any] | None = None) -> None:
        """Save as transformers or peft would: safetensors, config, processor.

        weights: the whole state dict, where the model itself holds only a share of it.
        """
        self.model.save_pretrained(str(path), state_dict=weights)  # type: ignore[operator]
        self.processor.save_pretrained(str(path))
        base = base_model(self.model)
        if base is not self.model and reward_head.head_of(base) is not None:
            reward_head.save_adapter_config(base.config, Path(path))
        if base is not self.model and quantization.is_quantised(base):
            quantization.save_adapter_config(base, Path(path))


def load_policy(
    config: ModelConfig, limits: TokenLimits | None = None, *, merge: bool = True
) -> Policy:
    """Load a policy, add fresh LoRA adapters if asked, and freeze what shall not train.

    merge: whether an adapter of the checkpoint becomes part of its weights. Left apart, as for
        evaluation, the model computes what was trained: in 16 bits, a merged weight would round
        small changes away.
    Raises ModelError for a folder that is no complete checkpoint, or an unsupported family.
    """
    model, processor = load_model(config, merge=merge)
    family = family_of(model.config)
    model.requires_grad_(False)
    if config.lora is not None:
        model = _with_lora(model, family, config)
    else:
        for name, parameter in model.named_parameters():
            is_head = name.startswith(f"{reward_head.NAME}.")
            trains = is_head or getattr(config.train, part_of(name, family))
            # 4-bit weights have no gradient: without an adapter, such a model is for evaluation.
            parameter.requires_grad_(trains and parameter.is_floating_point())
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    limits = limits or TokenLimits()
    if config.max_pixels is not None:
        limits = limits.model_copy(update={"max_pixels": config.max_pixels})
    preparer = Preparer(processor, model.config, family, limits, config.frames)
    return Policy(model=model, preparer=preparer, family=family)


def load_model(config: ModelConfig, *, merge: bool = True) -> tuple[Any, Any]:
    """The transformers model with its adapter, in eval mode, and its processor."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    quiet_libraries()
    path, adapter = resolve_adapter(config)
    check_folder(path)
    if adapter is not None and merge and config.dtype != "float32":
        raise ModelError(
            "an adapter is merged in float32, or its small changes are rounded away",
            where=adapter,
            got=f"model.dtype={config.dtype}",
            fix="use model.dtype=float32, or `mmalign merge` and train on the merged folder",
        )
    dtype = config.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    hub = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    bits = _quantization(config, adapter, merge=merge)
    try:
        stored = AutoConfig.from_pretrained(path, **hub)
        family = family_of(stored)
        options = {} if bits is None else loading_options(bits, family, stored, dtype)
        with reward_head.known_to_transformers():
            loaded: Any = AutoModelForImageTextToText.from_pretrained(
                path,
                dtype=dtype,
                attn_implementation="eager" if config.attention == "eager" else "sdpa",
                output_loading_info=True,
                **options,
                **hub,
            )
        model, found = loaded
        processor = _processor(path, config.revision, config.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"cannot be loaded ({first_line(error)})",
            where=path,
            fix="check the path or hub name; a half-copied folder has to be copied again",
        ) from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise ModelError(
            f"weights are damaged ({error})", where=path, fix="copy it again"
        ) from None
    if lost := sorted([*found["missing_keys"], *found["mismatched_keys"]]):
        # transformers only warns, and goes on with random weights.
        raise ModelError(
            "weights are missing or have another shape",
            where=path,
            got=f"{len(lost)} such tensors, {lost[0]} among them",
            fix="copy the checkpoint again, or correct its config.json",
        )
    quantization.use_one_kernel(model)
    _add_head(model, config, path, adapter)
    if adapter is not None:
        model = with_adapter(model, adapter)
        model = model.merge_and_unload() if merge else model
    return model.eval(), processor


def load_processor(
    path: str, revision: str | None = None, trust_remote_code: bool = False
) -> Preparer:
    """Only the preparer of a checkpoint, without its weights: for previews and estimates."""
    from transformers import AutoConfig

    path, _ = resolve_adapter(ModelConfig(path=path))
    check_folder(path)
    try:
        config = AutoConfig.from_pretrained(
            path, revision=revision, trust_remote_code=trust_remote_code
        )
        processor = _processor(path, revision, trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot be loaded ({first_line(error)})", where=path) from error
    return Preparer(processor, config, family_of(config))


def base_model(model: Any) -> Any:
    """The transformers model itself, also inside a PeftModel."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def part_of(parameter: str, family: Family) -> Literal["vision", "projector", "language_model"]:
    """Which part a parameter belongs to, by its name; the head counts as language model."""
    inside = f".{parameter}.".replace(".modules_to_save.default", "").replace(
        ".original_module", ""
    )
    if f".{family.projector}." in inside:
        return "projector"
    return "vision" if f".{family.vision}." in inside else "language_model"


def part_table(policy: Policy) -> list[Part]:
    """Parameters and trainable parameters of each part, for the table shown at the start."""
    counts = {name: [0, 0] for name in ("vision", "projector", "language_model")}
    for name, parameter in policy.model.named_parameters():
        count = counts[part_of(name, policy.family)]
        count[0] += num_weights(parameter)
        count[1] += parameter.numel() * parameter.requires_grad
    return [Part(name=n, num_parameters=a, num_trainable=t) for n, (a, t) in counts.items()]


def trained_outside_adapter(model: nn.Module) -> list[str]:
    """Trainable parameters that switching the adapter off does not restore.

    peft restores `lora_` weights and `modules_to_save` copies; anything else that trains makes the
    adapter-off model a moving one, which is no reference.
    """
    if not hasattr(model, "peft_config"):
        return [name for name, p in model.named_parameters() if p.requires_grad]
    restored = ("lora_", "modules_to_save")
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not any(mark in name for mark in restored)
    ]


def _quantization(config: ModelConfig, adapter: str | None, *, merge: bool) -> Quantization | None:
    """What is asked for, or what an adapter that stays apart from its base was trained on."""
    if adapter is None or not merge:
        told = None if adapter is None else quantization.adapter_config(adapter)
        return config.quantization or told
    if config.quantization is not None:
        raise ModelError(
            "an adapter is merged into floating-point weights: 4-bit ones would round it away",
            where=adapter,
            fix="merge with `mmalign merge ADAPTER NEW_FOLDER` and quantise NEW_FOLDER",
        )
    return None


def _add_head(model: Any, config: ModelConfig, path: str, adapter: str | None) -> None:
    """Attach the reward head that the checkpoint or its adapter has, or the fresh one asked for."""
    stored = reward_head.stored_config(model.config, f"{path}, config.json")
    if stored is not None:
        reward_head.attach(model, stored)
        reward_head.fill(model, path, config.revision)
    elif adapter is not None and (stored := reward_head.adapter_config(adapter)) is not None:
        reward_head.attach(model, stored)  # Its weights come with the adapter's.
    if config.reward_head is None:
        return
    if stored is not None:
        raise ModelError(
            "has a reward head already, and model.reward_head asks for a fresh one",
            where=adapter or path,
            fix="drop model.reward_head to go on with the head that is there",
        )
    reward_head.attach(model, config.reward_head)


def _with_lora(model: Any, family: Family, config: ModelConfig) -> Any:
    from peft import LoraConfig, get_peft_model

    assert config.lora is not None
    if resolve_adapter(config)[1] is not None:
        # The new adapter's file would name the base without the old one, and lose it on loading.
        raise ModelError(
            "a new LoRA adapter on top of an unmerged one cannot be saved by itself",
            where=config.path,
            fix="merge first with `mmalign merge ADAPTER NEW_FOLDER` and train on NEW_FOLDER",
        )
    if not config.train.language_model:
        raise ModelError(
            "LoRA adapts the language model, but model.train.language_model is false",
            fix="drop model.lora, or set model.train.language_model=true",
        )
    targets = lora_pattern(config.lora, family)
    # Saved with the adapter, and given back when it is switched off.
    parts = [m for m in ("vision", "projector") if getattr(config.train, m)]
    if "vision" in parts and family.projector.startswith(f"{family.vision}."):
        parts = ["vision"]
    whole = [getattr(family, name).split(".")[-1] for name in parts]
    if reward_head.head_of(model) is not None:
        whole.append(reward_head.NAME)
    try:
        model = get_peft_model(
            model,
            LoraConfig(
                r=config.lora.rank,
                lora_alpha=config.lora.alpha,
                lora_dropout=config.lora.dropout,
                target_modules=targets,
                modules_to_save=whole or None,
                base_model_name_or_path=config.path,
            ),
        )
    except ValueError as error:
        raise ModelError(
            f"LoRA finds nothing to adapt ({first_line(error)})",
            got=f"model.lora.targets={targets}",
        ) from None
    for name, parameter in model.named_parameters():
        # A projector inside the vision tower comes along with it, and may be meant to stay.
        if part_of(name, family) == "projector" and not config.train.projector:
            parameter.requires_grad_(False)
    return model


def resolve_adapter(config: ModelConfig) -> tuple[str, str | None]:
    """(base, adapter): a folder that holds only an adapter names its base itself."""
    folder = Path(config.path)
    if config.adapter is None and (folder / "adapter_config.json").exists():
        from peft import PeftConfig

        base = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
        if not base:
            raise ModelError("adapter names no base model", where=str(folder))
        return base, str(folder)
    return config.path, config.adapter


def check_folder(path: str) -> None:
    """Refuse a local folder that is no complete checkpoint, before transformers tries the hub."""
    folder = Path(path)
    if folder.is_dir():
        if (folder / "config.json").exists():
            return
        inner = folder / "model"
        fix = (
            f"did you mean {inner}?"
            if (inner / "config.json").exists()
            else ("point to a folder with config.json and safetensors")
        )
        raise ModelError("is no complete checkpoint: it has no config.json", where=path, fix=fix)
    # A hub name has at most one slash; "folder/name" is one too, unless that folder is here.
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1
    looks_local = looks_local or ("/" in path and folder.parent.is_dir())
    if looks_local:
        raise ModelError("no such folder", where=path, fix="train it first, or correct the path")


def _processor(path: str, revision: str | None, trust_remote_code: bool) -> Any:
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(
            path, revision=revision, trust_remote_code=trust_remote_code
        )
    except ImportError as error:
        # SmolVLM's processor wants num2words, a package of the extra `smolvlm`.
        raise ModelError(f"cannot be loaded ({first_line(error)})", where=path) from None
