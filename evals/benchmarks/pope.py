"""POPE (Li et al., 2023, arXiv 2305.10355): is this object in the image, yes or no?

Two readings of every answer are reported, since their gap is a known source of unequal scores:
`official/` is the released script's rule, `strict/` is mmalign.answers.yes_no, which may decline.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from evals.base import (
    OverMedia,
    QuestionPrompt,
    Row,
    Split,
    Suite,
    check_known,
    read_jsonl,
    text_field,
)
from evals.rules import Metric, Rules
from evals.sources import media_of, read_rows
from evals.stats import Ratio, mean, ratio
from mmalign.answers import YesNo, yes_no
from mmalign.errors import DataError
from mmalign.generate.base import Request
from mmalign.media import media_key
from mmalign.records import Media

METHOD = "official: the released script's rule; strict: opens with yes or no, else unparsed"


class Pope(OverMedia):
    """One split of POPE, from a question file in its released format.

    questions: JSON lines, or a list, of question_id, image, text, label; of video in place of image
    where the questions are about clips. images or videos: the folder of either. Or the hub's
    lmms-lab/POPE, or the folder of its parquet files, which hold the pictures: of these the rows
    whose category is `split`.
    prompt: what is asked, with the place of the question. limit: only the first so many questions.
    """

    name: Literal["pope"] = "pope"
    split: Split
    questions: Path
    prompt: QuestionPrompt = "{question}\nAnswer with a single word or phrase."
    limit: int | None = Field(default=None, ge=1)
    max_new_tokens: int = Field(default=16, ge=1)

    @property
    def key(self) -> str:
        """`pope-<split>`."""
        return f"pope-{self.split}"

    def requests(self) -> list[Request]:
        """One request per question, in the file's order."""
        return [self.request(row["id"], row["prompt"], row["media"]) for row in self._questions()]

    @property
    def holds_pictures(self) -> bool:
        """Whether the questions are the hub's rows."""
        return self.questions.suffix not in (".json", ".jsonl")

    def score(self, answers: Mapping[str, str]) -> Suite:
        """Score answers by question id; a missing one is wrong under both readings."""
        questions = self._questions()
        check_known(answers, {row["id"] for row in questions}, self.key)
        items = [_read(row, answers.get(row["id"]), self.medium) for row in questions]
        return Suite(
            key=self.key,
            benchmark=self.name,
            split=self.split,
            images=self.images,
            videos=self.videos,
            method=METHOD,
            items=items,
            metrics=metrics(items),
            num_unparsed=sum(row["strict"] is None for row in items),
        )

    def _questions(self) -> list[Row]:
        if self.holds_pictures:
            rows = _of_hub(str(self.questions), self.split)
        else:
            rows = read_questions(self.questions, self.medium)
        return [
            {
                "media": Media(path=row[self.medium]),
                **row,
                "prompt": self.prompt.replace("{question}", row["text"]),
            }
            for row in rows[: self.limit]
        ]


