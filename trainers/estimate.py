"""What a recipe trains and how much memory it takes, told from the model's config alone."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForImageTextToText

from mmalign.errors import MediaError
from mmalign.losses.base import Need
from mmalign.models.families import Family
from mmalign.models.load import (
    ModelConfig,
    Part,
    load_processor,
    part_of,
    resolve_adapter,
)
from mmalign.models.lora import lora_pattern
from mmalign.models.reward_head import NAME, adapter_config, attach, stored_config
from mmalign.prepare import Preparer, RowDropped, TokenLimits
from mmalign.store import MANIFEST, open_dataset
from trainers.config import Recipe
from trainers.memory import ACTIVATION_BYTES, memory_of, model_sizes
from trainers.objectives.base import check_dataset, objective_for
from trainers.tracking import part_lines

GIB = 2**30
SAMPLE_ROWS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class RowTokens:
    """Tokens of a row: all its prompts once, and all its responses. `source` says how known.

    rows: how many there are, and images: tokens of a row's pictures, each once; both 0 where
        there is no dataset yet.
    """

    mean: float
    longest: int
    source: str
    rows: int = 0
    images: float = 0.0


def estimate(recipe: Recipe) -> str:
    """The whole estimate as a text for a terminal."""
    loaded = load_processor(
        recipe.model.path, recipe.model.revision, recipe.model.trust_remote_code
    )
    with init_empty_weights():
        model = AutoModelForImageTextToText.from_config(
            loaded.config, trust_remote_code=recipe.model.trust_remote_code
        )
        _attach_head(model, recipe.model, loaded)
    parts = count_parts(model, loaded.family, recipe.model)
    tokens = row_tokens(recipe, loaded)
    sizes = model_sizes(model, loaded.family, parts)
    held = recipe.optim.micro_batch_size or recipe.optim.batch_size
    memory = memory_of(recipe, sizes, held * tokens.longest)
    every, trainable = sizes.num_parameters, sizes.num_trainable
    rows = [
        ("weights", memory.weights),
        ("reference copy", memory.reference),
        ("gradients", memory.gradients),
        ("optimizer", memory.optimizer),
        ("activations (rough)", memory.activations),
        ("all", memory.total),
    ]
    bits = recipe.model.quantization
    packed = [f"{sizes.num_linear:,} weights in 4 bits ({bits.quant_type})"] if bits else []
    return "\n".join(
        [
            *part_lines(parts),
            f"{'all':<16}{every:>16,}{trainable:>16,}  ({trainable / every:.2%})",
            "",
            f"tokens per row: mean {tokens.mean:.0f}, longest {tokens.longest} ({tokens.source})",
            f"tokens per step: about {tokens.mean * recipe.optim.batch_size:,.0f}",
            *packed,
            *_features_lines(recipe, tokens, loaded.config),
            "",
            f"{'memory of one process':<24}{'GiB':>10}",
            *(f"{name:<24}{size / GIB:>10.2f}" for name, size in rows),
            "FSDP spreads the first four over its processes. Activations: "
            f"{ACTIVATION_BYTES} bytes x tokens x layers x width in 16 bits, twice that in 32;",
            "with gradient checkpointing one layer's worth, and 2 (or 4) bytes for all others.",
        ]
    )


def _features_lines(recipe: Recipe, tokens: RowTokens, config: Any) -> list[str]:
    """What stored features would take on disk, if no picture stood in two rows."""
    if recipe.features is None:
        return []
    if not tokens.images:
        return ["vision features: unknown, there are no pictures yet"]
    # Qwen3-VL's DeepStack adds a feature of this width for each tower layer that it taps.
    layers = 1 + len(getattr(config.vision_config, "deepstack_visual_indexes", None) or ())
    narrow = recipe.model.dtype in ("bfloat16", "float16") or recipe.run.precision != "float32"
    each = config.get_text_config().hidden_size * layers * (2 if narrow else 4)
    size = tokens.images * tokens.rows * each / 1e9
    return [
        f"vision features: at most {size:.3g} GB on disk ({tokens.images:.0f} image tokens a row x "
        f"{each:,} bytes x {tokens.rows} rows); cap {recipe.features.cap_gb:g} GB"
    ]


def _attach_head(model: nn.Module, config: ModelConfig, loaded: Preparer) -> None:
    """The reward head that loading would give the model, and its prompt for the rows."""
    adapter = resolve_adapter(config)[1]
    head = config.reward_head or stored_config(loaded.config, config.path)
    head = head or (None if adapter is None else adapter_config(adapter))
    if head is not None:
        attach(model, head)
        loaded.config.reward_head = head.model_dump()


def count_parts(model: nn.Module, family: Family, config: ModelConfig) -> list[Part]:
    """Parameters of each part, and those that would train; adapters count as parameters too."""
    counts = {name: [0, 0] for name in ("vision", "projector", "language_model")}
    for name, parameter in model.named_parameters():
        part = part_of(name, family)
        # With an adapter, the language model's own weights stay; other parts train whole.
        whole = getattr(config.train, part)
        if config.lora is not None and part == "language_model":
            whole = False
        copies = 1
        if name.startswith(f"{NAME}."):
            # It trains in any case; peft trains a copy.
            whole, copies = True, 1 if config.lora is None else 2
        counts[part][0] += parameter.numel() * copies
        counts[part][1] += parameter.numel() * whole
    if config.lora is not None:
        targets = lora_pattern(config.lora, family)
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and re.fullmatch(targets, name):
                added = config.lora.rank * (module.in_features + module.out_features)
                counts[part_of(f"{name}.weight", family)][0] += added
                counts[part_of(f"{name}.weight", family)][1] += added
    return [Part(name=n, num_parameters=a, num_trainable=t) for n, (a, t) in counts.items()]


def row_tokens(recipe: Recipe, loaded: Preparer) -> RowTokens:
    """Measured on up to 64 rows spread over the dataset; from the limits where there is none."""
    data = recipe.data
    if not (data.path / MANIFEST).exists():
        limit = data.max_tokens or 2048
        conditions = 2 if {Need.CONTRAST, Need.REWARD_HEAD} & recipe.loss.needs else 1
        known = "data.max_tokens" if data.max_tokens else "assumed, data.max_tokens is not set"
        source = f"{limit} for each condition: {known}; {data.path} is not there yet"
        return RowTokens(mean=limit * conditions, longest=limit * conditions, source=source)
    dataset = open_dataset(data.path)
    check_dataset(dataset, recipe.loss, online=data.online_rows)
    limits = TokenLimits(
        max_tokens=data.max_tokens,
        min_response_tokens=data.min_response_tokens,
        max_pixels=recipe.model.max_pixels,
    )
    preparer = Preparer(loaded.processor, loaded.config, loaded.family, limits)
    objective = objective_for(recipe.loss, preparer, dataset.media_root, kind=dataset.kind)
    counts, images = [], []
    for row in range(0, len(dataset), max(1, len(dataset) // SAMPLE_ROWS)):
        try:
            made = objective.prepare(dataset[row])
        except (RowDropped, MediaError):
            continue
        counts.append(made.num_tokens)
        pictures = (picture for condition in made.conditions for picture in condition.images)
        images.append(sum({one.key: one.num_tokens for one in pictures}.values()))
    source = f"{len(counts)} rows of {data.path}"
    if not counts:
        return RowTokens(mean=0, longest=0, source=f"no usable row in a sample of {data.path}")
    return RowTokens(
        mean=sum(counts) / len(counts),
        longest=max(counts),
        source=source,
        rows=min(len(dataset), data.limit or len(dataset)),
        images=sum(images) / len(images),
    )
