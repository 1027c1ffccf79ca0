"""Open questions that ten people answered in a word or a few: VQAv2, TextVQA, VizWiz.

An answer's accuracy is vqa_words.leave_one_out: 1 where at least four of the ten said the
same, and 0.9, 0.6, 0.3 for three, two and one.

    vqav2    (Goyal et al., 2017, arXiv 1612.00837) vqaEval.py of GT-Vision-Lab/VQA, by copies
    textvqa  (Singh et al., 2019, arXiv 1904.08920) TextVQAAccuracyEvaluator of pythia and mmf
    vizwiz   (Gurari et al., 2018, arXiv 1802.08218) VizWiz's copy of vqaEval.py

Official readings differ in what is rewritten before it is compared:

    vqav2    both answer and references; neither where all ten references are alike, so that "Yes"
             is wrong where all said "yes"
    textvqa  both, always, by EvalAI's processor
    vizwiz   the answer alone

The rule of vqav2 was checked against the copy in mlfoundations/open_flamingo (eval/vqa_metric.py)
and against forks of the repository (mlej8/VQA, st7ma784/VQA). Issue 14 of GT-Vision-Lab/VQA quotes
it as the script's (2022), and the script's author says there what it is for: text that is read off
pictures. The two commits of the repository itself that could be read, 07aecec and c4e6a0e, hold
another one: the answer is always rewritten, and of references that differ only marks are taken
away. LAVIS and others still score by that one.

Where models write "Yes.", papers do not send answers as they are: LLaVA and others pass them
through EvalAI's processor first. `tidied/accuracy` of VQAv2 and VizWiz is the official one of
answers so tidied, and what published numbers of such models are to be compared with.

Strict: a single line of at most 5 words (TextVQA 10) is an answer, anything else is declined:
explanations, sentences, lists of lines. Answer and references are then both rewritten, always.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from evals.base import QuestionPrompt, Row, text_field
from evals.benchmarks.vqa_words import (
    NUM_REFERENCES,
    evalai,
    leave_one_out,
    official,
    one_line,
    short,
    vizwiz,
)
from evals.questions import READ_TWICE, Question, QuestionBench, Reading, question_rules
from evals.questions import metrics as question_metrics
from evals.rules import Metric, Test
from evals.sources import media_of, of_kind, read_json, read_rows
from evals.stats import Ratio, mean
from mmalign.errors import DataError
from mmalign.records import Media

SHORT_ANSWER = "{question}\nAnswer the question using a single word or phrase."
OR_UNANSWERABLE = (
    "{question}\nWhen the provided information is insufficient, respond with 'Unanswerable'."
    "\nAnswer the question using a single word or phrase."
)


class ShortAnswers(QuestionBench):
    """Questions to be answered in a few words, as LLaVA asks for them."""

    images: Path | None = None
    prompt: QuestionPrompt = SHORT_ANSWER

    max_words: ClassVar[int] = 5

    def picture(self, row: Row, file: str, where: str) -> Media:
        """The row's picture where it is in the data, else the file of that name."""
        if isinstance(row.get("image"), dict | bytes):
            return media_of(row["image"], f"{where}, image")
        if self.images is None:
            fix = "give images, the folder of the pictures"
            raise DataError("names a picture's file, and there is no folder", where=where, fix=fix)
        return Media(path=file)


class _TenAnswers(ShortAnswers):
    """Questions that ten people answered.

    hub_split: the split of a hub dataset, or of a folder of parquet files.
    """

    hub_split: str = "validation"

    def read(self, question: Question, answer: str, reading: Reading) -> str | None:
        """The answer as it is compared."""
        if reading == "official":
            return self.said(question, answer)
        return self.plain(answer) if short(answer, self.max_words) else None

    def credit(self, question: Question, said: str) -> float:
        """VQA's accuracy of an answer that was read officially."""
        return leave_one_out(said, self.compared(_references_of(question)))

    @abstractmethod
    def said(self, question: Question, answer: str) -> str:
        """An answer as the released script compares it."""

    @abstractmethod
    def compared(self, references: tuple[str, ...]) -> tuple[str, ...]:
        """References as the released script compares them."""

    def plain(self, text: str) -> str:
        """An answer or a reference as the strict reading compares it."""
        return official(text)

    def _item(self, question: Question, answer: str | None) -> Row:
        row = super()._item(question, answer)
        # Its references are rewritten always, those of the official reading not.
        references = [self.plain(one) for one in _references_of(question)]
        credit = 0.0 if row["strict"] is None else leave_one_out(row["strict"], references)
        return row | {"correct_strict": _told(credit)}


