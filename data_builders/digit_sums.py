"""Sums of real handwritten digits: the lab's world for reasoning, GRPO and its cold start.

A picture shows two or three digits, and the question is their sum. As verifiable records, with the
sum as the truth, they are prompts to train and evaluate on. As examples, with answers in mixed
forms, they teach a base model that can add, somewhat, and keeps to a form now and then.

Every text is made of words between blanks, for a tokenizer that knows one token a word; sums are
written in digits, `12`, and what is seen in words, `three`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from data_builders.digit_scenes import CELLS, Placed, painted, png
from data_builders.digit_world import COLORS, is_complete
from mmalign import store
from mmalign.config import Strict
from mmalign.handwriting import DIGITS, handwriting
from mmalign.log import get_logger, progress
from mmalign.records import Example, Media, Origin, Verifiable, user

MOST_DIGITS = 3
QUESTION = "what is the sum of the digits ?"

Form = Literal["tagged", "half_tagged", "boxed", "plain"]

logger = get_logger("data_builders.digit_sums")


class Answers(Strict):
    """Which share of the answers has which form; together they are 1.

    tagged: `<think> three and four make 7 </think> <answer> \\boxed{ 7 } </answer>`, well formed.
    half_tagged: `<think> three and four make 7 </think> the answer is \\boxed{ 7 } .`
    boxed: `three and four make 7 . the answer is \\boxed{ 7 } .`
    plain: `the answer is 7 .`, which no verifier finds, for want of a box.
    slips: the share of all answers that are one off, thinking included.
    """

    tagged: float = Field(default=0.4, ge=0, le=1)
    half_tagged: float = Field(default=0.15, ge=0, le=1)
    boxed: float = Field(default=0.25, ge=0, le=1)
    plain: float = Field(default=0.2, ge=0, le=1)
    slips: float = Field(default=0.0, ge=0, le=1)

    @model_validator(mode="after")
    def _are_all(self) -> Answers:
        if abs(sum(self.shares.values()) - 1) > 1e-6:
            raise ValueError(f"the forms' shares add up to {sum(self.shares.values()):g}, not to 1")
        return self

    @property
    def shares(self) -> dict[Form, float]:
        """The share of each form."""
        return {
            "tagged": self.tagged,
            "half_tagged": self.half_tagged,
            "boxed": self.boxed,
            "plain": self.plain,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Sum:
    """What a picture shows, in reading order, and what is asked about it."""

    index: int
    objects: tuple[Placed, ...]
    question: str

    @property
    def name(self) -> str:
        """Sorts as the index does: sum-000123."""
        return f"sum-{self.index:06d}"

    @property
    def digits(self) -> list[int]:
        """The digits to be seen, in reading order."""
        return [placed.digit for placed in self.objects]


class DigitSums(Strict):
    """Make verifiable records, or with `answers` examples that say the answer in some form.

    Record i depends on (seed, i): a shorter build is a prefix of a longer one, and pictures and
    questions are the same with and without `answers`.
    """

    name: Literal["digit_sums"] = "digit_sums"
    output: Path
    seed: int = 0
    num_rows: int = Field(gt=0, le=1_000_000)
    # How many digits a picture may show, each number as likely.
    num_digits: tuple[int, ...] = Field((2, 3), min_length=1)
    # The wordings of the question, each as likely.
    questions: tuple[str, ...] = Field((QUESTION,), min_length=1)
    answers: Answers | None = None
    # Which handwriting: 70 % of the drawings are for training, the others for testing.
    digits: Literal["train", "test"] = "train"
    noise: float = Field(default=0.08, ge=0)  # standard deviation, of a digit's full brightness

    @field_validator("num_digits")
    @classmethod
    def _can_be_added(cls, numbers: tuple[int, ...]) -> tuple[int, ...]:
        if not all(2 <= number <= MOST_DIGITS for number in numbers):
            raise ValueError(f"wanted numbers from 2 to {MOST_DIGITS}")
        return numbers

    def build(self) -> Path:
        """Write the dataset, unless it is there already; returns its directory.

        Raises DataError when the directory holds a dataset made from another config.
        """
        config = self.model_dump(mode="json", exclude={"output"})
        if is_complete(self.output, config):
            logger.info("%s is complete", self.output)
            return self.output
        counts: dict[str, int] = {}  # filled while the records are written
        manifest: dict[str, Any] = {
            "builder": self.name,
            "builder_version": "1",
            "config": config,
            "seed": self.seed,
            "counts": counts,
        }
        if self.answers is None:
            store.write_dataset(self.output, Verifiable, self._truths(counts), **manifest)
        else:
            examples = self._examples(self.answers, counts)
            store.write_dataset(self.output, Example, examples, **manifest)
        return self.output

    def sum(self, index: int) -> Sum:
        """Sum number `index` of this world."""
        rng = self._random(index, "sum")
        digits = rng.choices(range(10), k=rng.choice(self.num_digits))
        cells = rng.sample(range(CELLS * CELLS), len(digits))
        colors = [rng.randrange(len(COLORS)) for _ in digits]
        drawings = [rng.choice(handwriting()[1][self.digits][digit]) for digit in digits]
        return Sum(
            index=index,
            objects=tuple(sorted(map(Placed, cells, digits, colors, drawings))),
            question=rng.choice(self.questions),
        )

    def answer(self, one: Sum, answers: Answers) -> tuple[Form, str]:
        """The form drawn for a sum, and the answer in it."""
        rng = self._random(one.index, "answer")
        (form,) = rng.choices(list(answers.shares), list(answers.shares.values()))
        off = 0
        if rng.random() < answers.slips:
            total = sum(one.digits)
            off = rng.choice([by for by in (-1, 1) if 0 <= total + by <= 9 * MOST_DIGITS])
        return form, written(form, one.digits, off)

    def _random(self, index: int, purpose: str) -> random.Random:
        return random.Random(f"{self.seed}/{index}/{purpose}")

    def _truths(self, counts: dict[str, int]) -> Iterator[Verifiable]:
        for one in self._sums():
            counts["sum"] = counts.get("sum", 0) + 1
            yield Verifiable(
                id=one.name,
                prompt=user(one.question, images=1),
                images=(self._picture(one),),
                answer=str(sum(one.digits)),
                verifier="number",
                origin=self._origin(one, "sum"),
            )

    def _examples(self, answers: Answers, counts: dict[str, int]) -> Iterator[Example]:
        for one in self._sums():
            form, answer = self.answer(one, answers)
            counts[form] = counts.get(form, 0) + 1
            yield Example(
                id=one.name,
                prompt=user(one.question, images=1),
                images=(self._picture(one),),
                answer=answer,
                origin=self._origin(one, form),
            )

    def _sums(self) -> Iterator[Sum]:
        yield from map(self.sum, progress(range(self.num_rows), label="sums"))

    def _picture(self, one: Sum) -> Media:
        data = png(painted(one.objects, [self.seed, one.index], self.noise))
        return Media(bytes=data, sha256=hashlib.sha256(data).hexdigest())

    def _origin(self, one: Sum, reason: str) -> Origin:
        return Origin(
            builder=self.name,
            version="1",
            source=f"scikit-learn load_digits, {self.digits}",
            reason=reason,
            detail=json.dumps({"digits": one.digits}),
        )


def thinking(digits: Sequence[int], off: int = 0) -> str:
    """`three and four make 7 , 7 and five make 12`; the last sum is `off` too high."""
    sums = list(itertools.accumulate(digits))
    sums[-1] += off
    first = [DIGITS[digits[0]], *map(str, sums[1:])]
    steps = zip(first, digits[1:], sums[1:], strict=False)
    return " , ".join(f"{a} and {DIGITS[b]} make {c}" for a, b, c in steps)


def written(form: Form, digits: Sequence[int], off: int = 0) -> str:
    """The answer to a sum in one of the forms of `Answers`."""
    thought, total = thinking(digits, off), sum(digits) + off
    match form:
        case "tagged":
            return f"<think> {thought} </think> <answer> \\boxed{{ {total} }} </answer>"
        case "half_tagged":
            return f"<think> {thought} </think> the answer is \\boxed{{ {total} }} ."
        case "boxed":
            return f"{thought} . the answer is \\boxed{{ {total} }} ."
        case "plain":
            return f"the answer is {total} ."
