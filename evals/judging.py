"""Have a language model on a server judge answers, each verdict kept by all that led to it.

runs/eval/base/
  judge.jsonl        every reply of the judge, as it comes, unless the server has a ledger
  verdicts.jsonl     what was judged by which of them

A verdict is found again by the judge's model and settings, the words and pictures that it was
shown, and its number: scoring anew asks for nothing that is there. The judge is asked `repeats`
times about each answer, which shows its own variance, and again where its reply holds no verdict.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import PositiveInt, field_validator

from evals.answer_files import appending, read_kept
from evals.base import digest
from mmalign import log
from mmalign.config import Strict
from mmalign.errors import MmalignError
from mmalign.generate.base import Generation, Generator, Request, Sampling
from mmalign.generate.server import ServerConfig, Unanswered, with_ledger
from mmalign.media import media_key
from mmalign.records import Media

VERDICTS = "verdicts.jsonl"
# Whether a reply holds a verdict.
Holds = Callable[[str, str], bool]
_logger = log.get_logger("evals")


class EvalJudge(Strict):
    """The judge of benchmarks that have one.

    server: where it is, how it decodes (temperature 0 unless given), its budget and prices.
    repeats: verdicts on each answer. tries: how often each is asked for where a reply holds none.
    """

    server: ServerConfig
    repeats: PositiveInt = 1
    tries: PositiveInt = 3

    @field_validator("server")
    @classmethod
    def _greedy_unless_said(cls, server: ServerConfig) -> ServerConfig:
        given = server.model_fields_set
        defaults = {"temperature": 0.0, "max_new_tokens": 1024}
        missing = {name: value for name, value in defaults.items() if name not in given}
        return server.model_copy(update=missing)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """A line of verdicts.jsonl; `repeat` and `num_try` count from 1."""

    key: str
    benchmark: str
    id: str
    repeat: int
    num_try: int
    model: str
    text: str
    prompt_tokens: int
    completion_tokens: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judged:
    """What a judge said of a suite's answers.

    texts: by id, its replies in the order of repeats, each of the last try.
    told: who judged, how often, and what it took, for results.json.
    """

    texts: dict[str, list[str]]
    told: dict[str, Any]


class Judge:
    """Gives verdicts: those that are kept, and others by asking. `generator` stands in for it."""

    def __init__(self, config: EvalJudge, folder: Path, generator: Generator | None = None) -> None:
        self.config, self.path = config, folder / VERDICTS
        self._generator = generator
        self._settings = config.server.model_dump(mode="json")
        self._kept = {one.key: one for one in read_kept(self.path, Verdict)}

    def open(self) -> None:
        """Make sure that the judge can be asked. Raises ModelError, such as without its key."""
        server = with_ledger(self.config.server, self.path.with_name("judge.jsonl"))
        self._generator = self._generator or server.load()

    def judge(self, benchmark: str, requests: Sequence[Request], holds: Holds) -> Judged:
        """Verdicts on what each request asks, `repeats` times.

        holds: whether (id, reply) is one that can be read. Raises ModelError where some are not
        answered at all; those that were are kept.
        """
        texts: dict[str, list[str]] = {request.id: [] for request in requests}
        used: dict[str, Verdict] = {}
        for repeat in range(1, self.config.repeats + 1):
            left, found = list(requests), dict[str, str]()
            for num_try in range(1, self.config.tries + 1):
                given = self._verdicts(benchmark, left, repeat, num_try)
                used |= {verdict.key: verdict for verdict in given.values()}
                found |= {id: verdict.text for id, verdict in given.items()}
                left = [one for one in left if not holds(one.id, found[one.id])]
                if not left:
                    break
            for id, text in found.items():
                texts[id].append(text)
        return Judged(texts=texts, told=self._told([*used.values()]))

    def _verdicts(
        self, benchmark: str, requests: Sequence[Request], repeat: int, num_try: int
    ) -> dict[str, Verdict]:
        """By request id, after asking for those that are not kept."""
        keys = {request.id: self._key(request, repeat, num_try) for request in requests}
        # Once for each key: the same answer to the same question may stand in several items.
        once = {keys[request.id]: request for request in requests}
        missing = [request for key, request in once.items() if key not in self._kept]
        if missing:
            self.open()
        size = self.config.server.concurrency * 4
        chunks = [missing[start : start + size] for start in range(0, len(missing), size)]
        for chunk in log.progress(chunks, label=f"judging {benchmark}", total=len(chunks)):
            self._ask(benchmark, chunk, keys, repeat, num_try)
        return {id: self._kept[key] for id, key in keys.items()}

    def _ask(
        self,
        benchmark: str,
        requests: Sequence[Request],
        keys: Mapping[str, str],
        repeat: int,
        num_try: int,
    ) -> None:
        assert self._generator is not None
        server = self.config.server
        sampling = Sampling(
            max_new_tokens=server.max_new_tokens,
            temperature=server.temperature,
            top_p=server.top_p,
            # A server that heeds seeds says something else each time, if it samples at all.
            seed=1000 * repeat + num_try,
        )
        problem: MmalignError | None = None
        try:
            made: Sequence[Generation | None] = self._generator.generate(requests, sampling)
        except Unanswered as error:
            made, problem = error.generations, error
        with appending(self.path) as file:
            for request, one in zip(requests, made, strict=True):
                if one is None:
                    continue
                verdict = Verdict(
                    key=keys[request.id],
                    benchmark=benchmark,
                    id=request.id,
                    repeat=repeat,
                    num_try=num_try,
                    model=server.model,
                    text=one.text,
                    prompt_tokens=one.prompt_tokens,
                    completion_tokens=one.num_tokens,
                )
                self._kept[verdict.key] = verdict
                file.write(json.dumps(dataclasses.asdict(verdict)) + "\n")
        if problem is not None:
            raise problem

    def _key(self, request: Request, repeat: int, num_try: int) -> str:
        """A hash of the judge, of all that it is shown, and of which of its replies this is."""
        asked = [
            self._settings,
            [dataclasses.asdict(message) for message in request.prompt],
            [media_key(one) if isinstance(one, Media) else one.key for one in request.images],
            repeat,
            num_try,
        ]
        return digest(asked)

    def _told(self, used: Sequence[Verdict]) -> dict[str, Any]:
        server = self.config.server
        prompt = sum(verdict.prompt_tokens for verdict in used)
        completion = sum(verdict.completion_tokens for verdict in used)
        cost = (prompt * server.price_prompt + completion * server.price_completion) / 1e6
        return {
            "model": server.model,
            "settings": digest(self._settings),
            "repeats": self.config.repeats,
            "replies": len(used),
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "cost": cost,
        }


def own_variance(scores: Sequence[float]) -> dict[str, Any]:
    """How far a judge's repeats lie apart: the benchmark's number by each, and their deviation.

    The standard deviation has n - 1; None for a single repeat.
    """
    spread = statistics.stdev(scores) if len(scores) > 1 else None
    return {"scores": list(scores), "standard_deviation": spread}
