"""What a layout costs in arithmetic, told from token counts before anything runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from mmalign.models.families import Family
from mmalign.models.load import base_model, part_of
from mmalign.scoring.candidates import CandidateBatch, Condition

# Operations of attention take longer than those of a matrix product: softmax between two products
# of short inner length. Measured per backend in docs/benchmarks.md ("Layouts").
ATTENTION_WEIGHT = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCost:
    """Multiplications and additions of one forward pass.

    token: of the language model's linear layers, for each token. pair: of its attention, for each
    query and key that meet. patch: of tower and projector, for each patch of a picture of
    `patch_pixels` pixels. The vocabulary projection is the same in every layout and left out.
    trained_tower: whether gradients flow through the tower.
    """

    token: float
    pair: float
    patch: float
    patch_pixels: int
    trained_tower: bool


def model_cost(model: nn.Module, family: Family) -> ModelCost:
    """Counted from the model's linear layers; attention from its config."""
    base = base_model(model)
    config = base.config.get_text_config()
    words = base.get_output_embeddings()
    counts = {"language_model": 0, "projector": 0, "vision": 0}
    trained = False
    for name, module in base.named_modules():
        if isinstance(module, nn.Linear) and module is not words:
            part = part_of(name, family)
            counts[part] += module.in_features * module.out_features
            trained |= part != "language_model" and module.weight.requires_grad
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return ModelCost(
        token=2.0 * counts["language_model"],
        pair=4.0 * config.num_hidden_layers * config.num_attention_heads * width,
        patch=2.0 * (counts["vision"] + counts["projector"]),
        patch_pixels=_patch_pixels(base.config.vision_config),
        trained_tower=trained,
    )


def padded_cost(batch: CandidateBatch, cost: ModelCost) -> float:
    """Of a training step in the padded layout: rows as long as the longest, masked whole."""
    conditions = [batch.conditions[c.condition] for c in batch.candidates]
    sizes = [
        len(condition.prompt_ids) + len(candidate.response_ids)
        for condition, candidate in zip(conditions, batch.candidates, strict=True)
    ]
    width = max(sizes)
    # Rows of one length need no mask, and causal kernels skip half of the pairs.
    pairs = len(sizes) * width**2 / (2 if min(sizes) == width else 1)
    return _cost(cost, len(sizes) * width, pairs, _patches(conditions, cost, unique=False))


def shared_cost(
    batch: CandidateBatch, cost: ModelCost, *, packed: bool, two_way: bool = False
) -> float:
    """Of a training step in the shared_prefix layout, packed, or in rows as long as the longest.

    two_way: whether prompt tokens see all of their prompt.
    """
    lengths: dict[int, list[int]] = {}
    for candidate in batch.candidates:
        lengths.setdefault(candidate.condition, []).append(len(candidate.response_ids))
    conditions = [batch.conditions[number] for number in lengths]
    prompts = [len(condition.prompt_ids) for condition in conditions]
    sums = [sum(own) for own in lengths.values()]
    patches = _patches(conditions, cost, unique=True)
    if packed:
        pairs = sum(
            p * p / (1 if two_way else 2) + p * r + sum(n * n for n in own) / 2
            for p, r, own in zip(prompts, sums, lengths.values(), strict=True)
        )
        return _cost(cost, sum(prompts) + sum(sums), pairs, patches)
    width = max(p + r for p, r in zip(prompts, sums, strict=True))
    return _cost(cost, len(prompts) * width, len(prompts) * width**2, patches)


def _cost(cost: ModelCost, tokens: float, pairs: float, patches: float) -> float:
    # A backward pass is twice a forward one; a frozen tower has none.
    language = 3 * (tokens * cost.token + ATTENTION_WEIGHT * pairs * cost.pair)
    return language + (3 if cost.trained_tower else 1) * patches * cost.patch


def _patches(conditions: list[Condition], cost: ModelCost, *, unique: bool) -> float:
    media = [one for c in conditions for one in c.images + c.videos]
    if unique:
        media = list({one.key: one for one in media}.values())
    pixels = sum(
        tensor.numel() for one in media for name, tensor in one.inputs.items() if "pixel" in name
    )
    return pixels / cost.patch_pixels


def _patch_pixels(vision: Any) -> int:
    """Numbers that a processor hands over for one patch."""
    size = vision.patch_size
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return 3 * height * width * (getattr(vision, "temporal_patch_size", None) or 1)
