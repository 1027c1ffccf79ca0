"""Load CLIP models of open_clip and transformers; no weight is left random without saying so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from mmalign.errors import ModelError
from mmalign.log import quiet_libraries
from mmalign.models.load import check_folder
from mmalign.models.lora import first_line

Precision = Literal["fp32", "bf16", "fp16"]
# Which side of a picture becomes the model's size: the longer, with black bars, or the shorter,
# with a centre crop.
ResizeMode = Literal["shortest", "longest"]
# Names after these bring their own weights, and open_clip does not look at `pretrained`.
_WHOLE = ("hf-hub:", "local-dir:")


def device_for(device: str | None) -> str:
    """The device that is asked for; where None, a GPU if there is one."""
    import torch

    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def open_clip_name(model: str, pretrained: str | None) -> str:
    """How manifests and reports call it; random weights are called so."""
    if model.startswith(_WHOLE):
        return f"open_clip:{model}"
    return f"open_clip:{model}:{pretrained or 'random'}"


def dtypes() -> dict[Precision, Any]:
    """What each precision is to torch."""
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_open_clip(
    model: str,
    pretrained: str | None,
    *,
    precision: Precision,
    device: str,
    resize_mode: ResizeMode | None = None,
) -> tuple[Any, Any, str]:
    """An open_clip model in eval mode, its transform of pictures, and open_clip's name for it.

    model, pretrained: as in OpenClipModel. resize_mode: the model's own where None. Raises
    ModelError where it cannot be loaded, or where the tag's weights were trained with another
    activation than the named model has.
    """
    import open_clip
    import torch

    where = open_clip_name(model, pretrained)
    whole = model.startswith(_WHOLE)
    if whole and pretrained is not None:
        raise ModelError(
            "brings its own weights", where=where, got=f"pretrained={pretrained}", wanted="null"
        )
    try:
        if model.endswith(".json"):
            # open_clip keeps a path that it cannot read, and then fails for every other model.
            json.loads(Path(model).read_text())
            open_clip.add_model_config(Path(model))
            model = Path(model).stem
        if not whole and pretrained is not None:
            _check_activation(model, pretrained, where)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            clip, _, transform = open_clip.create_model_and_transforms(
                model,
                pretrained,
                precision=precision,
                device=device,
                image_resize_mode=resize_mode,
                require_pretrained=whole or pretrained is not None,
            )
    except ModelError:
        raise
    except Exception as error:
        # open_clip and torch raise whatever they like on a broken file; each means the same here.
        raise ModelError(
            f"open_clip model cannot be loaded ({first_line(error)})",
            where=where,
            wanted="a name and tag of open_clip.list_pretrained(), or files",
        ) from error
    return clip.eval(), transform, model


def load_transformers_clip(path: str, dtype: Any) -> Any:
    """A CLIPModel with every weight from its files. Raises ModelError for anything else."""
    from transformers import AutoConfig, CLIPModel

    quiet_libraries()
    check_folder(path)
    fix = "check the path or hub name; a half-copied folder has to be copied again"
    try:
        stored = AutoConfig.from_pretrained(path)
        if stored.model_type == "clip":
            # Its own error for weights of another shape does not say which; below, ours does.
            loaded: Any = CLIPModel.from_pretrained(
                path, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
            )
    except Exception as error:
        raise ModelError(
            f"cannot be loaded ({first_line(error)})", where=path, wanted="a CLIP", fix=fix
        ) from error
    if stored.model_type != "clip":
        raise ModelError("is another model", where=path, got=stored.model_type, wanted="clip")
    model, found = loaded
    mismatched = [name for name, *_ in found["mismatched_keys"]]
    if lost := sorted([*found["missing_keys"], *mismatched]):
        # transformers only warns, and goes on with random weights.
        raise ModelError(
            "weights are missing or have another shape",
            where=path,
            got=f"{len(lost)} such tensors, {lost[0]} among them",
            fix="copy the checkpoint again, or correct its config.json",
        )
    return model


def _check_activation(model: str, tag: str, where: str) -> None:
    """open_clip only warns, and computes with an activation that the weights never saw."""
    from open_clip import get_model_config, get_pretrained_cfg

    architecture = get_model_config(model)
    if architecture is None:
        return  # open_clip itself refuses it, and lists what it knows.
    # The other way round a tag merely does not say what its model's config does.
    if get_pretrained_cfg(model, tag).get("quick_gelu") and not architecture.get("quick_gelu"):
        raise ModelError(
            "the weights were trained with QuickGELU, which this model does not have",
            where=where,
            fix=f"use model={model}-quickgelu",
        )
