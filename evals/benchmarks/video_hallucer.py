"""VideoHallucer (Wang et al., 2024, arXiv 2406.16338): a true question and a hallucinated one.

    basic           share of the questions about what is there that are answered right
    hallucination   share of the questions about what is not there that are answered right
    accuracy        share of pairs of which both are right: the number that papers give

Each is the unweighted mean over subsets, as in the released script; `/<subset>` has a subset's own.

    official  right if the right word stands anywhere in the answer, case aside: "Yes and no" is
              right for either question
    strict    mmalign.answers.yes_no

Two numbers say which way a model leans, from the official reading of "yes" (the word yes stands in
the answer): yes_difference, (answers with yes - questions with yes) / questions, and
false_positive, the share of wrong answers that say yes. The released tool looks at the basic
answer where it means the hallucinated one; here each question's own answer is read.

The subset fact_detect asks whether summaries of a lecture tell facts. Its score in the released
script is `fact_score`, the mean of basic and hallucination, whether or not a pair's other answer is
right. It is none of the published subsets: ask it in a suite by itself. The right answer to every
question of the released fact_detect.json is no, so that a model that always says no has it all.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from evals.base import QuestionPrompt, Row, text_field
from evals.questions import (
    Question,
    QuestionBench,
    Reading,
    accuracy,
    by_category,
    question_rules,
    together,
    unparsed,
)
from evals.rules import Metric
from evals.sources import of_kind, read_json
from evals.stats import Ratio, ratio
from mmalign.answers import yes_no
from mmalign.errors import DataError

Subset = Literal[
    "object_relation",
    "temporal",
    "semantic_detail",
    "interaction",
    "external_factual",
    "external_nonfactual",
    "fact_detect",
]
SIDES = ("basic", "hallucination")


class VideoHallucer(QuestionBench):
    """Pairs of questions, from the released folder: <subset>/<subset>.json and <subset>/videos.

    videos: that folder. subsets: those asked; the default five are those of the published scores.
    `fact_detect` goes by itself, with a `split`. limit: whole pairs, of the first subsets.
    """

    name: Literal["video_hallucer"] = "video_hallucer"
    videos: Path
    subsets: tuple[Subset, ...] = Field(
        default=(
            "object_relation",
            "temporal",
            "semantic_detail",
            "external_factual",
            "external_nonfactual",
        ),
        min_length=1,
    )
    # The rule reads the whole of an answer: a short cut would make another.
    max_new_tokens: int = Field(default=1024, ge=1)
    prompt: QuestionPrompt = "{question}\nAnswer the question using 'yes' or 'no'."

    method: ClassVar[str] = (
        "official: the right word stands in the answer; strict: opens with yes or no, else unread"
    )

    def load(self) -> list[Question]:
        """Both questions of every pair, the basic one first."""
        files = {subset: self.videos / subset / f"{subset}.json" for subset in self.subsets}
        there = [subset for subset, file in files.items() if file.exists()]
        if there and len(there) < len(files):
            missing = next(file for subset, file in files.items() if subset not in there)
            fix = f"name those that you have: subsets: [{', '.join(there)}]"
            raise DataError("is not there", where=str(missing), fix=fix)
        return [
            question for subset, file in files.items() for question in self._subset(subset, file)
        ]

    def read(self, question: Question, answer: str, reading: Reading) -> str | None:
        """Yes or no; the official rule looks for the right word only, then for the other one."""
        if reading == "strict":
            return yes_no(answer)
        words = ("yes", "no") if question.truth == "yes" else ("no", "yes")
        return next((word for word in words if _says(word, answer)), None)

    def metrics(self, items: Sequence[Row]) -> dict[str, Ratio]:
        """The metrics above."""
        return metrics(items)

    def _subset(self, subset: str, file: Path) -> list[Question]:
        questions: list[Question] = []
        for number, pair in enumerate(read_json(file, list), start=1):
            where = f"{file}, pair {number}"
            of_kind(pair, dict, where)
            for side in SIDES:
                row = of_kind(pair.get(side), dict, f"{where}, {side}")
                truth = text_field(row, "answer", f"{where}, {side}").strip().lower()
                if truth not in ("yes", "no"):
                    raise DataError(
                        "answer is wrong", where=f"{where}, {side}", got=truth, wanted="yes or no"
                    )
                text = text_field(row, "question", f"{where}, {side}")
                clip = text_field(row, "video", f"{where}, {side}")
                questions.append(
                    Question(
                        id=f"{subset}/{number}/{side}",
                        video=f"{subset}/videos/{clip}",
                        text=text,
                        truth=truth,
                        categories=(subset, side),
                        # A pair's two clips may differ; those of the basic questions recur.
                        cluster=f"{subset}/{pair['basic']['video']}",
                        group=f"{subset}/{number}",
                    )
                )
        return questions


def metrics(items: Sequence[Row]) -> dict[str, Ratio]:
    """Both readings' metrics, each subset's official accuracy, and the two leanings."""
    found: dict[str, Ratio] = {}
    readings: tuple[Reading, ...] = ("official", "strict")
    for reading in readings:
        found[f"{reading}/accuracy"] = together(items, reading, macro=True)
        for side in SIDES:
            found[f"{reading}/{side}"] = _side(items, reading, side)
    facts = np.array([row["categories"][0] == "fact_detect" for row in items], bool)
    if facts.any():
        for reading in readings:
            right = np.array([row[f"correct_{reading}"] for row in items], bool)
            found[f"{reading}/fact_score"] = ratio(right & facts, facts)
    subsets = [{**row, "categories": row["categories"][:1]} for row in items]
    found |= by_category(subsets, "official/accuracy", together(items, "official"))
    said = [row["answer"] is not None and _says("yes", row["answer"]) for row in items]
    labelled = [row["label"] == "yes" for row in items]
    lean = [int(given) - int(right) for given, right in zip(said, labelled, strict=True)]
    wrong = [not row["correct_official"] for row in items]
    found["yes_difference"] = ratio(lean, [1] * len(items))
    found["false_positive"] = ratio(
        [bad and given for bad, given in zip(wrong, said, strict=True)], wrong
    )
    found["unparsed_rate"] = unparsed(items)
    return found


def _side(items: Sequence[Row], reading: Reading, side: str) -> Ratio:
    """Accuracy on one question of each pair, a mean over subsets."""
    inside = [row["categories"][1] == side for row in items]
    # Both questions of a pair are there, so weights by subset are right but for a factor.
    whole = accuracy(items, reading, macro=True)
    return ratio(whole.numerator * inside, whole.denominator * inside)


def _says(word: str, answer: str) -> bool:
    return re.search(rf"\b{word}\b", answer, re.IGNORECASE) is not None


RULES = question_rules(
    metrics,
    {
        "official/accuracy": "mcnemar",
        "official/basic": "mcnemar",
        "official/hallucination": "mcnemar",
        "official/fact_score": "mcnemar",
        "strict/accuracy": "mcnemar",
        "yes_difference": "bootstrap",
    },
    shown=(
        Metric("official/accuracy", "both right", "higher"),
        Metric("official/basic", "basic", "higher"),
        Metric("official/hallucination", "hallucinated", "higher"),
        Metric("official/fact_score", "facts", "higher"),
        Metric("strict/accuracy", "both right, strict", "higher"),
        Metric("yes_difference", "yes difference"),
        Metric("unparsed_rate", "unparsed", "lower"),
    ),
)
