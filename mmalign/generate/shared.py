"""What the requests of a batch have in common, computed once: pictures, and how prompts begin."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmalign.attention.choose import sliding_window
from mmalign.models.families import Family
from mmalign.models.load import Policy, base_model
from mmalign.scoring.blank import image_features, video_features
from mmalign.scoring.candidates import EncodedMedia, Features
from mmalign.scoring.features import joined_features, split_features
from mmalign.scoring.plan import joined

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import DynamicCache

# Of pictures' features, kept for later batches of a call: 56 pictures of a 7B LLaVA in 16 bits.
KEPT_BYTES = 2**28
# A second forward pass and the copies of its cache have to be worth it.
WORTH_IT = 0.75


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One request as the model reads it.

    ids: the prompt, `num_prompt` tokens, and what the answer begins with: S tokens.
    kinds, visible: [S] int64: 0 text, 1 picture, 2 clip; 0 where a token is hidden from the others.
    positions: [A, S] int64.
    seen: equal for rows whose equal tokens at the beginning give equal keys and values.
    """

    ids: list[int]
    num_prompt: int
    kinds: Tensor
    visible: Tensor
    positions: Tensor
    images: tuple[EncodedMedia, ...]
    videos: tuple[EncodedMedia, ...]
    seen: Hashable


class Encoder:
    """The tower's features of pictures and clips; a picture's are kept while there is room.

    For one call: weights may change before the next.
    """

    def __init__(self, policy: Policy, kept_bytes: int = KEPT_BYTES) -> None:
        self._body, self._family = base_model(policy.model).model, policy.family
        self._kept_bytes = kept_bytes
        self._kept: OrderedDict[str, Features] = OrderedDict()

    def __call__(self, rows: Sequence[Row], device: Any) -> dict[str, Any]:
        """What the model takes in the place of the rows' pixels; nothing for rows without media."""
        encoded: dict[str, Any] = {}
        if images := [image for row in rows for image in row.images]:
            encoded["image"] = joined_features(self._features(images, device))
        if clips := [clip for row in rows for clip in row.videos]:
            encoded["video"] = video_features(
                self._body, _inputs(clips, self._family.video_inputs, device)
            )
        return {"mm_encoder_outputs": encoded} if encoded else {}

    def _features(self, images: Sequence[EncodedMedia], device: Any) -> list[Features]:
        """In the order of the pictures; the tower runs once, on those that are not kept."""
        new = {image.key: image for image in images if image.key not in self._kept}
        here = {image.key: self._kept[image.key] for image in images if image.key in self._kept}
        if new:
            inputs = _inputs(list(new.values()), self._family.image_inputs, device)
            count = self._family.num_pieces
            pieces = [1 if count is None else count(one.inputs) for one in new.values()]
            made = split_features(image_features(self._body, inputs), pieces)
            here |= zip(new, made, strict=True)
        for key, features in here.items():
            self._kept[key] = features
            self._kept.move_to_end(key)
        while self._kept and sum(one.num_bytes for one in self._kept.values()) > self._kept_bytes:
            self._kept.popitem(last=False)
        return [here[image.key] for image in images]


def can_share(family: Family, config: Any) -> bool:
    """Whether equal beginnings have equal keys and values, and a gap after them changes nothing.

    The first fails where a prompt token sees later ones, the second where a window counts columns.
    """
    causal = family.prompt_attention == "causal"
    return causal and sliding_window(config.get_text_config()) is None


def cuts(rows: Sequence[Row]) -> list[int]:
    """How many tokens at the beginning of each row are computed once for all that share them.

    Zeros where that would save less than a quarter of the batch's tokens, padding included, or a
    picture would come behind a cut.
    """
    groups: dict[Hashable, list[int]] = {}
    for number, row in enumerate(rows):
        groups.setdefault(row.seen, []).append(number)
    found = [0] * len(rows)
    for group in groups.values():
        cut = _common([rows[number].ids for number in group])
        if any(rows[number].kinds[cut:].any() for number in group):
            return [0] * len(rows)
        for number in group:
            found[number] = cut
    tails = max(len(row.ids) - cut for row, cut in zip(rows, found, strict=True))
    shared = len(groups) * max(found) + len(rows) * tails
    whole = len(rows) * max(len(row.ids) for row in rows)
    return found if shared <= WORTH_IT * whole else [0] * len(rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """The same stretch of every row, padded on the left so that it ends in one column.

    ids, mask, kinds: [R, W] int64. is_response: [R, W] bool. positions: [A, R, W] int64.
    """

    ids: Tensor
    mask: Tensor
    kinds: Tensor
    is_response: Tensor
    positions: Tensor


def block(rows: Sequence[Row], starts: Sequence[int], ends: Sequence[int], pad: int) -> Block:
    """Tokens starts[r] to ends[r] of every row r."""
    import torch

    width = max(end - start for start, end in zip(starts, ends, strict=True))
    ids = torch.full((len(rows), width), pad)
    mask, kinds = torch.zeros_like(ids), torch.zeros_like(ids)
    is_response = torch.zeros_like(ids, dtype=torch.bool)
    # Given, not left to the model: it would count only what the mask lets through.
    positions = torch.zeros(len(rows[0].positions), *ids.shape, dtype=torch.long)
    for r, (row, start, end) in enumerate(zip(rows, starts, ends, strict=True)):
        to = slice(width - (end - start), width)
        ids[r, to] = torch.tensor(row.ids[start:end], dtype=torch.long)
        mask[r, to], kinds[r, to] = row.visible[start:end], row.kinds[start:end]
        is_response[r, to] = torch.arange(start, end) >= row.num_prompt
        positions[:, r, to] = row.positions[:, start:end]
    return Block(ids=ids, mask=mask, kinds=kinds, is_response=is_response, positions=positions)


def side_by_side(left: Block, right: Block) -> Block:
    """Two blocks of the same rows as one."""
    import torch

    return Block(
        ids=torch.cat([left.ids, right.ids], -1),
        mask=torch.cat([left.mask, right.mask], -1),
        kinds=torch.cat([left.kinds, right.kinds], -1),
        is_response=torch.cat([left.is_response, right.is_response], -1),
        positions=torch.cat([left.positions, right.positions], -1),
    )


def prefix_cache(
    policy: Policy, rows: Sequence[Row], heads: Block, encoder: Encoder, device: Any
) -> DynamicCache:
    """Keys and values of the rows' beginnings, for every row, each run through the model once."""
    import torch
    from transformers import DynamicCache

    first: dict[Hashable, int] = {}
    for number, row in enumerate(rows):
        first.setdefault(row.seen, number)
    some = list(first.values())
    place = {seen: n for n, seen in enumerate(first)}
    base = base_model(policy.model)
    cache = DynamicCache(config=base.config.get_text_config())
    positions = heads.positions[:, some].to(device)
    base.model(
        input_ids=heads.ids[some].to(device),
        attention_mask=heads.mask[some].to(device),
        position_ids=positions if len(positions) > 1 else positions[0],
        past_key_values=cache,
        use_cache=True,
        **encoder([rows[number] for number in some], device),
    )
    cache.batch_select_indices(torch.tensor([place[row.seen] for row in rows], device=device))
    return cache


def _inputs(media: Sequence[EncodedMedia], names: Sequence[str], device: Any) -> dict[str, Tensor]:
    return {name: joined(name, [one.inputs[name] for one in media]).to(device) for name in names}


def _common(rows: Sequence[list[int]]) -> int:
    """Length of the beginning that all rows share, and that leaves each a token."""
    most = min(map(len, rows)) - 1
    return next((n for n in range(most) if len({row[n] for row in rows}) > 1), most)
