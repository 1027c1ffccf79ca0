"""Rewards of responses: a weighted sum of named functions, each logged by itself.

SPECS's reward is `format` with weight 0.5 and `accuracy` with weight 1, so 0, 0.5, 1 or 1.5.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol

from pydantic import Field, FiniteFloat, PositiveFloat, PositiveInt, model_validator

from mmalign.config import Strict
from mmalign.errors import MissingExtra, MmalignError, RewardError
from mmalign.records import Verifiable
from mmalign.think import parts_of
from mmalign.verify import Verifiers


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """A response that the policy sampled for a row.

    num_tokens: its length, the end token included. finished: it ended with one and was not cut off.
    """

    id: str
    row: Verifiable
    text: str
    num_tokens: int
    finished: bool


@dataclass(frozen=True, slots=True)
class Undecided:
    """What a reward function returns that cannot tell. It counts as 0, and is counted by reason."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """A rollout's reward. `parts` holds what each function gave, before its weight.

    undecided: a function could not tell; `reasons` says of each of those why.
    """

    total: float
    parts: dict[str, float]
    undecided: bool = False
    reasons: dict[str, str]


class RewardFunction(Protocol):
    """One part of a reward; `name` is its name in logs and errors, `weight` its factor."""

    @property
    def name(self) -> str:
        """Its name in logs and errors."""
        ...

    @property
    def weight(self) -> float:
        """What it is multiplied by in the sum."""
        ...

    def __call__(self, rollout: Rollout, verifiers: Verifiers) -> float | Undecided:
        """A finite number. What it raises stops the run."""
        ...


class FormatReward(Strict):
    """1 where the response ended by itself and has the form of `think.parts_of`, else 0.

    One that was cut off has no form, even where only white space followed its last tag: else a
    policy that never ends its turn would lose nothing.
    """

    name: Literal["format"] = "format"
    weight: FiniteFloat = 0.5

    def __call__(self, rollout: Rollout, verifiers: Verifiers) -> float:
        """0 or 1."""
        return float(rollout.finished and parts_of(rollout.text).well_formed)


class AccuracyReward(Strict):
    """1 where the row's verifier finds the response's answer correct, else 0.

    The form does not matter: a right answer in a box earns it without any tags.
    """

    name: Literal["accuracy"] = "accuracy"
    weight: FiniteFloat = 1.0

    def __call__(self, rollout: Rollout, verifiers: Verifiers) -> float | Undecided:
        """0 or 1, or why the verifier could not tell."""
        checked = verifiers.check_response(rollout.text, rollout.row)
        return Undecided(checked.reason) if checked.correct is None else float(checked.correct)


class LengthReward(Strict):
    """DAPO's soft overlong penalty.

    0 up to max_tokens - buffer_tokens tokens, then falling linearly to -1 at max_tokens, and -1
    beyond.
    """

    name: Literal["length"] = "length"
    weight: FiniteFloat = 1.0
    max_tokens: PositiveInt
    buffer_tokens: PositiveInt

    @model_validator(mode="after")
    def _buffer_fits(self) -> LengthReward:
        if self.buffer_tokens > self.max_tokens:
            raise ValueError(
                f"buffer_tokens {self.buffer_tokens} is more than max_tokens {self.max_tokens}"
            )
        return self

    def __call__(self, rollout: Rollout, verifiers: Verifiers) -> float:
        """From -1 to 0."""
        over = rollout.num_tokens - (self.max_tokens - self.buffer_tokens)
        return 0.0 - min(max(over / self.buffer_tokens, 0.0), 1.0)


AnyReward = Annotated[FormatReward | AccuracyReward | LengthReward, Field(discriminator="name")]


class RewardsConfig(Strict):
    """Which functions make up a reward: by default SPECS's two.

    math_timeout_seconds: what comparing one answer of the verifier `math` may take.
    """

    functions: tuple[AnyReward, ...] = Field(
        default=(FormatReward(), AccuracyReward()), min_length=1
    )
    math_timeout_seconds: PositiveFloat = 5.0

    @model_validator(mode="after")
    def _one_of_each(self) -> RewardsConfig:
        if twice := _twice(self.functions):
            raise ValueError(f"functions: {twice} is named twice")
        return self

    def load(self) -> Rewards:
        """The rewards, to be closed after use. Nothing is started yet."""
        return Rewards(self.functions, Verifiers(math_timeout_seconds=self.math_timeout_seconds))


class Rewards:
    """A weighted sum of reward functions. A context manager: it ends its verifiers' process.

    Raises RewardError where two functions have one name.
    """

    def __init__(self, functions: Sequence[RewardFunction], verifiers: Verifiers) -> None:
        if twice := _twice(functions):
            raise RewardError(f"two rewards have the name {twice}", fix="rename one of them")
        self.functions, self.verifiers = tuple(functions), verifiers

    def __enter__(self) -> Rewards:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def score(self, items: Sequence[Rollout]) -> list[Scored]:
        """The reward of each rollout, in order.

        Raises RewardError naming function and row where a function raises or gives no finite
        number; a reward that fails is never 0. MissingExtra passes as it is.
        """
        return [self._score(rollout) for rollout in items]

    def close(self) -> None:
        """End the process in which mathematics is compared, where there is one."""
        self.verifiers.close()

    def _score(self, rollout: Rollout) -> Scored:
        parts: dict[str, float] = {}
        reasons: dict[str, str] = {}
        for function in self.functions:
            value = self._value(function, rollout)
            if isinstance(value, Undecided):
                reasons[function.name] = value.reason
                value = 0.0
            parts[function.name] = value
        return Scored(
            total=math.fsum(f.weight * parts[f.name] for f in self.functions),
            parts=parts,
            undecided=bool(reasons),
            reasons=reasons,
        )

    def _value(self, function: RewardFunction, rollout: Rollout) -> float | Undecided:
        where = f"row {rollout.row.id}, rollout {rollout.id}"
        got = f"the response {_shown(rollout.text)}, the answer {_shown(rollout.row.answer)}"
        try:
            value = function(rollout, self.verifiers)
        except MissingExtra:
            raise
        except Exception as error:
            said = str(error) if isinstance(error, MmalignError) else repr(error)
            raise RewardError(
                f"the reward {function.name} failed: {said}", where=where, got=got
            ) from error
        if isinstance(value, Undecided):
            return value
        # A tensor or an array is no number: what is logged and stored must be plain.
        if not isinstance(value, float | int) or not math.isfinite(value):
            raise RewardError(
                f"the reward {function.name} gave {value!r} for {got}",
                where=where,
                wanted="a finite number, or Undecided",
            )
        return float(value)


def _twice(functions: Sequence[RewardFunction]) -> str:
    """The names that more than one function has, or ""."""
    counts = Counter(function.name for function in functions)
    return ", ".join(name for name, count in counts.items() if count > 1)


def _shown(text: str) -> str:
    return repr(text if len(text) <= 200 else f"{text[:100]} … {text[-100:]}")
