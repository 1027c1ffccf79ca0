"""VidHalluc's STH (Li et al., 2025, arXiv 2412.03735): does the scene change, and how?

    score         0.6 ((mcc + 1) / 2)^2 + 0.4 descriptions
    mcc           Matthews' correlation of the answers with the truth; 0 where all say the same
    descriptions  over clips whose scene changes and whose answer says so, the mean of both places'
                  f(c), with the cosine c of the place in the answer and in the truth:
                  f(c) = 0 if c <= 0.5 else (s(c) - s(0.5)) / (s(1) - s(0.5)), s the sigmoid
    accuracy      questions with the right yes or no; `/change` and `/same` are of either kind

    official  yes, if the text between the first ": " and the next comma is Yes, case aside; else
              no. The places are the "from ... to ...." that the text after ", Locations: " begins
              with, full stop included; without them both count 0. So they do where the truth's own
              places are of another form
    strict    one "Scene change: Yes" or "No", or mmalign.answers.yes_no. The places stand after
              "Locations:", with or without brackets and a full stop; a truth that has none is left
              out of the descriptions

A change that is not seen is no part of the descriptions, as in the released script: read them
beside mcc. An answer that is missing, which the script leaves out, or that the strict reading
declines counts as the wrong one of yes and no.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from evals.base import Row, text_field
from evals.questions import (
    READINGS,
    Question,
    QuestionBench,
    Reading,
    accuracy,
    by_category,
    question_rules,
    unparsed,
)
from evals.rules import Metric
from evals.sources import of_kind, read_json
from evals.stats import Array, Ratio, combined, matthews, mean, ratio
from mmalign.answers import yes_no
from mmalign.errors import DataError
from mmalign.similarity import FirstTokenMeasure, OverlapMeasure, SentenceMeasure

Places = tuple[str, str]
LOW = 0.5
_ASKED = (
    "Watch the given video and determine if a scene change occurs. If no change occurs, respond: "
    "'Scene change: No, Locations: None'. If there is a scene change, respond in the format: "
    "'Scene change: Yes, Locations: from [location1] to [location2].'"
)
_OFFICIAL_PLACES = re.compile(r"from (.+?) to (.+?)\.", re.IGNORECASE)
_PLACES = re.compile(r"\bfrom\s+(.+?)\s+to\s+([^.\n]+)", re.IGNORECASE)
_CHANGE = re.compile(r"\bscene change\W+(yes|no)\b", re.IGNORECASE)
_MARKS = " []'\"*\t"
_AFTER = re.compile(r"\blocations?\W*:(.*)", re.IGNORECASE | re.DOTALL)

SceneSimilarity = Annotated[
    FirstTokenMeasure | SentenceMeasure | OverlapMeasure, Field(discriminator="name")
]


class VidHallucScenes(QuestionBench):
    """sth.json: {clip: {Scene change: Yes or No, Locations: from a place to a place.}}.

    data: the file. similarity: of places; the default is the released script's, and no other gives
    its numbers. It is loaded when answers are scored, and not before.
    """

    name: Literal["vidhalluc_scenes"] = "vidhalluc_scenes"
    videos: Path
    data: Path
    similarity: SceneSimilarity = FirstTokenMeasure()
    max_new_tokens: int = Field(default=512, ge=1)

    method: ClassVar[str] = (
        "official: Yes after the first ': ', and 'from ... to ....' after ', Locations: '; "
        "strict: one 'Scene change: Yes' or 'No', and the places after 'Locations:'"
    )

    def load(self) -> list[Question]:
        """One question for each clip; `notes` holds the places of a change."""
        questions: list[Question] = []
        for clip, row in read_json(self.data, dict).items():
            where = f"{self.data}, {clip}"
            truth = text_field(of_kind(row, dict, where), "Scene change", where).strip().lower()
            if truth not in ("yes", "no"):
                raise DataError("Scene change is wrong", where=where, got=truth, wanted="Yes, No")
            changes = truth == "yes"
            places = text_field(row, "Locations", where).strip() if changes else ""
            questions.append(
                Question(
                    id=clip,
                    video=f"{clip}.mp4",
                    text=_ASKED,
                    truth=truth,
                    categories=("change" if changes else "same",),
                    notes={"places": places},
                )
            )
        return questions

    def read(self, question: Question, answer: str, reading: Reading) -> str | None:
        """Yes or no."""
        if reading == "strict":
            found = {word.lower() for word in _CHANGE.findall(answer)}
            return yes_no(answer) if not found else found.pop() if len(found) == 1 else None
        before = answer.strip().partition(", Locations: ")[0]
        said = before.split(": ", 1)[-1].split(",")[0].strip().lower()
        return "yes" if said == "yes" else "no"

    def items_of(self, questions: Sequence[Question], answers: Mapping[str, str]) -> list[Row]:
        """Rows with the `places` that either reading finds, and their `cosines` with the truth's.

        None where an answer tells no change, or where its places or the truth's cannot be read.
        `has_places` is whether the truth's can be, strictly.
        """
        items = super().items_of(questions, answers)
        asked: list[tuple[Row, str, Places, Places]] = []
        for question, row in zip(questions, items, strict=True):
            truth = question.notes["places"]
            row["measure"] = self.similarity.model_dump(mode="json")
            row["label_places"], row["has_places"] = truth, _places(truth, "strict") is not None
            for reading in READINGS:
                told = row["label"] == row[reading] == "yes"
                ours = _answered(row["answer"], reading) if told else None
                theirs = _places(truth, reading)
                row[f"places_{reading}"], row[f"cosines_{reading}"] = ours, None
                if ours is not None and theirs is not None:
                    asked.append((row, f"cosines_{reading}", ours, theirs))
        if asked:
            cosines = self.similarity.load()(
                [place for _, _, ours, _ in asked for place in ours],
                [place for _, _, _, theirs in asked for place in theirs],
            )
            for number, (row, field, _, _) in enumerate(asked):
                row[field] = cosines[2 * number : 2 * number + 2]
        return items

    def metrics(self, items: Sequence[Row]) -> dict[str, Ratio]:
        """The metrics above."""
        return metrics(items)


def metrics(items: Sequence[Row]) -> dict[str, Ratio]:
    """Both readings' score and what it is made of, the official accuracy by kind of clip."""
    found: dict[str, Ratio] = {}
    for reading in READINGS:
        right = accuracy(items, reading)
        mcc, descriptions = _mcc(items, reading), _descriptions(items, reading)
        found[f"{reading}/score"] = combined(_score, [mcc, descriptions])
        found[f"{reading}/mcc"] = mcc
        found[f"{reading}/descriptions"] = descriptions
        found[f"{reading}/accuracy"] = right
        if reading == "official":
            found |= by_category(items, "official/accuracy", right)
    found["unparsed_rate"] = unparsed(items)
    return found


