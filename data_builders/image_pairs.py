"""Pairs of pictures by a diffusion pipeline: chosen and rejected by a prefix, or by a judge.

By prefix, as Pick-Style and Pick-Safety were made (arXiv 2406.06424): the pipeline draws
"<prefix> <prompt>" for either side, and the pair is of the bare prompt. Both sides start from the
same noise, so that they differ in what the prefix says. By judge: several pictures of a prompt, of
which the judge's best is chosen and its worst rejected.

A picture depends on (seed, prompt's id, its number) alone.

Launch: mmalign build configs/build/image_pairs_style.yaml
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator

from data_builders.base import Builder
from data_builders.picture_page import write_picture_page
from mmalign.config import Strict
from mmalign.diffusion.config import DiffusionConfig
from mmalign.diffusion.judging import AnyJudge, ImageJudge
from mmalign.diffusion.prompts import ImagePrompt, read_prompts
from mmalign.diffusion.sampling import Draw, ImageSampling
from mmalign.jobs import Outcome
from mmalign.media import embed
from mmalign.records import ImagePreference, Origin

if TYPE_CHECKING:
    from PIL.Image import Image

    from mmalign.diffusion.sampling import ImageSampler

VERSION = "1"


class ByPrefix(Strict):
    """Chosen and rejected are drawn under prefixes of their own, from the same noise.

    chosen, rejected: prefixes; empty for the bare prompt. judge: where given, only pairs are kept
    whose chosen picture it scores at least min_score, and higher than the rejected one by more than
    min_gap; of the two, what is None is not asked for, and with both None min_gap is 0. It is asked
    about the bare prompt.
    """

    by: Literal["prefix"] = "prefix"
    chosen: str = ""
    rejected: str = ""
    judge: AnyJudge | None = None
    min_gap: NonNegativeFloat | None = None
    min_score: float | None = None

    @model_validator(mode="after")
    def _differ(self) -> ByPrefix:
        if self.chosen.strip() == self.rejected.strip():
            raise ValueError("chosen and rejected are one prefix, so the pictures would be one")
        if self.judge is None and (self.min_gap is not None or self.min_score is not None):
            raise ValueError("min_gap and min_score are of a judge; give a judge, or drop them")
        return self

    def draws(self, prompt: ImagePrompt, seed: int) -> list[Draw]:
        """Chosen, then rejected."""
        return [
            Draw(id=prompt.id, prompt=f"{prefix} {prompt.text}".strip(), seed=seed)
            for prefix in (self.chosen, self.rejected)
        ]

    def pair(self, scores: Sequence[float]) -> tuple[int, int]:
        """Which picture is chosen, which rejected."""
        return 0, 1

    def problem(self, chosen: float, rejected: float) -> str | None:
        """Why a pair of these scores is left out, or None."""
        if self.min_score is not None and chosen < self.min_score:
            return "score_too_low"
        if self.min_gap is None and self.min_score is not None:
            return None
        return gap_problem(chosen - rejected, self.min_gap or 0.0)


class ByJudge(Strict):
    """The best and the worst of some pictures of one prompt.

    candidates: pictures. min_gap: pairs whose scores differ by no more are left out.
    """

    by: Literal["judge"] = "judge"
    judge: AnyJudge
    candidates: int = Field(default=4, ge=2)
    min_gap: NonNegativeFloat = 0.0

    def draws(self, prompt: ImagePrompt, seed: int) -> list[Draw]:
        """All candidates."""
        return [
            Draw(id=f"{prompt.id}/{number}", prompt=prompt.text, seed=seed)
            for number in range(self.candidates)
        ]

    def pair(self, scores: Sequence[float]) -> tuple[int, int]:
        """Which picture is chosen, which rejected; the first of equals."""
        places = range(len(scores))
        return max(places, key=scores.__getitem__), min(places, key=scores.__getitem__)

    def problem(self, chosen: float, rejected: float) -> str | None:
        """Why a pair of these scores is left out, or None."""
        return gap_problem(chosen - rejected, self.min_gap)


def gap_problem(gap: float, least: float) -> str | None:
    """Why a judge's gap does not make a pair, or None; it must be more than `least`."""
    if gap > least:
        return None
    return "judge_disagrees" if gap < 0 else "gap_too_small"


