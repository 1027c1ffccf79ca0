"""RRPO's pairs from clips: what the policy says wrongly of a spoilt clip (arXiv 2504.12083).

For every example with one clip and an answer:

    perturb    spoil the clip (block masking, shuffling of frames, ...)
    answer     the policy, the model that will be aligned, answers the question about it
    verify     keep a response that is wrong; else try again, with another perturbation
    rewrite    let a language model write what is wrong in it into the answer, in its style
    mark       the phrases in which chosen and rejected differ

The record holds the clean clip, the answer as chosen, and the rewritten response as rejected: the
spoilt clip only draws the error out. It can be made again from what `origin.detail` says of it.

A clip is decoded once, for all tries, and no more clips than one batch of the generator are held:
when one is settled, the next takes its place.

Deviation: the released code has no builder. Try by try, and what happens to what no rule or judge
can tell (nothing is kept), are ours.

Launch: mmalign build configs/build/rrpo_video.yaml
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from data_builders.base import Builder, GeneratorConfig, PictureFolder
from data_builders.perturb import Mask, Perturbation, Shuffle, Step, apply, can_change
from data_builders.rewrite import AsItIs, JudgeRewrites, Rewrite, Rewritten, rewritten
from data_builders.verify import (
    ByJudge,
    Differs,
    JudgeConfig,
    Rules,
    Verdict,
    Verifier,
    Verify,
    load_verifier,
)
from mmalign.clips import Clip, ClipReader
from mmalign.errors import MediaError
from mmalign.generate.base import Generation, Generator, Request, request_seed
from mmalign.jobs import Outcome
from mmalign.judge import Case, Judge
from mmalign.log import get_logger
from mmalign.prepare import RowDropped
from mmalign.records import Example, Media, Origin, Preference, prompt_text
from mmalign.spans import differing_spans, one_sided
from mmalign.store import MANIFEST, open_dataset

VERSION = "1"

logger = get_logger("rrpo_video")

_Models = tuple[Generator, Verifier, Judge | None]
# What became of a request: a reply, or why the model could not be asked.
_Reply = Generation | MediaError | RowDropped


class RRPOVideo(Builder):
    """Settings of the builder.

    perturb: done one after the other, anew in each try. Which frames of a clip are seen is told by
    generator.model.frames. timeout_seconds: to open and decode one clip.
    """

    name: Literal["rrpo_video"] = "rrpo_video"
    generator: GeneratorConfig
    perturb: tuple[Perturbation, ...] = Field(default=(Mask(), Shuffle()), min_length=1)
    verify: Verify = Rules()
    rewrite: Rewrite = AsItIs()
    judge: JudgeConfig | None = None
    tries: PositiveInt = 3
    timeout_seconds: PositiveFloat = 60.0

    @field_validator("source")
    @classmethod
    def _holds_clips(cls, source: Path | PictureFolder) -> Path | PictureFolder:
        if isinstance(source, PictureFolder):
            raise ValueError("wanted a dataset of examples with clips, not a folder of pictures")
        return source

    @model_validator(mode="after")
    def _judge_is_there_if_asked(self) -> RRPOVideo:
        asked = isinstance(self.verify, ByJudge) or isinstance(self.rewrite, JudgeRewrites)
        if asked and self.judge is None:
            raise ValueError("verify or rewrite asks a judge, but there is no `judge`")
        if self.judge is not None and not asked:
            raise ValueError("there is a `judge`, but neither verify nor rewrite asks it")
        return self

    def build(self) -> Path:
        """Load the models and build the dataset; returns its directory."""
        self.check_source()

        def load() -> _Models:
            judge = None if self.judge is None else self.judge.load(self.seed)
            verifier = load_verifier(self.verify, judge)
            return self.generator.load(), verifier, judge

        with ClipReader(
            sampling=self.generator.model.frames, timeout_seconds=self.timeout_seconds
        ) as reader:
            return self._build(reader, load)

    def build_with(
        self, generator: Generator, reader: Reader, verifier: Verifier, judge: Judge | None
    ) -> Path:
        """Build with models that are loaded already, from the clips that `reader` opens."""
        return self._build(reader, lambda: (generator, verifier, judge))

    def _build(self, reader: Reader, load: Callable[[], _Models]) -> Path:
        source = self.load_source()
        root = source.media_root

        def pairs() -> _Pairs:
            generator, verifier, judge = load()
            return _Pairs(
                config=self,
                media_root=root,
                generator=generator,
                verifier=verifier,
                judge=judge,
                reader=reader,
            )

        path = self.make_pairs(source, pairs, VERSION)
        if (path / MANIFEST).exists():
            origins = open_dataset(path, Preference).column("origin")
            count = sum(json.loads(origin["detail"])["one_sided"] for origin in origins)
            told = "%s: %d pairs; phrases that only one response of a pair has: %d"
            logger.info(told, path, len(origins), count)
        return path


class Reader(Protocol):
    """Opens clips."""

    def open(self, media: Media, root: Path | None) -> Clip:
        """Decode one. Raises MediaError where it is broken or takes too long."""
        ...


@dataclass(kw_only=True)
class _Attempt:
    """One example on its way through the tries; `told` says how each of them ended."""

    example: Example
    clip: Clip
    number: int = 1
    told: list[Verdict] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class _Wrong:
    """A wrong response, and how it came about."""

    example: Example
    number: int
    steps: list[Step]
    response: str
    verdict: Verdict


@dataclass(kw_only=True)
class _Pairs:
    """The work function of the job, with the models that it needs."""

    config: RRPOVideo
    media_root: Path
    generator: Generator
    verifier: Verifier
    judge: Judge | None
    reader: Reader

    @property
    def names(self) -> dict[str, str]:
        verify = self.config.verify
        names = {"generator": self.generator.name, "verify": verify.name}
        if self.judge is not None:
            names["judge"] = self.judge.name
        if isinstance(verify, Differs):
            names["similarity"] = verify.similarity.name
        return names

    def make(self, examples: list[Example]) -> list[Outcome]:
        """One outcome per example.

        The generator's batch is kept full: examples leave it when they are settled, others enter.
        """
        outcomes: dict[str, Outcome] = {}
        wrong: list[_Wrong] = []
        waiting = deque(examples)
        attempts: list[_Attempt] = []
        while waiting or attempts:
            self._fill(attempts, waiting, outcomes)
            attempts = self._try(attempts, wrong, outcomes) if attempts else []
        cases = [_case(one.example, one.number, one.response) for one in wrong]
        rejected = rewritten(self.config.rewrite, cases, self.judge)
        for one, made in zip(wrong, rejected, strict=True):
            outcomes[one.example.id] = self._accept(one, made)
        return [outcomes[example.id] for example in examples]

    def _fill(
        self, attempts: list[_Attempt], waiting: deque[Example], outcomes: dict[str, Outcome]
    ) -> None:
        """Begin what waits until a batch is full; write the outcome of what cannot be used."""
        while waiting and len(attempts) < self.config.generator.batch_size:
            begun = self._begin(waiting.popleft())
            if isinstance(begun, Outcome):
                outcomes[begun.id] = begun
            else:
                attempts.append(begun)

    def _begin(self, example: Example) -> _Attempt | Outcome:
        """Decode an example's clip, or say why it is left out."""
        if not (example.answer or "").strip():
            return _dropped(example, "no_answer")
        if len(example.videos) != 1 or example.images:
            found = f"{len(example.videos)} clips, {len(example.images)} images"
            return _dropped(example, "not_a_clip", found)
        # Not left to the job, which would begin the whole chunk again to find the clip at fault.
        try:
            clip = self.reader.open(example.videos[0], self.media_root)
        except MediaError as error:
            return _unreadable(example, error)
        if not can_change(clip, self.config.perturb):
            return _dropped(example, "nothing_to_perturb", "it shows one frame only")
        return _Attempt(example=example, clip=clip)

    def _try(
        self, attempts: list[_Attempt], wrong: list[_Wrong], outcomes: dict[str, Outcome]
    ) -> list[_Attempt]:
        """The next try of each attempt; returns those that are not settled by it."""
        config = self.config
        requests, recorded = list[Request](), list[list[Step]]()
        for attempt in attempts:
            name = f"{attempt.example.id}/try{attempt.number}"
            seed = request_seed(config.seed, f"{name}/perturb")
            clip, steps = apply(attempt.clip, config.perturb, seed)
            recorded.append(steps)
            requests.append(Request(id=name, prompt=attempt.example.prompt, videos=(clip,)))
        replies = self._replies(requests)
        texts = [_whole(reply) for reply in replies]
        verdicts = self._verdicts(attempts, replies, texts)
        left = []
        for attempt, steps, reply, text, verdict in zip(
            attempts, recorded, replies, texts, verdicts, strict=True
        ):
            example, number = attempt.example, attempt.number
            attempt.told.append(verdict)
            if isinstance(reply, MediaError):
                outcomes[example.id] = _unreadable(example, reply)
            elif isinstance(reply, RowDropped):
                outcomes[example.id] = _dropped(example, reply.reason, str(reply))
            elif verdict.outcome == "wrong":
                wrong.append(
                    _Wrong(
                        example=example, number=number, steps=steps, response=text, verdict=verdict
                    )
                )
            elif number == config.tries:
                outcomes[example.id] = _never_wrong(attempt)
            else:
                attempt.number += 1
                left.append(attempt)
        return left

    def _replies(self, requests: list[Request]) -> list[_Reply]:
        """What the policy says; what it cannot be asked at all is found by halving, and told.

        Raised, it would make the job decode the chunk again.
        """
        config = self.config
        try:
            return [*self.generator.generate(requests, config.generator.sampling(config.seed))]
        except (MediaError, RowDropped) as error:
            if len(requests) == 1:
                return [error]
            half = len(requests) // 2
            return self._replies(requests[:half]) + self._replies(requests[half:])

    def _verdicts(
        self, attempts: Sequence[_Attempt], replies: Sequence[_Reply], texts: Sequence[str]
    ) -> Iterator[Verdict]:
        """Of all replies; those without a text, or cut by the token limit, are not worth asking."""
        cases = [
            _case(attempt.example, attempt.number, text)
            for attempt, text in zip(attempts, texts, strict=True)
            if text
        ]
        verified = iter(self.verifier(cases))
        for reply, text in zip(replies, texts, strict=True):
            if text:
                yield next(verified)
            elif isinstance(reply, Generation):
                yield Verdict("unknown", "empty" if reply.finished else "cut")
            else:
                yield Verdict("unknown", "refused")

    def _accept(self, one: _Wrong, made: Rewritten) -> Outcome:
        example, config = one.example, self.config
        if made.text is None:
            return _dropped(example, made.reason, made.detail)
        chosen, rejected = example.answer or "", made.text
        chosen_spans, rejected_spans = differing_spans(chosen, rejected)
        if not chosen_spans and not rejected_spans:
            return _dropped(example, "same_words", rejected)
        try:
            videos = config.stored(example.videos, self.media_root)
        except MediaError as error:
            return _unreadable(example, error)
        detail: dict[str, Any] = {
            "try": one.number,
            "verdict": one.verdict.reason,
            "one_sided": one_sided(chosen_spans, rejected_spans),
            "response": one.response,
            "perturbation": one.steps,
            "frames": config.generator.model.frames.model_dump(mode="json"),
        }
        if made.differences is not None:
            detail["differences"] = made.differences
        reason = f"accepted:try{one.number}"
        record = Preference(
            id=example.id,
            prompt=example.prompt,
            videos=videos,
            chosen=chosen,
            rejected=rejected,
            chosen_spans=chosen_spans,
            rejected_spans=rejected_spans,
            origin=Origin(
                builder="rrpo_video",
                version=VERSION,
                source=example.id,
                reason=reason,
                detail=json.dumps(detail, ensure_ascii=False),
            ),
        )
        return Outcome(id=example.id, record=record, reason=reason)


def _whole(reply: _Reply) -> str:
    """The text of a reply that came to its end, else nothing."""
    return reply.text.strip() if isinstance(reply, Generation) and reply.finished else ""


def _case(example: Example, number: int, response: str) -> Case:
    return Case(
        id=f"{example.id}/try{number}",
        question=prompt_text(example.prompt),
        answer=example.answer or "",
        response=response,
    )


def _never_wrong(attempt: _Attempt) -> Outcome:
    """What becomes of an example that no try got wrong."""
    right = any(verdict.outcome == "right" for verdict in attempt.told)
    told = [f"try{n} {v.outcome} ({v.reason})" for n, v in enumerate(attempt.told, start=1)]
    return _dropped(attempt.example, "right_answer" if right else "unverifiable", "; ".join(told))


def _dropped(example: Example, reason: str, detail: str = "") -> Outcome:
    return Outcome(id=example.id, reason=f"dropped:{reason}", detail=detail)


def _unreadable(example: Example, error: MediaError) -> Outcome:
    return Outcome(id=example.id, reason="quarantined:unreadable", detail=str(error))