class _Tidied(_TenAnswers):
    """Benchmarks whose answers are mostly tidied before they are submitted."""

    def metrics(self, items: Sequence[Row]) -> dict[str, Ratio]:
        """Those of questions, and the accuracy of tidied answers."""
        return metrics(items)

    def _item(self, question: Question, answer: str | None) -> Row:
        said = None if answer is None else self.said(question, evalai(answer))
        credit = 0.0 if said is None else self.credit(question, said)
        return super()._item(question, answer) | {"correct_tidied": _told(credit)}


class VqaV2(_Tidied):
    """questions, annotations: the released v2_OpenEnded_…_questions.json and v2_…_annotations.json.

    Or questions: parquet files or a hub name whose rows hold the answers and pictures as well.
    images: the folder of COCO_<data_subtype>_<image_id>.jpg.
    """

    name: Literal["vqav2"] = "vqav2"
    questions: str
    annotations: Path | None = None

    method: ClassVar[str] = (
        "official: the released script; strict: a line of at most 5 words, always rewritten; "
        "tidied: the released script after EvalAI's processor"
    )

    def load(self) -> list[Question]:
        """The questions, in the files' order; categories are the types of answer and question."""
        file, annotated = Path(self.questions), self._annotations()
        subtype = None
        if file.suffix == ".json" and file.is_file():
            subtype = read_json(file, dict).get("data_subtype")
            if not isinstance(subtype, str):
                raise DataError("has no data_subtype", where=str(file), wanted="such as val2014")
        found: list[Question] = []
        for where, row in _rows(self.questions, "questions", self.hub_split):
            id = id_field(row, "question_id", where)
            if annotated is not None and id not in annotated:
                raise DataError(
                    "has no annotation", where=where, got=f"question_id {id}",
                    wanted=f"one in {self.annotations}",
                )  # fmt: skip
            answered = row if annotated is None else annotated[id]
            here = where if annotated is None else f"{self.annotations}, question {id}"
            image = id_field(row, "image_id", where)
            found.append(
                Question(
                    id=id,
                    text=text_field(row, "question", where),
                    truth=_references(answered, here),
                    categories=tuple(
                        text_field(answered, name, here)
                        for name in ("answer_type", "question_type")
                    ),
                    images=(self.picture(row, f"COCO_{subtype}_{image:0>12}.jpg", where),),
                    cluster=image,
                )
            )
        return found

    def said(self, question: Question, answer: str) -> str:
        """Rewritten, unless the references are all alike."""
        references = set(map(one_line, _references_of(question)))
        return one_line(answer) if len(references) == 1 else official(answer)

    def compared(self, references: tuple[str, ...]) -> tuple[str, ...]:
        """Rewritten, unless they are all alike."""
        return _if_they_differ(references)

    def _annotations(self) -> dict[str, Row] | None:
        if self.annotations is None:
            return None
        found: dict[str, Row] = {}
        for where, row in _rows(str(self.annotations), "annotations", self.hub_split):
            id = id_field(row, "question_id", where)
            if id in found:
                raise DataError("a question is annotated twice", where=where, got=id)
            found[id] = row
        return found


class TextVqa(_TenAnswers):
    """data: the released TextVQA_…_val.json, or parquet files or a hub name with the pictures.

    images: the folder of <image_id>.jpg. ocr: ask with the words that a reader of text found, the
    rows' `ocr_tokens`, in LLaVA's form; the key then ends in "ocr". The released file has none.
    """

    name: Literal["textvqa"] = "textvqa"
    data: str
    ocr: bool = False

    method: ClassVar[str] = "official: EvalAI's processor; strict: a line of at most 10 words"
    max_words: ClassVar[int] = 10

    @property
    def key(self) -> str:
        """`textvqa-<split>-ocr`, the latter with words that were found."""
        return "-".join(filter(None, (self.name, self.split, "ocr" if self.ocr else None)))

    def load(self) -> list[Question]:
        """The questions, in the file's order."""
        found: list[Question] = []
        for where, row in _rows(self.data, "data", self.hub_split):
            text, image = text_field(row, "question", where), id_field(row, "image_id", where)
            if self.ocr:
                words = of_kind(row.get("ocr_tokens"), list, f"{where}, ocr_tokens")
                text += f"\nReference OCR token: {', '.join(map(str, words))}"
            found.append(
                Question(
                    id=id_field(row, "question_id", where),
                    text=text,
                    truth=_references(row, where),
                    images=(self.picture(row, f"{image}.jpg", where),),
                    cluster=image,
                )
            )
        return found

    def said(self, question: Question, answer: str) -> str:
        """Rewritten by EvalAI's processor."""
        return evalai(answer)

    def compared(self, references: tuple[str, ...]) -> tuple[str, ...]:
        """Rewritten by EvalAI's processor."""
        return _by_evalai(references)

    def plain(self, text: str) -> str:
        """The official form."""
        return evalai(text)


