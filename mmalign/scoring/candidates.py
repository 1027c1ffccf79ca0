"""Batches: a flat list of candidates (responses), each under a condition (prompt and images)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedMedia:
    """One picture or clip as its processor made it; two with the same key hold the same tensors.

    text: what stands for it in the rendered prompt, where that is more than its placeholder
    repeated num_tokens times.

    Example: EncodedMedia(key="9f2c…", inputs={"pixel_values": [1, 3, 336, 336]}, num_tokens=576)
    """

    key: str
    inputs: dict[str, Tensor]
    num_tokens: int
    text: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """What responses are conditioned on: a prompt in tokens, its images and its clips in order.

    prompt_ids holds one placeholder token for each image or clip feature. positions: [A, P] int64.
    """

    id: str
    prompt_ids: list[int]
    images: tuple[EncodedMedia, ...]
    positions: Tensor
    videos: tuple[EncodedMedia, ...] = ()
    text: str = field(default="", repr=False)

    @property
    def num_image_tokens(self) -> int:
        """Placeholder tokens of all the images together."""
        return sum(image.num_tokens for image in self.images)

    @property
    def num_video_tokens(self) -> int:
        """Placeholder tokens of all the clips together."""
        return sum(clip.num_tokens for clip in self.videos)

    @property
    def num_media_tokens(self) -> int:
        """Placeholder tokens of pictures and clips."""
        return self.num_image_tokens + self.num_video_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One response, its end-of-turn token included, under `conditions[condition]`.

    marked: for each response token, whether it lies in a phrase that differs from the other
    response's; None where nobody asks.
    """

    condition: int
    response_ids: list[int]
    marked: list[bool] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidateBatch:
    """What a scorer scores. Every layout gives the same TokenScores, in candidate order."""

    conditions: list[Condition]
    candidates: list[Candidate]