class ImagePairs(Builder):
    """Settings of the builder.

    source: prompts, as mmalign.diffusion.prompts reads them; limit: of them. per_prompt: pairs of
    each. pipeline: any diffusers pipeline from text to pictures. pairs: how chosen and rejected
    come about.
    """

    name: Literal["image_pairs"] = "image_pairs"
    source: Path  # type: ignore[assignment] # prompts
    pipeline: DiffusionConfig
    sampling: ImageSampling = ImageSampling()
    pairs: Annotated[ByPrefix | ByJudge, Field(discriminator="by")]
    per_prompt: PositiveInt = 1
    shard_rows: PositiveInt = 32

    def build(self) -> Path:
        """Load pipeline and judge and build the dataset; returns its directory."""
        from mmalign.diffusion.sampling import ImageSampler

        def load() -> _Pairing:
            judge = self.pairs.judge
            return _Pairing(
                config=self,
                sampler=ImageSampler.from_checkpoint(self.pipeline, self.sampling),
                judge=None if judge is None else judge.load(),
            )

        return self._build(load)

    def build_with(self, sampler: ImageSampler, judge: ImageJudge | None = None) -> Path:
        """Build with what is loaded already."""
        return self._build(lambda: _Pairing(config=self, sampler=sampler, judge=judge))

    def _build(self, load: Callable[[], _Pairing]) -> Path:
        prompts = [
            ImagePrompt(id=f"{prompt.id}/{number}", text=prompt.text)
            for prompt in read_prompts(self.source)[: self.limit]
            for number in range(self.per_prompt)
        ]
        # Pictures are bytes in the rows: no file of theirs is anywhere else.
        manifest = self.run_job(prompts, load, ImagePreference, VERSION, Path("media"))
        if manifest is not None:
            write_picture_page(self.output)
        return self.output


@dataclass(kw_only=True)
class _Pairing:
    """The work function of the job, with the models that it needs."""

    config: ImagePairs
    sampler: ImageSampler
    judge: ImageJudge | None

    @property
    def names(self) -> dict[str, str]:
        judge = {} if self.judge is None else {"judge": self.judge.name}
        return {"pipeline": self.sampler.name, **judge}

    def make(self, rows: list[Any]) -> list[Outcome]:
        """One outcome per prompt, in order; all pictures of a chunk are drawn together."""
        pairs, seed = self.config.pairs, self.config.seed
        draws = [pairs.draws(prompt, seed) for prompt in rows]
        pictures = iter(self.sampler.draw([one for some in draws for one in some]))
        return [
            self._outcome(prompt, some, [next(pictures) for _ in some])
            for prompt, some in zip(rows, draws, strict=True)
        ]

    def _outcome(
        self, prompt: ImagePrompt, draws: Sequence[Draw], pictures: list[Image]
    ) -> Outcome:
        scores: list[float] = []
        if self.judge is not None:
            scores = self.judge.score([prompt.text] * len(pictures), pictures)
        best, worst = self.config.pairs.pair(scores)
        if pictures[best].tobytes() == pictures[worst].tobytes():
            return Outcome(id=prompt.id, reason="dropped:same_image")
        if scores:
            found = [scores[best], scores[worst]]
            problem = self.config.pairs.problem(*found)
            if problem is not None:
                told = "scores {:.4g}, {:.4g}".format(*found)
                return Outcome(id=prompt.id, reason=f"dropped:{problem}", detail=told)
        sides = (("chosen", best), ("rejected", worst))
        detail: dict[str, Any] = {f"{side}_prompt": draws[place].prompt for side, place in sides}
        detail |= {f"{side}_score": scores[place] for side, place in sides if scores}
        record = ImagePreference(
            id=prompt.id,
            prompt=prompt.text,
            chosen=embed(pictures[best]),
            rejected=embed(pictures[worst]),
            origin=Origin(
                builder=self.config.name,
                version=VERSION,
                source=prompt.id,
                reason=f"by {self.config.pairs.by}",
                detail=json.dumps(detail),
            ),
        )
        return Outcome(id=prompt.id, record=record, reason="accepted")
