"""Who says which responses of the policy are better: an answer, a reward model, a judge, rules.

An annotator gives each response to a prompt a score, higher for better. The best and the worst
make a pair; where they are equal, or there is no telling, there is none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from pydantic import Field, PositiveInt

from mmalign.config import Strict
from mmalign.errors import RewardError
from mmalign.generate.base import Generation
from mmalign.generate.server import ServerConfig
from mmalign.models.load import ModelConfig
from mmalign.records import Preference, Verifiable, prompt_text
from mmalign.rewards import RewardsConfig
from mmalign.similarity import OverlapMeasure, SentenceMeasure

Row = Preference | Verifiable


class ByAnswer(Strict):
    """The better response is the one more like the dataset's chosen one."""

    name: Literal["answer"] = "answer"
    similarity: Annotated[OverlapMeasure | SentenceMeasure, Field(discriminator="name")] = (
        OverlapMeasure()
    )


class ByReward(Strict):
    """The better response is the one with the higher reward of a reward model."""

    name: Literal["reward"] = "reward"
    model: ModelConfig
    batch_size: PositiveInt = 16


class ByJudge(Strict):
    """The better response is the one that a judge on a server ranks first."""

    name: Literal["judge"] = "judge"
    server: ServerConfig


class ByRule(Strict):
    """The better response is the one for which rewards, as GRPO has them, add up to more."""

    name: Literal["rule"] = "rule"
    rewards: RewardsConfig = RewardsConfig()


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The places of a group's best and worst response, with their scores.

    reason: "ok", or why there is no pair; all else is then nothing. "tied": the best is no better
    than the worst. "too_few": fewer than two whole and different texts. "no_verdict": the annotator
    cannot tell.
    """

    reason: Literal["ok", "tied", "too_few", "no_verdict"] = "ok"
    chosen: int = 0
    rejected: int = 0
    chosen_score: float = 0.0
    rejected_score: float = 0.0


class Annotator(Protocol):
    """Scores texts that answer the prompts of rows."""

    def score(
        self, rows: Sequence[Row], groups: Sequence[Sequence[str]], tag: str
    ) -> list[Sequence[float] | None]:
        """A score for each text of each row's group; None where there is no telling.

        tag: tells the requests of one step from those of another.
        """
        ...


def verdicts(
    annotator: Annotator, rows: Sequence[Row], groups: Sequence[Sequence[Generation]], tag: str
) -> list[Verdict]:
    """The best and the worst response to each row's prompt, as the annotator finds them.

    It is asked about texts that are whole, not empty, and different from those before them, and
    about nobody who has fewer than two of those.
    """
    texts = [[reply.text.strip() if reply.finished else "" for reply in group] for group in groups]
    places = [[i for i, t in enumerate(own) if t and own.index(t) == i] for own in texts]
    open_rows = [i for i, own in enumerate(places) if len(own) > 1]
    found = [Verdict(reason="too_few")] * len(rows)
    if not open_rows:
        return found
    scores = annotator.score(
        [rows[i] for i in open_rows], [[texts[i][p] for p in places[i]] for i in open_rows], tag
    )
    for i, own in zip(open_rows, scores, strict=True):
        told = None if own is None else best_and_worst(own, rows[i].id)
        found[i] = Verdict(reason="no_verdict") if told is None else _moved(told, places[i])
    return found


def best_and_worst(scores: Sequence[float], row: str) -> Verdict:
    """The first of the best and the first of the worst. Raises RewardError on what is no number."""
    if not all(map(math.isfinite, scores)):
        raise RewardError(
            "the annotator's score of a response is not finite",
            where=f"row {row}",
            got=str(list(scores)),
            wanted="finite numbers",
        )
    best, worst = max(scores), min(scores)
    if best == worst:
        return Verdict(reason="tied")
    return Verdict(
        chosen=scores.index(best),
        rejected=scores.index(worst),
        chosen_score=best,
        rejected_score=worst,
    )


def annotator_of(config: ByAnswer | ByReward | ByJudge, media_root: Path) -> Annotator:
    """The annotator that a config names, with its model loaded."""
    if isinstance(config, ByAnswer):
        return _AnswerAnnotator(config.similarity.load())
    if isinstance(config, ByReward):
        from mmalign.reward import RewardModel

        loaded = RewardModel.from_checkpoint(config.model, batch_size=config.batch_size)
        return _RewardAnnotator(loaded, media_root)
    from mmalign.judge import Judge

    return _JudgeAnnotator(Judge(config.server.load()), media_root)


@dataclass(frozen=True)
class _AnswerAnnotator:
    similarity: Any

    def score(
        self, rows: Sequence[Row], groups: Sequence[Sequence[str]], tag: str
    ) -> list[Sequence[float] | None]:
        answers = []
        for row, group in zip(rows, groups, strict=True):
            assert isinstance(row, Preference)
            answers += [row.chosen] * len(group)
        texts = [text for group in groups for text in group]
        return _regrouped(self.similarity(answers, texts), groups)


@dataclass(frozen=True)
class _RewardAnnotator:
    model: Any
    media_root: Path

    def score(
        self, rows: Sequence[Row], groups: Sequence[Sequence[str]], tag: str
    ) -> list[Sequence[float] | None]:
        from mmalign.reward import Judgement

        items = [
            Judgement(
                id=f"{tag}/{row.id}/{number}",
                prompt=row.prompt,
                response=text,
                images=row.images,
                videos=row.videos,
                media_root=self.media_root,
            )
            for row, group in zip(rows, groups, strict=True)
            for number, text in enumerate(group)
        ]
        return _regrouped([judged.reward for judged in self.model.judge(items)], groups)


@dataclass(frozen=True)
class _JudgeAnnotator:
    judge: Any
    media_root: Path

    def score(
        self, rows: Sequence[Row], groups: Sequence[Sequence[str]], tag: str
    ) -> list[Sequence[float] | None]:
        from mmalign.judge import Contest

        rulings = self.judge.rank(
            [
                Contest(
                    id=f"{tag}/{row.id}",
                    question=prompt_text(row.prompt),
                    responses=tuple(group),
                    images=row.images,
                    media_root=self.media_root,
                )
                for row, group in zip(rows, groups, strict=True)
            ]
        )
        # Rank 0 is the best.
        return [None if r.value is None else [-rank for rank in r.value.ranks] for r in rulings]


def _regrouped(
    scores: Sequence[float], groups: Sequence[Sequence[str]]
) -> list[Sequence[float] | None]:
    left = iter(scores)
    return [[next(left) for _ in group] for group in groups]


def _moved(verdict: Verdict, places: Sequence[int]) -> Verdict:
    """A verdict on some responses of a group, by their places in all of it."""
    if verdict.reason != "ok":
        return verdict
    return Verdict(
        chosen=places[verdict.chosen],
        rejected=places[verdict.rejected],
        chosen_score=verdict.chosen_score,
        rejected_score=verdict.rejected_score,
    )
