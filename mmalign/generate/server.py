"""The server backend: any OpenAI-compatible chat server, asked politely and never twice.

Requests go out by `concurrency` at a time. What passes by itself (429, 5xx, time-outs, dropped
connections, replies that are no JSON) is tried again after a growing, jittered pause, or the one
that the server asks for; what does not (400, 401, 404) is told at once. Every answer is in the
ledger before it is used. The same request again, in another run, is read from there.

A server is free to ignore `seed`, so that unlike the local engine a sampled text may depend on its
neighbours. `transformers serve` samples only where the checkpoint's generation config says so.
"""

from __future__ import annotations

import logging
import random
import re
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from mmalign.clips import FrameSampling
from mmalign.config import Strict
from mmalign.errors import ModelError
from mmalign.generate.base import Generation, Request, Sampling, request_seed
from mmalign.generate.budget import Account
from mmalign.generate.chat import Ask, make_ask
from mmalign.generate.client import ChatClient, Passing
from mmalign.generate.ledger import Answer
from mmalign.log import get_logger

logger = get_logger("generate.server")

# So many requests in a row that no try got answered: the server is down, not the request odd.
DOWN_AFTER = 3
LONGEST_BACKOFF_SECONDS = 60.0
# A server that asks for a longer pause than this is not worth waiting for.
LONGEST_PAUSE_SECONDS = 600.0
_SET_BY_US = frozenset({"model", "messages", "stream", "n", "max_tokens", "max_completion_tokens"})
# Names of what no file may show. Not max_tokens, top_k, nor those that chat templates and OpenAI's
# cache have.
_SECRET = re.compile(
    r"(?!prompt_cache_key$|(?:bos|eos|pad|unk)_token$)"
    r"(?:(?:.*[_-])?key|.*(?:apikey|token|secret|password|authorization))",
    re.IGNORECASE | re.DOTALL,
)


class ServerConfig(Strict):
    """A model behind an OpenAI-compatible server, how it decodes, and how hard it is asked.

    base_url: such as http://localhost:8000/v1. Like all that changes no answer, it is not told in
        manifests.
    api_key_env: the name of the environment variable that holds the key. A server on this machine
        may do without.
    limit_field: what the server calls the limit of new tokens.
    prefill: `continue_final_message` for servers that can continue a begun answer, such as vLLM.
    frames: which frames of a clip are sent, as pictures.
    extra: more fields of the request; null leaves one out that the server refuses, such as top_p.
    max_requests, max_total_tokens: stop when the ledger holds so much for this model, earlier runs
        included; tokens may exceed it by the requests on their way.
    ledger: the file that keeps the answers.
    price_prompt, price_completion: of a million tokens, in any currency, for the log.
    """

    engine: Literal["server"] = "server"
    model: str = Field(min_length=1)
    base_url: str = Field(exclude=True)
    api_key_env: str = Field(default="OPENAI_API_KEY", exclude=True)
    temperature: NonNegativeFloat = 1.0
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_new_tokens: PositiveInt = 256
    limit_field: Literal["max_completion_tokens", "max_tokens"] = "max_completion_tokens"
    prefill: Literal["refuse", "continue_final_message"] = "refuse"
    frames: FrameSampling = FrameSampling()
    extra: dict[str, Any] = Field(default_factory=dict)
    concurrency: PositiveInt = Field(default=8, exclude=True)
    timeout_seconds: PositiveFloat = Field(default=120.0, exclude=True)
    max_retries: NonNegativeInt = Field(default=6, exclude=True)
    backoff_seconds: PositiveFloat = Field(default=1.0, exclude=True)
    max_requests: PositiveInt | None = Field(default=None, exclude=True)
    max_total_tokens: PositiveInt | None = Field(default=None, exclude=True)
    ledger: Path | None = Field(default=None, exclude=True)
    price_prompt: NonNegativeFloat = Field(default=0.0, exclude=True)
    price_completion: NonNegativeFloat = Field(default=0.0, exclude=True)

    @field_validator("extra")
    @classmethod
    def _leaves_ours_alone(cls, extra: dict[str, Any]) -> dict[str, Any]:
        if ours := sorted(_SET_BY_US & extra.keys()):
            raise ValueError(f"{', '.join(ours)} cannot be set here")
        if secret := next(filter(_SECRET.fullmatch, _names(extra)), None):
            raise ValueError(
                f"{secret} looks like a secret, which results would show; name the environment "
                "variable that holds the key in api_key_env"
            )
        return extra

    @model_validator(mode="after")
    def _is_an_address(self) -> ServerConfig:
        # Not the address's own check, whose message would show what is secret in it.
        parts = urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("base_url: wanted an address such as http://localhost:8000/v1")
        if "@" in parts.netloc or parts.query:
            raise ValueError("base_url holds a password or a query; keys come from api_key_env")
        return self

    def load(self) -> ServerGenerator:
        """Open the ledger and a client; the server is not asked yet.

        Raises ConfigError where there is a budget and no ledger.
        """
        return ServerGenerator(self)

    def sampling(self, seed: int) -> Sampling:
        """How to decode, with this seed."""
        return Sampling(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=seed,
        )


