"""AMBER (Wang et al., 2023, arXiv 2311.07397): what descriptions make up, and yes or no questions.

One suite holds both tasks, since AMBER's score needs both. Read CHAIR with cover and length: a
short description hallucinates less and says less.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from evals.base import QuestionPrompt, Row, Split, Suite, check_known
from evals.benchmarks.amber_files import (
    DIMENSIONS,
    GENERATIVE,
    KINDS,
    read_annotations,
    read_answered,
)
from evals.benchmarks.amber_words import AmberWords, NounRule
from evals.rules import Metric, Rules
from evals.sources import read_json
from evals.stats import Ratio, ratio, weighted_sum
from mmalign.answers import yes_no
from mmalign.config import Strict
from mmalign.errors import DataError
from mmalign.generate.base import Request
from mmalign.records import Media, user

# Every counter of the released script starts at this, against division by zero.
_START = 0.001


class Amber(Strict):
    """AMBER's queries, from its released files.

    images: the folder of the pictures. queries: query files, such as query_all.json or several.
    annotations, relations, safe_words: annotations.json, relation.json, safe_words.txt.
    nouns: how the nouns of a description are found: `vocabulary` (see amber_words.py), or `nltk`
    as released, if it is installed. similarity: a spaCy model, released en_core_web_lg, whose
    similarity above `threshold` makes two words synonyms; None matches words exactly.
    prompt, question_prompt: how descriptions and how yes or no are asked, with the query's place.
    limit: only the queries about the first so many pictures.
    """

    name: Literal["amber"] = "amber"
    split: Split | None = None
    images: Path
    queries: tuple[Path, ...] = Field(min_length=1)
    annotations: Path
    relations: Path
    safe_words: Path
    nouns: NounRule = "vocabulary"
    similarity: str | None = None
    threshold: float = Field(default=0.8, ge=0, le=1)
    prompt: QuestionPrompt = "{question}"
    question_prompt: QuestionPrompt = "{question}\nAnswer with a single word or phrase."
    limit: int | None = Field(default=None, ge=1)
    max_new_tokens: int = Field(default=512, ge=1)

    @property
    def key(self) -> str:
        """`amber`, or `amber-<split>`."""
        return "amber" if self.split is None else f"amber-{self.split}"

    @property
    def method(self) -> str:
        """How answers are read, in words."""
        tagger = "nltk's tags" if self.nouns == "nltk" else "the vocabulary's words, no tagger"
        synonyms = (
            "exact words"
            if self.similarity is None
            else f"similarity above {self.threshold:g} in {self.similarity}"
        )
        return (
            f"descriptions: released rules; nouns by {tagger}; {synonyms}. "
            "questions: official: the bare word Yes or No; strict: opens with yes or no, else "
            "unparsed"
        )

    def requests(self) -> list[Request]:
        """One request per query, in the files' order; its number is the id."""
        # What is not installed is better told before a model answers than after.
        self._words()
        return [
            Request(
                id=row["id"],
                prompt=user(row["prompt"], images=1),
                images=(Media(path=row["image"]),),
                media_root=self.images,
            )
            for row in self._queries()
        ]

    def score(self, answers: Mapping[str, str]) -> Suite:
        """Score answers by query; see `metrics` for what is missing."""
        queries = self._queries()
        check_known(answers, {row["id"] for row in queries}, self.key)
        words = self._words()
        items = [_read(row, answers.get(row["id"]), words) for row in queries]
        return Suite(
            key=self.key,
            benchmark=self.name,
            split=self.split,
            images=self.images,
            method=self.method,
            items=items,
            metrics=metrics(items),
            num_unparsed=sum(
                row["answer"] is None if row["type"] == GENERATIVE else row["strict"] is None
                for row in items
            ),
        )

    def _words(self) -> AmberWords:
        return AmberWords.read(
            self.relations,
            self.safe_words,
            nouns=self.nouns,
            similarity=self.similarity,
            threshold=self.threshold,
        )

    def _queries(self) -> list[Row]:
        """The queries with what is annotated: id, image, prompt, type, label, truth, hallu."""
        annotated = read_annotations(self.annotations, read_json(self.relations, dict))
        rows = [
            {
                "id": str(id),
                "image": row["image"],
                "prompt": self._prompt(annotated[id]["type"]).replace("{question}", row["query"]),
                **annotated[id],
            }
            for path in self.queries
            for id, row in read_answered(path, annotated, ("image", "query"))
        ]
        twice = [id for id, n in Counter(row["id"] for row in rows).items() if n > 1]
        if twice:
            raise DataError("two query files ask it", where=self.key, got=f"id {twice[0]}")
        if not rows:
            raise DataError("holds no queries", where=", ".join(map(str, self.queries)))
        kept = set(list(dict.fromkeys(row["image"] for row in rows))[: self.limit])
        return [row for row in rows if row["image"] in kept]

    def _prompt(self, kind: str) -> str:
        return self.prompt if kind == GENERATIVE else self.question_prompt


