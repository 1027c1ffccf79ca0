"""Pairs made during training, from what the policy says now.

    BDHS        the rejected response is what the current policy writes while it hardly sees the
                picture (Online-BDHS, arXiv 2407.02477); log-probabilities use the clean picture
    annotated   both responses are samples of the current policy, and an annotator says which is
                the better one (Online-DPO)

and either replaces the dataset's own pair, is averaged with it (Avg-DPO: gamma L(offline) +
(1 - gamma) L(online), an average of losses), or takes turns with it by the toss of a coin for each
row (Mixed-DPO). Everything random depends on (run.seed, step, id), so a resumed run repeats it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

from pydantic import Field, NonNegativeFloat, PositiveInt

from mmalign.config import Strict
from mmalign.generate.base import Request, Sampling
from mmalign.generate.server import ServerConfig
from mmalign.hallucinate import Bias, BiasItem, sample_negatives
from mmalign.models.load import ModelConfig, Policy
from mmalign.prepare import RowDropped
from mmalign.records import Preference, prompt_text
from mmalign.similarity import OverlapMeasure, SentenceMeasure
from mmalign.spans import differing_spans
from trainers.objectives.base import Objective, PreparedRow, RowPair

if TYPE_CHECKING:
    from mmalign.generate.local import LocalGenerator


class Decoding(Strict):
    """How the policy samples."""

    temperature: NonNegativeFloat = 1.0
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_new_tokens: PositiveInt = 256
    batch_size: PositiveInt = 16

    def sampling(self, seed: int) -> Sampling:
        """With this seed."""
        return Sampling(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=seed,
        )


class OnlineBDHS(Strict):
    """The rejected response from the current policy's own bias; settings as in the builder."""

    name: Literal["bdhs"] = "bdhs"
    bias: Bias = Bias()
    decoding: Decoding = Decoding()


class ByAnswer(Strict):
    """The better response is the one more like the dataset's chosen one."""

    name: Literal["answer"] = "answer"
    similarity: Annotated[OverlapMeasure | SentenceMeasure, Field(discriminator="name")] = (
        OverlapMeasure()
    )


class ByReward(Strict):
    """The better response is the one with the higher reward."""

    name: Literal["reward"] = "reward"
    model: ModelConfig
    batch_size: PositiveInt = 16


class ByJudge(Strict):
    """The better response is the one that a judge on a server ranks first."""

    name: Literal["judge"] = "judge"
    server: ServerConfig


class OnlineSamples(Strict):
    """Both responses from the current policy, ordered by an annotator."""

    name: Literal["annotated"] = "annotated"
    annotator: Annotated[ByAnswer | ByReward | ByJudge, Field(discriminator="name")] = ByAnswer()
    decoding: Decoding = Decoding()


class Replace(Strict):
    """The new pair instead of the dataset's."""

    name: Literal["replace"] = "replace"


class Average(Strict):
    """Both pairs of every row: gamma times the dataset's, 1 - gamma times the new one."""

    name: Literal["average"] = "average"
    gamma: float = Field(default=0.5, ge=0, le=1)


class Coin(Strict):
    """For each row the dataset's pair with probability p, else the new one."""

    name: Literal["coin"] = "coin"
    p: float = Field(default=0.5, ge=0, le=1)


class Online(Strict):
    """Where new pairs come from during training, and what becomes of the dataset's own."""

    source: Annotated[OnlineBDHS | OnlineSamples, Field(discriminator="name")] = OnlineBDHS()
    use: Annotated[Replace | Average | Coin, Field(discriminator="name")] = Replace()


class Annotator(Protocol):
    """Says which of two responses is better."""

    def prefer(
        self, rows: Sequence[Preference], pairs: Sequence[tuple[str, str]], tag: str
    ) -> list[int | None]:
        """0 or 1 for each pair, None where there is no telling."""
        ...


