"""Rankings with critiques: responses to one prompt from any models, ranked and criticised.

MM-RLHF's data (arXiv 2502.10391), with a judge in the place of its annotators:

1. every generator answers the prompt, each as often as it is told to;
2. equal responses become one, and fewer than two different ones are no ranking;
3. the judge sees them in an order drawn from (seed, id), for judges prefer places, and gives each a
   score, a rank and a critique. What it does not say in form, or says against itself, is nothing.

The judge is a language model or, through `build_with`, anything that is a Ranker, such as a rule of
a closed world. Annotations by people are the business of `expand_critiques`. A critique of more
words than `max_critique_words` ends at the last sentence that fits.

Launch: mmalign build configs/build/critiques.yaml
"""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from pydantic import Field, PositiveInt, field_validator, model_validator

from data_builders.base import AnyGenerator, Builder
from data_builders.in_turn import InTurn
from data_builders.judging import asked, question_of, reason_of, shortened
from data_builders.ranking_page import write_ranking_page
from data_builders.verify import JudgeConfig
from mmalign.config import Strict
from mmalign.errors import MediaError
from mmalign.generate.base import Generation, Generator, Request, request_seed
from mmalign.generate.server import Unanswered
from mmalign.jobs import Outcome
from mmalign.judge import Contest, Judge, Ruling
from mmalign.media import open_image
from mmalign.records import Example, Origin, RankedResponse, Ranking
from mmalign.verdicts import RankVerdict

VERSION = "1"
JUDGE = "judge"
# A ranking that goes in circles, or against its own scores.
CONTRADICTIONS = frozenset({"rank_repeats_response", "scores_contradict_rank"})


class Ranker(Protocol):
    """Ranks responses; mmalign.judge.Judge does, and so may a rule. Contests have examples' ids."""

    @property
    def name(self) -> str:
        """What identifies it in manifests."""
        ...

    def rank(self, contests: Sequence[Contest]) -> list[Ruling[RankVerdict]]:
        """One ruling for each contest, in order; a blank critique is none."""
        ...


class Writer(Strict):
    """A generator by the name that pages and ids know it by, and how often it answers."""

    name: str = Field(pattern=r"^[\w.-]+$")
    num_samples: PositiveInt = 1
    generator: AnyGenerator

    @model_validator(mode="after")
    def _samples_may_differ(self) -> Writer:
        if self.num_samples > 1 and self.generator.temperature == 0:
            raise ValueError("num_samples above 1 needs a temperature above 0")
        return self


class Critiques(Builder):
    """Settings of the builder. `max_critique_words`: see the module."""

    name: Literal["critiques"] = "critiques"
    generators: tuple[Writer, ...] = Field(min_length=1)
    judge: JudgeConfig
    max_critique_words: PositiveInt = 200

    @field_validator("generators")
    @classmethod
    def _have_names_of_their_own(cls, generators: tuple[Writer, ...]) -> tuple[Writer, ...]:
        names = Counter(writer.name for writer in generators)
        if names[JUDGE]:
            raise ValueError("the name judge is the judge's")
        if twice := [name for name, count in names.items() if count > 1]:
            raise ValueError(f"{', '.join(twice)} is the name of more than one")
        if sum(writer.num_samples for writer in generators) < 2:
            raise ValueError("one response cannot be ranked; add a generator or raise num_samples")
        return generators

    def build(self) -> Path:
        """Load the models, one after another, and build the dataset; returns its directory."""
        self.check_source()
        configs = {writer.name: writer.generator for writer in self.generators}
        models = InTurn(configs | {JUDGE: self.judge.generator})
        sampling = self.judge.generator.sampling(self.seed)

        def judge() -> Ranker:
            return Judge(models.get(JUDGE), tries=self.judge.tries, sampling=sampling)

        return self._build(models, judge)

    def build_with(self, generators: Mapping[str, Generator], judge: Ranker) -> Path:
        """Build with models that are loaded already, the generators by their names."""
        return self._build(InTurn(given=generators), lambda: judge)

    def _build(self, models: InTurn, judge: Callable[[], Ranker]) -> Path:
        source = self.load_source()
        root = source.media_root

        def rankings() -> _Rankings:
            return _Rankings(config=self, media_root=root, models=models, judge=judge)

        if self.run_job(source.examples, rankings, Ranking, VERSION, root) is not None:
            write_ranking_page(self.output)
        return self.output


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sample:
    """One answer of a writer; `reason` says why it is no response, and is "" where it is one."""

    writer: str
    model: str
    text: str
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """An example with its different responses, who wrote each, and the place it is shown at."""

    example: Example
    texts: tuple[str, ...]
    models: tuple[str, ...]
    writers: tuple[tuple[str, ...], ...]
    places: tuple[int, ...]
    lost: dict[str, int]


