"""Re-Align: a rejected response written in view of another, similar picture (arXiv 2502.13146).

Mask what depends on the picture in the chosen response; retrieve the k most similar pictures; let
the model fill the gaps in view of the nearest, then the next, until the response differs enough:

    s = similarity(chosen, response) < threshold    accept: the response is rejected, and the
                                                    picture it came from is the contrast image
    k pictures tried, none accepted                 drop the example

Deviation: the paper's Algorithm 1 prints s >= threshold, no break, and the k-th picture whatever
was accepted; its prose and figure, followed here, say otherwise. Near-duplicates (cosine over
`near_duplicate`) and other copies of the same file are no neighbours, which the paper leaves open.

Launch: mmalign build configs/build/realign_coco.yaml
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import Field, PositiveInt

from data_builders.base import (
    Builder,
    CountingGenerator,
    GeneratorConfig,
    SentenceFilter,
    SimilarityFilter,
    Source,
)
from data_builders.built_page import write_preview
from data_builders.completion import Completer, Gapped, InstructCompleter
from data_builders.masking import Masked, Masker, ModelMasker, Refused, locate
from mmalign.config import Strict
from mmalign.errors import MediaError
from mmalign.jobs import Outcome, run_job
from mmalign.log import progress
from mmalign.media import media_key, open_image, read_bytes
from mmalign.records import Example, Media, Origin, Preference, Span
from mmalign.retrieval import (
    FeatureSource,
    ImageEncoder,
    Index,
    Neighbour,
    OpenClipEncoder,
    PolicyVisionEncoder,
    neighbours,
)
from mmalign.similarity import TextSimilarity

if TYPE_CHECKING:
    from PIL.Image import Image

VERSION = "1"
ENCODE_AT_ONCE = 32


class OpenClip(Strict):
    """Retrieve by an open_clip model. `pretrained: null`, random weights, must be written out."""

    name: Literal["open_clip"] = "open_clip"
    model: str = "ViT-L-14"
    pretrained: str | None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"

    def load(self, policy: FeatureSource) -> ImageEncoder:
        """Load the encoder, onto the GPU if there is one."""
        return OpenClipEncoder(self.model, pretrained=self.pretrained, precision=self.precision)


class PolicyVision(Strict):
    """Retrieve by what the policy sees, as the paper's text says."""

    name: Literal["policy"] = "policy"

    def load(self, policy: FeatureSource) -> ImageEncoder:
        """The policy is loaded already."""
        return PolicyVisionEncoder(policy)


class ReAlign(Builder):
    """Settings of the builder; the defaults are the paper's."""

    name: Literal["realign"] = "realign"
    generator: GeneratorConfig
    masker: Masker = ModelMasker()
    encoder: Annotated[OpenClip | PolicyVision, Field(discriminator="name")] = OpenClip(
        pretrained="openai"
    )
    completer: Completer = InstructCompleter()
    similarity: SimilarityFilter = SentenceFilter()
    k: PositiveInt = 10
    near_duplicate: float = Field(default=0.99, gt=0, le=1)
    index: Index = "auto"

    def build(self) -> Path:
        """Load the models and build the dataset; returns its directory."""
        generator = self.generator.load()
        return self.build_with(generator, self.encoder.load(generator), self.similarity.load())

    def build_with(
        self, generator: CountingGenerator, encoder: ImageEncoder, similarity: TextSimilarity
    ) -> Path:
        """Build with models that are loaded already."""
        source = self.load_source()
        pairs = _Pairs(
            config=self,
            source=source,
            generator=generator,
            encoder=encoder,
            similarity=similarity,
        )
        manifest = run_job(
            source.examples,
            pairs.make,
            self.output,
            Preference,
            shard_rows=self.shard_rows,
            shard=self.shard_of,
            **self.manifest(
                source,
                VERSION,
                generator=generator.name,
                encoder=encoder.name,
                similarity=similarity.name,
                masker=self.masker.name,
                completer=self.completer.name,
                threshold=self.similarity.threshold,
                k=self.k,
            ),
        )
        if manifest is not None:
            write_preview(self.output)
        return self.output


