"""Spoil a clip, so that a model which watches it must guess: the perturbations of RRPO.

The paper hides a block of 25 to 50 per cent of the picture and shuffles the frames; its code was
not released, and its one example covers the same block, light grey, in every frame. Dropping,
freezing and reversing are beside it here.

The time axis stays what it was: slot i of the clip keeps its index and its timestamp, whatever
frame is shown in it now, so timestamps still increase. Dropping removes slots with their frames.

What was done is recorded in numbers (rectangles in pixels, orders, positions), so that `replay`
needs the clip and the record, but neither the settings nor the seed.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from random import Random
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field

from mmalign.config import Strict
from mmalign.errors import DataError

if TYPE_CHECKING:
    from mmalign.clips import Clip

# One perturbation as it was done: JSON, `op` says which.
Step = dict[str, Any]
# Height and width of frames. An op draws from them and from `shown`: which frame of the source
# each slot shows, since sampling a short clip repeats frames.
Size = tuple[int, int]

# Sides of a block, as powers of its share: a share of 0.25 is 0.35 x 0.71 at the most oblong.
_OBLONG = (0.25, 0.75)


def _ordered(share: tuple[float, float]) -> tuple[float, float]:
    if not 0 < share[0] <= share[1] <= 1:
        raise ValueError("wanted two shares, 0 < least <= most <= 1")
    return share


Share = Annotated[tuple[float, float], AfterValidator(_ordered)]


class Mask(Strict):
    """Cover a block: its share of the area uniform in `share`, one place in every frame."""

    name: Literal["mask"] = "mask"
    share: Share = (0.25, 0.5)
    grey: int = Field(default=211, ge=0, le=255)

    def draw(self, size: Size, shown: Sequence[int], rng: Random) -> Step:
        """The block in pixels."""
        height, width = size
        block_height, block_width = _block(self.share, height, width, rng)
        return {
            "op": self.name,
            "top": rng.randint(0, height - block_height),
            "left": rng.randint(0, width - block_width),
            "height": block_height,
            "width": block_width,
            "grey": self.grey,
        }


class Shuffle(Strict):
    """Show all frames in another order, each that makes a difference being as likely."""

    name: Literal["shuffle"] = "shuffle"

    def draw(self, size: Size, shown: Sequence[int], rng: Random) -> Step:
        """`order`: slot i shows what slot order[i] did."""
        if _still(shown):
            return _nothing(self.name)
        order = list(range(len(shown)))
        while [shown[slot] for slot in order] == list(shown):
            rng.shuffle(order)
        return {"op": self.name, "order": order}


class Drop(Strict):
    """Take out frames, their share uniform in `share`; what is left keeps its order."""

    name: Literal["drop"] = "drop"
    share: Share = (0.25, 0.5)

    def draw(self, size: Size, shown: Sequence[int], rng: Random) -> Step:
        """`dropped`: which slots, at least one, never all."""
        if _still(shown):
            return _nothing(self.name)
        count = _count(self.share, len(shown), rng)
        return {"op": self.name, "dropped": sorted(rng.sample(range(len(shown)), count))}


class Freeze(Strict):
    """Let one frame stand for the share of frames that follow it; time goes on, the picture not.

    place: a run anywhere in the clip, after which it goes on, or up to the end.
    """

    name: Literal["freeze"] = "freeze"
    share: Share = (0.25, 0.75)
    place: Literal["anywhere", "end"] = "end"

    def draw(self, size: Size, shown: Sequence[int], rng: Random) -> Step:
        """`slot` shows the frame that stands, `num_frames` is how many it replaces."""
        if _still(shown):
            return _nothing(self.name)
        count = _count(self.share, len(shown), rng)
        last = len(shown) - 1 - count
        slot = last if self.place == "end" else rng.randint(0, last)
        return {"op": self.name, "slot": slot, "num_frames": count}


class Reverse(Strict):
    """Show the frames from the last to the first."""

    name: Literal["reverse"] = "reverse"

    def draw(self, size: Size, shown: Sequence[int], rng: Random) -> Step:
        """Nothing to draw."""
        return _nothing(self.name) if _still(shown) else {"op": self.name}


Perturbation = Annotated[Mask | Shuffle | Drop | Freeze | Reverse, Field(discriminator="name")]


def apply(clip: Clip, ops: Sequence[Perturbation], seed: int) -> tuple[Clip, list[Step]]:
    """The clip after all `ops`, one after the other, and what was done.

    Everything random is drawn from `seed`. What can do nothing to a clip that shows one frame only
    is recorded with `noop`.
    """
    rng = Random(seed)
    size: Size = clip.frames.shape[1:3]
    spoilt, shown, steps = clip, list(clip.indices), list[Step]()
    for op in ops:
        steps.append(op.draw(size, shown, rng))
        spoilt = _done(spoilt, steps[-1])
        shown = [shown[slot] for slot in _slots(len(shown), steps[-1])]
    return _renamed(spoilt, clip, steps), steps


def replay(clip: Clip, steps: Sequence[Mapping[str, Any]]) -> Clip:
    """The clip that `apply` made when it recorded `steps`.

    Raises DataError where the steps are none, or were recorded with other frames than these.
    """
    spoilt = clip
    for number, step in enumerate(steps, start=1):
        try:
            spoilt = _done(spoilt, step)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise DataError(
                f"step {number} of its perturbation cannot be done again ({error!r})",
                where=f"clip {clip.key[:12]}, {len(spoilt.frames)} frames",
                got=json.dumps(step)[:200],
                fix="sample its frames as the builder did",
            ) from None
    return _renamed(spoilt, clip, steps)


def can_change(clip: Clip, ops: Sequence[Perturbation]) -> bool:
    """Whether any of `ops` does something to a clip. Where all stands still, a block does."""
    return not _still(clip.indices) or any(isinstance(op, Mask) for op in ops)


def told(step: Mapping[str, Any]) -> str:
    """A step in words, for a reader of the preview page."""
    match step:
        case {"noop": why}:
            return f"{step['op']}: nothing ({why})"
        case {"op": "mask"}:
            size = f"{step['width']}x{step['height']}"
            return f"mask: {size} pixels at ({step['left']}, {step['top']})"
        case {"op": "drop"}:
            return f"drop: {len(step['dropped'])} frames"
        case {"op": "freeze"}:
            return f"freeze: slot {step['slot'] + 1} for {step['num_frames']} more"
    return str(step.get("op"))


def sources(num_frames: int, steps: Sequence[Mapping[str, Any]]) -> list[int]:
    """Which frame of the clean clip each slot of the perturbed one shows."""
    shown = list(range(num_frames))
    for step in steps:
        shown = [shown[slot] for slot in _slots(len(shown), step)]
    return shown


def _done(clip: Clip, step: Mapping[str, Any]) -> Clip:
    """The clip after one step."""
    import numpy as np

    if step["op"] == "mask":
        frames = clip.frames.copy()
        top, left = step["top"], step["left"]
        bottom, right = top + step["height"], left + step["width"]
        if not (0 <= top < bottom <= frames.shape[1] and 0 <= left < right <= frames.shape[2]):
            raise ValueError("the block lies outside the frame")
        frames[:, top:bottom, left:right] = step["grey"]
        return replace(clip, frames=frames)
    slots = _slots(len(clip.frames), step)
    frames = np.ascontiguousarray(clip.frames[slots])
    if step["op"] != "drop":
        return replace(clip, frames=frames)
    return replace(
        clip,
        frames=frames,
        indices=tuple(clip.indices[slot] for slot in slots),
        timestamps=tuple(clip.timestamps[slot] for slot in slots),
    )


def _slots(num_frames: int, step: Mapping[str, Any]) -> list[int]:
    """Which slot of the clip before a step each slot after it shows."""
    slots = list(range(num_frames))
    match step:
        case {"noop": _} | {"op": "mask"}:
            return slots
        case {"op": "shuffle", "order": order}:
            if sorted(order) != slots:
                raise ValueError(f"an order of {len(order)} frames")
            return list(order)
        case {"op": "drop", "dropped": dropped}:
            if not set(dropped) < set(slots):
                raise ValueError("drops frames that are not there, or all")
            return [slot for slot in slots if slot not in set(dropped)]
        case {"op": "freeze", "slot": first, "num_frames": count}:
            if not 0 <= first < first + count < num_frames:
                raise ValueError("freezes frames that are not there")
            return [first if first < slot <= first + count else slot for slot in slots]
        case {"op": "reverse"}:
            return slots[::-1]
    raise ValueError("is no perturbation")


def _renamed(spoilt: Clip, clean: Clip, steps: Sequence[Mapping[str, Any]]) -> Clip:
    """With a key of its own: by its key a model's processed clip is kept and found again."""
    name = json.dumps([clean.key, list(steps)], sort_keys=True)
    return replace(spoilt, key=hashlib.sha256(name.encode()).hexdigest())


