"""BDHS: a rejected response written by the policy while it hardly sees the picture.

Bias-driven hallucination sampling (Amirloo et al., arXiv 2407.02477): hide the image tokens, each
with probability rho_th, from attention; let the policy complete every sentence of the answer from a
random cut of it on; keep the result where it differs enough from the answer. No second model, no
annotator. What is done to one answer is in mmalign/hallucinate.py, which online training shares;
here it becomes a dataset.

Launch: mmalign build configs/build/bdhs_llava.yaml
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import PositiveInt

from data_builders.base import Builder, GeneratorConfig, Source
from mmalign.errors import MediaError
from mmalign.generate.base import Generator
from mmalign.hallucinate import (
    Alike,
    AlikeSentences,
    AnyCorruption,
    AnyGuidance,
    Bias,
    BiasItem,
    Guided,
    MaskTokens,
    Negative,
    sample_negatives,
    share_blind,
)
from mmalign.jobs import Outcome
from mmalign.log import get_logger
from mmalign.prepare import RowDropped
from mmalign.records import Example, Origin, Preference
from mmalign.similarity import TextSimilarity
from mmalign.spans import differing_spans
from mmalign.store import MANIFEST, read_manifest

if TYPE_CHECKING:
    from mmalign.generate.local import LocalGenerator

VERSION = "1"
# From this share of draws on that hide every token, the threshold is worth a warning.
OFTEN_BLIND = 0.01

logger = get_logger("data_builders.bdhs")


class BDHS(Builder):
    """Settings of the builder; the defaults are the paper's, as in mmalign.hallucinate.Bias."""

    name: Literal["bdhs"] = "bdhs"
    generator: GeneratorConfig
    corruption: AnyCorruption = MaskTokens()
    guidance: AnyGuidance = Guided()
    tries: PositiveInt = 5
    similarity: Alike = AlikeSentences()
    drop_refusals: bool = True

    @property
    def bias(self) -> Bias:
        """The settings that online training shares."""
        return Bias(**{name: getattr(self, name) for name in Bias.model_fields})

    def build(self) -> Path:
        """Load the models and build the dataset; returns its directory."""
        self.check_source()
        source = self.load_source()
        first, root = source.examples[:8], source.media_root

        def load() -> tuple[Generator, TextSimilarity]:
            generator = self.generator.load()
            if isinstance(self.corruption, MaskTokens):
                tell_visible(self.corruption, generator, first, root)
            return generator, self.similarity.load()

        return self._build(source, load)

    def build_with(self, generator: Generator, similarity: TextSimilarity) -> Path:
        """Build with models that are loaded already."""
        return self._build(self.load_source(), lambda: (generator, similarity))

    def _build(self, source: Source, load: Callable[[], tuple[Generator, TextSimilarity]]) -> Path:
        root = source.media_root

        def pairs() -> _Pairs:
            generator, similarity = load()
            return _Pairs(config=self, media_root=root, generator=generator, similarity=similarity)

        path = self.make_pairs(source, pairs, VERSION)
        if (path / MANIFEST).exists():
            tell_yield(read_manifest(path).counts)
        return path