def _names(value: Any) -> Iterator[str]:
    """The names of all fields inside, at any depth."""
    if isinstance(value, dict):
        yield from map(str, value)
        value = [*value.values()]
    if isinstance(value, list):
        for part in value:
            yield from _names(part)


def with_ledger(config: ServerConfig, ledger: Path) -> ServerConfig:
    """The same with this ledger, unless it has one: what was paid for outlives a crash."""
    return config if config.ledger is not None else config.model_copy(update={"ledger": ledger})


class Unanswered(ModelError):
    """Some requests got no answer, all tries failing; the others did.

    `generations` is in the order asked, with None for those; `reasons` says why, else None.
    """

    def __init__(
        self,
        generations: Sequence[Generation | None],
        reasons: Sequence[str | None],
        *,
        where: str,
        first: str,
    ) -> None:
        self.generations, self.reasons = tuple(generations), tuple(reasons)
        missing = sum(reason is not None for reason in reasons)
        super().__init__(
            f"{missing} of {len(self.reasons)} requests were not answered, the first {first}",
            where=where,
            fix="start again to ask only these once more, if a ledger is named",
        )


class ServerGenerator:
    """Generates by asking a server. Threads: usable from any, with an event loop or without.

    Raises ModelError where the server refuses a request or answers nothing at all, Unanswered
    where it leaves out some, BudgetReached where the configured cap is reached.
    """

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self._client = ChatClient(
            config.base_url,
            api_key_env=config.api_key_env,
            timeout_seconds=config.timeout_seconds,
        )
        self._account = Account(
            config.ledger,
            model=config.model,
            max_requests=config.max_requests,
            max_total_tokens=config.max_total_tokens,
        )
        self._slots = threading.BoundedSemaphore(config.concurrency)
        self._closed = threading.Event()

    def close(self) -> None:
        """Ask nothing more, from whichever thread; what is on its way may still be answered."""
        self._closed.set()

    @property
    def name(self) -> str:
        """The model's name, not the host's: the same weights may be served anywhere."""
        return f"server:{self.config.model}"

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Generation]:
        """Answer every request, in the order asked; pictures are checked before the first is."""
        asks = [self._ask(request, sampling) for request in requests]
        known = {ask.key: self._account.known(ask.key) for ask in asks}
        answers = {key: answer for key, answer in known.items() if answer is not None}
        todo = {ask.key: ask for ask in asks if ask.key not in answers}
        for ask in todo.values():
            ask.check()
        run = _Run()
        self._ask_all(list(todo.values()), run)
        self._log(run, known=len(answers))
        if run.error is not None:
            raise run.error
        answers |= run.answers
        generations = list(map(_generation, requests, [answers.get(ask.key) for ask in asks]))
        if run.failed:
            reasons = [run.failed.get(ask.key) for ask in asks]
            raise Unanswered(generations, reasons, where=self.name, first=run.first_failure)
        return [generation for generation in generations if generation is not None]

    def _ask(self, request: Request, sampling: Sampling) -> Ask:
        config = self.config
        if request.prefill and config.prefill == "refuse":
            raise ModelError(
                "a chat server begins every answer itself and takes no start of one",
                where=f"request {request.id}",
                fix="use engine: local, or prefill: continue_final_message if the server has it",
            )
        seed = request_seed(sampling.seed, request.id) & 2**31 - 1
        fields = {
            "model": config.model,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            config.limit_field: sampling.max_new_tokens,
            "seed": seed,
        }
        return make_ask(request, fields | config.extra, frames=config.frames, seed=seed)

    def _ask_all(self, asks: list[Ask], run: _Run) -> None:
        """Ask from threads; on an error let those on their way finish, for they are paid for."""

        def work(ask: Ask) -> None:
            if self._closed.is_set():
                run.halt(ModelError("no more is asked", where=self.name))
            if run.stop.is_set():
                return
            try:
                run.answered(ask.key, self._answer(ask, run))
            except Passing as problem:
                if run.gave_up(ask, problem) >= DOWN_AFTER:
                    run.halt(self._down(problem))
            except Exception as error:
                run.halt(error)

        with ThreadPoolExecutor(self.config.concurrency) as pool:
            try:
                list(pool.map(work, asks))
            except BaseException:
                run.stop.set()
                raise

    def _answer(self, ask: Ask, run: _Run) -> Answer:
        with self._slots:
            if (known := self._account.known(ask.key)) is not None:
                return known  # Another process that shares the ledger was quicker.
            with self._account.reserved() as pay:
                answer = self._patiently(ask, run)
                pay(ask, answer)
            return answer

    def _patiently(self, ask: Ask, run: _Run) -> Answer:
        """Ask until there is an answer, or no try is left. Raises Passing then."""
        body, tries = ask.filled(), 0
        while True:
            try:
                return self._client.ask(ask.id, body)
            except Passing as problem:
                tries += 1
                pause = self._pause(tries, problem)
                if tries > self.config.max_retries or pause > LONGEST_PAUSE_SECONDS:
                    raise
                level = logging.DEBUG if run.num_retries else logging.WARNING
                logger.log(level, "request %s: %s; again in %.1f s", ask.id, problem, pause)
                if run.stop.wait(pause):
                    raise
                run.retried()

    def _pause(self, tries: int, problem: Passing) -> float:
        """Seconds before the next try: doubling, jittered, beyond what the server asks for."""
        backoff = min(LONGEST_BACKOFF_SECONDS, self.config.backoff_seconds * 2 ** (tries - 1))
        return problem.pause_seconds + backoff * random.uniform(0.5, 1.0)

    def _down(self, problem: Passing) -> ModelError:
        return ModelError(
            f"{DOWN_AFTER} requests in a row got no answer, the last one for {problem}",
            where=f"{self.name} at {self.config.base_url}",
            fix="see whether the server runs, then start again; answers in a ledger are kept",
        )

    def _log(self, run: _Run, *, known: int) -> None:
        prompt = sum(answer.prompt_tokens for answer in run.answers.values())
        completion = sum(answer.completion_tokens for answer in run.answers.values())
        cost = prompt * self.config.price_prompt + completion * self.config.price_completion
        logger.info(
            "%s: %d answered, %d known, %d unanswered, %d retries, %d + %d tokens%s",
            self.name,
            len(run.answers),
            known,
            len(run.failed),
            run.num_retries,
            prompt,
            completion,
            f", cost {cost / 1e6:.4f}" if cost else "",
        )


