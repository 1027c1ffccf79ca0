"""Rollouts from a vLLM server that is kept in step with the policy.

At the start of a batch the main process writes the policy's adapter, or its weights, to a folder
and has the server load them. A version is named after the step and the weights themselves, so what
answers can be told: an adapter by the name of the model that a response gives, weights by the
version that the server states before and after a batch. Every process asks for its own rows.

What was sampled is the token ids that the server returns, never its text. They are refused where
the server saw another prompt than the policy will be scored on.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator

from mmalign.config import Strict
from mmalign.errors import MmalignError, ModelError, TrainingError
from mmalign.generate.base import Generation, Request, Sampling
from mmalign.generate.local import LocalGenerator, banned_ids, end_ids, fingerprint
from mmalign.generate.server import ServerConfig, ServerGenerator
from mmalign.generate.vllm import VllmControl
from mmalign.log import get_logger
from trainers.decoding import evaluating
from trainers.objectives.base import PreparedRow

if TYPE_CHECKING:
    from accelerate import Accelerator

    from mmalign.models.load import Policy

logger = get_logger("trainers.rollout_server")

# What every request says beside how to decode, and a recipe's `extra` may not take back.
_ASKED = frozenset({"return_token_ids", "logprobs", "logit_bias", "stop_token_ids"})


class PolicyItself(Strict):
    """Rollouts are sampled by the training processes, which do nothing else meanwhile."""

    engine: Literal["policy"] = "policy"


class VllmServer(Strict):
    """Rollouts are sampled by a vLLM server, which loads the policy's weights at every batch.

    base_url: such as http://localhost:8000/v1. model: the base model's name there.
    overlap: while a batch is learnt from, the next one is sampled, by the policy as it was before:
        one batch stale, and scored by those weights, a copy of which each process keeps.
    folder: where weights are written, which the server must see under the same path; by default
        `weights` in run.output.
    max_gap: an error beyond so many nats between the log-probabilities of server and policy, a
        mean over tokens; null lets it be.
    ready_seconds, sync_seconds: how long to wait for the server to start, and to load weights.
    api_key_env, timeout_seconds (of one response), max_retries, backoff_seconds, concurrency (of
        each process), extra: as of any server.
    """

    engine: Literal["vllm"] = "vllm"
    base_url: str
    model: str = Field(min_length=1)
    overlap: bool = False
    folder: Path | None = None
    max_gap: PositiveFloat | None = 0.5
    ready_seconds: PositiveFloat = 300.0
    sync_seconds: PositiveFloat = 600.0
    api_key_env: str = "OPENAI_API_KEY"
    concurrency: PositiveInt = 64
    timeout_seconds: PositiveFloat = 600.0
    max_retries: NonNegativeInt = 6
    backoff_seconds: PositiveFloat = 1.0
    extra: dict[str, Any] = Field(default_factory=dict)

    @field_validator("base_url")
    @classmethod
    def _is_an_address(cls, url: str) -> str:
        # Its own checks, with its own words.
        ServerConfig(model="any", base_url=url)
        return url

    @field_validator("extra")
    @classmethod
    def _leaves_ours_alone(cls, extra: dict[str, Any]) -> dict[str, Any]:
        ServerConfig(model="any", base_url="http://localhost", extra=extra)
        if ours := sorted(_ASKED & extra.keys()):
            raise ValueError(f"{', '.join(ours)} cannot be set here")
        return extra

    def asking(self, model: str, fields: dict[str, Any]) -> ServerGenerator:
        """The client for one of the server's models."""
        config = ServerConfig(
            model=model,
            base_url=self.base_url,
            api_key_env=self.api_key_env,
            concurrency=self.concurrency,
            timeout_seconds=self.timeout_seconds,
            max_retries=self.max_retries,
            backoff_seconds=self.backoff_seconds,
            extra=fields | self.extra,
        )
        return config.load()


class RolloutSampler(Protocol):
    """Who samples."""

    def sync(self, step: int) -> None:
        """Sample with the weights as they are before `step` from now on; all processes call it."""
        ...

    def generate(
        self, requests: Sequence[Request], rows: Sequence[PreparedRow], sampling: Sampling
    ) -> list[Generation]:
        """Responses with their token ids, in the order asked; rows: of each request, in tokens."""
        ...

    def close(self) -> None:
        """Sample no more."""
        ...


