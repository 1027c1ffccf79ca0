"""Object HalBench (Yu et al., 2023, arXiv 2312.00849): objects that answers about COCO make up.

Rohrbach's CHAIR over 300 COCO pictures, each asked for a description in one of several wordings.
Read recall and length beside the rates: a short answer hallucinates less and says less.

Plurals are undone as in chair.py: "men" is a person, where the released script's WordNet leaves it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from evals.base import QuestionPrompt, Row, Split, Suite, check_known, read_jsonl, text_field
from evals.benchmarks.chair import (
    DOUBLE_WORDS,
    Mention,
    ObjectWords,
    add_boxes,
    add_captions,
    not_coco,
    read_coco,
)
from evals.rules import Metric, Rules
from evals.sources import media_of, read_rows
from evals.stats import Ratio, ratio
from mmalign.config import Strict
from mmalign.errors import DataError
from mmalign.generate.base import Request
from mmalign.media import media_key
from mmalign.records import Media, user

METHOD = (
    "objects by CHAIR's words in the whole answer, not by a language model's list of them; plurals "
    "by the synonym list's own words"
)


class ObjectHalBench(Strict):
    """Object HalBench, from RLHF-V's question file.

    data: obj_halbench_300_with_image.jsonl, rows of image_id, question and image, a picture in
    base64; or any file of such rows. images: the folder of the pictures, where rows name files.
    instances, captions: COCO's 2014 annotation files, of val, or of train and val as released;
    an image's objects are those of its boxes and of its reference captions.
    synonyms: RLHF-V's synonyms_refine.txt, one line per category. prompt: what is asked.
    limit: only the first so many rows.
    """

    name: Literal["object_halbench"] = "object_halbench"
    split: Split | None = None
    data: str
    images: Path | None = None
    instances: tuple[Path, ...] = Field(min_length=1)
    captions: tuple[Path, ...] = Field(min_length=1)
    synonyms: Path
    prompt: QuestionPrompt = "{question}"
    limit: int | None = Field(default=None, ge=1)
    max_new_tokens: int = Field(default=512, ge=1)

    @property
    def key(self) -> str:
        """`object_halbench`, or `object_halbench-<split>`."""
        return "-".join(filter(None, (self.name, self.split)))

    def requests(self) -> list[Request]:
        """One request per row; its place in the file, from 0, is the id."""
        # A file that is missing or of another split is better told before a model answers.
        self._truth(read_words(self.synonyms))
        return [
            Request(
                id=row["id"],
                prompt=user(row["prompt"], images=1),
                images=(media,),
                media_root=self.images,
            )
            for row, media in self._questions()
        ]

    def score(self, answers: Mapping[str, str]) -> Suite:
        """Score answers by row; a row without an answer counts in `num_unparsed` alone."""
        questions = [row for row, _ in self._questions()]
        check_known(answers, {row["id"] for row in questions}, self.key)
        words = read_words(self.synonyms)
        truth = self._truth(words)
        items = [
            _read(row, answers.get(row["id"]), words, truth[row["image_id"]]) for row in questions
        ]
        return Suite(
            key=self.key,
            benchmark=self.name,
            split=self.split,
            images=self.images,
            method=METHOD,
            items=items,
            metrics=metrics(items),
            num_unparsed=sum(row["answer"] is None for row in items),
        )

    def _truth(self, words: ObjectWords) -> dict[int, set[str]]:
        numbers = {row["image_id"] for row, _ in self._questions()}
        return coco_truth(numbers, self.instances, self.captions, words)

    def _questions(self) -> list[tuple[Row, Media]]:
        rows = list(itertools.islice(_read_questions(self.data, self.prompt), self.limit))
        if not rows:
            raise DataError("holds no questions", where=self.data)
        return rows


def read_words(synonyms: Path) -> ObjectWords:
    """The released rules over a synonym file: every pair of words in it is read as one.

    So are CHAIR's pairs that no category has, such as "train track". Raises DataError.
    """
    names = ObjectWords.read(synonyms, {}).category
    pairs = {name: name for name in names if name.count(" ") == 1}
    return ObjectWords.read(synonyms, pairs | _OTHER_PAIRS)


# CHAIR's pairs but those that name an object of a synonym file: which these are, the file says.
_OTHER_PAIRS = {
    pair: meant
    for pair, meant in DOUBLE_WORDS.items()
    if pair != meant or pair in ("home plate", "train track")
}


def coco_truth(
    numbers: set[int], instances: Sequence[Path], captions: Sequence[Path], words: ObjectWords
) -> dict[int, set[str]]:
    """The categories in each of COCO's images that are asked about, by its number.

    Raises DataError on files that are no COCO annotations, and on an image that is in none.
    """
    objects: dict[int, set[str]] = {number: set() for number in numbers}
    known: set[int] = set()
    for path in instances:
        data = read_coco(path)
        add_boxes(objects, data, words, path)
        try:
            known |= {image["id"] for image in data["images"]}
        except (KeyError, TypeError) as error:
            raise not_coco(path, "an instances", error) from None
    unknown = sorted(numbers - known)
    if unknown:
        raise DataError(
            f"{len(unknown)} images are in none of the instances files, such as {unknown[0]}",
            where=", ".join(map(str, instances)),
            fix="give those of the split that the images are of, or of train and val",
        )
    for path in captions:
        add_captions(objects, path, words)
    return objects


def metrics(items: Sequence[Row]) -> dict[str, Ratio]:
    """The released numbers, of the answers that there are.

    response_hall (CHAIRs_refine) = answers with a hallucinated object / answers with an object;
    object_hall (CHAIRi) = hallucinated mentions / mentions; recall (obj_rec) = objects of the
    image that are mentioned / objects of the image, summed over answers; num_words is a mean.
    object_hall_once counts each word once an answer, as the released script does with the list
    that a language model gives it. The script divides by zero without objects; here that is 0.0.
    """
    there = [row["answer"] is not None for row in items]
    mentioned = [len(row["mentioned"]) for row in items]
    hallucinated = [len(row["hallucinated"]) for row in items]
    truth = [len(row["truth"]) * given for row, given in zip(items, there, strict=True)]
    return {
        "response_hall": ratio([n > 0 for n in hallucinated], [n > 0 for n in mentioned]),
        "object_hall": ratio(hallucinated, mentioned),
        "object_hall_once": ratio(
            [row["num_hallucinated_once"] for row in items],
            [row["num_mentioned_once"] for row in items],
        ),
        "recall": ratio([len(row["recalled"]) for row in items], truth),
        "num_words": ratio([row["num_words"] for row in items], there),
        "mentions": ratio(mentioned, there),
    }


def score_answers_file(
    answers: str | Path,
    instances: Sequence[str | Path],
    captions: Sequence[str | Path],
    synonyms: str | Path,
) -> dict[str, float]:
    """The released script's `overall_metrics`, run without a language model (no --use_gpt).

    answers: JSON lines of image_id, and text or answer. Returns CHAIRs, CHAIRs_refine, CHAIRi,
    obj_rec, correct_rate, object_correct_rate, avg_word_len and the counts sentence_num,
    coco_sentence_num, coco_word_count (true categories named) and gt_word_count. Differs from it
    where words are parted and plurals undone (chair.ObjectWords). Raises DataError.
    """
    given: list[tuple[Row, str]] = []
    for where, row in read_jsonl(Path(answers)):
        text = text_field(row, "text" if "text" in row else "answer", where)
        given.append(({"image_id": _image_id(row, where)}, text))
    if not given:
        raise DataError("holds no answers", where=str(answers))
    words = read_words(Path(synonyms))
    numbers = {row["image_id"] for row, _ in given}
    truth = coco_truth(numbers, [*map(Path, instances)], [*map(Path, captions)], words)
    items = [_read(row, text, words, truth[row["image_id"]]) for row, text in given]
    made = metrics(items)
    hall, mentions = made["response_hall"], made["object_hall"]
    return {
        "CHAIRs": float(hall.numerator.sum()) / len(items),
        "CHAIRs_refine": hall.value,
        "CHAIRi": mentions.value,
        "obj_rec": made["recall"].value,
        "sentence_num": len(items),
        "coco_sentence_num": float(hall.denominator.sum()),
        "coco_word_count": float(made["recall"].numerator.sum()),
        "gt_word_count": float(made["recall"].denominator.sum()),
        "avg_word_len": made["num_words"].value,
        "correct_rate": 1 - hall.value,
        "object_correct_rate": 1 - mentions.value,
    }


def _read_questions(data: str, prompt: str) -> Iterator[tuple[Row, Media]]:
    for place, (where, row) in enumerate(read_rows(data)):
        number = _image_id(row, where)
        media = media_of(row.get("image"), f"{where}, image")
        yield (
            {
                "id": str(place),
                "image": media.path or media_key(media),
                "image_id": number,
                "cluster": str(number),
                "prompt": prompt.replace("{question}", text_field(row, "question", where)),
            },
            media,
        )


def _image_id(row: Row, where: str) -> int:
    number = row.get("image_id")
    if isinstance(number, str) and number.isdecimal():
        number = int(number)
    if not isinstance(number, int) or isinstance(number, bool):
        raise DataError("field image_id is no whole number", where=where, got=repr(number))
    return number


def _read(question: Row, answer: str | None, words: ObjectWords, truth: set[str]) -> Row:
    """One scored row; `spans` are the characters of the answer that `mentioned` stand at."""
    # The released script scores what is left when a speaker's name is taken away.
    text = None if answer is None else answer.replace("Assistant:", "").strip()
    mentions = words.mentions(text or "")
    once = {(_word(text or "", mention, words), mention.category) for mention in mentions}
    return {
        **question,
        "answer": text,
        "mentioned": [mention.category for mention in mentions],
        "spans": [[mention.start, mention.end] for mention in mentions],
        "hallucinated": [m.category for m in mentions if m.category not in truth],
        "truth": sorted(truth),
        "recalled": sorted(truth.intersection(m.category for m in mentions)),
        "num_mentioned_once": len(once),
        "num_hallucinated_once": sum(category not in truth for _, category in once),
        "num_words": 0 if text is None else len(text.split(" ")),
    }


def _word(text: str, mention: Mention, words: ObjectWords) -> str:
    """The word or pair that a mention stands for, in the singular."""
    return " ".join(map(words.singular, text[mention.start : mention.end].lower().split()))


RULES = Rules(
    metrics=metrics,
    read=(
        *("answer", "mentioned", "spans", "hallucinated", "recalled", "num_words"),
        *("num_mentioned_once", "num_hallucinated_once"),
    ),
    same=("truth", "prompt"),
    compared={
        "response_hall": "bootstrap",
        "object_hall": "bootstrap",
        "recall": "bootstrap",
        "num_words": "bootstrap",
    },
    shown=(
        Metric("response_hall", "responses that hallucinate", "lower"),
        Metric("object_hall", "mentions hallucinated", "lower"),
        Metric("object_hall_once", "each word once", "lower"),
        Metric("recall", "recall", "higher"),
        Metric("num_words", "words", percent=False),
    ),
    length=False,
    items="answers",
    meaning="Object HalBench looks for COCO's objects in answers. Of the answers that name one, "
    "responses that hallucinate are those that name one that is not in the picture; mentions "
    "hallucinated is the share of all mentions, recall the share of a picture's objects that are "
    "mentioned.",
)