@dataclass(frozen=True, kw_only=True)
class OnlinePairs:
    """Makes the rows of a step with the policy as it is then."""

    config: Online
    policy: Policy
    generator: LocalGenerator
    judge: Any  # a TextSimilarity for BDHS, an Annotator for samples
    objective: Objective
    media_root: Path
    seed: int

    def rows(
        self, step: int, records: Sequence[Preference], own: Sequence[PreparedRow]
    ) -> list[PreparedRow]:
        """The step's rows: `own`, the prepared `records`, with their new pairs as configured.

        A row for which no pair could be made keeps its place with weight 0: it trains nothing, and
        metrics show how many there are as the loss's missing weight.
        """
        use = self.config.use
        wanted = [not isinstance(use, Coin) or self._tossed(step, r.id, use.p) for r in records]
        asked = [record for record, ask in zip(records, wanted, strict=True) if ask]
        made = iter(self._made(step, asked))
        rows = []
        for row, ask in zip(own, wanted, strict=True):
            new = next(made) if ask else None
            if not ask:
                rows.append(row)
            elif isinstance(use, Average):
                rows.append(merged(row, new, use.gamma))
            else:
                rows.append(without_weight(row) if new is None else new)
        return rows

    def _tossed(self, step: int, id: str, p: float) -> bool:
        """Whether this row gets a new pair at this step."""
        return random.Random(f"{self.seed}/{step}/{id}/coin").random() >= p

    def _made(self, step: int, records: Sequence[Preference]) -> list[PreparedRow | None]:
        """A prepared row with a new pair for each record, None where there is none."""
        if not records:
            return []
        # At the first step the draws are those of the builder with the same seed.
        tag = f"step{step}" if step else ""
        was_training = self.policy.model.training
        self.policy.model.eval()
        try:
            source = self.config.source
            make = self._biased if isinstance(source, OnlineBDHS) else self._sampled
            made = make(records, tag)
        finally:
            self.policy.model.train(was_training)
        return [None if record is None else self._prepared(record) for record in made]

    def _prepared(self, record: Preference) -> PreparedRow | None:
        spans = differing_spans(record.chosen, record.rejected)
        record = replace(record, chosen_spans=spans[0], rejected_spans=spans[1])
        try:
            return self.objective.prepare(record)
        except RowDropped:
            return None

    def _biased(self, records: Sequence[Preference], tag: str) -> list[Preference | None]:
        source = self.config.source
        assert isinstance(source, OnlineBDHS)
        items = [
            BiasItem(
                id=record.id,
                prompt=record.prompt,
                images=record.images,
                videos=record.videos,
                media_root=self.media_root,
                chosen=record.chosen,
            )
            for record in records
        ]
        found = sample_negatives(
            items,
            self.generator,
            similarity=self.judge,
            settings=source.bias,
            sampling=source.decoding.sampling(self.seed),
            tag=tag,
        )
        return [
            None if negative.text is None else replace(record, rejected=negative.text)
            for record, negative in zip(records, found, strict=True)
        ]

    def _sampled(self, records: Sequence[Preference], tag: str) -> list[Preference | None]:
        source = self.config.source
        assert isinstance(source, OnlineSamples)
        requests = [
            Request(
                id=f"{tag}/{record.id}/sample{number}",
                prompt=record.prompt,
                images=record.images,
                videos=record.videos,
                media_root=self.media_root,
            )
            for record in records
            for number in (1, 2)
        ]
        replies = self.generator.generate(requests, source.decoding.sampling(self.seed))
        texts = [reply.text.strip() if reply.finished else "" for reply in replies]
        pairs = list(zip(texts[::2], texts[1::2], strict=True))
        # Equal, empty and cut samples make no pair; nobody need be asked about them.
        open_rows = [i for i, (one, other) in enumerate(pairs) if one and other and one != other]
        verdicts = self.judge.prefer(
            [records[i] for i in open_rows], [pairs[i] for i in open_rows], tag
        )
        made: list[Preference | None] = [None] * len(records)
        for i, better in zip(open_rows, verdicts, strict=True):
            if better is not None:
                chosen, rejected = pairs[i][better], pairs[i][1 - better]
                made[i] = replace(records[i], chosen=chosen, rejected=rejected, score_gap=None)
        return made


def without_weight(row: PreparedRow) -> PreparedRow:
    """The row in its place, training nothing."""
    return replace(row, pairs=tuple(replace(pair, weight=0.0) for pair in row.pairs))