def scaled(cosine: float) -> float:
    """f(c) above: how far a cosine is on the way from 0.5 to 1, along the sigmoid."""
    low = _sigmoid(LOW)
    return max(0.0, (_sigmoid(cosine) - low) / (_sigmoid(1.0) - low))


def _score(mcc: Array, descriptions: Array) -> Array:
    return 0.6 * ((mcc + 1) / 2) ** 2 + 0.4 * descriptions


def _mcc(items: Sequence[Row], reading: Reading) -> Ratio:
    """An answer that is not right has said the other one of yes and no."""
    changes = np.array([row["label"] == "yes" for row in items], bool)
    right = np.array([row[f"correct_{reading}"] for row in items], bool)
    return matthews(
        tp=mean(changes & right),
        fp=mean(~changes & ~right),
        fn=mean(changes & ~right),
        tn=mean(~changes & right),
    )


def _descriptions(items: Sequence[Row], reading: Reading) -> Ratio:
    told = [
        row["label"] == row[reading] == "yes" and (reading == "official" or row["has_places"])
        for row in items
    ]
    points = [sum(map(scaled, row[f"cosines_{reading}"] or ())) for row in items]
    return ratio(points, [2 * counted for counted in told])


def _answered(answer: str, reading: Reading) -> Places | None:
    """The places that an answer tells."""
    if reading == "official":
        return _places(answer.strip().partition(", Locations: ")[2].strip(), reading)
    found = _AFTER.search(answer)
    return _places(found[1], reading) if found else None


def _places(text: str, reading: Reading) -> Places | None:
    """From where to where; officially with a full stop, and nothing before it."""
    official = reading == "official"
    found = _OFFICIAL_PLACES.match(text) if official else _PLACES.search(text)
    if not found:
        return None
    start, end = (part.strip() if official else part.strip(_MARKS) for part in found.groups())
    return (start, end) if start and end else None


def _sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


_RULES = question_rules(
    metrics,
    {
        "official/score": "bootstrap",
        "official/mcc": "bootstrap",
        "official/descriptions": "bootstrap",
        "official/accuracy": "mcnemar",
        "strict/score": "bootstrap",
    },
    shown=(
        Metric("official/score", "score", "higher"),
        Metric("official/mcc", "MCC", "higher", percent=False, decimals=3),
        Metric("official/descriptions", "descriptions", "higher"),
        Metric("official/accuracy", "accuracy", "higher"),
        Metric("strict/score", "score, strict", "higher"),
        Metric("strict/mcc", "MCC, strict", "higher", percent=False, decimals=3),
        Metric("unparsed_rate", "unparsed", "lower"),
    ),
    meaning="The score weighs whether a model sees that the scene changes (MCC, from -1 to 1, 0 "
    "for chance) and how near the two places that it names are to the right ones.",
)
RULES = replace(
    _RULES,
    read=(*_RULES.read, "cosines_official", "cosines_strict", "has_places"),
    # Cosines of two encoders do not compare.
    same=(*_RULES.same, "measure", "label_places"),
)