class _Run:
    """What the threads of one `generate` share."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.answers: dict[str, Answer] = {}
        self.failed: dict[str, str] = {}
        self.first_failure = ""
        self.error: Exception | None = None
        self.num_retries = self._in_a_row = 0
        self._lock = threading.Lock()

    def answered(self, key: str, answer: Answer) -> None:
        with self._lock:
            self.answers[key], self._in_a_row = answer, 0

    def gave_up(self, ask: Ask, problem: Passing) -> int:
        """How many have given up in a row, this one included."""
        with self._lock:
            self.first_failure = self.first_failure or f"{ask.id}: {problem}"
            self.failed[ask.key] = problem.reason
            self._in_a_row += 1
            return self._in_a_row

    def retried(self) -> None:
        with self._lock:
            self.num_retries += 1

    def halt(self, error: Exception) -> None:
        """Ask nothing more; the first error is the one that is raised."""
        with self._lock:
            self.error = self.error or error
        self.stop.set()


def _generation(request: Request, answer: Answer | None) -> Generation | None:
    if answer is None:
        return None
    return Generation(
        id=request.id,
        # What continues a begun text begins where that ends.
        text=answer.text if request.prefill else answer.text.strip(),
        num_tokens=answer.completion_tokens,
        finished=answer.finish_reason == "stop",
        token_ids=answer.token_ids,
        told=answer.told,
        prompt_tokens=answer.prompt_tokens,
    )
