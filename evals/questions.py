"""Questions with short answers: asking them, reading them twice, and their shares.

Every answer is read by the released scorer's rule (`official/`) and by a stricter one that declines
where an answer is not clear (`strict/`). An answer that is missing or was not read is wrong.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from evals.base import QuestionPrompt, Row, Split, Suite, check_known
from evals.rules import YES_RATIO, Metric, Metrics, Rules, Test
from evals.stats import Ratio, mean, ratio
from mmalign.config import Strict
from mmalign.errors import DataError
from mmalign.generate.base import Request
from mmalign.media import media_key
from mmalign.records import Media, user

Reading = Literal["official", "strict"]
READINGS: tuple[Reading, ...] = ("official", "strict")


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question about pictures or a clip.

    video: a clip's file below the benchmark's folder, or images: pictures, by file or whole; with
    neither, the question is of words alone. truth: the right answer as a reading gives it, or all
    that count for right. categories: what it counts under; means over categories take the first.
    cluster: what intervals draw together; by default the clip or the first picture. group: what
    questions share that are right only together; None for a question by itself. options: by letter.
    notes: what a judge is told beside question, answer and truth, by name.
    """

    id: str
    text: str
    truth: str | tuple[str, ...]
    categories: tuple[str, ...] = ()
    video: str | None = None
    images: tuple[Media, ...] = ()
    cluster: str | None = None
    group: str | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)

    @property
    def shown(self) -> str:
        """The name of the clip or of the first picture; the question's own if it has neither."""
        if self.video is not None:
            return self.video
        first = self.images[0] if self.images else None
        return self.id if first is None else first.path or media_key(first)


class Asking(Strict):
    """What all benchmarks of questions have in common: whose answers are read, and those judged.

    split: a name of your own, where two suites would share a key. prompt: what is asked, with the
    place of the question. limit: only the first so many questions, whole groups.
    method: how answers are scored, in words. A benchmark has a field `images` or `videos` of its
    own, the folder of its pictures or clips.
    """

    split: Split | None = None
    prompt: QuestionPrompt = "{question}"
    limit: int | None = Field(default=None, ge=1)
    max_new_tokens: int = Field(default=16, ge=1)

    method: ClassVar[str]

    @abstractmethod
    def load(self) -> list[Question]:
        """All questions, in the files' order. Raises DataError on files missing or wrong."""

    @property
    def folder(self) -> Path | None:
        """The folder of the pictures or clips; None where the data itself holds them."""
        return getattr(self, "images", None) or getattr(self, "videos", None)

    @property
    def label(self) -> str:
        """The benchmark's name, as recipes write it."""
        return type(self).model_fields["name"].default

    @property
    def key(self) -> str:
        """`<name>-<split>`."""
        return "-".join(filter(None, (self.label, self.split)))

    def requests(self) -> list[Request]:
        """One request per question, in the files' order."""
        return [
            Request(
                id=question.id,
                prompt=user(
                    self.asked(question),
                    images=len(question.images),
                    videos=0 if question.video is None else 1,
                ),
                images=question.images,
                videos=() if question.video is None else (Media(path=question.video),),
                media_root=self.folder,
            )
            for question in self.selected()
        ]

    def asked(self, question: Question) -> str:
        """The words of the prompt."""
        return self.prompt.replace("{question}", question.text)

    def selected(self) -> list[Question]:
        """Those within the limit. Raises DataError where there are none, or two share an id."""
        questions = self.load()
        if not questions:
            raise DataError("holds no question", where=self.key, fix="check its data folder")
        twice = [id for id, n in Counter(question.id for question in questions).items() if n > 1]
        if twice:
            raise DataError("two questions share an id", where=self.key, got=twice[0])
        if self.limit is None or self.limit >= len(questions):
            return questions
        first = {question.group or question.id for question in questions[: self.limit]}
        return [question for question in questions if (question.group or question.id) in first]

    def suite(self, items: list[Row], metrics: dict[str, Ratio], num_unparsed: int) -> Suite:
        """The scored answers."""
        of_clips = any("video" in row for row in items)
        return Suite(
            key=self.key,
            benchmark=self.label,
            split=self.key.removeprefix(self.label).lstrip("-") or None,
            images=None if of_clips else self.folder,
            videos=self.folder if of_clips else None,
            method=self.method,
            items=items,
            metrics=metrics,
            num_unparsed=num_unparsed,
        )


class QuestionBench(Asking):
    """Questions whose answers are read, by a rule of their own.

    judge_unread: have the recipe's judge read what the official rule does not (evals.unread).
    """

    judge_unread: bool = False

    @abstractmethod
    def read(self, question: Question, answer: str, reading: Reading) -> str | None:
        """What an answer says, in the form of `truth`; None where the reading cannot tell."""

    def credit(self, question: Question, said: str) -> float:
        """How right it is, from 0 to 1: by default whether it equals the truth, or one of them."""
        truths = (question.truth,) if isinstance(question.truth, str) else question.truth
        return float(said in truths)

    def metrics(self, items: Sequence[Row]) -> dict[str, Ratio]:
        """The benchmark's numbers, from rows alone."""
        return metrics(items)

    def score(self, answers: Mapping[str, str]) -> Suite:
        """Score answers by question id; a missing one is wrong under both readings."""
        items = self.items_of(self.selected(), answers)
        unread = sum(row["strict"] is None for row in items)
        return self.suite(items, _leaning(self.metrics(items), items), unread)

    def items_of(self, questions: Sequence[Question], answers: Mapping[str, str]) -> list[Row]:
        """The questions' rows, in their order. Raises DataError on answers to others."""
        check_known(answers, {question.id for question in questions}, self.key)
        return [self._item(question, answers.get(question.id)) for question in questions]

    def _item(self, question: Question, answer: str | None) -> Row:
        official, strict = (
            None if answer is None else self.read(question, answer, reading) for reading in READINGS
        )
        label = question.truth
        return {
            **about(question),
            "prompt": self.asked(question),
            "answer": answer,
            "label": label if isinstance(label, str) else list(label),
            "official": official,
            "strict": strict,
            "correct_official": self.right(question, official),
            "correct_strict": self.right(question, strict),
        }

    def right(self, question: Question, said: str | None) -> bool | float:
        """How right a reading is; one that declines is wrong."""
        credit = 0.0 if said is None else self.credit(question, said)
        return bool(credit) if credit in (0, 1) else credit