def official(answer: str) -> str | None:
    """The released script's reading: the bare words Yes and No, and nothing else, are answers."""
    return {"Yes": "yes", "No": "no"}.get(answer)


def metrics(items: Sequence[Row]) -> dict[str, Ratio]:
    """AMBER's numbers, of whichever task was asked, as ratios of sums over responses.

    Descriptions that there are: chair = hallucinated nouns / nouns of the vocabulary; cover = true
    objects named / true objects; hal = descriptions with a hallucinated noun / descriptions;
    cog = likely hallucinations named / likely hallucinations.
    Questions, for both readings: accuracy, and precision, recall and f1 of answering no, which is
    the positive class; the official ones also by dimension. What is not read answers neither.
    A question without an answer is wrong, where the script counts the rows of its file alone.
    amber_score = (1 - chair + f1) / 2, and so 0.5 for empty answers. The script adds 0.001 to
    denominators and 0.0001 to F1's, and rounds precision and recall first; not so here.
    """
    written = [row["type"] == GENERATIVE for row in items]
    found: dict[str, Ratio] = {}
    if any(written):
        found |= _descriptions(items)
    if not all(written):
        for reading in ("official", "strict"):
            found |= {f"{reading}/{k}": v for k, v in _questions(items, reading).items()}
        for dimension in DIMENSIONS:
            inside = np.array([dimension in KINDS[row["type"]] for row in items])
            if inside.any():
                own = _questions(items, "official", inside)
                found |= {f"official/{k}/{dimension}": v for k, v in own.items()}
        asked = ~np.array(written)
        said_yes = [row["official"] == "yes" for row in items]
        unread = [row["strict"] is None for row in items]
        found["yes_ratio"] = ratio(said_yes & asked, asked)
        found["unparsed_rate"] = ratio(unread & asked, asked)
    if any(written) and not all(written):
        for reading in ("official", "strict"):
            parts = [(-0.5, found["chair"]), (0.5, found[f"{reading}/f1"])]
            found[f"{reading}/amber_score"] = weighted_sum(parts, 0.5)
    return found


def score_answers_file(
    answers: str | Path,
    annotations: str | Path,
    relations: str | Path,
    safe_words: str | Path,
    *,
    nouns: NounRule = "vocabulary",
    similarity: str | None = None,
    threshold: float = 0.8,
) -> dict[str, float]:
    """The released script on an answer file: a list of {id, response}. Returns what it prints.

    chair, cover, hal, cog of descriptions; accuracy, precision, recall, f1 of questions, and each
    with a dimension, such as existence/f1; in percent with the script's rounding, in which 0.001 is
    added to every denominator (0.003 for attribute, the sum of three counters), and to F1's 0.0001,
    or 0.001 for existence. Of tasks that are not in the file nothing is returned, where the script
    prints 0. Raises DataError, beyond the script, on an id that is unknown or appears twice.
    """
    words = AmberWords.read(
        Path(relations), Path(safe_words), nouns=nouns, similarity=similarity, threshold=threshold
    )
    annotated = read_annotations(Path(annotations), words.relations)
    items = [
        _read(annotated[id], row["response"], words)
        for id, row in read_answered(Path(answers), annotated, ("response",))
    ]
    if not items:
        raise DataError("holds no answers", where=str(answers))
    made = metrics(items)
    result = {name: _percent(made[name]) for name in ("chair", "cover", "cog") if name in made}
    if "hal" in made:
        clean = ratio(made["hal"].denominator - made["hal"].numerator, made["hal"].denominator)
        result["hal"] = round(100 - 100 * _share(clean), 1)
    for dimension in ("", *DIMENSIONS):
        own = f"/{dimension}" if dimension else ""
        if f"official/accuracy{own}" not in made:
            continue
        names = ("accuracy", "precision", "recall")
        start = _START * (3 if dimension == "attribute" else 1)
        shown = {name: _percent(made[f"official/{name}{own}"], start) for name in names}
        p, r = shown["precision"] / 100, shown["recall"] / 100
        apart = 0.001 if dimension == "existence" else 0.0001
        shown["f1"] = round(2 * p * r / (p + r + apart) * 100, 1)
        result |= {f"{dimension}/{k}" if dimension else k: v for k, v in shown.items()}
    return result


