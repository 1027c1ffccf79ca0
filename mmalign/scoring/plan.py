"""How candidates are laid out for the model: `padded` rows or `shared_prefix` rows.

A plan is made on the CPU, where batches are made, and holds everything the scorer needs: tokens,
positions, attention, pictures, and which hidden state predicts which response token.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor

from mmalign.errors import DataError
from mmalign.models.families import Family
from mmalign.scoring.candidates import CandidateBatch, Condition, EncodedImage

Layout = Literal["padded", "shared_prefix"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One forward pass. R rows of S tokens, K response tokens of N candidates, at most T each.

    input_ids: [R, S]. is_image: [R, S] bool, image placeholders.
    attention: [R, S] bool (padded) or [R, 1, S, S] bool (shared_prefix), True where attended.
    positions: [A, R, S] or None where the model's own are right.
    images: processor tensors of the pictures to encode; image_order: which of them fills each
        image place, in row order.
    source: [K] index into the R*S hidden states; target: [K] token ids; candidate, offset: [K],
        where each score goes in the [N, T] result.
    num_tokens: tokens that carry content, for throughput.
    """

    layout: Layout
    input_ids: Tensor
    is_image: Tensor
    attention: Tensor
    positions: Tensor | None
    images: dict[str, Tensor]
    image_order: Tensor
    source: Tensor
    target: Tensor
    candidate: Tensor
    offset: Tensor
    mask: Tensor
    num_tokens: int

    def to(self, device: torch.device | str) -> Plan:
        """The same plan with every tensor on `device`."""

        def move(value: object) -> object:
            if isinstance(value, Tensor):
                return value.to(device, non_blocking=True)
            if isinstance(value, dict):
                return {key: item.to(device, non_blocking=True) for key, item in value.items()}
            return value

        return replace(self, **{f.name: move(getattr(self, f.name)) for f in fields(self)})


def make_plan(
    batch: CandidateBatch, family: Family, layout: Layout, *, image_token_id: int, pad_token_id: int
) -> Plan:
    """Lay a batch out.

    padded: one row per candidate, [prompt | response | pad]; each row brings its own pictures, and
        the model makes its own positions. The layout every family runs, and the one the other is
        tested against.
    shared_prefix: one row per condition, [prompt | response 1 | response 2 | ... | pad]. Each
        response sees the prompt and itself, never its siblings, and its positions restart after
        the prompt, so every response token sees what it would see in a row of its own.
    Raises DataError, naming the row, where image placeholders and image features differ.
    """
    for condition in batch.conditions:
        _check_images(condition, image_token_id)
    if layout == "padded":
        rows = [
            _Row(condition=batch.conditions[c.condition], branches=[(index, c.response_ids)])
            for index, c in enumerate(batch.candidates)
        ]
    else:
        rows = [_Row(condition=condition, branches=[]) for condition in batch.conditions]
        for index, c in enumerate(batch.candidates):
            rows[c.condition].branches.append((index, c.response_ids))
        rows = [row for row in rows if row.branches]
    width = max(row.length for row in rows)
    input_ids = torch.full((len(rows), width), pad_token_id)
    token_mask = torch.zeros(len(rows), width, dtype=torch.bool)
    source: list[int] = []
    target: list[int] = []
    candidate: list[int] = []
    offset: list[int] = []
    for r, row in enumerate(rows):
        tokens = list(row.condition.prompt_ids)
        for index, response in row.branches:
            # The first token of every branch is predicted by the prompt's last state, wherever
            # the branch lies in the row.
            start = r * width + len(tokens)
            source += [r * width + len(row.condition.prompt_ids) - 1]
            source += range(start, start + len(response) - 1)
            target += response
            candidate += [index] * len(response)
            offset += range(len(response))
            tokens += response
        input_ids[r, : len(tokens)] = torch.tensor(tokens)
        token_mask[r, : len(tokens)] = True
    shared = layout == "shared_prefix"
    images, order = _images(rows, family, unique=shared)
    mask = torch.zeros(len(batch.candidates), max(offset) + 1, dtype=torch.bool)
    mask[candidate, offset] = True
    return Plan(
        layout=layout,
        input_ids=input_ids,
        is_image=(input_ids == image_token_id) & token_mask,
        attention=_branch_attention(rows, width) if shared else token_mask,
        positions=_branch_positions(rows, width, family.num_axes) if shared else None,
        images=images,
        image_order=torch.tensor(order, dtype=torch.long),
        source=torch.tensor(source),
        target=torch.tensor(target),
        candidate=torch.tensor(candidate),
        offset=torch.tensor(offset),
        mask=mask,
        num_tokens=int(token_mask.sum()),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    condition: Condition
    branches: list[tuple[int, list[int]]]

    @property
    def length(self) -> int:
        return len(self.condition.prompt_ids) + sum(len(ids) for _, ids in self.branches)


def _check_images(condition: Condition, image_token_id: int) -> None:
    tokens = condition.prompt_ids.count(image_token_id)
    if tokens != condition.num_image_tokens:
        raise DataError(
            "image tokens and image features do not match",
            where=f"row {condition.id}",
            got=f"{tokens} placeholders in the prompt",
            wanted=f"{condition.num_image_tokens}, one for each feature",
        )


def _images(
    rows: list[_Row], family: Family, *, unique: bool
) -> tuple[dict[str, Tensor], list[int]]:
    """Processor tensors to encode, each distinct picture once if `unique`, and the fill order."""
    chosen: list[EncodedImage] = []
    index_of: dict[str, int] = {}
    order: list[int] = []
    for row in rows:
        for image in row.condition.images:
            if not unique or image.key not in index_of:
                index_of[image.key] = len(chosen)
                chosen.append(image)
            order.append(index_of[image.key])
    if not chosen:
        return {}, []
    return {
        name: torch.cat([image.inputs[name] for image in chosen]) for name in family.image_inputs
    }, order


def _branch_positions(rows: list[_Row], width: int, num_axes: int) -> Tensor:
    """[A, R, S]: the prompt's positions, then each branch counting on from the prompt's end."""
    result = torch.zeros(num_axes, len(rows), width, dtype=torch.long)
    for r, row in enumerate(rows):
        end = len(row.condition.prompt_ids)
        result[:, r, :end] = row.condition.positions
        follow = int(row.condition.positions.max()) + 1
        for _, response in row.branches:
            result[:, r, end : end + len(response)] = torch.arange(follow, follow + len(response))
            end += len(response)
    return result


def _branch_attention(rows: list[_Row], width: int) -> Tensor:
    """[R, 1, S, S] bool: causal, no branch sees another; padding sees itself, to stay finite."""
    branch = torch.full((len(rows), width), -1)
    for r, row in enumerate(rows):
        end = len(row.condition.prompt_ids)
        branch[r, :end] = 0
        for number, (_, response) in enumerate(row.branches, start=1):
            branch[r, end : end + len(response)] = number
            end += len(response)
    query, key = branch[:, :, None], branch[:, None, :]
    sees = torch.ones(width, width, dtype=torch.bool).tril() & ((key == query) | (key == 0))
    return sees[:, None]