def merged(own: PreparedRow, new: PreparedRow | None, gamma: float) -> PreparedRow:
    """One row with the pairs of both, `own` weighing gamma and `new` 1 - gamma.

    A chosen response that both share is one candidate. Without a new pair its half trains nothing.
    """
    kept = tuple(replace(pair, weight=gamma * pair.weight) for pair in own.pairs)
    if new is None:
        rest = tuple(replace(pair, weight=0.0) for pair in own.pairs)
        return replace(own, pairs=(*kept, *rest))
    shift = len(own.conditions)
    added = [replace(c, condition=c.condition + shift) for c in new.candidates]
    places = list(range(len(own.candidates), len(own.candidates) + len(added)))
    if own.candidates[0] == new.candidates[0]:
        added, places = added[1:], [0, *(place - 1 for place in places[1:])]

    def moved(pair: RowPair) -> RowPair:
        columns = ("chosen", "rejected", "contrast", "rationale")
        where = {name: getattr(pair, name) for name in columns}
        where = {name: None if old is None else places[old] for name, old in where.items()}
        return replace(pair, weight=(1 - gamma) * pair.weight, **where)

    return PreparedRow(
        id=own.id,
        conditions=own.conditions + new.conditions,
        candidates=(*own.candidates, *added),
        pairs=(*kept, *map(moved, new.pairs)),
    )


def online_pairs(
    config: Online, policy: Policy, objective: Objective, media_root: Path, seed: int
) -> OnlinePairs:
    """Load what the configured source needs beside the policy."""
    from mmalign.generate.local import LocalGenerator

    source = config.source
    batch_size = source.decoding.batch_size
    if isinstance(source, OnlineBDHS):
        judge: Any = source.bias.similarity.load()
    else:
        judge = annotator_of(source.annotator, media_root)
    return OnlinePairs(
        config=config,
        policy=policy,
        generator=LocalGenerator(policy, batch_size=batch_size),
        judge=judge,
        objective=objective,
        media_root=media_root,
        seed=seed,
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

    def prefer(
        self, rows: Sequence[Preference], pairs: Sequence[tuple[str, str]], tag: str
    ) -> list[int | None]:
        answers = [row.chosen for row in rows]
        first, second = (
            self.similarity(answers, [pair[side] for pair in pairs]) for side in (0, 1)
        )
        return [_first_if_higher(a, b) for a, b in zip(first, second, strict=True)]


@dataclass(frozen=True)
class _RewardAnnotator:
    model: Any
    media_root: Path

    def prefer(
        self, rows: Sequence[Preference], pairs: Sequence[tuple[str, str]], tag: str
    ) -> list[int | None]:
        from mmalign.reward import Judgement

        items = [
            Judgement(
                id=f"{tag}/{row.id}/{side}",
                prompt=row.prompt,
                response=pair[side],
                images=row.images,
                videos=row.videos,
                media_root=self.media_root,
            )
            for row, pair in zip(rows, pairs, strict=True)
            for side in (0, 1)
        ]
        rewards = [judged.reward for judged in self.model.judge(items)]
        return [_first_if_higher(a, b) for a, b in zip(rewards[::2], rewards[1::2], strict=True)]


@dataclass(frozen=True)
class _JudgeAnnotator:
    judge: Any
    media_root: Path

    def prefer(
        self, rows: Sequence[Preference], pairs: Sequence[tuple[str, str]], tag: str
    ) -> list[int | None]:
        from mmalign.judge import Contest

        rulings = self.judge.rank(
            [
                Contest(
                    id=f"{tag}/{row.id}",
                    question=prompt_text(row.prompt),
                    responses=pair,
                    images=row.images,
                    media_root=self.media_root,
                )
                for row, pair in zip(rows, pairs, strict=True)
            ]
        )
        # Rank 0 is the best.
        return [
            None if r.value is None else _first_if_higher(-r.value.ranks[0], -r.value.ranks[1])
            for r in rulings
        ]


def _first_if_higher(one: float, other: float) -> int | None:
    return None if one == other else int(other > one)