def _read(about: Row, answer: str | None, words: AmberWords) -> Row:
    """One scored row; what belongs to the other task is empty."""
    row: Row = {
        **about,
        "answer": answer,
        "mentioned": [],
        "spans": [],
        "hallucinated": [],
        "covered": [],
        "foreseen": [],
        "num_words": 0,
        "official": None,
        "strict": None,
    }
    if answer is None:
        return row
    if row["type"] != GENERATIVE:
        return row | {"official": official(answer), "strict": yes_no(answer)}
    counted = words.count(answer, row["truth"], row["hallu"])
    return row | {
        "mentioned": counted.mentioned,
        "spans": [list(span) for span in counted.spans],
        "hallucinated": counted.hallucinated,
        "covered": [row["truth"][place] for place in counted.covered],
        "foreseen": [row["hallu"][place] for place in counted.foreseen],
        "num_words": len(answer.split()),
    }


def _descriptions(items: Sequence[Row]) -> dict[str, Ratio]:
    there = np.array([row["type"] == GENERATIVE and row["answer"] is not None for row in items])
    fields = ("mentioned", "hallucinated", "covered", "foreseen", "truth", "hallu")
    count = {name: np.array([len(row[name]) for row in items]) for name in fields}
    return {
        "chair": ratio(count["hallucinated"], count["mentioned"]),
        "cover": ratio(count["covered"], count["truth"] * there),
        "hal": ratio(count["hallucinated"] > 0, there),
        "cog": ratio(count["foreseen"], count["hallu"] * there),
        "num_words": ratio([row["num_words"] for row in items], there),
        "mentions": ratio(count["mentioned"], there),
    }


def _questions(
    items: Sequence[Row], reading: Literal["official", "strict"], inside: np.ndarray | None = None
) -> dict[str, Ratio]:
    """Of the questions among some rows, or of those inside a dimension; no is positive."""
    asked = np.array([row["label"] is not None for row in items])
    asked = asked if inside is None else asked & inside
    no = np.array([row["label"] == "no" for row in items]) & asked
    said_no = np.array([row[reading] == "no" for row in items]) & asked
    right = np.array([row[reading] == row["label"] for row in items]) & asked
    return {
        "accuracy": ratio(right, asked),
        "precision": ratio(no & said_no, said_no),
        "recall": ratio(no & said_no, no),
        # F1 = 2PR / (P + R) = 2 TP / (answered no + labelled no).
        "f1": ratio(2 * (no & said_no), said_no.astype(int) + no),
    }


def _share(metric: Ratio, start: float = _START) -> float:
    return float(metric.numerator.sum() / (metric.denominator.sum() + start))


def _percent(metric: Ratio, start: float = _START) -> float:
    return round(_share(metric, start) * 100, 1)


RULES = Rules(
    metrics=metrics,
    read=(
        *("answer", "type", "label", "mentioned", "spans", "hallucinated", "covered", "foreseen"),
        *("num_words", "official", "strict"),
    ),
    same=("type", "label", "truth", "hallu"),
    compared={
        "official/amber_score": "bootstrap",
        "chair": "bootstrap",
        "cover": "bootstrap",
        "hal": "bootstrap",
        "cog": "bootstrap",
        "num_words": "bootstrap",
        "official/f1": "bootstrap",
        "official/accuracy": "mcnemar",
        "strict/f1": "bootstrap",
    },
    shown=(
        Metric("official/amber_score", "AMBER", "higher"),
        Metric("chair", "CHAIR", "lower"),
        Metric("cover", "cover", "higher"),
        Metric("hal", "hal", "lower"),
        Metric("cog", "cog", "lower"),
        Metric("num_words", "words", percent=False),
        Metric("official/accuracy", "accuracy", "higher"),
        Metric("official/f1", "F1", "higher"),
        Metric("strict/f1", "F1, strict", "higher"),
        Metric("unparsed_rate", "unparsed", "lower"),
    ),
    items="queries",
    meaning="AMBER asks for descriptions and yes or no questions. CHAIR is the share of nouns that "
    "are not in the picture, cover the share of its objects that are named, hal the share of "
    "descriptions with a made-up noun, cog the share of likely hallucinations that are named. F1 "
    "is of answering no. AMBER is the mean of 1 - CHAIR and F1.",
)
