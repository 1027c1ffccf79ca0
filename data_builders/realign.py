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

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveInt

from data_builders.base import (
    Builder,
    CountingGenerator,
    GeneratorConfig,
    SentenceFilter,
    SimilarityFilter,
    Source,
)
from data_builders.completion import Completer, Gapped, InstructCompleter
from data_builders.gallery import Encoder, Gallery, OpenClip, make_gallery
from data_builders.masking import Masked, Masker, ModelMasker, Refused, locate
from mmalign.engines import Deferred
from mmalign.jobs import Outcome
from mmalign.media import media_key
from mmalign.records import Example, Origin, Preference, Span
from mmalign.retrieval import ImageEncoder, Index, Neighbour
from mmalign.similarity import TextSimilarity

VERSION = "1"
_Models = tuple[CountingGenerator, ImageEncoder, TextSimilarity]


class ReAlign(Builder):
    """Settings of the builder; the defaults are the paper's."""

    name: Literal["realign"] = "realign"
    generator: GeneratorConfig
    masker: Masker = ModelMasker()
    encoder: Encoder = OpenClip(pretrained="openai")
    completer: Completer = InstructCompleter()
    similarity: SimilarityFilter = SentenceFilter()
    k: PositiveInt = 10
    near_duplicate: float = Field(default=0.99, gt=0, le=1)
    index: Index = "auto"

    def build(self) -> Path:
        """Load the models and build the dataset; returns its directory."""
        self.check_source()

        def load() -> _Models:
            generator = self.generator.load()
            return generator, self.encoder.load(generator), self.similarity.load()

        return self._build(load)

    def build_with(
        self, generator: CountingGenerator, encoder: ImageEncoder, similarity: TextSimilarity
    ) -> Path:
        """Build with models that are loaded already."""
        return self._build(lambda: (generator, encoder, similarity))

    def _build(self, load: Callable[[], _Models]) -> Path:
        # Every worker retrieves from all pictures, and so reads the source for itself.
        source = Deferred(self.load_source)

        def pairs() -> _Pairs:
            generator, encoder, similarity = load()
            return _Pairs(
                config=self,
                source=source.value,
                generator=generator,
                encoder=encoder,
                similarity=similarity,
            )

        return self.make_pairs(source.value, pairs, VERSION)


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

    @property
    def names(self) -> dict[str, str]:
        return {
            "generator": self.generator.name,
            "encoder": self.encoder.name,
            "similarity": self.similarity.name,
            "masker": self.config.masker.name,
            "completer": self.config.completer.name,
        }

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
