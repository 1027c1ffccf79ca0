"""Questions whose answers a program can check: is the answer right, and is it in form?

Form and answer are read by the functions that reward rollouts (mmalign.rewards), so that what GRPO
was paid for and what is measured here are one thing. Answers are greedy, or sampled as in training
(`decoding`), which is how a policy's format rate is told.

    accuracy         the row's verifier finds the answer correct; the form does not matter
    format           ended by itself, one think block, then one answer block, nothing else
    no_answer        no answer block and no closed box, so nothing to compare
    undecided        there is an answer, and the verifier cannot tell
    finished         ended by itself; others were cut at max_new_tokens
    response_tokens  mean length, without the token that ends the turn
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from evals.base import Row, Split, Suite, check_known
from evals.rules import Metric, Rules
from evals.stats import Ratio, mean, ratio
from mmalign.config import Strict
from mmalign.errors import DataError
from mmalign.generate.base import Generation, Request, Sampling, request_for
from mmalign.media import media_key
from mmalign.records import Verifiable, prompt_text
from mmalign.rewards import AccuracyReward, FormatReward, Rewards, Rollout
from mmalign.store import Dataset, open_dataset
from mmalign.think import final_answer, parts_of
from mmalign.verify import Verifiers, check_extras, truth_problem

BENCHMARK = "verifiable"
METHOD = (
    "accuracy: the row's verifier on the answer block, or else the last box; format: ended by "
    "itself, one think block, then one answer block"
)
# Metrics of each category are "accuracy/<category>". With more categories than these, none is told.
BY_CATEGORY = "accuracy/"
MOST_CATEGORIES = 20


class EvalDecoding(Strict):
    """How responses are drawn: greedy by default. `seed` and a row's id alone decide a sample."""

    temperature: NonNegativeFloat = 0.0
    top_p: float = Field(default=1.0, gt=0, le=1)
    seed: int = 0


class VerifiableBench(Strict):
    """A dataset of verifiable records, whose prompts are asked as they stand.

    split: a name of your own, where two suites would share a key.
    limit: only the first so many rows, by id.
    math_timeout_seconds: what comparing one answer of the verifier `math` may take.
    """

    name: Literal["verifiable"] = "verifiable"
    split: Split | None = None
    data: Path
    decoding: EvalDecoding = EvalDecoding()
    max_new_tokens: PositiveInt = 1024
    math_timeout_seconds: PositiveFloat = 5.0
    limit: PositiveInt | None = None

    @property
    def key(self) -> str:
        """`verifiable-<split>`."""
        return "-".join(filter(None, (self.name, self.split)))

    def sampling(self) -> Sampling:
        """How responses are drawn and where they are cut."""
        return Sampling(
            max_new_tokens=self.max_new_tokens,
            temperature=self.decoding.temperature,
            top_p=self.decoding.top_p,
            seed=self.decoding.seed,
        )

    def requests(self) -> list[Request]:
        """One request per row.

        Raises DataError where a row's own answer cannot be read by its verifier, MissingExtra where
        a verifier is not installed: both before a model is loaded.
        """
        dataset, rows = self._rows()
        check_extras(rows)
        bad = [(row.id, problem) for row in rows if (problem := truth_problem(row))]
        if bad:
            raise DataError(
                f"{len(bad)} of {len(rows)} rows cannot be checked, such as {bad[0][0]}: "
                f"{bad[0][1]}",
                where=str(self.data),
                fix="mend or drop those that `mmalign data validate` names",
            )
        return [request_for(row, id=row.id, media_root=dataset.media_root) for row in rows]

    def score(self, answers: Mapping[str, Generation]) -> Suite:
        """Score responses by row id; a missing one is wrong, and in no form."""
        dataset, rows = self._rows()
        check_known(answers, {row.id for row in rows}, self.key)
        functions = (FormatReward(), AccuracyReward())
        verifiers = Verifiers(math_timeout_seconds=self.math_timeout_seconds)
        with Rewards(functions, verifiers) as rewards:
            items = [_item(row, answers.get(row.id), rewards) for row in rows]
        return Suite(
            key=self.key,
            benchmark=self.name,
            split=self.split,
            images=dataset.media_root,
            method=METHOD,
            items=items,
            metrics=metrics(items),
            num_unparsed=sum(row["no_answer"] for row in items),
        )

    def _rows(self) -> tuple[Dataset[Verifiable], list[Verifiable]]:
        dataset = open_dataset(self.data, Verifiable)
        rows = sorted(dataset, key=lambda row: row.id)[: self.limit]
        if not rows:
            raise DataError("holds no question", where=str(self.data))
        return dataset, rows


