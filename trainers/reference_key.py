"""What the reference's scores of a dataset depend on, in words that an error can name.

A folder of scores is addressed by the model and by what is scored of a row, so that several models
and losses keep theirs side by side. Everything else that can change a score is its key: where the
key of a folder differs from a recipe's, the scores are stale. Neither knows the run: its seed, its
optimizer, its batches and its fresh adapter change no score of the initial policy.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmalign.attention.choose import Attention
from mmalign.errors import TrainingError
from mmalign.losses.base import Need
from mmalign.models.load import Policy, base_model, resolve_adapter
from mmalign.store import Dataset
from trainers.config import Recipe

# Needs of a loss that change neither the candidates of a row nor what is stored of them.
UNSTORED = {Need.REFERENCE, Need.SCORE_GAP, Need.SPANS, Need.P_TARGET}
# Settings of a model that say how it was loaded or saved, and nothing of what it computes.
LOADING = {"transformers_version", "architectures", "dtype", "use_cache"}
# How peft names the copy of a part that trains beside an adapter.
COPY = ".modules_to_save.default."
HEX = 24
SHOWN = 60


def address(recipe: Recipe) -> dict[str, Any]:
    """What has a folder of its own: the model by name, and what is scored of a row."""
    path, adapter = resolve_adapter(recipe.model)
    bits = recipe.model.quantization
    return {
        "model": place_of(path),
        "revision": recipe.model.revision,
        "adapter": None if adapter is None else place_of(adapter),
        "quantization": None if bits is None else bits.model_dump(),
        "loss needs": sorted(recipe.loss.needs - UNSTORED),
    }


def cache_folder(recipe: Recipe) -> Path:
    """Where the recipe's scores lie: in `reference_cache`, by default beside the dataset."""
    found = address(recipe)
    root = recipe.reference_cache or recipe.data.path / "reference"
    name = "-".join(Path(found["adapter"] or found["model"]).parts[-2:])
    return root / f"{name}-{digest_of(found)[:8]}"


def scores_key(recipe: Recipe, dataset: Dataset[Any], policy: Policy) -> dict[str, Any]:
    """All that the scores depend on, but for files that rows name by path, which are looked at
    row by row. Takes the policy as it was loaded, whole.
    """
    processor, data, model = policy.processor, recipe.data, recipe.model
    config = base_model(policy.model).config.to_diff_dict()
    weights = next(base_model(policy.model).parameters())
    found = {
        "dataset": dataset.manifest.content_hash[:HEX],
        "weights": weights_hash(policy.model),
        "model.config": without(config, LOADING),
        "model.dtype": str(weights.dtype).removeprefix("torch."),
        "run.precision": recipe.run.precision,
        "processor": without(processor.to_dict(), {"processor_class", "chat_template"}),
        "chat template": digest_of(processor.chat_template or processor.tokenizer.chat_template),
        "tokenizer": _tokenizer_hash(processor.tokenizer),
        "model.max_pixels": model.max_pixels,
        "model.frames": model.frames.model_dump(mode="json"),
        "data.max_tokens": data.max_tokens,
        "data.min_response_tokens": data.min_response_tokens,
    }
    return json.loads(json.dumps(found, default=str))


def made_with(recipe: Recipe, device: torch.device, attention: Attention) -> dict[str, Any]:
    """What changes scores by rounding only: kept to be read, never compared."""
    return {
        "layout": recipe.scorer.layout,
        "attention": attention.name,
        "device": device.type,
        "versions": {name: version(name) for name in ("mmalign", "torch", "transformers")},
    }


def differences(old: Any, new: Any, name: str = "") -> Iterator[str]:
    """Phrases that name every value in which two keys differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for part in sorted(old.keys() | new.keys()):
            yield from differences(old.get(part), new.get(part), f"{name}.{part}".lstrip("."))
    elif old != new:
        yield f"{name} was {_shown(old)}, is {_shown(new)}"


def weights_hash(model: nn.Module) -> str:
    """A hash over every byte of the policy that training starts from: `starting_weights`.

    Raises TrainingError where a parameter is not whole.
    """
    return tensors_hash(starting_weights(model))


def starting_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights that training starts from, by their names without an adapter.

    A fresh LoRA adds nothing to the model and does not count, nor does the copy of a part that
    trains beside it: runs with adapters of any rank, and runs without, share their scores.
    Raises TrainingError where a parameter is not whole.
    """
    named = dict(model.named_parameters())
    fresh = not any(bool(p.any()) for name, p in named.items() if "lora_B" in name)
    counted: dict[str, Tensor] = {}
    for name, parameter in named.items():
        if ".original_module." in name or (fresh and "lora_" in name):
            continue
        if parameter.numel() == 0:
            raise TrainingError(
                "the weights are in pieces, so that stored scores cannot be told to be theirs",
                got=f"{name}, empty on this process",
                fix="use another reference than cached, or no ZeRO-3",
            )
        if COPY in name:
            # It is what computes; until it has trained, it differs from its original in dtype.
            original = named[name.replace(COPY, ".original_module.")]
            if torch.equal(parameter, original.to(parameter.dtype)):
                parameter = original
        plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        counted[plain.replace(COPY, ".")] = parameter
    return counted


def tensors_hash(named: Mapping[str, Tensor], *, widened: bool = False) -> str:
    """A hash over the names and every byte of tensors.

    widened: tensors of 16 bits count as float32, which holds all their values.
    """
    # hashlib lets other threads run meanwhile.
    with ThreadPoolExecutor() as threads:
        hashes = threads.map(_widened_hash if widened else _tensor_hash, named.values())
        return digest_of(dict(zip(named, hashes, strict=True)))


def _widened_hash(values: Tensor) -> str:
    narrow = values.dtype in (torch.bfloat16, torch.float16)
    return _tensor_hash(values.detach().float() if narrow else values)


def _tensor_hash(values: Tensor) -> str:
    data = values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
    told = [f"{tuple(values.shape)} {hashlib.sha256(data).hexdigest()}"]
    # bitsandbytes keeps the scales of a quantised weight beside it, in no parameter and no buffer.
    if (state := getattr(values, "quant_state", None)) is not None:
        told += [_tensor_hash(v) for v in state.as_dict().values() if isinstance(v, Tensor)]
    return " ".join(told)


def _tokenizer_hash(tokenizer: Any) -> str:
    told: dict[str, Any] = {"special": tokenizer.special_tokens_map}
    if tokenizer.is_fast:
        whole = json.loads(tokenizer.backend_tokenizer.to_str())
        # How the last call padded, which stays behind in the tokenizer.
        told["backend"] = without(whole, {"padding", "truncation"})
    else:
        told["vocabulary"] = tokenizer.get_vocab()
    return digest_of(told)


def without(values: Any, names: set[str]) -> Any:
    """Nested mappings without the keys `names`, at any depth."""
    if not isinstance(values, dict):
        return values
    return {key: without(value, names) for key, value in values.items() if key not in names}


def digest_of(values: Any) -> str:
    """A short hash of plain values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[
        :HEX
    ]


def place_of(path: str) -> str:
    """What a model is known by: a local folder by its whole path, a hub name as it is."""
    return str(Path(path).resolve()) if Path(path).is_dir() else path


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
