"""LLaVA-Bench (Liu et al., 2023, arXiv 2304.08485): open questions, scored beside GPT-4's answers.

The judge sees a description of the picture, the question, and two answers: first that of GPT-4,
which was written from the description, then the model's. It gives each 1 to 10.

    relative_score        sum of the model's scores / sum of the reference's; also by category
    points                mean score of the model's answers
    reference_points      mean score of the reference's

    official  the reply's first line, whose commas become blanks, is two numbers with one blank
              between them ("8,9", not "8, 9"); any other reply counts -1 for both, as in the
              released scripts, whose summary takes such pairs into its means
    strict    one line that is two numbers of 1 to 10; answers without one are left out

An unanswered question counts 0 officially, beside the reference's mean score. The reference always
stands first, as in the released script; judges favour places, so compare only such numbers.
The scripts match answers by order, here they are matched by question_id.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import model_validator

from evals.base import Row, read_jsonl, text_field
from evals.judged import JudgedBench, disagreement, judged_rules, unjudged
from evals.questions import READINGS, Question, Reading
from evals.rules import Metric
from evals.sources import of_kind, read_json
from evals.stats import Ratio, mean, ratio
from mmalign.errors import DataError
from mmalign.records import Media

_PAIR_LINE = re.compile(
    r"^[ \t]*(\d+(?:\.\d+)?)(?:[ \t]*,[ \t]*|[ \t]+)(\d+(?:\.\d+)?)[ \t]*$", re.MULTILINE
)
_UNREAD = -1.0

# How the released script lays out what it asks.
_RELEASED = (
    "[Context]\n{released_context}\n\n[Question]\n{question}\n\n"
    "[{role} 1]\n{reference}\n\n[End of {role} 1]\n\n"
    "[{role} 2]\n{answer}\n\n[End of {role} 2]\n\n[System]\n{task}\n\n"
)


class LlavaBench(JudgedBench):
    """questions: JSON lines of question_id, image, text, category. context: of image, caption.
    references: of question_id, text. images: the folder of the pictures.

    rule: the released rule.json, whose prompts are then asked, in place of judge_prompt.
    judge_prompt has a place {context} beside the usual ones.

    LLaVA-Bench (COCO) is read too: its context has captions, and instances with their boxes.
    """

    name: Literal["llava_bench"] = "llava_bench"
    images: Path | None = None
    questions: Path
    context: Path
    references: Path
    rule: Path | None = None

    method: ClassVar[str] = (
        "official: two numbers on the first line, -1 and -1 without; strict: one such line"
    )
    unread: ClassVar[float] = _UNREAD
    default_prompt: ClassVar[str] = """\
Two assistants were asked the same about a picture. Judge how helpful, relevant, accurate and \
detailed each answer is, and give each a score from 1 to 10; higher is better. What is in the \
picture is described below; the description is true, but not complete. Which answer stands first \
must not matter.

{rule}

[BEGIN description {code}]
{context}
[END description {code}]

[BEGIN question {code}]
{question}
[END question {code}]

[BEGIN answer 1 {code}]
{reference}
[END answer 1 {code}]

[BEGIN answer 2 {code}]
{answer}
[END answer 2 {code}]

Begin with a line that holds two numbers and nothing else, the score of answer 1 and that of \
answer 2, with a blank between them, such as: 3 4
Then explain them in a few sentences, without a further line of numbers."""

    @model_validator(mode="after")
    def _one_prompt(self) -> LlavaBench:
        if self.rule is not None and self.judge_prompt is not None:
            raise ValueError("give rule or judge_prompt, not both")
        return self

    def load(self) -> list[Question]:
        """One question for each line. Raises DataError on one without context or reference."""
        contexts = {text_field(row, "image", w): (w, row) for w, row in read_jsonl(self.context)}
        references = {
            _id(row, where): text_field(row, "text", where)
            for where, row in read_jsonl(self.references)
        }
        rules = None if self.rule is None else read_json(self.rule, dict)
        questions: list[Question] = []
        for where, row in read_jsonl(self.questions):
            id, image = _id(row, where), text_field(row, "image", where)
            category = text_field(row, "category", where)
            for key, known, file in (
                (image, contexts, self.context),
                (id, references, self.references),
            ):
                if key not in known:
                    raise DataError("has no line there", where=f"{file}, for {where}", got=key)
            notes = _context(*contexts[image])
            if rules is not None:
                in_wild = "captions" not in contexts[image][1]
                notes |= _rule(rules, f"llava_bench_{category}" if in_wild else category, self.rule)
            questions.append(
                Question(
                    id=id,
                    text=text_field(row, "text", where),
                    truth=references[id],
                    categories=(category,),
                    images=(Media(path=image),),
                    notes=notes,
                )
            )
        return questions

    def template(self) -> str:
        """The default prompt, the one that is given, or the released script's."""
        return super().template() if self.rule is None else _RELEASED

    def read_verdict(self, question: Question, reply: str, reading: Reading) -> float | None:
        """The model's score."""
        pair = read_pair(reply, reading)
        return None if pair is None else pair[1]

    def item(self, question: Question, answer: str | None, replies: Sequence[str]) -> Row:
        """The row, with the scores of the reference beside those of the answer."""
        official, strict = ([read_pair(one, how) for one in replies] for how in READINGS)
        return {
            **super().item(question, answer, replies),
            "references_official": [_UNREAD if pair is None else pair[0] for pair in official],
            "references_strict": [None if pair is None else pair[0] for pair in strict],
        }

    def metrics(self, items: Sequence[Row]) -> dict[str, Ratio]:
        """The metrics above."""
        return metrics(items)

    def per_repeat(self, items: Sequence[Row]) -> list[float]:
        """The relative score by each of the judge's repeats."""
        judged = [_pairs(row, "official") for row in items if row["scores_official"]]
        return [float(_divide(*np.sum(column, axis=0))) for column in zip(*judged, strict=True)]