class PolicySampler:
    """The policy itself, in this process."""

    def __init__(self, policy: Policy, batch_size: int) -> None:
        self._generator = LocalGenerator(policy, batch_size=batch_size)

    def sync(self, step: int) -> None:
        """There is but one set of weights."""

    def generate(
        self, requests: Sequence[Request], rows: Sequence[PreparedRow], sampling: Sampling
    ) -> list[Generation]:
        """Responses, with the model in evaluation mode meanwhile."""
        with evaluating(self._generator.policy.model):
            return self._generator.generate(requests, sampling)

    def close(self) -> None:
        """Nothing runs by itself."""


class ServerSampler:
    """A vLLM server. Raises TrainingError where it does not do what is asked of it.

    folder: where weights are written. adapter: whether the policy is a LoRA, which is served as
    one; else the server's own weights are replaced.
    """

    def __init__(
        self,
        config: VllmServer,
        policy: Policy,
        accelerator: Accelerator,
        *,
        folder: Path,
        adapter: bool,
    ) -> None:
        self.config, self.policy, self.accelerator = config, policy, accelerator
        self.folder, self.adapter = Path(os.path.abspath(folder)), adapter
        self._control = VllmControl(
            config.base_url,
            api_key_env=config.api_key_env,
            timeout_seconds=config.sync_seconds,
        )
        self._ends, self._banned = set(end_ids(policy)), set(banned_ids(policy))
        self._fields = {
            "return_token_ids": True,
            "logprobs": True,
            "stop_token_ids": sorted(self._ends),
            # What a local policy may not say either.
            "logit_bias": {str(token): -100 for token in sorted(self._banned)},
            # Else vLLM takes these from the checkpoint's generation_config.
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
        }
        self._step: int | None = None
        self._version = ""
        self._asking: ServerGenerator | None = None

    def sync(self, step: int) -> None:
        """Have the server load the policy as it is before `step`, and see that it did."""
        if self._step == step:
            return
        from accelerate.utils import broadcast_object_list

        # Nobody may still be sampling with the weights that go.
        self.accelerator.wait_for_everyone()
        told: list[Any] = [None]
        if self.accelerator.is_main_process:
            try:
                told[0] = self._loaded(step)
            except ModelError as error:
                raise self._failed(
                    f"cannot be given the weights for step {step + 1}", error
                ) from error
        broadcast_object_list(told)
        self._step, self._version = step, told[0]
        model = self._version if self.adapter else self.config.model
        self._asking = self.config.asking(model, self._fields)

    def generate(
        self, requests: Sequence[Request], rows: Sequence[PreparedRow], sampling: Sampling
    ) -> list[Generation]:
        """Responses of the version that was last synced, checked one by one."""
        assert self._asking is not None
        assert self._step is not None
        for request, row in zip(requests, rows, strict=True):
            if request.videos:
                raise TrainingError(
                    "a clip would be sent to the server as pictures, which is another prompt",
                    where=f"row {row.id}",
                    fix="leave rollouts.generator out, so that the policy samples by itself",
                )
        try:
            self._check_version()
            made = self._asking.generate(requests, sampling)
            self._check_version()
        except ModelError as error:
            raise self._failed(f"failed in rollouts of step {self._step + 1}", error) from error
        return [self._checked(one, row) for one, row in zip(made, rows, strict=True)]

    def close(self) -> None:
        """Ask nothing more."""
        if self._asking is not None:
            self._asking.close()

    def _loaded(self, step: int) -> str:
        """Write the weights, have them loaded, drop the last ones; returns the version."""
        self._control.wait(self.config.ready_seconds)
        fresh = self.folder / ".fresh"
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        self.policy.model.save_pretrained(str(fresh))  # type: ignore[operator]
        # The weights' own hash: another run on this server, or another start of this one, has
        # the same name for the same weights alone.
        version = f"step-{step:06d}-{fingerprint(str(fresh))}"
        final = self.folder / version
        shutil.rmtree(final, ignore_errors=True)
        fresh.rename(final)
        if self.adapter:
            served = self._control.models()
            if version in served:
                self._control.unload_adapter(version)
            self._control.load_adapter(version, final)
            served = self._control.models()
            if version not in served:
                raise ModelError("it does not list the adapter", got=", ".join(sorted(served)))
            # A server that was started anew has lost it by itself.
            if self._version != version and self._version in served:
                self._control.unload_adapter(self._version)
        else:
            self._control.load_weights(version, final)
        if self._version and self._version != version:
            shutil.rmtree(self.folder / self._version, ignore_errors=True)
        logger.info("step %d: the server has %s", step + 1, version)
        return version

    def _check_version(self) -> None:
        """Weights that were replaced have no name in a response, so the server is asked."""
        if not self.adapter and (found := self._control.weight_version()) != self._version:
            raise self._other_weights(found)

    def _checked(self, made: Generation, row: PreparedRow) -> Generation:
        """The response as the local generator would have told it."""
        told, ids = made.told, made.token_ids
        if told is None or not ids or len(told.logps) != len(ids):
            raise self._wrong(
                "returns no token ids and log-probabilities with its text",
                row,
                got=f"{len(ids)} and {0 if told is None else len(told.logps)}",
                fix="use a vLLM that knows return_token_ids and logprobs in chat completions",
            )
        if self.adapter and told.model != self._version:
            raise self._other_weights(told.model)
        if told.ending not in ("stop", "length"):
            raise self._wrong("broke off a response", row, got=f"finish_reason {told.ending}")
        self._check_prompt(told.prompt_ids, row)
        finished = ids[-1] in self._ends
        kept = ids[:-1] if finished else ids
        if finished != (told.ending == "stop") or self._ends.intersection(kept):
            raise self._wrong(
                "ends turns by other tokens than the policy",
                row,
                got=f"finish_reason {told.ending}, last token {ids[-1]}",
                wanted=f"one of {sorted(self._ends)} at the end of what is finished, nowhere else",
                fix="see that it serves the same model, and drop `stop` from extra",
            )
        if banned := self._banned.intersection(kept):
            raise self._wrong(
                "sampled what a response may not hold", row, got=f"tokens {sorted(banned)}"
            )
        text = self.policy.preparer.tokenizer.decode(list(kept), skip_special_tokens=True).strip()
        return Generation(
            id=made.id,
            text=text,
            num_tokens=len(kept),
            finished=finished,
            token_ids=ids,
            told=told,
        )

    def _check_prompt(self, theirs: Sequence[int], row: PreparedRow) -> None:
        ours = row.conditions[0].prompt_ids
        if list(theirs) == list(ours):
            return
        both = zip(theirs, ours, strict=False)
        at = next((i for i, (a, b) in enumerate(both) if a != b), min(len(theirs), len(ours)))
        raise self._wrong(
            f"saw another prompt, from token {at} on",
            row,
            got=f"{len(theirs)} tokens, there {list(theirs[at : at + 8])}",
            wanted=f"{len(ours)} tokens, there {list(ours[at : at + 8])}",
            fix="see that it has the same chat template and picture size, such as "
            "--mm-processor-kwargs '{\"max_pixels\": …}' for model.max_pixels",
        )

    def _other_weights(self, found: str) -> TrainingError:
        return TrainingError(
            "the server answers from other weights than it was given",
            where=self.config.base_url,
            got=found,
            wanted=self._version,
            fix="see that no other run uses it and that it was not started anew; then start again: "
            "the run goes on from its last checkpoint",
        )

    def _wrong(self, what: str, row: PreparedRow, **told: Any) -> TrainingError:
        where = f"{self.config.base_url}, row {row.id}"
        return TrainingError(f"the server {what}", where=where, **told)

    def _failed(self, what: str, error: MmalignError) -> TrainingError:
        """What went wrong with the server, what has been done, and how to go on."""
        return TrainingError(
            f"the server {what}: {error.what}; nothing was learnt from this batch",
            where=self.config.base_url,
            got=error.got,
            wanted=error.wanted,
            fix=(f"{error.fix}; " if error.fix else "")
            + "then start the same command again: the run goes on from its last checkpoint",
        )