def metrics(items: Sequence[Row]) -> dict[str, Ratio]:
    """The metrics above, and accuracy for each category where there are several."""
    found = {
        "accuracy": mean([row["correct"] for row in items]),
        "format": mean([row["well_formed"] for row in items]),
        "no_answer": mean([row["no_answer"] for row in items]),
        "undecided": mean([row["undecided"] for row in items]),
        "finished": mean([row["finished"] for row in items]),
        "response_tokens": mean([row["num_tokens"] for row in items]),
    }
    categories = sorted({row["category"] for row in items})
    if 1 < len(categories) <= MOST_CATEGORIES:
        for category in categories:
            inside = [row["category"] == category for row in items]
            right = [row["correct"] and row["category"] == category for row in items]
            found[BY_CATEGORY + category] = ratio(right, inside)
    return found


def _item(row: Verifiable, made: Generation | None, rewards: Rewards) -> Row:
    """One row. `image` names what it shows, whose questions are drawn together in intervals."""
    media = [*row.images, *row.videos]
    item: Row = {
        "id": row.id,
        "image": media_key(media[0]) if media else row.id,
        "prompt": prompt_text(row.prompt),
        "category": _category(row),
        "truth": row.answer,
        "answer": None,
        "given": None,
        "form": "missing",
        "reason": "missing",
        "correct": False,
        "well_formed": False,
        "no_answer": True,
        "undecided": False,
        "finished": False,
        "num_tokens": 0,
    }
    if made is None:
        return item
    rollout = Rollout(
        id="0",
        row=row,
        text=made.text,
        num_tokens=made.num_tokens,
        finished=made.finished,
    )
    (scored,) = rewards.score([rollout])
    given = final_answer(made.text)
    correct = scored.parts["accuracy"] == 1
    told = "correct" if correct else "no_answer" if given is None else "different"
    return item | {
        "answer": made.text,
        "given": given,
        "form": parts_of(made.text).problem or ("" if made.finished else "cut"),
        "reason": scored.reasons.get("accuracy", told),
        "correct": correct,
        "well_formed": scored.parts["format"] == 1,
        "no_answer": given is None,
        "undecided": scored.undecided,
        "finished": made.finished,
        "num_tokens": made.num_tokens,
    }


def _category(row: Verifiable) -> str:
    """What the row's origin names as its category, else the verifier."""
    try:
        category = json.loads(row.origin.detail or "{}").get("category")
    except (ValueError, AttributeError):
        category = None
    return category if isinstance(category, str) and category else row.verifier


RULES = Rules(
    metrics=metrics,
    read=(
        "answer",
        "category",
        "correct",
        "well_formed",
        "no_answer",
        "undecided",
        "finished",
        "num_tokens",
    ),
    same=("prompt", "truth"),
    compared={
        "accuracy": "mcnemar",
        "format": "mcnemar",
        "no_answer": "bootstrap",
        "undecided": "bootstrap",
        "finished": "bootstrap",
        "response_tokens": "bootstrap",
    },
    shown=(
        Metric("accuracy", "accuracy", "higher"),
        Metric("format", "format", "higher"),
        Metric("no_answer", "no answer", "lower"),
        Metric("undecided", "undecided", "lower"),
        Metric("finished", "finished", "higher"),
        Metric("response_tokens", "tokens", percent=False),
    ),
    length=False,
    items="questions",
    meaning="Answers were checked by the functions that reward rollouts. Accuracy is the "
    "share of right answers, in whatever form; format the share of responses that ended by "
    "themselves with one think block and one answer block; no answer the share in which none was "
    "found, undecided that in which the verifier cannot tell, finished that which was not cut; "
    "tokens is the mean length.",
)