@dataclass(frozen=True)
class Gallery:
    """Every readable picture of the source, and its neighbours, nearest first."""

    pictures: list[Media]
    near: list[list[Neighbour]]
    row: dict[str, int]
    unreadable: dict[str, str]


def make_gallery(
    source: Source, encoder: ImageEncoder, k: int, *, near_duplicate: float, index: Index
) -> Gallery:
    """Embed every picture once and find its neighbours; unreadable ones stand aside."""
    found = {media_key(media): media for e in source.examples for media in e.images}
    pictures: list[Media] = []
    rows: list[np.ndarray] = []
    unreadable: dict[str, str] = {}
    items = list(found.items())
    batches = [items[i : i + ENCODE_AT_ONCE] for i in range(0, len(items), ENCODE_AT_ONCE)]
    with ThreadPoolExecutor() as pool:
        for batch in progress(batches, label=f"embedding {len(found)} pictures, in batches"):
            opened = pool.map(partial(_open, media_root=source.media_root), [m for _, m in batch])
            images: list[Image] = []
            for (key, _), result in zip(batch, opened, strict=True):
                if isinstance(result, MediaError):
                    unreadable[key] = str(result)
                else:
                    pictures.append(result[0])
                    images.append(result[1])
            if images:
                rows.append(encoder.encode(images))
    near = neighbours(
        np.concatenate(rows) if rows else np.zeros((0, 1), np.float32),
        k,
        index=index,
        near_duplicate=near_duplicate,
        keys=[picture.sha256 or "" for picture in pictures],
    )
    readable = [key for key in found if key not in unreadable]
    row = {key: number for number, key in enumerate(readable)}
    return Gallery(pictures, near, row, unreadable)


def _open(media: Media, media_root: Path) -> tuple[Media, Image] | MediaError:
    """The picture, and its media with the hash of the file."""
    try:
        data = read_bytes(media, media_root)
        image = open_image(replace(media, bytes=data))
    except MediaError as error:
        return error
    return replace(media, sha256=hashlib.sha256(data).hexdigest()), image