def about(question: Question) -> Row:
    """What the row of every benchmark of questions says of the question itself."""
    return {
        "id": question.id,
        "image" if question.video is None else "video": question.shown,
        "cluster": question.cluster or question.shown,
        "group": question.group or question.id,
        "categories": list(question.categories),
    }


READ_TWICE = (
    Metric("official/accuracy", "accuracy", "higher"),
    Metric("strict/accuracy", "accuracy, strict", "higher"),
    Metric("unparsed_rate", "unparsed", "lower"),
)


def question_rules(
    metrics: Metrics,
    compared: dict[str, Test] | None = None,
    *,
    shown: tuple[Metric, ...] = READ_TWICE,
    meaning: str = "",
) -> Rules:
    """The rules of a benchmark of questions; its two accuracies, if nothing is said.

    McNemar's test is for answers that are right or wrong: name the bootstrap for soft credit.
    Where all truths are yes or no, the yes ratio joins the metrics.
    """
    return Rules(
        metrics=lambda items: _leaning(metrics(items), items),
        read=("answer", "official", "strict", "correct_official", "correct_strict"),
        same=("label", "categories", "cluster", "group"),
        compared=compared or {"official/accuracy": "mcnemar", "strict/accuracy": "mcnemar"},
        shown=shown,
        items="questions",
        meaning=meaning,
    )


def metrics(items: Sequence[Row]) -> dict[str, Ratio]:
    """Both readings' accuracies, the official one by category too, and what was not read."""
    official = accuracy(items, "official")
    return {
        "official/accuracy": official,
        **by_category(items, "official/accuracy", official),
        "strict/accuracy": accuracy(items, "strict"),
        "unparsed_rate": unparsed(items),
    }


def accuracy(items: Sequence[Row], reading: Reading, *, macro: bool = False) -> Ratio:
    """The share of questions answered right; `macro` is the mean of the categories' shares."""
    right = np.array([row[f"correct_{reading}"] for row in items], float)
    counted = np.ones(len(items))
    return ratio(*(over_categories(items, right, counted) if macro else (right, counted)))


def together(items: Sequence[Row], reading: Reading, *, macro: bool = False) -> Ratio:
    """The share of groups of which every question is right. A group counts at its first row."""
    wrong = {row["group"] for row in items if not row[f"correct_{reading}"]}
    right, counted, seen = np.zeros(len(items)), np.zeros(len(items)), set[str]()
    for place, row in enumerate(items):
        if row["group"] not in seen:
            seen.add(row["group"])
            counted[place], right[place] = 1, row["group"] not in wrong
    return ratio(*(over_categories(items, right, counted) if macro else (right, counted)))


def by_category(items: Sequence[Row], name: str, whole: Ratio) -> dict[str, Ratio]:
    """`<name>/<category>`: a metric without weights, of each category's rows alone."""
    found: dict[str, Ratio] = {}
    for category in dict.fromkeys(c for row in items for c in row["categories"]):
        inside = np.array([category in row["categories"] for row in items])
        found[f"{name}/{category}"] = ratio(whole.numerator * inside, whole.denominator * inside)
    return found


def unparsed(items: Sequence[Row], reading: Reading = "strict") -> Ratio:
    """The share of questions whose answer the reading declined, or that have none."""
    return mean([row[reading] is None for row in items])


def yes_ratio(items: Sequence[Row]) -> Ratio:
    """The share of questions whose answer the official reading takes for yes.

    Read it beside every accuracy on questions of yes and no: a model that learned to say one of
    them moves it. A missing or unread answer is no yes.
    """
    return mean([row["official"] == "yes" for row in items])


def _leaning(found: dict[str, Ratio], items: Sequence[Row]) -> dict[str, Ratio]:
    """The metrics, with the yes ratio where all truths are yes or no."""
    if YES_RATIO.key in found or not all(row["label"] in ("yes", "no") for row in items):
        return found
    return found | {YES_RATIO.key: yes_ratio(items)}


def over_categories(
    items: Sequence[Row], right: np.ndarray, counted: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The two with each row weighing 1 / (what its first category counts), so categories equal.

    Intervals keep the weights, so that a category drawn more often weighs more in that draw.
    """
    first = [row["categories"][0] for row in items]
    sizes = Counter[str]()
    for name, count in zip(first, counted, strict=True):
        sizes[name] += int(count)
    weights = np.array([1 / sizes[name] if sizes[name] else 0.0 for name in first])
    return right * weights, counted * weights
