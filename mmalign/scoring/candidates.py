"""Batches: a flat list of candidates (responses), each under a condition (prompt and images)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


# No slots: as in TokenScores, since a scorer returns it too.
@dataclass(frozen=True, kw_only=True)
class Features:
    """What tower and projector make of one picture alone.

    pooled: [P, T, H], its P rows of the tower's output, or [T, H] where the model hands over one
        such tensor for each picture.
    deeper: [T, H] each, for the first layers of the language model (Qwen3-VL).
    """

    pooled: Tensor
    deeper: tuple[Tensor, ...] = ()

    @property
    def num_pieces(self) -> int:
        """Rows of the tower's output."""
        return self.pooled.shape[0] if self.pooled.dim() == 3 else 1

    @property
    def num_bytes(self) -> int:
        """Size of its tensors."""
        return sum(tensor.nbytes for tensor in (self.pooled, *self.deeper))

    def to(self, device: torch.device | str) -> Features:
        """The same features on `device`."""
        return Features(
            pooled=self.pooled.to(device, non_blocking=True),
            deeper=tuple(tensor.to(device, non_blocking=True) for tensor in self.deeper),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedMedia:
    """One picture or clip as its processor made it; two with the same key hold the same tensors.

    text: what stands for it in the rendered prompt, where that is more than its placeholder
    repeated num_tokens times.
    features: of a picture, where the tower has run on it before; `inputs` then need no pixels.

    Example: EncodedMedia(key="9f2c…", inputs={"pixel_values": [1, 3, 336, 336]}, num_tokens=576)
    """

    key: str
    inputs: dict[str, Tensor]
    num_tokens: int
    text: str | None = None
    features: Features | None = None


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
