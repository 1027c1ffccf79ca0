"""Questions whose answers a language model judges: what it is asked, and two readings of its reply.

The judge gives every answer a number. `official` reads a reply as the released script does, and
counts one that holds no number as the script does; `strict` takes a reply that gives exactly one,
in the form that was asked for, and leaves out answers on which there is none (`unjudged_rate`).

What the judge is asked is in our words. A number that a model gives hangs on its prompt: for a
paper's own numbers give the released prompt as `judge_prompt`, and the judge that the paper used.
An answer may hold instructions and verdicts of its own. So the default prompts put it between marks
with a code that no answer can know; a released prompt does not.
"""

from __future__ import annotations

import hashlib
import re
import statistics
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from evals.base import Row, Suite, check_known
from evals.judging import Holds, Judged, own_variance
from evals.questions import READINGS, Asking, Question, Reading, about
from evals.rules import Metric, Metrics, Rules
from evals.stats import Ratio, ratio
from mmalign.errors import ConfigError
from mmalign.generate.base import Request
from mmalign.judge import RULE, code_for
from mmalign.records import user

_PLACE = re.compile(r"\{([a-z_]+)\}")


class JudgedBench(Asking):
    """What benchmarks with a judge have in common.

    judge_prompt: a text file in place of the default prompt, with {question}, {reference}, {answer}
    and the benchmark's other places.
    """

    judge_prompt: Path | None = None
    max_new_tokens: int = Field(default=1024, ge=1)

    # What the judge is asked, with places; {rule} and {code} as mmalign.judge has them.
    default_prompt: ClassVar[str]
    # What a reply without a number counts for, officially.
    unread: ClassVar[float] = 0.0

    @abstractmethod
    def read_verdict(self, question: Question, reply: str, reading: Reading) -> float | None:
        """The number that a reply gives an answer; None where it gives none."""

    @abstractmethod
    def metrics(self, items: Sequence[Row]) -> dict[str, Ratio]:
        """The benchmark's numbers, from rows alone."""

    def shows_pictures(self, question: Question) -> bool:
        """Whether the judge sees the question's pictures."""
        return False

    def verdict_requests(self, answers: Mapping[str, str]) -> list[Request]:
        """What to ask the judge, by question id; nothing on a question without an answer.

        Raises ConfigError on a judge_prompt that cannot be read, lacks {answer} or has a place that
        the benchmark cannot fill.
        """
        template, requests = self.template(), list[Request]()
        for question in self.selected():
            answer = answers.get(question.id)
            if answer is None:
                continue
            pictures = question.images if self.shows_pictures(question) else ()
            requests.append(
                Request(
                    id=question.id,
                    prompt=user(self._filled(template, question, answer), images=len(pictures)),
                    images=pictures,
                    media_root=self.folder,
                )
            )
        return requests

    def reader(self) -> Holds:
        """Whether (question id, reply) gives a number under the strict reading."""
        questions = {question.id: question for question in self.selected()}
        return lambda id, reply: self.read_verdict(questions[id], reply, "strict") is not None

    def score(self, answers: Mapping[str, str], judged: Judged) -> Suite:
        """Score answers by question id with the judge's replies; a missing answer has none."""
        questions = self.selected()
        check_known(answers, {question.id for question in questions}, self.key)
        items = [
            self.item(question, answers.get(question.id), judged.texts.get(question.id, []))
            for question in questions
        ]
        unjudged = sum(row["score_strict"] is None for row in items)
        suite = self.suite(items, self.metrics(items), unjudged)
        told = judged.told | {"asked": self._asked_of_judge(questions)}
        return replace(suite, judge=told | own_variance(self.per_repeat(items)))

    def _asked_of_judge(self, questions: Sequence[Question]) -> str:
        """A hash of the judge's prompt, and of what it is told beside answers: other than those."""
        notes = [sorted(question.notes.items()) for question in questions]
        return hashlib.sha256(repr([self.template(), notes]).encode()).hexdigest()

    def per_repeat(self, items: Sequence[Row]) -> list[float]:
        """The benchmark's number by each of the judge's repeats, over the items that it judged."""
        scores = [row["scores_official"] for row in items if row["scores_official"]]
        return [statistics.fmean(column) for column in zip(*scores, strict=True)]

    def template(self) -> str:
        """What the judge is asked, with places. Raises ConfigError as verdict_requests does."""
        if self.judge_prompt is None:
            return self.default_prompt
        try:
            template = self.judge_prompt.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot be read ({error})", where=str(self.judge_prompt)) from None
        if "{answer}" not in template:
            raise ConfigError("has no place for the {answer}", where=str(self.judge_prompt))
        return template

    def _filled(self, template: str, question: Question, answer: str) -> str:
        reference = question.truth if isinstance(question.truth, str) else question.truth[0]
        values = {
            **question.notes,
            "question": question.text,
            "reference": reference,
            "answer": answer,
        }
        code = code_for(*values.values())
        values |= {"code": code, "rule": RULE.format(code=code)}
        unknown = set(_PLACE.findall(template)) - values.keys()
        if unknown and self.judge_prompt is None:
            raise AssertionError(f"{self.label}: no {unknown}")
        if unknown:
            raise ConfigError(
                "has places that cannot be filled",
                where=str(self.judge_prompt),
                got=", ".join(sorted(unknown)),
                wanted=", ".join(sorted(values)),
            )
        # In one pass, so that an answer's own "{reference}" stays what it is.
        return _PLACE.sub(lambda place: values[place[1]], template)

    def item(self, question: Question, answer: str | None, replies: Sequence[str]) -> Row:
        """The row of a question, from its answer and what the judge said of it in each repeat."""
        official, strict = (
            [self.read_verdict(question, reply, reading) for reply in replies]
            for reading in READINGS
        )
        counted = [self.unread if number is None else number for number in official]
        read = [number for number in strict if number is not None]
        return {
            **about(question),
            "prompt": self.asked(question),
            "answer": answer,
            "label": question.truth if isinstance(question.truth, str) else list(question.truth),
            "replies": list(replies),
            "scores_official": counted,
            "scores_strict": strict,
            "score_official": sum(counted) / len(counted) if counted else self.unread,
            "score_strict": sum(read) / len(read) if read else None,
        }


