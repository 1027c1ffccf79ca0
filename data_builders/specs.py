"""SPECS's pairs, which differ in form alone: for a cold start by preference, before GRPO.

For every verifiable row, self-distillation without anyone else's words:

    choose     the generator (the base model, or its short-RL version) answers, try after try; the
               first response that is correct and well formed is chosen, where there is a judge one
               whose reasoning comes to its answer
    complete   where no try is both, a correct response whose form can be completed is chosen
    reject     the same text with its form broken, or another correct response in no good form

Form is what `mmalign.think.parts_of` reads, correct what the row's verifier says. A record's prompt
is the row's with `instruction` at its end, just as it was asked: GRPO and evaluations must ask so
too, by `mmalign.instruct.instructed`.

Deviation: SPECS has no released code. Its prompt, its fifth kind of corruption and where its
rejected responses come from are assumptions: docs/methods/specs.md.

Launch: mmalign build configs/build/specs_qwen25vl.yaml
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from data_builders.base import AnyGenerator, Builder, PictureFolder
from data_builders.built_page import write_preview
from data_builders.in_turn import InTurn
from data_builders.malform import KINDS, Kind, malformed
from data_builders.self_distill import BASE, GENERATOR, JUDGE, Chunk, Response, gives
from data_builders.verify import JudgeConfig
from mmalign.generate.base import Generator, request_seed
from mmalign.instruct import FORM
from mmalign.jobs import Outcome
from mmalign.judge import Judge
from mmalign.records import Origin, Preference, Verifiable
from mmalign.spans import differing_spans
from mmalign.store import open_dataset
from mmalign.think import parts_of
from mmalign.verify import Verifiers, check_extras, truth_problem

VERSION = "1"


class Specs(Builder):
    """Settings of the builder.

    source: a dataset of verifiable records.
    instruction: asks for the form, at the end of every prompt; null where the prompts do so.
    tries: samples of a prompt at most, of the generator and again of the base generator.
    supplement: take a correct response whose form was completed, where no other is found.
    judge: drops responses whose reasoning does not come to their answer.
    rejected_from: `chosen` breaks the form of the chosen text; `base` takes another correct
        response, and breaks its form where it is good; `wrong` takes a wrong one (the paper's
        "coupled" data, for ablation).
    base_generator: who writes those; without it the generator.
    kinds: how the form is broken, each as likely.
    """

    name: Literal["specs"] = "specs"
    generator: AnyGenerator
    instruction: str | None = Field(default=FORM, min_length=1)
    tries: PositiveInt = 8
    supplement: bool = True
    judge: JudgeConfig | None = None
    rejected_from: Literal["chosen", "base", "wrong"] = "chosen"
    base_generator: AnyGenerator | None = None
    kinds: tuple[Kind, ...] = Field(default=KINDS, min_length=1)
    math_timeout_seconds: PositiveFloat = 5.0

    @field_validator("source")
    @classmethod
    def _holds_answers(cls, source: Path | PictureFolder) -> Path | PictureFolder:
        if isinstance(source, PictureFolder):
            raise ValueError("wanted a dataset of verifiable records, not a folder of pictures")
        return source

    @field_validator("kinds")
    @classmethod
    def _stand_once(cls, kinds: tuple[Kind, ...]) -> tuple[Kind, ...]:
        if len(set(kinds)) < len(kinds):
            raise ValueError("a kind is named twice: each is as likely as the others")
        return kinds

    @model_validator(mode="after")
    def _fits_together(self) -> Specs:
        if self.base_generator is not None and self.rejected_from == "chosen":
            raise ValueError("base_generator is not asked: set rejected_from to base or wrong")
        asked = {"generator": self.generator, "base_generator": self.base_generator}
        for name, config in asked.items():
            if config is not None and config.temperature == 0 and self.tries > 1:
                raise ValueError(f"tries above 1 needs a temperature above 0 of {name}")
        return self

    def build(self) -> Path:
        """Load the models, one after another, and build the dataset; returns its directory."""
        self.check_source()
        configs: dict[str, AnyGenerator] = {GENERATOR: self.generator}
        if self.base_generator is not None:
            configs[BASE] = self.base_generator
        if self.judge is None:
            return self._build(InTurn(configs), None)
        models = InTurn(configs | {JUDGE: self.judge.generator})
        tries, sampling = self.judge.tries, self.judge.generator.sampling(self.seed)
        return self._build(models, lambda: Judge(models.get(JUDGE), tries=tries, sampling=sampling))

    def build_with(self, generators: Mapping[str, Generator], judge: Judge | None) -> Path:
        """Build with models that are loaded already: `generator`, and `base_generator` if any."""
        return self._build(InTurn(given=generators), None if judge is None else lambda: judge)

    def _build(self, models: InTurn, judge: Callable[[], Judge] | None) -> Path:
        dataset = open_dataset(Path(str(self.source)), Verifiable)
        rows = sorted(dataset, key=lambda row: row.id)[: self.limit]
        check_extras(rows)
        root = dataset.media_root

        def pairs() -> _Pairs:
            return _Pairs(config=self, media_root=root, models=models, judge=judge)

        if self.run_job(rows, pairs, Preference, VERSION, root) is not None:
            write_preview(self.output)
        return self.output


@dataclass(kw_only=True)
class _Pairs:
    """The work function of the job, with the models that it needs."""

    config: Specs
    media_root: Path
    models: InTurn
    judge: Callable[[], Judge] | None

    @property
    def names(self) -> dict[str, str]:
        used = [GENERATOR] if self.config.base_generator is None else [GENERATOR, BASE]
        names = {name: self.models.get(name).name for name in used}
        return names if self.judge is None else names | {JUDGE: self.judge().name}

    def make(self, rows: list[Verifiable]) -> list[Outcome]:
        """One outcome per row; try after try, all open rows of a chunk together."""
        config = self.config
        bad = {row.id: found for row in rows if (found := self._unusable(row)) is not None}
        with Verifiers(math_timeout_seconds=config.math_timeout_seconds) as verifiers:
            chunk = Chunk(
                rows=[row for row in rows if row.id not in bad],
                media_root=self.media_root,
                seed=config.seed,
                tries=config.tries,
                instruction=config.instruction,
                models=self.models,
                verifiers=verifiers,
            )
            chunk.outcomes |= bad
            chosen = chunk.choose(config.generator, self.judge, supplement=config.supplement)
            for response, rejected in self._rejected(chunk, chosen):
                chunk.outcomes[response.row.id] = self._outcome(chunk, response, rejected)
        return [chunk.outcomes[row.id] for row in rows]

    def _unusable(self, row: Verifiable) -> Outcome | None:
        if problem := truth_problem(row):
            return Outcome(id=row.id, reason="quarantined:bad_truth", detail=problem)
        if not row.prompt or row.prompt[-1].role != "user":
            what = "the prompt does not end with a user's turn"
            return Outcome(id=row.id, reason="quarantined:bad_prompt", detail=what)
        return None

    def _rejected(self, chunk: Chunk, chosen: list[Response]) -> list[tuple[Response, Response]]:
        """Each chosen response with the one whose form is to be broken."""
        config = self.config
        if config.rejected_from == "chosen":
            return [(response, response) for response in chosen]
        found = chunk.others(
            [response.row for response in chosen],
            GENERATOR if config.base_generator is None else BASE,
            config.base_generator or config.generator,
            correct=config.rejected_from == "base",
        )
        return [(one, found[one.row.id]) for one in chosen if one.row.id in found]

    def _outcome(self, chunk: Chunk, chosen: Response, other: Response) -> Outcome:
        row = chosen.row
        broken = self._broken(chunk.verifiers, other)
        if broken is None:
            return Outcome(id=row.id, reason="dropped:answer_lost", detail=other.text)
        kind, rejected = broken
        chosen_spans, rejected_spans = differing_spans(chosen.text, rejected)
        detail: dict[str, Any] = {
            "kind": kind,
            "rejected_from": self.config.rejected_from,
            "tries": chosen.number,
        }
        if other is not chosen:
            detail["base_tries"] = other.number
        if chosen.supplemented:
            detail["response"] = chosen.sampled
        reason = "accepted:supplemented" if chosen.supplemented else "accepted:sampled"
        record = Preference(
            id=row.id,
            prompt=chunk.prompt(row),
            images=self.config.stored(row.images, self.media_root),
            videos=self.config.stored(row.videos, self.media_root),
            chosen=chosen.text,
            rejected=rejected,
            chosen_spans=chosen_spans,
            rejected_spans=rejected_spans,
            origin=Origin(
                builder="specs",
                version=VERSION,
                source=row.id,
                reason=reason,
                detail=json.dumps(detail, ensure_ascii=False),
            ),
        )
        return Outcome(id=row.id, record=record, reason=reason)

    def _broken(self, verifiers: Verifiers, other: Response) -> tuple[str, str] | None:
        """How and into what the form is broken, by the first kind that keeps the answer as it was.

        Kinds are tried in an order drawn from (seed, id). A form that is none is left as it is.
        """
        if not parts_of(other.text).well_formed:
            return "as_sampled", other.text
        correct = self.config.rejected_from != "wrong"
        rng = random.Random(request_seed(self.config.seed, f"{other.row.id}/kind"))
        for kind in rng.sample(self.config.kinds, len(self.config.kinds)):
            text = malformed(other.text, kind)
            if gives(verifiers.check_response(text, other.row), correct=correct):
                return kind, text
        return None