@dataclass(kw_only=True)
class _Rankings:
    """The work function of the job, with the models that it needs."""

    config: Critiques
    media_root: Path
    models: InTurn
    judge: Callable[[], Ranker]

    @property
    def names(self) -> dict[str, str]:
        writers = (writer.name for writer in self.config.generators)
        return {name: self.models.get(name).name for name in writers} | {JUDGE: self.judge().name}

    def make(self, examples: list[Example]) -> list[Outcome]:
        """One outcome per example; writer after writer, then the judge, all of a chunk together."""
        outcomes: dict[str, Outcome] = {}
        for example in examples:
            if (unusable := self._unusable(example)) is not None:
                outcomes[example.id] = unusable
        usable = [example for example in examples if example.id not in outcomes]
        entries = []
        for example, samples in zip(usable, self._samples(usable), strict=True):
            entry = self._entry(example, samples)
            if isinstance(entry, Outcome):
                outcomes[example.id] = entry
            else:
                entries.append(entry)
        for entry, ruling in zip(entries, self._rulings(entries), strict=True):
            outcomes[entry.example.id] = self._outcome(entry, ruling)
        return [outcomes[example.id] for example in examples]

    def _unusable(self, example: Example) -> Outcome | None:
        # The judge would rank what it has not seen.
        if example.videos:
            return _dropped(example.id, "has_clips", "the judge is shown pictures only")
        try:
            for media in example.images:
                open_image(media, self.media_root)
        except MediaError as error:
            return Outcome(id=example.id, reason="quarantined:unreadable", detail=str(error))
        return None

    def _samples(self, examples: list[Example]) -> list[list[_Sample]]:
        """All answers to each example, in the config's order whatever order they are made in."""
        if not examples:
            return []
        writers = {writer.name: writer for writer in self.config.generators}
        made = {name: self._written(writers[name], examples) for name in self._order()}
        return [[s for name in writers for s in made[name][i]] for i in range(len(examples))]

    def _order(self) -> list[str]:
        return self.models.loaded_first(writer.name for writer in self.config.generators)

    def _written(self, writer: Writer, examples: list[Example]) -> list[list[_Sample]]:
        """One writer's answers to each example."""
        generator = self.models.get(writer.name)
        model, sampling = generator.name, writer.generator.sampling(self.config.seed)
        requests = [
            Request(
                id=f"{example.id}/{writer.name}/{number}",
                prompt=example.prompt,
                images=example.images,
                media_root=self.media_root,
            )
            for example in examples
            for number in range(1, writer.num_samples + 1)
        ]

        def ask(some: list[Request]) -> list[Generation | str]:
            try:
                return list(generator.generate(some, sampling))
            except Unanswered as error:
                both = zip(error.generations, error.reasons, strict=True)
                return [one or reason or "unanswered" for one, reason in both]

        replies = asked(ask, requests, lambda _, error: reason_of(error))
        samples = [_sample(writer.name, model, reply) for reply in replies]
        count = writer.num_samples
        return [samples[start : start + count] for start in range(0, len(samples), count)]

    def _entry(self, example: Example, samples: list[_Sample]) -> _Entry | Outcome:
        """Equal responses become one, of the model that wrote it first."""
        found: dict[str, list[_Sample]] = {}
        for sample in samples:
            if not sample.reason:
                found.setdefault(sample.text, []).append(sample)
        lost = dict(Counter(sample.reason for sample in samples if sample.reason))
        if len(found) < 2:
            told = [f"{len(found)} different of {len(samples)}"]
            told += [f"{count} {reason}" for reason, count in lost.items()]
            return _dropped(example.id, "too_few_responses", ", ".join(told))
        places = list(range(len(found)))
        random.Random(request_seed(self.config.seed, f"{example.id}/places")).shuffle(places)
        return _Entry(
            example=example,
            texts=tuple(found),
            models=tuple(same[0].model for same in found.values()),
            writers=tuple(tuple(s.writer for s in same) for same in found.values()),
            places=tuple(places),
            lost=lost,
        )

    def _rulings(self, entries: list[_Entry]) -> list[Ruling[RankVerdict]]:
        if not entries:
            return []
        return asked(
            self.judge().rank,
            [self._contest(entry) for entry in entries],
            lambda contest, error: Ruling(
                id=contest.id, value=None, reason=reason_of(error), num_tries=0
            ),
        )

    def _contest(self, entry: _Entry) -> Contest:
        shown = sorted(zip(entry.places, entry.texts, strict=True))
        return Contest(
            id=entry.example.id,
            question=question_of(entry.example.prompt),
            responses=tuple(text for _, text in shown),
            images=entry.example.images,
            media_root=self.media_root,
        )

    def _outcome(self, entry: _Entry, ruling: Ruling[RankVerdict]) -> Outcome:
        example, verdict = entry.example, ruling.value
        if verdict is None:
            why = "contradiction" if ruling.reason in CONTRADICTIONS else f"judge_{ruling.reason}"
            return _dropped(example.id, why, f"{ruling.reason} after {ruling.num_tries} tries")
        if not _agrees(verdict, len(entry.texts)):
            return _dropped(example.id, "contradiction", f"ranks {verdict.ranks}, {verdict.scores}")
        full = [verdict.critiques[place].strip() for place in entry.places]
        critiques = [shortened(text, self.config.max_critique_words) for text in full]
        if None in critiques:
            return _dropped(example.id, "critique_too_long", "its first sentence is over the limit")
        num_cut = sum(cut != text for cut, text in zip(critiques, full, strict=True))
        flags = ["all_ties"] if len(set(verdict.ranks)) == 1 else []
        flags += ["critique_cut"] if num_cut else []
        reason = f"accepted:{'+'.join(flags)}" if flags else "accepted"
        detail = {
            "writers": entry.writers,
            "shown_at": entry.places,
            "judge_tries": ruling.num_tries,
            "critiques_cut": num_cut,
            "lost": entry.lost,
        }
        responses = tuple(
            RankedResponse(
                text=entry.texts[i],
                rank=verdict.ranks[place],
                model=entry.models[i],
                score=verdict.scores[place],
                critique=critiques[i] or None,
            )
            for i, place in enumerate(entry.places)
        )
        record = Ranking(
            id=example.id,
            prompt=example.prompt,
            images=self.config.stored(example.images, self.media_root),
            responses=responses,
            origin=Origin(
                builder="critiques",
                version=VERSION,
                source=example.id,
                reason=reason,
                detail=json.dumps(detail, ensure_ascii=False),
            ),
        )
        return Outcome(id=example.id, record=record, reason=reason)


def _sample(writer: str, model: str, reply: Generation | str) -> _Sample:
    """A reply that the token limit cut is none: its missing end would tell it from the others."""
    if isinstance(reply, str):
        return _Sample(writer=writer, model=model, text="", reason=reply)
    text = reply.text.strip()
    reason = "cut" if not reply.finished else "" if text else "blank"
    return _Sample(writer=writer, model=model, text=text, reason=reason)


def _agrees(verdict: RankVerdict, num_responses: int) -> bool:
    """Whether no better rank has a lower score, nor equal ranks unequal ones."""
    columns = (verdict.ranks, verdict.scores, verdict.critiques)
    assert all(len(column) == num_responses for column in columns), "one for each response"
    judged = sorted(zip(verdict.ranks, verdict.scores, strict=True), key=lambda pair: pair[0])
    return all(
        one[1] >= other[1] and (one[0] < other[0] or one[1] == other[1])
        for one, other in itertools.pairwise(judged)
    )


def _dropped(id: str, reason: str, detail: str = "") -> Outcome:
    return Outcome(id=id, reason=f"dropped:{reason}", detail=detail)