JUDGED_ROW = ("answer", "scores_official", "score_official", "score_strict")


def judged_rules(
    metrics: Metrics,
    compared: Sequence[str],
    *,
    shown: tuple[Metric, ...],
    read: tuple[str, ...] = (),
    items: str = "questions",
    meaning: str,
) -> Rules:
    """The rules of a benchmark with a judge. compared: its numbers, all by the bootstrap.

    read: fields of its rows beside those that all have. shown: `unjudged_rate` stands behind them.
    """
    return Rules(
        metrics=metrics,
        read=(*JUDGED_ROW, *read),
        same=("label", "categories", "cluster", "group"),
        compared=dict.fromkeys(compared, "bootstrap"),
        shown=(*shown, Metric("unjudged_rate", "unjudged", "lower")),
        items=items,
        meaning=meaning,
    )


def score_of(items: Sequence[Row], reading: Reading) -> Ratio:
    """The mean number: officially over all items, strictly over those with a verdict."""
    scores = [row[f"score_{reading}"] for row in items]
    return ratio([score or 0.0 for score in scores], [score is not None for score in scores])


def unjudged(items: Sequence[Row]) -> Ratio:
    """The share of items without a verdict in the form that was asked for, or without an answer."""
    return ratio([row["score_strict"] is None for row in items], [1] * len(items))


def disagreement(items: Sequence[Row]) -> Ratio:
    """The share of judged items that the judge's repeats gave different numbers."""
    differ = [len(set(row["scores_official"])) > 1 for row in items]
    return ratio(differ, [len(row["scores_official"]) > 0 for row in items])
