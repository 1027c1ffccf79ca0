"""The Generator protocol: what builders and evals ask of a model, whatever serves it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from mmalign.records import Example, Media, Message, Preference, Verifiable

if TYPE_CHECKING:
    from mmalign.clips import Clip


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskImageTokens:
    """Hide image tokens from attention: token i stays visible where rho_i >= threshold.

    rho_i is uniform in [0, 1), drawn from (the sampling's seed, `key`): requests with one key and
    as many image tokens see the same ones. threshold 0 hides none, 1 hides all (BDHS's rho_th).
    """

    threshold: float
    key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NoisePixels:
    """Gaussian noise on the processed pixels, as after `steps` of 1000 diffusion steps.

    x -> sqrt(a) x + sqrt(1 - a) e, drawn from (the sampling's seed, `key`); BDHS's noise variant.
    """

    steps: int
    key: str


Corruption = MaskImageTokens | NoisePixels


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt to continue.

    `prefill` is the start of the assistant's answer, given and not generated; the returned text
    does not repeat it. `media_root` is the folder that the images' paths are relative to.
    `num_tokens`, where set, asks for exactly so many new tokens (Re-Align's masked segments).
    `videos` are clips on disk or decoded ones. `corruption` is what the model must not see well.
    Example: Request(id="coco-7", prompt=user("Describe the image.", images=1), images=(…,))
    """

    id: str
    prompt: tuple[Message, ...]
    images: tuple[Media, ...] = ()
    videos: tuple[Media | Clip, ...] = ()
    media_root: Path | None = None
    prefill: str = ""
    num_tokens: int | None = None
    corruption: Corruption | None = None


def request_for(
    record: Example | Preference | Verifiable, *, id: str, media_root: Path | None
) -> Request:
    """The request to answer a record's own prompt about its own pictures and clips."""
    return Request(
        id=id,
        prompt=record.prompt,
        images=record.images,
        videos=record.videos,
        media_root=media_root,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to decode. Temperature 0 is greedy; every request draws from (seed, its id) alone."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What a server says of how an answer came about.

    prompt_ids: the prompt as it saw it. logps: of each sampled token, in nats, as the model gave
    it, before temperature. model: which of its models answered. ending: its finish_reason.
    """

    prompt_ids: tuple[int, ...]
    logps: tuple[float, ...]
    model: str
    ending: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """The text that came back; `finished` is False where the token limit cut it.

    num_tokens: without the token that ended the turn. token_ids: all that were sampled, that one
    included, where the generator knows them. told: where a server was asked to say so.
    prompt_tokens: of the prompt, where a server counts them.
    """

    id: str
    text: str
    num_tokens: int
    finished: bool
    token_ids: tuple[int, ...] = ()
    told: Told | None = None
    prompt_tokens: int = 0


class Generator(Protocol):
    """Turns requests into texts, in the order asked."""

    @property
    def name(self) -> str:
        """What identifies the model in caches and manifests: path or hub name, and revision."""
        ...

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Generation]:
        """Answer every request. Raises MediaError, naming the request, on an unreadable picture."""
        ...


def request_seed(seed: int, request_id: str) -> int:
    """A seed that depends on the run's seed and the request's id only, never on its neighbours."""
    digest = hashlib.sha256(f"{seed}\x00{request_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