def _block(share: tuple[float, float], height: int, width: int, rng: Random) -> tuple[int, int]:
    """Height and width of a block whose share of the area lies in `share`, rounding included.

    In frames of a few pixels no block may be so large; then it is the next smaller or larger one.
    """
    short, long = sorted((height, width))
    wanted = rng.uniform(*share)
    # The coarser side first, so that the finer one can make up for its rounding.
    along_short = max(1, round(short * wanted ** rng.uniform(*_OBLONG)))
    area_per_pixel = short * long / along_short
    least, most = math.ceil(share[0] * area_per_pixel), math.floor(share[1] * area_per_pixel)
    along_long = round(wanted * area_per_pixel)
    if least <= most:
        along_long = min(max(along_long, least), most)
    along_long = min(max(1, along_long), long)
    return (along_short, along_long) if height == short else (along_long, along_short)


def _count(share: tuple[float, float], num_frames: int, rng: Random) -> int:
    """A share of the frames, at least one and not all."""
    return min(max(1, round(num_frames * rng.uniform(*share))), num_frames - 1)


def _still(shown: Sequence[int]) -> bool:
    """Whether all slots show one frame."""
    return len(set(shown)) == 1


def _nothing(op: str) -> Step:
    return {"op": op, "noop": "one frame is all that it shows"}