def read_pair(reply: str, reading: Reading) -> tuple[float, float] | None:
    """The scores of the reference and of the model's answer; None where a reply gives none.

    Officially they may be any finite numbers; the released script takes "nan" and "inf" as well.
    """
    if reading == "strict":
        lines = [(float(a), float(b)) for a, b in _PAIR_LINE.findall(reply)]
        in_range = len(lines) == 1 and all(1 <= number <= 10 for number in lines[0])
        return lines[0] if in_range else None
    words = reply.split("\n")[0].replace(",", " ").split(" ")
    if len(words) != 2:
        return None
    try:
        first, second = float(words[0]), float(words[1])
    except ValueError:
        return None
    return (first, second) if math.isfinite(first) and math.isfinite(second) else None


def metrics(items: Sequence[Row]) -> dict[str, Ratio]:
    """Both readings' numbers, the official relative score by category, and how sure the judge is.

    With several repeats an item has their mean. The released summary is of one review of each
    answer, and rounds both means to three decimals before it divides them.
    """
    found: dict[str, Ratio] = {}
    for reading in READINGS:
        reference, model = _means(items, reading)
        # Without a pair an item adds to neither sum.
        found[f"{reading}/relative_score"] = ratio(np.nan_to_num(model), np.nan_to_num(reference))
    whole = found["official/relative_score"]
    found["official/points"] = mean(whole.numerator)
    found["official/reference_points"] = mean(whole.denominator)
    for name in dict.fromkeys(name for row in items for name in row["categories"]):
        inside = np.array([name in row["categories"] for row in items])
        found[f"official/relative_score/{name}"] = ratio(
            whole.numerator * inside, whole.denominator * inside
        )
    found["unjudged_rate"] = unjudged(items)
    found["judge_disagreement"] = disagreement(
        [{"scores_official": _pairs(row, "official")} for row in items]
    )
    return found


def _means(items: Sequence[Row], reading: Reading) -> np.ndarray:
    """Each item's mean score of the reference and of the answer, [2, N]; NaN without any."""
    pairs = [_pairs(row, reading) for row in items]
    means = np.array([np.mean(one, axis=0) if one else (np.nan, np.nan) for one in pairs]).T
    if reading == "official":
        missing = np.isnan(means[0])
        usual = 0.0 if missing.all() else means[0][~missing].mean()
        means[0][missing], means[1][missing] = usual, 0.0
    return means


def _pairs(row: Row, reading: Reading) -> list[tuple[float, float]]:
    """The pairs of a row that were read: (reference, model) for each repeat."""
    both = zip(row[f"references_{reading}"], row[f"scores_{reading}"], strict=True)
    return [(reference, model) for reference, model in both if model is not None]


def _divide(reference: float, model: float) -> float:
    return model / reference if reference else 0.0


def _id(row: Row, where: str) -> str:
    if "question_id" not in row:
        raise DataError("field question_id is missing", where=where)
    return str(row["question_id"])


def _context(where: str, row: Row) -> dict[str, str]:
    """What the judge is told of a picture, and how the released script would tell it."""
    if "captions" in row:
        lines = of_kind(row["captions"], list, f"{where}, captions")
        boxes = of_kind(row.get("instances"), list, f"{where}, instances")
        told = ["\n".join(map(str, lines)), "\n".join(_box(box, where) for box in boxes)]
        return dict.fromkeys(("context", "released_context"), "\n\n".join(told))
    caption: Any = row.get("caption")
    if isinstance(caption, list):
        return dict.fromkeys(("context", "released_context"), "\n".join(map(str, caption)))
    caption = text_field(row, "caption", where)
    # The released captions are plain texts, whose letters the released script joins by line
    # breaks, as it would the lines of a list. Published numbers were made so.
    return {"context": caption, "released_context": "\n".join(caption)}


def _box(box: Any, where: str) -> str:
    of_kind(box, dict, f"{where}, instances")
    return f"{text_field(box, 'category', where)}: {box.get('bbox')}"


def _rule(rules: Mapping[str, Any], key: str, file: Path | None) -> dict[str, str]:
    """The role and the task of a kind of question."""
    if key not in rules:
        raise DataError("has no rule of this name", where=str(file), got=key)
    where = f"{file}, {key}"
    rule = of_kind(rules[key], dict, where)
    return {"role": text_field(rule, "role", where), "task": text_field(rule, "prompt", where)}


RULES = judged_rules(
    metrics,
    ("official/relative_score", "official/points", "strict/relative_score"),
    read=(
        "scores_strict",
        "references_official",
        "references_strict",
    ),
    shown=(
        Metric("official/relative_score", "relative score", "higher"),
        Metric("strict/relative_score", "relative score, strict", "higher"),
        Metric("official/points", "points", "higher", percent=False, decimals=2),
        Metric("official/reference_points", "the reference's points", percent=False, decimals=2),
    ),
    meaning="LLaVA-Bench asks open questions, and a language model scores each answer beside "
    "GPT-4's. The relative score is the sum of the scores by the sum of GPT-4's.",
)
