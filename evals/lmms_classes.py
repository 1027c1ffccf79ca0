"""Model classes of lmms-eval 0.7.3, and the arguments that load a checkpoint of ours into one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mmalign.errors import ConfigError

if TYPE_CHECKING:
    from evals.config import EvalModel


@dataclass(frozen=True, kw_only=True)
class LmmsClass:
    """A model class of lmms-eval, and which of a recipe's model settings it takes.

    weights: the type it loads weights in; None where `dtype` says so. min_pixels: smaller pictures
    are enlarged to this by default, None where it has no limits.
    """

    name: str
    weights: str | None = None
    takes: frozenset[str] = frozenset()
    min_pixels: int | None = None


_LLAVA = LmmsClass(
    name="llava_hf", takes=frozenset({"dtype", "revision", "trust_remote_code", "attention"})
)
# The minimum of the Qwen checkpoints themselves, 56 x 56, and of qwen2_vl.
_LEAST = 3136
_QWEN = frozenset({"max_pixels", "attention"})
# By the model_type of config.json. There is none for PaliGemma, Idefics3 and SmolVLM.
CLASSES: dict[str, LmmsClass] = {
    "llava": _LLAVA,
    "llava_next": _LLAVA,
    "llava_onevision": _LLAVA,
    "qwen2_vl": LmmsClass(
        name="qwen2_vl",
        weights="auto",
        takes=frozenset({"max_pixels"}),
        min_pixels=_LEAST,
    ),
    "qwen2_5_vl": LmmsClass(
        name="qwen2_5_vl", weights="bfloat16", takes=_QWEN, min_pixels=256 * 28 * 28
    ),
    "qwen3_vl": LmmsClass(
        name="qwen3_vl", weights="bfloat16", takes=_QWEN, min_pixels=256 * 28 * 28
    ),
    "gemma3": LmmsClass(
        name="gemma3", weights="bfloat16", takes=frozenset({"trust_remote_code", "attention"})
    ),
    "internvl": LmmsClass(
        name="internvl_hf",
        weights="bfloat16",
        takes=frozenset({"revision", "trust_remote_code", "attention"}),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a user says of the class: its name, arguments after those found here, and a device."""

    model_class: str | None = None
    model_args: str = ""
    device: str | None = None


def arguments(model: EvalModel, checkpoint: str, choice: Choice) -> tuple[str, str, list[str]]:
    """(class, its arguments as lmms-eval reads them, settings of the recipe that it cannot take).

    Raises ConfigError for a family without a class here, or what cannot be passed on.
    """
    if model.quantization is not None:
        raise ConfigError(
            "lmms-eval's classes load no weights in 4 bits",
            where="model.quantization",
            fix="drop it; an adapter is then merged into floating-point weights",
        )
    chosen = _class_of(checkpoint, model, choice)
    if (model.revision is not None and "revision" not in chosen.takes) and not _local(checkpoint):
        raise ConfigError(
            f"lmms-eval's {chosen.name} takes no revision, and would load another checkpoint",
            where="model.revision",
            got=model.revision,
            fix="download that revision into a folder, and give the folder as model.path",
        )
    given: dict[str, object] = {"pretrained": plain(checkpoint, "the checkpoint's path")}
    left_out: list[str] = []
    if chosen in CLASSES.values():
        device = choice.device or _device()
        # Both, since a class either reads the one or the other, and its defaults want a GPU.
        given |= {"device": device, "device_map": device}
    elif choice.device is not None:
        given["device"] = choice.device
    if model.revision is not None and not _local(checkpoint):
        given["revision"] = model.revision
    if "dtype" in chosen.takes:
        given["dtype"] = model.dtype
    elif chosen.weights != model.dtype:
        loads = "as stored" if chosen.weights == "auto" else f"in {chosen.weights}"
        loads = loads if chosen.weights else "in a type of its own choice"
        left_out.append(f"dtype={model.dtype}: {chosen.name} loads weights {loads}")
    if model.max_pixels is not None:
        if "max_pixels" in chosen.takes and chosen.min_pixels is not None:
            given["max_pixels"] = model.max_pixels
            if model.max_pixels < chosen.min_pixels:
                # Else pictures are enlarged to that minimum, whatever the maximum says.
                given["min_pixels"] = min(model.max_pixels, _LEAST)
        else:
            left_out.append(f"max_pixels={model.max_pixels}")
    if model.attention != "auto":
        if "attention" in chosen.takes:
            given["attn_implementation"] = model.attention
        else:
            left_out.append(f"attention={model.attention}")
    if model.trust_remote_code:
        if "trust_remote_code" in chosen.takes:
            given["trust_remote_code"] = True
        else:
            left_out.append("trust_remote_code=true")
    if model.frames != type(model).model_fields["frames"].default:
        left_out.append("frames: clips are sampled by lmms-eval's own rule")
    # Later ones count, where a name comes twice.
    parts = [*(f"{name}={value}" for name, value in given.items()), choice.model_args.strip(", ")]
    return chosen.name, ",".join(filter(None, parts)), left_out


def _class_of(checkpoint: str, model: EvalModel, choice: Choice) -> LmmsClass:
    """The class asked for, or that of the checkpoint's family. Raises ConfigError."""
    known = {one.name: one for one in CLASSES.values()}
    if choice.model_class is not None:
        return known.get(choice.model_class) or LmmsClass(name=choice.model_class)
    kind = _model_type(checkpoint, model)
    if kind not in CLASSES:
        raise ConfigError(
            f"no class of lmms-eval is known here for model_type {kind}",
            where=checkpoint,
            wanted=f"one of {', '.join(CLASSES)}",
            fix="if lmms-eval has one (`python -m lmms_eval models`), name it with --lmms-model, "
            "and give what it takes with --model-args, such as device=cuda",
        )
    return CLASSES[kind]


def _model_type(checkpoint: str, model: EvalModel) -> str:
    if _local(checkpoint):
        try:
            told = json.loads((Path(checkpoint) / "config.json").read_text(encoding="utf-8"))
            return str(told.get("model_type"))
        except (OSError, ValueError, AttributeError) as error:
            raise ConfigError(f"has no readable config.json ({error})", where=checkpoint) from None
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(
            checkpoint, revision=model.revision, trust_remote_code=model.trust_remote_code
        ).model_type
    except (OSError, ValueError) as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"cannot be loaded ({why})", where=checkpoint) from None


def _local(checkpoint: str) -> bool:
    return Path(checkpoint).is_dir()


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def plain(text: str, what: str) -> str:
    """A text that survives lmms-eval's own splitting of arguments."""
    if odd := sorted(set(text) & set(",'\"{}[]")):
        raise ConfigError(
            f"{what} cannot be handed to lmms-eval, which splits its arguments at commas",
            got=text,
            fix=f"choose one without {' '.join(odd)}",
        )
    return text
