"""Questions about clips with short answers: asking them, reading them twice, and their shares.

Every answer is read by the released scorer's rule (`official/`) and by a stricter one that declines
where an answer is not clear (`strict/`). An answer that is missing or was not read is wrong.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from evals.base import QuestionPrompt, Row, Suite, check_known
from evals.stats import Ratio, mean, ratio
from mmalign.config import Strict
from mmalign.errors import DataError
from mmalign.generate.base import Request
from mmalign.records import Media, user

Reading = Literal["official", "strict"]


@dataclass(frozen=True, kw_only=True)
class ClipQuestion:
    """One question about one clip.

    video: its file, below the benchmark's folder of clips. truth: the right answer, as a reading
    gives it. categories: what it counts under; the first one is what means over categories take.
    cluster: what intervals draw together, such as the clip. group: what questions share that are
    right only together; None for a question by itself. options: by letter, if there are any.
    """

    id: str
    video: str
    text: str
    truth: str
    categories: tuple[str, ...]
    cluster: str
    group: str | None = None
    options: Mapping[str, str] = field(default_factory=dict)


class ClipBench(Strict):
    """What benchmarks of questions about clips have in common.

    videos: the folder of the clips. split: a name of your own, where two suites would share a key.
    prompt: what is asked, with the place of the question. limit: only the first so many questions,
    whole groups. method: how answers are read, in words.
    """

    split: str | None = None
    videos: Path
    prompt: QuestionPrompt = "{question}"
    limit: int | None = Field(default=None, ge=1)
    max_new_tokens: int = Field(default=16, ge=1)

    method: ClassVar[str]

    @abstractmethod
    def load(self) -> list[ClipQuestion]:
        """All questions, in the files' order. Raises DataError on files missing or wrong."""

    @abstractmethod
    def read(self, question: ClipQuestion, answer: str, reading: Reading) -> str | None:
        """What an answer says, in the form of `truth`; None where the reading cannot tell."""

    @abstractmethod
    def metrics(self, items: Sequence[Row]) -> dict[str, Ratio]:
        """The benchmark's numbers, from rows alone."""

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
                prompt=user(self._asked(question), videos=1),
                videos=(Media(path=question.video),),
                media_root=self.videos,
            )
            for question in self._questions()
        ]

    def score(self, answers: Mapping[str, str]) -> Suite:
        """Score answers by question id; a missing one is wrong under both readings."""
        questions = self._questions()
        check_known(answers, {question.id for question in questions}, self.key)
        items = [self._item(question, answers.get(question.id)) for question in questions]
        return Suite(
            key=self.key,
            benchmark=self.label,
            split=self.key.removeprefix(self.label).lstrip("-") or None,
            videos=self.videos,
            method=self.method,
            items=items,
            metrics=self.metrics(items),
            num_unparsed=sum(row["strict"] is None for row in items),
        )

    def _asked(self, question: ClipQuestion) -> str:
        return self.prompt.replace("{question}", question.text)

    def _questions(self) -> list[ClipQuestion]:
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

    def _item(self, question: ClipQuestion, answer: str | None) -> Row:
        official, strict = (
            None if answer is None else self.read(question, answer, reading)
            for reading in ("official", "strict")
        )
        return {
            "id": question.id,
            "video": question.video,
            "cluster": question.cluster,
            "group": question.group or question.id,
            "prompt": self._asked(question),
            "categories": list(question.categories),
            "answer": answer,
            "label": question.truth,
            "official": official,
            "strict": strict,
            "correct_official": official == question.truth,
            "correct_strict": strict == question.truth,
        }


def accuracy(items: Sequence[Row], reading: Reading, *, macro: bool = False) -> Ratio:
    """The share of questions answered right; `macro` is the mean of the categories' shares."""
    right = np.array([row[f"correct_{reading}"] for row in items], float)
    return _weighted(items, right, np.ones(len(items)), macro=macro)


def together(items: Sequence[Row], reading: Reading, *, macro: bool = False) -> Ratio:
    """The share of groups of which every question is right. A group counts at its first row."""
    wrong = {row["group"] for row in items if not row[f"correct_{reading}"]}
    right, counted, seen = np.zeros(len(items)), np.zeros(len(items)), set[str]()
    for place, row in enumerate(items):
        if row["group"] not in seen:
            seen.add(row["group"])
            counted[place], right[place] = 1, row["group"] not in wrong
    return _weighted(items, right, counted, macro=macro)


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


def read_json(path: Path, kind: type[list[Any]] | type[dict[str, Any]]) -> Any:
    """What a JSON file holds, a list or an object.

    Raises DataError when the file is missing, is no JSON, holds something else, or has a key twice.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_keys_once)
    except (OSError, UnicodeDecodeError) as error:
        fix = "check that it is there, and is UTF-8 text"
        raise DataError(f"cannot be read ({error})", where=str(path), fix=fix) from None
    except ValueError as error:
        raise DataError(f"is not JSON ({error})", where=str(path)) from None
    return of_kind(found, kind, str(path))


def of_kind(value: Any, kind: type[list[Any]] | type[dict[str, Any]], where: str) -> Any:
    """The value, checked to be a list or an object of JSON. Raises DataError."""
    if not isinstance(value, kind):
        wanted = "a list" if kind is list else "an object"
        raise DataError("is wrong", where=where, got=type(value).__name__, wanted=wanted)
    return value


def _keys_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(k for k in keys if keys.count(k) > 1)} appears twice")
    return found


def _weighted(
    items: Sequence[Row], right: np.ndarray, counted: np.ndarray, *, macro: bool
) -> Ratio:
    """right / counted; macro weighs each row by 1 / (its category's count), so categories equal.

    Intervals keep the weights, so that a category drawn more often weighs more in that draw.
    """
    if macro:
        first = [row["categories"][0] for row in items]
        sizes = Counter[str]()
        for name, count in zip(first, counted, strict=True):
            sizes[name] += int(count)
        weights = np.array([1 / sizes[name] if sizes[name] else 0.0 for name in first])
        right, counted = right * weights, counted * weights
    return ratio(right, counted)