@dataclass(kw_only=True)
class _Attempt:
    """One example on its way through the ranks; `tried` says how each rank ended."""

    example: Example
    masked: Masked
    near: list[Neighbour]
    tried: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class _Pairs:
    """The work function of the job, with the models that it needs."""

    config: ReAlign
    source: Source
    generator: CountingGenerator
    encoder: ImageEncoder
    similarity: TextSimilarity

    @cached_property
    def gallery(self) -> Gallery:
        """Made when the first chunk needs it: a finished job never does."""
        config = self.config
        return make_gallery(
            self.source,
            self.encoder,
            config.k,
            near_duplicate=config.near_duplicate,
            index=config.index,
        )

    def make(self, examples: list[Example]) -> list[Outcome]:
        """One outcome per example: rank after rank, all open examples of a chunk together."""
        outcomes: dict[str, Outcome] = {}
        attempts = self._begin(examples, outcomes)
        for rank in range(1, self.config.k + 1):
            trying = [
                attempt
                for attempt in attempts
                if attempt.example.id not in outcomes and rank <= len(attempt.near)
            ]
            if not trying:
                break
            for attempt, response, similarity in self._try(trying, rank):
                if isinstance(response, Refused):
                    attempt.tried.append(response.reason)
                elif similarity < self.config.similarity.threshold:
                    outcomes[attempt.example.id] = self._accept(attempt, rank, response, similarity)
                else:
                    attempt.tried.append(f"similarity {similarity:.4f}")
        for attempt in attempts:
            dropped = _dropped(attempt.example, "no_neighbour_accepted", "; ".join(attempt.tried))
            outcomes.setdefault(attempt.example.id, dropped)
        return [outcomes[example.id] for example in examples]

    def _begin(self, examples: list[Example], outcomes: dict[str, Outcome]) -> list[_Attempt]:
        """Mask what can be used; write the outcome of what cannot."""
        usable: list[Example] = []
        for example in examples:
            if (outcome := self._unusable(example)) is not None:
                outcomes[example.id] = outcome
            else:
                usable.append(example)
        # Masking is no matter of taste: it is decoded greedily.
        greedy = replace(self.config.generator.sampling(self.config.seed), temperature=0.0)
        masks = self.config.masker.mask(usable, self.generator, greedy, self.source.media_root)
        attempts = []
        for example, masked in zip(usable, masks, strict=True):
            if isinstance(masked, Refused):
                outcomes[example.id] = _dropped(example, masked.reason, masked.detail)
            else:
                near = self.gallery.near[self._row(example)]
                attempts.append(_Attempt(example=example, masked=masked, near=near))
        return attempts

    def _unusable(self, example: Example) -> Outcome | None:
        if not (example.answer or "").strip():
            return _dropped(example, "no_answer")
        if len(example.images) != 1 or example.videos:
            return _dropped(example, "not_one_image", f"{len(example.images)} images")
        if why := self.gallery.unreadable.get(media_key(example.images[0])):
            return Outcome(id=example.id, reason="quarantined:unreadable", detail=why)
        if not self.gallery.near[self._row(example)]:
            return _dropped(example, "no_neighbour", "no other picture is near but not the same")
        return None

    def _try(
        self, trying: list[_Attempt], rank: int
    ) -> Iterator[tuple[_Attempt, str | Refused, float]]:
        """Complete every masked answer in view of its picture of this rank, and compare."""
        gapped = [
            Gapped(
                id=f"{attempt.example.id}/rank{rank}",
                prompt=attempt.example.prompt,
                image=self.gallery.pictures[attempt.near[rank - 1].index],
                masked=attempt.masked,
            )
            for attempt in trying
        ]
        sampling = self.config.generator.sampling(self.config.seed)
        responses = self.config.completer.complete(
            gapped, self.generator, sampling, self.source.media_root
        )
        texts = [response if isinstance(response, str) else "" for response in responses]
        similarities = self.similarity([attempt.masked.chosen for attempt in trying], texts)
        yield from zip(trying, responses, similarities, strict=True)

    def _accept(self, attempt: _Attempt, rank: int, response: str, similarity: float) -> Outcome:
        example, neighbour = attempt.example, attempt.near[rank - 1]
        picture, contrast = (
            self.gallery.pictures[n] for n in (self._row(example), neighbour.index)
        )
        chosen_spans, rejected_spans = _spans(attempt.masked, response)
        detail = {
            "similarity": round(similarity, 6),
            "neighbour": contrast.path or contrast.sha256,
            "image_similarity": round(neighbour.similarity, 6),
            "masked": attempt.masked.text,
            "tried": attempt.tried,
        }
        reason = f"accepted:rank{rank}"
        record = Preference(
            id=example.id,
            prompt=example.prompt,
            images=self.config.stored([picture], self.source.media_root),
            chosen=attempt.masked.chosen,
            rejected=response,
            contrast_images=self.config.stored([contrast], self.source.media_root),
            chosen_spans=chosen_spans,
            rejected_spans=rejected_spans,
            origin=Origin(
                builder="realign",
                version=VERSION,
                source=example.id,
                reason=reason,
                detail=json.dumps(detail, ensure_ascii=False),
            ),
        )
        return Outcome(id=example.id, record=record, reason=reason)

    def _row(self, example: Example) -> int:
        return self.gallery.row[media_key(example.images[0])]


def _dropped(example: Example, reason: str, detail: str = "") -> Outcome:
    return Outcome(id=example.id, reason=f"dropped:{reason}", detail=detail)


def _spans(masked: Masked, response: str) -> tuple[tuple[Span, ...], tuple[Span, ...]]:
    """The phrases that differ, where the response kept the words between them; else none."""
    gaps = locate(masked.pieces, response)
    pairs = [
        (ours, theirs)
        for ours, theirs in zip(masked.segments, gaps or (), strict=gaps is not None)
        if masked.chosen[slice(*ours)] != response[slice(*theirs)]
    ]
    numbered = list(enumerate(pairs, start=1))
    return (
        tuple(Span(start=a, end=b, phrase=number) for number, ((a, b), _) in numbered),
        tuple(Span(start=a, end=b, phrase=number) for number, (_, (a, b)) in numbered),
    )