@dataclass(kw_only=True)
class _Pairs:
    """The work function of the job, with the models that it needs."""

    config: BDHS
    media_root: Path
    generator: Generator
    similarity: TextSimilarity

    @property
    def names(self) -> dict[str, str]:
        return {"generator": self.generator.name, "similarity": self.similarity.name}

    def make(self, examples: list[Example]) -> list[Outcome]:
        """One outcome per example; halved down to the one at fault where a row cannot be asked."""
        try:
            return self._make(examples)
        except RowDropped as drop:
            if len(examples) == 1:
                why = f"dropped:{drop.reason}"
                return [Outcome(id=examples[0].id, reason=why, detail=str(drop))]
            half = len(examples) // 2
            return self.make(examples[:half]) + self.make(examples[half:])

    def _make(self, examples: list[Example]) -> list[Outcome]:
        seen = [example for example in examples if example.images or example.videos]
        negatives = sample_negatives(
            [self._item(example) for example in seen],
            self.generator,
            similarity=self.similarity,
            settings=self.config.bias,
            sampling=self.config.generator.sampling(self.config.seed),
        )
        outcomes = {
            example.id: self._outcome(example, negative)
            for example, negative in zip(seen, negatives, strict=True)
        }
        return [
            outcomes.get(example.id) or Outcome(id=example.id, reason="dropped:no_picture")
            for example in examples
        ]

    def _item(self, example: Example) -> BiasItem:
        return BiasItem(
            id=example.id,
            prompt=example.prompt,
            images=example.images,
            videos=example.videos,
            media_root=self.media_root,
            chosen=example.answer or "",
        )

    def _outcome(self, example: Example, negative: Negative) -> Outcome:
        if negative.text is None:
            tries = f"try {negative.try_number}" if negative.try_number else ""
            return Outcome(id=example.id, reason=f"dropped:{negative.reason}", detail=tries)
        chosen = example.answer or ""
        chosen_spans, rejected_spans = differing_spans(chosen, negative.text)
        alike = negative.first_try_similarity >= self.config.similarity.threshold
        detail = {
            "similarity": round(negative.similarity, 6),
            "first_try_alike": alike,
            "tries": negative.try_number,
        }
        reason = f"accepted:{negative.reason}"
        record = Preference(
            id=example.id,
            prompt=example.prompt,
            images=self.config.stored(example.images, self.media_root),
            videos=self.config.stored(example.videos, self.media_root),
            chosen=chosen,
            rejected=negative.text,
            chosen_spans=chosen_spans,
            rejected_spans=rejected_spans,
            origin=Origin(
                builder="bdhs",
                version=VERSION,
                source=example.id,
                reason=reason,
                detail=json.dumps(detail),
            ),
        )
        return Outcome(id=example.id, record=record, reason=reason)


def yields(counts: Mapping[str, int]) -> dict[int, float]:
    """The share of answers with a negative that differs after try 1, 2, …, of all that were tried.

    Example: yields({"accepted:try1": 3, "accepted:free": 1}) == {1: 0.75}
    """
    untried = ("quarantined", "dropped:no_")
    tried = sum(n for reason, n in counts.items() if not reason.startswith(untried))
    found = {
        int(match[1]): n
        for reason, n in counts.items()
        if (match := re.fullmatch(r"accepted:try(\d+)", reason))
    }
    return {
        number: sum(n for other, n in found.items() if other <= number) / tried
        for number in sorted(found)
    }


def tell_yield(counts: Mapping[str, int]) -> None:
    """Log what the threshold is tuned by: how soon the negatives differ."""
    if shares := yields(counts):
        told = ", ".join(f"{share:.1%} by try {number}" for number, share in shares.items())
        logger.info("negatives that differ enough: %s", told)


def tell_visible(
    mask: MaskTokens, generator: LocalGenerator, examples: Sequence[Example], media_root: Path
) -> None:
    """Log what the mask leaves visible of these pictures; warn where it is often nothing."""
    counts = num_media_tokens(generator, examples, media_root)
    if not counts:
        return
    fewest, most = min(counts), max(counts)
    tokens = f"{fewest} to {most}" if fewest < most else f"{most}"
    blind = share_blind(mask.threshold, fewest)
    logger.info(
        "%s image tokens an example: %.1f visible on average, none in %.2g %% of tries",
        tokens,
        fewest * (1 - mask.threshold),
        100 * blind,
    )
    if OFTEN_BLIND < blind < 1:
        logger.warning(
            "corruption.threshold %g hides all of %d image tokens in %.0f %% of tries; it was "
            "chosen for up to 2880 of them: see how to tune it in docs/methods/bdhs.md",
            mask.threshold,
            fewest,
            100 * blind,
        )


def num_media_tokens(
    generator: LocalGenerator, examples: Sequence[Example], media_root: Path
) -> list[int]:
    """Tokens that the pictures and clips of each example take, where it has and can show any."""
    counts = []
    for example in examples:
        try:
            condition = generator.policy.preparer.condition(
                example.prompt, example.images, media_root, videos=example.videos, id=example.id
            )
        except (MediaError, RowDropped):
            continue  # The job will say what is wrong with it.
        counts.append(condition.num_media_tokens)
    return [count for count in counts if count]