def official(answer: str) -> YesNo:
    """The released script's reading: no if the first sentence holds the word No, no or not.

    A sentence ends at its first full stop, commas vanish, and words are what stands between
    blanks, so that "NO", "nope", "no!" and "yes\\nno" are all read as yes.
    """
    words = answer.partition(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"}.intersection(words) else "yes"


def metrics(items: Sequence[Row]) -> dict[str, Ratio]:
    """Accuracy, precision, recall and F1 of both readings (yes is positive), and two rates.

    An answer that was not read, or is missing, counts as the wrong one. `yes_ratio` is of the
    official reading. The released script divides by zero when nothing is predicted or labelled
    yes; here such a metric is 0.0.
    """
    labels = [row["label"] for row in items]
    result: dict[str, Ratio] = {}
    for reading in ("official", "strict"):
        predicted = [row[reading] for row in items]
        result |= {f"{reading}/{k}": v for k, v in _classification(predicted, labels).items()}
    result["yes_ratio"] = mean([row["official"] == "yes" for row in items])
    result["unparsed_rate"] = mean([row["strict"] is None for row in items])
    return result


def score_answers_file(questions: str | Path, answers: str | Path) -> dict[str, float]:
    """The released script on its own files: JSON lines with an `answer`, matched by order.

    Returns tp, fp, tn, fn, accuracy, precision, recall, f1 and yes_ratio. Beyond the script, raises
    DataError when the numbers of lines differ, or when an answer carries another question_id than
    the question in its place.
    """
    asked, given = read_questions(Path(questions)), list(read_jsonl(Path(answers)))
    if len(asked) != len(given):
        raise DataError(
            "does not answer each question once",
            where=str(answers),
            got=f"{len(given)} answers",
            wanted=f"{len(asked)}, one per line of {questions}",
        )
    for question, (where, row) in zip(asked, given, strict=True):
        if str(row.get("question_id", question["id"])) != question["id"]:
            raise DataError(
                "answers are matched by order, and this one is out of order",
                where=where,
                got=f"question_id {row['question_id']}",
                wanted=question["id"],
                fix="sort the answers as the questions are",
            )
    predicted = [official(text_field(row, "answer", where)) for where, row in given]
    labels = [row["label"] for row in asked]
    pairs = list(zip(predicted, labels, strict=True))
    return {
        "tp": pairs.count(("yes", "yes")),
        "fp": pairs.count(("yes", "no")),
        "tn": pairs.count(("no", "no")),
        "fn": pairs.count(("no", "yes")),
        **{name: metric.value for name, metric in _classification(predicted, labels).items()},
        "yes_ratio": predicted.count("yes") / len(predicted),
    }


def read_questions(path: Path, medium: str = "image") -> list[Row]:
    """The rows of a question file: id, image (or another medium), text, label.

    Raises DataError, naming the line, on a broken row, a label other than yes and no, or an id
    that appears twice; and when there are no questions at all.
    """
    return _checked(_rows(path), medium, str(path))


def _checked(found: Iterable[tuple[str, Row]], medium: str, source: str) -> list[Row]:
    rows: dict[str, Row] = {}
    for where, row in found:
        if "question_id" not in row:
            raise DataError("field question_id is missing", where=where)
        number = str(row["question_id"])
        if number in rows:
            raise DataError("question_id appears twice", where=where, got=number)
        if row.get("label") not in ("yes", "no"):
            raise DataError("label is wrong", where=where, got=row.get("label"), wanted="yes or no")
        rows[number] = {
            "id": number,
            medium: text_field(row, medium, where),
            "text": text_field(row, "text", where),
            "label": row["label"],
        }
    if not rows:
        raise DataError("holds no questions", where=source)
    return list(rows.values())


def _of_hub(data: str, split: str) -> list[Row]:
    """The rows of one category of lmms-lab/POPE, each with its picture."""
    found, pictures, others = list[tuple[str, Row]](), list[Media](), set[str]()
    for where, row in read_rows(data):
        if row.get("category") != split:
            others.add(str(row.get("category")))
            continue
        pictures.append(media_of(row.get("image"), where))
        told = {"image": str(row.get("image_source") or media_key(pictures[-1]))}
        told |= {"text": row.get("question"), "label": row.get("answer")}
        found.append((where, {**row, **told}))
    if others and not found:
        raise DataError(
            "holds no question of the split",
            where=data,
            got=", ".join(sorted(others)),
            wanted=split,
        )
    rows = _checked(found, "image", data)
    return [{**row, "media": media} for row, media in zip(rows, pictures, strict=True)]


def _rows(path: Path) -> Iterator[tuple[str, Row]]:
    """A row a line, as the files on COCO are; those on A-OKVQA and GQA are one list."""
    try:
        with open(path, encoding="utf-8") as file:
            is_list = file.read(1) == "["
    except (OSError, UnicodeDecodeError):
        is_list = False  # Told by what reads it.
    return read_rows(path) if is_list else read_jsonl(path)


def _read(question: Row, answer: str | None, medium: str) -> Row:
    label = question["label"]
    by_script = None if answer is None else official(answer)
    by_us = None if answer is None else yes_no(answer)
    return {
        "id": question["id"],
        medium: question[medium],
        "prompt": question["prompt"],
        "answer": answer,
        "label": label,
        "official": by_script,
        "strict": by_us,
        "correct_official": by_script == label,
        "correct_strict": by_us == label,
    }


def _classification(predicted: Sequence[str | None], labels: Sequence[str]) -> dict[str, Ratio]:
    """Accuracy, precision, recall and F1 as ratios of sums; None predicts the wrong answer."""
    label = np.array([text == "yes" for text in labels])
    right = np.array(predicted) == np.array(labels)
    yes = np.where(right, label, ~label)
    tp = yes & label
    return {
        "accuracy": mean(right),
        "precision": ratio(tp, yes),
        "recall": ratio(tp, label),
        # F1 = 2PR / (P + R) = 2 TP / (predicted yes + labelled yes).
        "f1": ratio(2 * tp, yes.astype(int) + label),
    }


RULES = Rules(
    metrics=metrics,
    read=("answer", "official", "strict", "correct_official"),
    same=("label",),
    compared={
        "official/accuracy": "mcnemar",
        "official/f1": "bootstrap",
        "yes_ratio": "bootstrap",
    },
    shown=(
        Metric("official/accuracy", "accuracy", "higher"),
        Metric("official/f1", "F1", "higher"),
        Metric("yes_ratio", "yes ratio"),
        Metric("unparsed_rate", "unparsed", "lower"),
    ),
    items="questions",
    meaning="POPE asks whether an object is in the picture. Accuracy and F1 are of the answers, "
    "yes being positive; yes ratio is the share of answers that are yes.",
)
