"""The plainest pairs: what the policy says by itself against the right answer.

The rejected response is a sample of the policy on the example's own picture and prompt, the first
of `tries` that differs enough from the answer; the chosen response is the answer. A sample that the
token limit cut is none: its missing end would tell it from the answer. The phrases that differ are
marked, so that losses over phrases can train on the same pairs.

Launch: mmalign build config.yaml with `name: on_policy`
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import PositiveInt

from data_builders.base import AnyGenerator, Builder, SentenceFilter, SimilarityFilter
from mmalign.generate.base import Generator, request_for
from mmalign.jobs import Outcome
from mmalign.records import Example, Origin, Preference
from mmalign.similarity import TextSimilarity
from mmalign.spans import differing_spans

VERSION = "2"


class OnPolicy(Builder):
    """Settings of the builder."""

    name: Literal["on_policy"] = "on_policy"
    generator: AnyGenerator
    similarity: SimilarityFilter = SentenceFilter()
    tries: PositiveInt = 4

    def build(self) -> Path:
        """Load the models and build the dataset; returns its directory."""
        self.check_source()
        return self._build(lambda: (self.generator.load(), self.similarity.load()))

    def build_with(self, generator: Generator, similarity: TextSimilarity) -> Path:
        """Build with models that are loaded already."""
        return self._build(lambda: (generator, similarity))

    def _build(self, load: Callable[[], tuple[Generator, TextSimilarity]]) -> Path:
        source = self.load_source()
        root = source.media_root

        def pairs() -> _Pairs:
            generator, similarity = load()
            return _Pairs(config=self, media_root=root, generator=generator, similarity=similarity)

        return self.make_pairs(source, pairs, VERSION)


@dataclass(kw_only=True)
class _Pairs:
    """The work function of the job, with the models that it needs."""

    config: OnPolicy
    media_root: Path
    generator: Generator
    similarity: TextSimilarity

    @property
    def names(self) -> dict[str, str]:
        return {"generator": self.generator.name, "similarity": self.similarity.name}

    def make(self, examples: list[Example]) -> list[Outcome]:
        """One outcome per example; try after try, all open examples of a chunk together."""
        outcomes = {
            example.id: Outcome(id=example.id, reason="dropped:no_answer")
            for example in examples
            if not (example.answer or "").strip()
        }
        for number in range(1, self.config.tries + 1):
            trying = [example for example in examples if example.id not in outcomes]
            if not trying:
                break
            for example, response, similarity in self._try(trying, number):
                if response and similarity < self.config.similarity.threshold:
                    outcomes[example.id] = self._accept(example, number, response, similarity)
        return [
            outcomes.get(example.id) or Outcome(id=example.id, reason="dropped:no_try_accepted")
            for example in examples
        ]

    def _try(self, trying: list[Example], number: int) -> list[tuple[Example, str, float]]:
        requests = [
            request_for(example, id=f"{example.id}/try{number}", media_root=self.media_root)
            for example in trying
        ]
        sampling = self.config.generator.sampling(self.config.seed)
        replies = self.generator.generate(requests, sampling)
        responses = [reply.text.strip() if reply.finished else "" for reply in replies]
        answers = [example.answer or "" for example in trying]
        return list(zip(trying, responses, self.similarity(answers, responses), strict=True))

    def _accept(self, example: Example, number: int, response: str, similarity: float) -> Outcome:
        reason = f"accepted:try{number}"
        chosen_spans, rejected_spans = differing_spans(example.answer or "", response)
        record = Preference(
            id=example.id,
            prompt=example.prompt,
            images=self.config.stored(example.images, self.media_root),
            videos=self.config.stored(example.videos, self.media_root),
            chosen=example.answer or "",
            rejected=response,
            chosen_spans=chosen_spans,
            rejected_spans=rejected_spans,
            origin=Origin(
                builder="on_policy",
                version=VERSION,
                source=example.id,
                reason=reason,
                detail=json.dumps({"similarity": round(similarity, 6)}),
            ),
        )
        return Outcome(id=example.id, record=record, reason=reason)
