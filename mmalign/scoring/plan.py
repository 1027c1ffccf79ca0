"""How candidates are laid out for the model: `padded` rows or `shared_prefix` rows.

A plan is made on the CPU, where batches are made, and holds everything the scorer needs: tokens,
positions, attention, pictures, and which hidden state predicts which response token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from mmalign.errors import DataError
from mmalign.models.families import Family
from mmalign.scoring.candidates import CandidateBatch, Condition, EncodedMedia

Layout = Literal["padded", "shared_prefix"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One forward pass. R rows of S tokens, K response tokens of N candidates, at most T each.

    input_ids: [R, S]. is_image, is_video: [R, S] bool, placeholders of pictures and of clips.
    attention: [R, S] bool (padded) or [R, 1, S, S] bool (shared_prefix), True where attended.
    positions: [A, R, S] or None where the model's own are right.
    images, videos: processor tensors of the pictures and clips to encode; image_order,
        video_order: which of them fills each place, in row order.
    source: [K] index into the R*S hidden states; target: [K] token ids; candidate, offset: [K],
        where each score goes in the [N, T] result.
    last: [N] index into the R*S hidden states of each candidate's last token.
    mask: [N, T] bool, response tokens; marked: [N, T] bool, those in a differing phrase, or None.
    num_tokens: tokens that carry content, for throughput.
    """

    layout: Layout
    input_ids: Tensor
    is_image: Tensor
    is_video: Tensor
    attention: Tensor
    positions: Tensor | None
    images: dict[str, Tensor]
    image_order: Tensor
    videos: dict[str, Tensor]
    video_order: Tensor
    source: Tensor
    target: Tensor
    candidate: Tensor
    offset: Tensor
    last: Tensor
    mask: Tensor
    marked: Tensor | None
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
    batch: CandidateBatch,
    family: Family,
    layout: Layout,
    *,
    image_token_id: int,
    video_token_id: int | None,
    pad_token_id: int,
) -> Plan:
    """Lay a batch out.

    padded: one row per candidate, [prompt | response | pad]; each row brings its own pictures, and
        the model makes its own positions. The layout every family runs, and the one the other is
        tested against.
    shared_prefix: one row per condition, [prompt | response 1 | response 2 | ... | pad]. Each
        response sees the prompt and itself, never its siblings, and its positions restart after
        the prompt, so every response token sees what it would see in a row of its own.
    Raises DataError, naming the row, where placeholders and features of pictures or clips differ.
    """
    for condition in batch.conditions:
        _check_media(condition, "image", image_token_id, condition.num_image_tokens)
        _check_media(condition, "video", video_token_id, condition.num_video_tokens)
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
    last = torch.zeros(len(batch.candidates), dtype=torch.long)
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
            last[index] = start + len(response) - 1
            tokens += response
        input_ids[r, : len(tokens)] = torch.tensor(tokens)
        token_mask[r, : len(tokens)] = True
    shared = layout == "shared_prefix"
    images, image_order = _media(
        [row.condition.images for row in rows], family.image_inputs, unique=shared
    )
    videos, video_order = _media(
        [row.condition.videos for row in rows], family.video_inputs, unique=shared
    )
    mask = torch.zeros(len(batch.candidates), max(offset) + 1, dtype=torch.bool)
    mask[candidate, offset] = True
    is_video = token_mask & (input_ids == (-1 if video_token_id is None else video_token_id))
    return Plan(
        layout=layout,
        input_ids=input_ids,
        is_image=(input_ids == image_token_id) & token_mask,
        is_video=is_video,
        attention=_branch_attention(rows, width) if shared else token_mask,
        positions=_branch_positions(rows, width, family.num_axes) if shared else None,
        images=images,
        image_order=torch.tensor(image_order, dtype=torch.long),
        videos=videos,
        video_order=torch.tensor(video_order, dtype=torch.long),
        source=torch.tensor(source),
        target=torch.tensor(target),
        candidate=torch.tensor(candidate),
        offset=torch.tensor(offset),
        last=last,
        mask=mask,
        marked=_marked(batch, mask),
        num_tokens=int(token_mask.sum()),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    condition: Condition
    branches: list[tuple[int, list[int]]]

    @property
    def length(self) -> int:
        return len(self.condition.prompt_ids) + sum(len(ids) for _, ids in self.branches)


def _check_media(condition: Condition, kind: str, token_id: int | None, num_features: int) -> None:
    tokens = 0 if token_id is None else condition.prompt_ids.count(token_id)
    if tokens != num_features:
        raise DataError(
            f"{kind} tokens and {kind} features do not match",
            where=f"row {condition.id}",
            got=f"{tokens} placeholders in the prompt",
            wanted=f"{num_features}, one for each feature",
        )


def _media(
    rows: Sequence[tuple[EncodedMedia, ...]], names: tuple[str, ...], *, unique: bool
) -> tuple[dict[str, Tensor], list[int]]:
    """Processor tensors to encode, each distinct picture once if `unique`, and the fill order."""
    chosen: list[EncodedMedia] = []
    index_of: dict[str, int] = {}
    order: list[int] = []
    for row in rows:
        for media in row:
            if not unique or media.key not in index_of:
                index_of[media.key] = len(chosen)
                chosen.append(media)
            order.append(index_of[media.key])
    if not chosen:
        return {}, []
    return {name: joined(name, [media.inputs[name] for media in chosen]) for name in names}, order


def joined(name: str, tensors: Sequence[Tensor]) -> Tensor:
    """Processor tensors `name` of several pictures or clips as one, along the first axis.

    Pictures cut into different numbers of tiles ([1, tiles, C, H, W]) are filled up with empty
    tiles, which the model takes off again by each picture's size. Clips cannot be: raises
    DataError where a family that takes them as [1, frames, C, H, W] meets different numbers.
    """
    widest = max((t.shape[1] for t in tensors if t.dim() == 5), default=0)
    if all(t.dim() != 5 or t.shape[1] == widest for t in tensors):
        return torch.cat(list(tensors))
    if name == "pixel_values_videos":
        raise DataError(
            "clips of one batch have different numbers of frames, which this family cannot take",
            got=" and ".join(map(str, sorted({t.shape[1] for t in tensors}))),
            fix="sample by model.frames.num_frames, or use batches of one row",
        )
    return torch.cat([pad(t, (0, 0) * 3 + (0, widest - t.shape[1])) for t in tensors])


def _marked(batch: CandidateBatch, mask: Tensor) -> Tensor | None:
    """[N, T] bool, or None where no candidate says what is marked in it."""
    if all(candidate.marked is None for candidate in batch.candidates):
        return None
    result = torch.zeros_like(mask)
    for row, candidate in enumerate(batch.candidates):
        if candidate.marked is not None:
            result[row, : len(candidate.marked)] = torch.tensor(candidate.marked)
    return result


def _branch_positions(rows: list[_Row], width: int, num_axes: int) -> Tensor:
    """[A, R, S]: the prompt's positions, then each branch counting on from the prompt's end."""
    result = torch.zeros(num_axes, len(rows), width, dtype=torch.long)
    for r, row in enumerate(rows):
        end = len(row.condition.prompt_ids)
        result[:, r, :end] = row.condition.positions
        # From the last token, not the largest position: a clip's time may run ahead of the text.
        follow = int(row.condition.positions[:, -1].max()) + 1
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
