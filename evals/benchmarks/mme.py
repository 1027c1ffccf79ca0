"""MME (Fu et al., 2023, arXiv 2306.13394): two questions about each picture, one answered yes.

A task's score is 100 (acc + acc+), from 0 to 200: acc is the share of its questions answered
right, acc+ that of its pictures with both right. `perception` is the sum over ten tasks (2000 at
most), `cognition` over four (800).

    official  the released script's rule: yes if "yes" stands in the first four characters in lower
              case, else no if "no" does, else unread: "The answer is yes" is wrong, "None" is no
    strict    mmalign.answers.yes_no

Intervals weigh questions by 1 / their task's count, as the score does, and keep these weights: a
draw that has more pictures of one task lets it count for more, and never leaves 0 to the most.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from evals.base import QuestionPrompt, Row, text_field
from evals.questions import (
    READINGS,
    Question,
    QuestionBench,
    Reading,
    accuracy,
    question_rules,
    together,
    unparsed,
)
from evals.rules import Metric
from evals.sources import media_of, read_rows
from evals.stats import Ratio, mean, ratio
from mmalign.answers import yes_no
from mmalign.errors import DataError
from mmalign.records import Media

PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = (
    "commonsense_reasoning",
    "numerical_calculation",
    "text_translation",
    "code_reasoning",
)
SIDES = {"perception": PERCEPTION, "cognition": COGNITION}
_SIDE_OF = {task: side for side, tasks in SIDES.items() for task in tasks}
_PICTURES = {".jpg", ".jpeg", ".png"}


class Mme(QuestionBench):
    """data: the released folder, the folder of <task>.txt, or the hub's lmms-lab/MME.

    The released folder has <task>/<picture>.txt with lines of a question and its answer, beside the
    pictures, or in <task>/questions_answers_YN with these in <task>/images. Lines of <task>.txt
    have picture, question and answer, and perhaps a response, which is not read; `images` is then
    the released folder. Cells stand apart by tabs. limit: whole pictures.
    """

    name: Literal["mme"] = "mme"
    images: Path | None = None
    data: str
    prompt: QuestionPrompt = "{question}"

    method: ClassVar[str] = (
        "official: yes or no in the first four characters; strict: opens with yes or no"
    )

    @property
    def folder(self) -> Path | None:
        """The folder of the pictures; the released one itself, if that is the data."""
        return self.images or (Path(self.data) if Path(self.data).is_dir() else None)

    def load(self) -> list[Question]:
        """Both questions of every picture, named task/picture/1 and /2."""
        data = Path(self.data)
        if data.is_dir() and any((data / task).is_dir() for task in _SIDE_OF):
            rows = _released(data)
        elif data.is_dir() and any((data / f"{task}.txt").is_file() for task in _SIDE_OF):
            rows = self._listed(data)
        elif data.is_dir() and not any(data.rglob("*.parquet")):
            raise DataError(
                "holds none of MME's tasks",
                where=self.data,
                wanted="folders such as existence/ with pictures and .txt files, or existence.txt",
            )
        else:
            rows = _of_rows(self.data)
        questions, seen = list[Question](), Counter[str]()
        for where, task, picture, media, text, answer in rows:
            group = f"{task}/{picture}"
            seen[group] += 1
            questions.append(
                Question(
                    id=f"{group}/{seen[group]}",
                    images=(media,),
                    text=text.strip(),
                    truth=_label(answer, where),
                    categories=(task, _SIDE_OF[task]),
                    cluster=group,
                    group=group,
                )
            )
        odd = [group for group, count in seen.items() if count != 2]
        if odd:
            raise DataError(
                "asks no two questions of a picture",
                where=f"{self.data}, {odd[0]}",
                got=seen[odd[0]],
                wanted="2: acc+ counts pictures with both right",
            )
        return questions

    def read(self, question: Question, answer: str, reading: Reading) -> str | None:
        """Yes or no."""
        return yes_no(answer) if reading == "strict" else official(answer)

    def metrics(self, items: Sequence[Row]) -> dict[str, Ratio]:
        """The metrics above."""
        return metrics(items)

    def _listed(self, data: Path) -> Iterator[tuple[str, str, str, Media, str, str]]:
        images = self.images
        if images is None:
            raise DataError("needs images, the folder of the pictures", where=self.data)
        for where, task, cells in _lists(data, fewest=3):
            picture = cells[0].strip()
            inner = images / task / "images"
            folder = f"{task}/images" if inner.is_dir() else task
            yield where, task, picture, Media(path=f"{folder}/{picture}"), cells[1], cells[2]


def official(answer: str) -> str | None:
    """The released script's reading; None where it says "other"."""
    start = answer.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else None


def metrics(items: Sequence[Row]) -> dict[str, Ratio]:
    """Scores of both readings, the official ones by task too, plain accuracies, and two rates.

    Scores are of the tasks that are there.
    """
    found: dict[str, Ratio] = {}
    tasks = dict.fromkeys(row["categories"][0] for row in items)
    for reading in READINGS:
        for side, names in SIDES.items():
            if not tasks.keys().isdisjoint(names):
                found[f"{reading}/{side}"] = _score(items, reading, names)
        found[f"{reading}/accuracy"] = accuracy(items, reading)
    for task in tasks:
        found[f"official/{_SIDE_OF[task]}/{task}"] = _score(items, "official", (task,))
    found["yes_ratio"] = mean([row["official"] == "yes" for row in items])
    found["unparsed_rate"] = unparsed(items)
    return found