class VizWiz(_Tidied):
    """data: the released val.json, or parquet files or a hub name with the pictures.

    images: the folder of the pictures. The model is asked to say "Unanswerable", as LLaVA asks.
    """

    name: Literal["vizwiz"] = "vizwiz"
    data: str
    hub_split: str = "val"
    prompt: QuestionPrompt = OR_UNANSWERABLE

    method: ClassVar[str] = (
        "official: the released script, which rewrites the answer alone; strict: a line of at most "
        "5 words, both rewritten; tidied: the released script after EvalAI's processor"
    )

    def load(self) -> list[Question]:
        """The questions, in the file's order; their category is the type of answer."""
        found: list[Question] = []
        for where, row in read_rows(self.data, split=self.hub_split):
            named = isinstance(row.get("image"), str)
            file = text_field(row, "image", where) if named else ""
            kind = "answer_type" if named else "category"
            found.append(
                Question(
                    # In the released file a question has no number, and each its own picture.
                    id=file if named else id_field(row, "question_id", where),
                    text=text_field(row, "question", where),
                    truth=_references(row, where),
                    categories=(text_field(row, kind, where),),
                    images=(self.picture(row, file, where),),
                )
            )
        return found

    def said(self, question: Question, answer: str) -> str:
        """Rewritten, with VizWiz's contractions."""
        return vizwiz(answer)

    def compared(self, references: tuple[str, ...]) -> tuple[str, ...]:
        """As they are in the file."""
        return references


def metrics(items: Sequence[Row]) -> dict[str, Ratio]:
    """Those of questions, and the accuracy of answers tidied before the official reading."""
    tidied = mean([row["correct_tidied"] for row in items])
    return question_metrics(items) | {"tidied/accuracy": tidied}


def _rows(data: str, inside: str, hub_split: str) -> Iterator[tuple[str, Row]]:
    """The rows of any file; of a released .json the list that its object has under a name."""
    file = Path(data)
    if file.suffix != ".json" or not file.is_file():
        yield from read_rows(data, split=hub_split)
        return
    listed = of_kind(read_json(file, dict).get(inside), list, f"{file}, {inside}")
    for number, row in enumerate(listed, start=1):
        where = f"{file}, {inside}, row {number}"
        yield where, of_kind(row, dict, where)


def id_field(row: Row, name: str, where: str) -> str:
    """A number or a name that is not empty, as text."""
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, int | str) or not str(value).strip():
        wanted = "a number, or a name"
        raise DataError(f"field {name} is wrong", where=where, got=repr(value), wanted=wanted)
    return str(value)


def _references(row: Row, where: str) -> tuple[str, ...]:
    """The ten answers of a question: texts, or objects with an `answer`."""
    answers = row.get("answers")
    texts = [_text_of(one) for one in answers] if isinstance(answers, list) else []
    found = tuple(text for text in texts if text is not None)
    if len(texts) != NUM_REFERENCES or len(found) < len(texts) or not any(found):
        raise DataError(
            "answers are wrong",
            where=where,
            got=repr(answers)[:80],
            wanted=f"{NUM_REFERENCES} answers",
            fix="take a split whose answers are public; those of test splits are not",
        )
    return found


def _text_of(answer: Any) -> str | None:
    text = answer.get("answer") if isinstance(answer, dict) else answer
    return text if isinstance(text, str) else None


def _references_of(question: Question) -> tuple[str, ...]:
    assert isinstance(question.truth, tuple)
    return question.truth


# A question's references are asked for several times in a row.
@functools.lru_cache(maxsize=16)
def _if_they_differ(references: tuple[str, ...]) -> tuple[str, ...]:
    cleaned = tuple(map(one_line, references))
    return cleaned if len(set(cleaned)) == 1 else tuple(map(official, cleaned))


@functools.lru_cache(maxsize=16)
def _by_evalai(references: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(map(evalai, references))


def _told(credit: float) -> bool | float:
    """As rows hold it: true or false where it is all or nothing."""
    return bool(credit) if credit in (0, 1) else credit


_SOFT = (
    "Ten people answered each question: an answer that four of them gave counts fully, one of "
    "fewer in part. Strict takes only answers of a few words."
)
_SOFTLY: dict[str, Test] = {
    "official/accuracy": "bootstrap",
    "strict/accuracy": "bootstrap",
}
RULES = question_rules(question_metrics, _SOFTLY, meaning=_SOFT)
_TIDIED_RULES = question_rules(
    metrics,
    {**_SOFTLY, "tidied/accuracy": "bootstrap"},
    shown=(*READ_TWICE, Metric("tidied/accuracy", "accuracy, tidied", "higher")),
    meaning=f"{_SOFT} Tidied is official after EvalAI's processor, as papers submit answers.",
)
TIDIED_RULES = replace(_TIDIED_RULES, read=(*_TIDIED_RULES.read, "correct_tidied"))
