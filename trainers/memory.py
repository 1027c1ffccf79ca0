"""What one process needs while training, in bytes, from the sizes of its model and its rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from mmalign.losses.base import Need
from mmalign.models.families import Family
from mmalign.models.load import Part, base_model, part_of
from mmalign.models.reward_head import NAME
from mmalign.scoring.plan import Layout
from trainers.config import Recipe
from trainers.objectives.base import PreparedRow

# Bytes per token, layer and hidden unit that a 16-bit transformer keeps for its backward pass,
# attention scores aside (Korthikanti et al., arXiv 2205.05198, section 4.1).
ACTIVATION_BYTES = 34


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSizes:
    """num_linear: weights of the language model's linear layers, which quantisation covers.

    shards: processes over which weights, gradients and moments are spread.
    """

    num_parameters: int
    num_trainable: int
    num_linear: int
    layers: int
    width: int
    shards: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes that one process needs while training."""

    weights: int
    reference: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def standing(self) -> int:
        """What is there whatever the batch."""
        return self.weights + self.reference + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        """Everything together."""
        return self.standing + self.activations


@dataclass(frozen=True, slots=True, kw_only=True)
class ConditionSize:
    """Tokens of a prompt, apart from its media: text; of each picture, each clip, each response."""

    text: int
    images: tuple[int, ...]
    clips: tuple[int, ...]
    responses: tuple[int, ...]

    @property
    def prompt(self) -> int:
        """Text, pictures and clips."""
        return self.text + sum(self.images) + sum(self.clips)


RowSize = tuple[ConditionSize, ...]


def model_sizes(
    model: nn.Module, family: Family, parts: Sequence[Part], *, shards: int = 1
) -> ModelSizes:
    """Of a loaded model, with or without adapter, or of one without storage; parts: its table."""
    base = base_model(model)
    head, text = base.get_output_embeddings(), base.config.get_text_config()
    linear = (
        module.in_features * module.out_features
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear)
        and module is not head
        and "lora_" not in name
        and not name.startswith(NAME)
        and part_of(f"{name}.weight", family) == "language_model"
    )
    return ModelSizes(
        num_parameters=sum(part.num_parameters for part in parts),
        num_trainable=sum(part.num_trainable for part in parts),
        num_linear=sum(linear),
        layers=text.num_hidden_layers,
        width=text.hidden_size,
        shards=shards,
    )


def memory_of(recipe: Recipe, sizes: ModelSizes, tokens: float) -> Memory:
    """Weights and optimizer are counted; the activations of `tokens` follow a rough rule.

    ACTIVATION_BYTES x tokens x layers x width in 16 bits, twice that in 32; with gradient
    checkpointing one layer's worth, and 2 (or 4) bytes for each of the others.
    """
    narrow = recipe.model.dtype in ("bfloat16", "float16")
    trainable, bits = sizes.num_trainable, recipe.model.quantization
    packed = 0 if bits is None else sizes.num_linear
    # What trains is float32 in any case.
    frozen = (sizes.num_parameters - trainable - packed) * (2 if narrow else 4)
    packed_bytes = 0 if bits is None else packed * bits.bytes_per_weight
    weights = int(frozen + packed_bytes + trainable * 4)
    copied = Need.REFERENCE in recipe.loss.needs and recipe.reference_kind() == "frozen_copy"
    moments = 8 if recipe.optim.optimizer == "adamw" else 2
    wide = 1 if narrow or recipe.run.precision != "float32" else 2
    per_token = sizes.width * wide * ACTIVATION_BYTES * sizes.layers
    if recipe.model.gradient_checkpointing:
        per_token = sizes.width * wide * (ACTIVATION_BYTES + 2 * sizes.layers)
    return Memory(
        weights=weights // sizes.shards,
        reference=weights // sizes.shards if copied else 0,
        gradients=4 * trainable // sizes.shards,
        optimizer=moments * trainable // sizes.shards,
        activations=int(tokens * per_token),
    )


def row_size(row: PreparedRow) -> RowSize:
    """The tokens of a prepared row, by what a recipe can change about them."""
    found = []
    for place, condition in enumerate(row.conditions):
        under = [c for c in row.candidates if c.condition == place]
        if under:
            found.append(
                ConditionSize(
                    text=len(condition.prompt_ids) - condition.num_media_tokens,
                    images=tuple(image.num_tokens for image in condition.images),
                    clips=tuple(clip.num_tokens for clip in condition.videos),
                    responses=tuple(len(candidate.response_ids) for candidate in under),
                )
            )
    return tuple(found)


def row_tokens(rows: Iterable[RowSize], layout: Layout, *, packed: bool) -> int:
    """Tokens of rows laid out together, with their padding, as mmalign.scoring.plan does.

    padded: every candidate as long as the longest. shared_prefix: every prompt with its responses
    as long as the longest; packed: all in one row, with none.
    """
    conditions = [condition for row in rows for condition in row]
    if layout == "padded":
        longest = max(c.prompt + max(c.responses) for c in conditions)
        return longest * sum(len(c.responses) for c in conditions)
    lengths = [c.prompt + sum(c.responses) for c in conditions]
    return sum(lengths) if packed else max(lengths) * len(lengths)
