"""How candidates are laid out for the model: `padded` or `shared_prefix`, in rows or packed.

A plan is made on the CPU, where batches are made, and holds everything the scorer needs: tokens,
positions, attention, pictures, and which hidden state predicts which response token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from mmalign.attention.tree import Tree, make_tree
from mmalign.errors import DataError
from mmalign.models.families import Family
from mmalign.scoring.candidates import CandidateBatch, Condition, EncodedMedia, Features

Layout = Literal["padded", "shared_prefix"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One forward pass. R rows of S tokens, K response tokens of N candidates, at most T each.

    input_ids: [R, S]. is_image, is_video, is_response: [R, S] bool, placeholders of pictures and
        of clips, and tokens of responses.
    attention: [R, S] bool (padded) or [R, 1, S, S] bool (rows of shared_prefix), True where
        attended; None for a packed row, whose `tree` says it. windowed: the same as attention
        for layers with a sliding window, where the model has such.
    positions: [A, R, S] or None where the model's own are right.
    images, videos: processor tensors of the pictures and clips to encode; image_order,
        video_order: which of their features fill each place, in row order.
    features: of the same pictures, where the tower has run on them before; `images` then holds
        what is not pixels.
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
    is_response: Tensor
    attention: Tensor | None
    windowed: Tensor | None
    tree: Tree | None
    positions: Tensor | None
    images: dict[str, Tensor]
    image_order: Tensor
    features: tuple[Features, ...]
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
            if isinstance(value, Tree):
                return value.to(device)
            if isinstance(value, dict):
                return {key: item.to(device, non_blocking=True) for key, item in value.items()}
            if isinstance(value, tuple):
                return tuple(item.to(device) for item in value)
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
    packed: bool = False,
    window: int | None = None,
) -> Plan:
    """Lay a batch out.

    padded: one row per candidate, [prompt | response | pad]; each row brings its own pictures, and
        the model makes its own positions. The layout every family runs, and the one the other is
        tested against.
    shared_prefix: one row per condition, [prompt | response 1 | response 2 | ... | pad]. Each
        response sees the prompt and itself, never its siblings, and its positions restart after
        the prompt, so every response token sees what it would see in a row of its own.
    packed: shared_prefix in a single row without padding, all prompts before all responses; for
        attention that follows a `tree` instead of a mask.
    window: what a layer with a sliding window sees, in tokens of the prompt and the response.
    Raises DataError, naming the row, where placeholders and features of pictures or clips differ.
    """
    for condition in batch.conditions:
        _check_media(condition, "image", image_token_id, condition.num_image_tokens)
        _check_media(condition, "video", video_token_id, condition.num_video_tokens)
    shared = layout == "shared_prefix"
    groups = _groups(batch, shared)
    prompts = [len(group.condition.prompt_ids) for group in groups]
    lengths = [[len(ids) for _, ids in group.branches] for group in groups]
    if packed and shared:
        rows, width = 1, sum(prompts) + sum(map(sum, lengths))
    else:
        rows, width = len(groups), max(p + sum(r) for p, r in zip(prompts, lengths, strict=True))
    starts = _starts(prompts, lengths, width, packed=packed and shared)
    input_ids = torch.full((rows * width,), pad_token_id)
    # 0 in a prompt, the branch's number from 1 in a response, -1 in padding.
    branch = torch.full((rows * width,), -1)
    source: list[int] = []
    target: list[int] = []
    candidate: list[int] = []
    offset: list[int] = []
    last = torch.zeros(len(batch.candidates), dtype=torch.long)
    for group, size, (start, branch_starts) in zip(groups, prompts, starts, strict=True):
        input_ids[start : start + size] = torch.tensor(group.condition.prompt_ids)
        branch[start : start + size] = 0
        for number, ((index, response), place) in enumerate(
            zip(group.branches, branch_starts, strict=True), start=1
        ):
            stop = place + len(response)
            input_ids[place:stop] = torch.tensor(response)
            branch[place:stop] = number
            # The first token of every branch is predicted by the prompt's last state, wherever
            # the branch lies in the row.
            source += [start + size - 1, *range(place, stop - 1)]
            target += response
            candidate += [index] * len(response)
            offset += range(len(response))
            last[index] = stop - 1
    pictures, image_order = _places(
        [group.condition.images for group in groups], unique=shared, num_pieces=family.num_pieces
    )
    clips, video_order = _places([group.condition.videos for group in groups], unique=shared)
    mask = torch.zeros(len(batch.candidates), max(offset) + 1, dtype=torch.bool)
    mask[candidate, offset] = True
    input_ids, branch = input_ids.view(rows, width), branch.view(rows, width)
    is_image = (branch >= 0) & (input_ids == image_token_id)
    positions = attention = windowed = tree = None
    if shared:
        own = [group.condition.positions for group in groups]
        positions = _counted(groups, starts, rows, width, own)
        if packed:
            tree = make_tree(prompts, lengths, two_way=family.prompt_attention == "bidirectional")
        else:
            attention = _row_attention(branch, is_image, family)
            if window is not None:
                order = [torch.arange(size)[None] for size in prompts]
                (places,) = _counted(groups, starts, rows, width, order)
                near = places[:, :, None] - places[:, None, :] < window
                windowed = attention & near[:, None]
    else:
        attention = branch >= 0
    return Plan(
        layout=layout,
        input_ids=input_ids,
        is_image=is_image,
        is_video=(branch >= 0) & (input_ids == (-1 if video_token_id is None else video_token_id)),
        is_response=branch > 0,
        attention=attention,
        windowed=windowed,
        tree=tree,
        positions=positions,
        images=_inputs(pictures, family.image_inputs),
        image_order=torch.tensor(image_order, dtype=torch.long),
        features=_features(pictures),
        videos=_inputs(clips, family.video_inputs),
        video_order=torch.tensor(video_order, dtype=torch.long),
        source=torch.tensor(source),
        target=torch.tensor(target),
        candidate=torch.tensor(candidate),
        offset=torch.tensor(offset),
        last=last,
        mask=mask,
        marked=_marked(batch, mask),
        num_tokens=int((branch >= 0).sum()),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """A condition and the candidates under it that share it, by number."""

    condition: Condition
    branches: list[tuple[int, list[int]]]


# Where a group's prompt starts among all R*S tokens, and where each of its branches does.
_Start = tuple[int, list[int]]


def _groups(batch: CandidateBatch, shared: bool) -> list[_Group]:
    if not shared:
        return [
            _Group(condition=batch.conditions[c.condition], branches=[(index, c.response_ids)])
            for index, c in enumerate(batch.candidates)
        ]
    groups = [_Group(condition=condition, branches=[]) for condition in batch.conditions]
    for index, c in enumerate(batch.candidates):
        groups[c.condition].branches.append((index, c.response_ids))
    return [group for group in groups if group.branches]


def _starts(
    prompts: list[int], lengths: list[list[int]], width: int, *, packed: bool
) -> list[_Start]:
    result: list[_Start] = []
    branch = sum(prompts)
    for number, (size, own) in enumerate(zip(prompts, lengths, strict=True)):
        start = sum(prompts[:number]) if packed else number * width
        branch = branch if packed else start + size
        result.append((start, [branch + sum(own[:n]) for n in range(len(own))]))
        branch += sum(own)
    return result


def _check_media(condition: Condition, kind: str, token_id: int | None, num_features: int) -> None:
    tokens = 0 if token_id is None else condition.prompt_ids.count(token_id)
    if tokens != num_features:
        raise DataError(
            f"{kind} tokens and {kind} features do not match",
            where=f"row {condition.id}",
            got=f"{tokens} placeholders in the prompt",
            wanted=f"{num_features}, one for each feature",
        )


def _places(
    rows: Sequence[tuple[EncodedMedia, ...]],
    *,
    unique: bool,
    num_pieces: Callable[[Mapping[str, Tensor]], int] | None = None,
) -> tuple[list[EncodedMedia], list[int]]:
    """What is to be encoded, each distinct picture once if `unique`, and the fill order.

    The order runs over rows of the tower's output, of which a picture has one or `num_pieces`.
    """
    chosen: list[EncodedMedia] = []
    pieces_of: dict[str, range] = {}
    order: list[int] = []
    count = 0
    for row in rows:
        for media in row:
            if not unique or media.key not in pieces_of:
                if media.features is not None:
                    size = media.features.num_pieces
                else:
                    size = 1 if num_pieces is None else num_pieces(media.inputs)
                pieces_of[media.key] = range(count, count + size)
                count += size
                chosen.append(media)
            order += pieces_of[media.key]
    return chosen, order


def _inputs(chosen: Sequence[EncodedMedia], names: tuple[str, ...]) -> dict[str, Tensor]:
    """Processor tensors of several pictures or clips as one; none where there are no media."""
    if not chosen:
        return {}
    whole = chosen[0].features is None
    present = [name for name in names if whole or name in chosen[0].inputs]
    return {name: joined(name, [media.inputs[name] for media in chosen]) for name in present}


def _features(chosen: Sequence[EncodedMedia]) -> tuple[Features, ...]:
    found = tuple(media.features for media in chosen if media.features is not None)
    # A model takes pixels of all its pictures or features of all.
    assert len(found) in (0, len(chosen))
    return found


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


def _counted(
    groups: list[_Group], starts: list[_Start], rows: int, width: int, own: list[Tensor]
) -> Tensor:
    """[A, R, S]: the prompts' `own` counts, [A, P] each, and every branch counting on from them."""
    result = torch.zeros(len(own[0]), rows * width, dtype=torch.long)
    for group, (start, branch_starts), prompt in zip(groups, starts, own, strict=True):
        result[:, start : start + prompt.shape[1]] = prompt
        # From the last token, not the largest position: a clip's time may run ahead of the text.
        follow = int(prompt[:, -1].max()) + 1
        for (_, response), place in zip(group.branches, branch_starts, strict=True):
            count = torch.arange(follow, follow + len(response))
            result[:, place : place + len(response)] = count
    return result.view(-1, rows, width)


def _row_attention(branch: Tensor, is_image: Tensor, family: Family) -> Tensor:
    """[R, 1, S, S] bool: causal, no branch sees another; padding sees itself, to stay finite."""
    query, key = branch[:, :, None], branch[:, None, :]
    width = branch.shape[1]
    before = torch.ones(width, width, dtype=torch.bool).tril()
    if family.prompt_attention == "bidirectional":
        before = before | ((query == 0) & (key == 0))
    elif family.prompt_attention == "picture_blocks":
        # Neighbouring picture tokens are one picture, as in transformers' Gemma3.
        first = is_image & ~is_image.roll(1, 1)
        first[:, 0] = is_image[:, 0]
        picture = first.cumsum(1).masked_fill(~is_image, 0)
        mine, theirs = picture[:, :, None], picture[:, None, :]
        before = before | ((mine == theirs) & (mine > 0))
    sees = before & ((key == query) | (key == 0))
    return sees[:, None]
