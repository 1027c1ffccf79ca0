"""Pairs made during training, from what the policy says now.

    BDHS        the rejected response is what the current policy writes while it hardly sees the
                picture (Online-BDHS, arXiv 2407.02477); log-probabilities use the clean picture
    annotated   both responses are samples of the current policy, and an annotator says which is
                the better one (Online-DPO)
    rollouts    the dataset holds prompts alone, whose responses are all the policy's own: see
                trainers/rollout_pairs.py

One of the first two either replaces the dataset's own pair, is averaged with it (Avg-DPO: gamma
L(offline) + (1 - gamma) L(online), an average of losses), or takes turns with it by the toss of a
coin for each row (Mixed-DPO). Everything random depends on (run.seed, step, id), so a resumed run
repeats it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from mmalign.config import Strict
from mmalign.generate.base import request_for
from mmalign.hallucinate import Bias, BiasItem, sample_negatives
from mmalign.models.load import Policy
from mmalign.prepare import RowDropped
from mmalign.records import Preference
from mmalign.spans import differing_spans
from trainers.annotators import ByAnswer, ByJudge, ByReward, annotator_of, verdicts
from trainers.decoding import Decoding, evaluating
from trainers.objectives.base import Objective, PreparedRow, RowPair
from trainers.rollout_pairs import OnlineRollouts

if TYPE_CHECKING:
    from mmalign.generate.local import LocalGenerator


class OnlineBDHS(Strict):
    """The rejected response from the current policy's own bias; settings as in the builder."""

    name: Literal["bdhs"] = "bdhs"
    bias: Bias = Bias()
    decoding: Decoding = Decoding()


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

    source: Annotated[OnlineBDHS | OnlineSamples | OnlineRollouts, Field(discriminator="name")] = (
        OnlineBDHS()
    )
    use: Annotated[Replace | Average | Coin, Field(discriminator="name")] = Replace()

    @model_validator(mode="after")
    def _prompts_have_no_pair(self) -> Online:
        if isinstance(self.source, OnlineRollouts) and not isinstance(self.use, Replace):
            raise ValueError(
                f"use={self.use.name} needs a pair of the dataset's own, and source=rollouts is "
                "for prompts alone; drop use"
            )
        return self


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

    def close(self) -> None:
        """Nothing was started."""

    def _tossed(self, step: int, id: str, p: float) -> bool:
        """Whether this row gets a new pair at this step."""
        return random.Random(f"{self.seed}/{step}/{id}/coin").random() >= p

    def _made(self, step: int, records: Sequence[Preference]) -> list[PreparedRow | None]:
        """A prepared row with a new pair for each record, None where there is none."""
        if not records:
            return []
        # At the first step the draws are those of the builder with the same seed.
        tag = f"step{step}" if step else ""
        source = self.config.source
        make = self._biased if isinstance(source, OnlineBDHS) else self._sampled
        with evaluating(self.policy.model):
            made = make(records, tag)
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
            request_for(record, id=f"{tag}/{record.id}/sample{number}", media_root=self.media_root)
            for record in records
            for number in (1, 2)
        ]
        replies = self.generator.generate(requests, source.decoding.sampling(self.seed))
        pairs = list(zip(replies[::2], replies[1::2], strict=True))
        made: list[Preference | None] = []
        # Equal, empty and cut samples make no pair; nobody need be asked about them.
        found = verdicts(self.judge, records, pairs, tag)
        for record, pair, verdict in zip(records, pairs, found, strict=True):
            if verdict.reason != "ok":
                made.append(None)
                continue
            chosen, rejected = (
                pair[place].text.strip() for place in (verdict.chosen, verdict.rejected)
            )
            made.append(replace(record, chosen=chosen, rejected=rejected, score_gap=None))
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
    assert not isinstance(source, OnlineRollouts)
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