def score_results_folder(folder: str | Path) -> dict[str, Any]:
    """The released script on a folder of answers, <task>.txt for each of its tasks.

    Lines have picture, question, answer and response, with tabs. Returns perception, cognition
    and, under "tasks", each task's score. As there, two lines that follow each other are one
    picture's. Raises DataError where a task's file is missing or broken.
    """
    items: list[Row] = []
    for place, (where, task, cells) in enumerate(_lists(Path(folder), fewest=4, all_tasks=True)):
        items.append(
            {
                "categories": [task, _SIDE_OF[task]],
                "group": f"{place // 2}",
                "correct_official": official(cells[3]) == _label(cells[2], where),
            }
        )
        if place % 2 and items[-2]["categories"] != items[-1]["categories"]:
            raise DataError("an odd number of lines comes before it", where=where)
    if len(items) % 2:
        raise DataError("the last task has an odd number of lines", where=str(folder))
    sides = {side: _score(items, "official", tasks).value for side, tasks in SIDES.items()}
    return {**sides, "tasks": {t: _score(items, "official", (t,)).value for t in _SIDE_OF}}


def _score(items: Sequence[Row], reading: Reading, tasks: Sequence[str]) -> Ratio:
    """The sum of the tasks' scores, as a weighted mean of shares times the most that it can be.

    A question weighs 1 / its task's count, and a picture the same at its first question.
    """
    task_of = [row["categories"][0] for row in items]
    both = together(items, reading)
    counts, pictures = Counter(task_of), Counter[str]()
    for task, first in zip(task_of, both.denominator, strict=True):
        pictures[task] += int(first)
    inside = [task in tasks for task in task_of]
    question = np.array([1 / counts[task] for task in task_of]) * inside
    picture = both.denominator * [1 / pictures[task] for task in task_of] * inside
    right = np.array([row[f"correct_{reading}"] for row in items], float)
    # Each of the tasks adds 2 to the weights, 1 for acc and 1 for acc+: 100 for either.
    most = 100 * (question.sum() + picture.sum())
    weights = question + picture
    return ratio(most * (question * right + both.numerator * picture), weights)


def _released(data: Path) -> Iterator[tuple[str, str, str, Media, str, str]]:
    """(where, task, picture, its file, question, answer) of the released folder, by name."""
    for task in (task for task in _SIDE_OF if (data / task).is_dir()):
        inner = (data / task / "questions_answers_YN").is_dir()
        asked = data / task / "questions_answers_YN" if inner else data / task
        below = f"{task}/images" if inner else task
        files = {
            file.stem: file.name
            for file in sorted((data / below).glob("*"))
            if file.suffix.lower() in _PICTURES
        }
        for file in sorted(asked.glob("*.txt")):
            if file.stem not in files:
                raise DataError("has no picture", where=str(file), wanted=f"one in {data / below}")
            picture = files[file.stem]
            for where, cells in _lines(file, fewest=2):
                yield where, task, picture, Media(path=f"{below}/{picture}"), cells[0], cells[1]


def _of_rows(data: str) -> Iterator[tuple[str, str, str, Media, str, str]]:
    for where, row in read_rows(data):
        task = text_field(row, "category", where)
        if task not in _SIDE_OF:
            raise DataError(
                "category is no task", where=where, got=task, wanted=", ".join(_SIDE_OF)
            )
        # Named task/picture there already.
        picture = text_field(row, "question_id", where).removeprefix(f"{task}/")
        media = media_of(row.get("image"), where)
        question, answer = (text_field(row, name, where) for name in ("question", "answer"))
        yield where, task, picture, media, question, answer


def _lists(
    folder: Path, *, fewest: int, all_tasks: bool = False
) -> Iterator[tuple[str, str, list[str]]]:
    """(where, task, cells) of <task>.txt, of those that are there or of all."""
    for task in _SIDE_OF:
        file = folder / f"{task}.txt"
        if all_tasks or file.is_file():
            for where, cells in _lines(file, fewest=fewest):
                yield where, task, cells


def _lines(file: Path, *, fewest: int) -> Iterator[tuple[str, list[str]]]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot be read ({error})", where=str(file)) from None
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        cells = line.rstrip("\r").split("\t")
        where = f"{file}, line {number}"
        if len(cells) < fewest:
            raise DataError(
                "has too few cells", where=where, got=len(cells), wanted=f"{fewest}, with tabs"
            )
        yield where, cells


def _label(answer: str, where: str) -> str:
    label = answer.strip().lower()
    if label not in ("yes", "no"):
        raise DataError("answer is wrong", where=where, got=answer, wanted="Yes or No")
    return label


RULES = question_rules(
    metrics,
    {
        "official/perception": "bootstrap",
        "official/cognition": "bootstrap",
        "official/accuracy": "mcnemar",
        "yes_ratio": "bootstrap",
    },
    shown=(
        Metric("official/perception", "perception, of 2000", "higher", percent=False),
        Metric("official/cognition", "cognition, of 800", "higher", percent=False),
        Metric("strict/perception", "perception, strict", "higher", percent=False),
        Metric("strict/cognition", "cognition, strict", "higher", percent=False),
        Metric("official/accuracy", "accuracy", "higher"),
        Metric("yes_ratio", "yes ratio"),
        Metric("unparsed_rate", "unparsed", "lower"),
    ),
    meaning="MME asks two questions of each picture. Perception (2000 at most) and cognition (800) "
    "are sums over tasks of 100 for all questions right and 100 for all pictures with both right.",
)
