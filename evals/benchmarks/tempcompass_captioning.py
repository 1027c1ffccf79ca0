"""TempCompass's captioning (Liu et al., 2024, arXiv 2403.00476): a caption that answers a question.

The model writes a caption from a choice of what a clip may show. A judge, which sees the caption
alone, answers a multiple-choice question of the same clip and aspect from it, or says that none of
the options is right: the caption is right if the judge's answer is.

    accuracy   the share of captions that are right; `/<aspect>` has each aspect's own

    official  in the reply's last line with the word Answer, without "Answer:", exactly one of "A.",
              "B.", "C." and "D." stands, and the text before the first ". " is the right letter.
              Without such a line the whole reply is read. Anything else is wrong
    strict    one line "Answer: ..." with one option by mmalign.options.chosen_option, or with
              none; other replies are left out

The judge of the original is gpt-3.5-turbo-1106 at temperature 1.0, that of RRPO
gpt-4o-mini-2024-07-18, each behind a system message that is not sent here. A reply that never came
counts -1 in the released script; here it is asked for again, and an empty one is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from evals.base import Row, text_field
from evals.benchmarks.tempcompass import ASPECTS, truth_of
from evals.judged import JudgedBench, disagreement, judged_rules, score_of, unjudged
from evals.questions import Question, Reading, by_category
from evals.rules import Metric
from evals.sources import of_kind, read_json
from evals.stats import Ratio
from mmalign.errors import DataError
from mmalign.options import chosen_option

_LINE = re.compile(r"^\W*answer\W*:(.*)$", re.IGNORECASE | re.MULTILINE)
_NONE = re.compile(r"\W*none\b", re.IGNORECASE)


class TempCompassCaptioning(JudgedBench):
    """questions: the released folder, of captioning.json and multi-choice.json. videos: the clips.

    judge_prompt has a place {choices}, the multiple-choice question, beside {answer}, the caption.
    """

    name: Literal["tempcompass_captioning"] = "tempcompass_captioning"
    questions: Path
    videos: Path
    max_new_tokens: int = Field(default=512, ge=1)

    method: ClassVar[str] = (
        "official: the judge's last Answer line begins with the right letter, and names one; "
        "strict: one Answer line with one option, or none"
    )
    default_prompt: ClassVar[str] = """\
A clip was described in words. Answer a multiple-choice question about the clip from its \
description alone. If the description does not say enough, or says what none of the options says, \
the answer is that none of the choices are correct. Do not guess, and take nothing for true but \
what the description says.

{rule}

[BEGIN description {code}]
{answer}
[END description {code}]

[BEGIN question {code}]
{choices}
[END question {code}]

First give your reason in one sentence. Then end with one line, the letter of an option, a full \
stop and the option's words, or that there is none, such as:
Answer: B. a black cat
Answer: None of the choices are correct"""

    def load(self) -> list[Question]:
        """One question for each caption that is asked for, in the file's order."""
        file, choices = self.questions / "captioning.json", self.questions / "multi-choice.json"
        known, questions = read_json(choices, dict), list[Question]()
        for clip, aspects in read_json(file, dict).items():
            for aspect, asked in of_kind(aspects, dict, f"{file}, {clip}").items():
                where = f"{file}, {clip}, {aspect}"
                if aspect not in ASPECTS:
                    raise DataError("is no aspect", where=where, wanted=", ".join(ASPECTS))
                text, truth, options = _choice(known, clip, aspect, choices)
                for number, row in enumerate(of_kind(asked, list, where), start=1):
                    here = f"{where}, question {number}"
                    questions.append(
                        Question(
                            id=f"{clip}/{aspect}/{number}",
                            video=f"{clip}.mp4",
                            text=text_field(of_kind(row, dict, here), "question", here),
                            truth=truth,
                            categories=(aspect,),
                            cluster=clip,
                            options=options,
                            notes={"choices": text},
                        )
                    )
        return questions

    def read_verdict(self, question: Question, reply: str, reading: Reading) -> float | None:
        """1 if the judge's answer is right, else 0."""
        if reading == "strict":
            said = _LINE.findall(reply)
            if len(said) != 1:
                return None
            option = chosen_option(said[0], question.options)
            if option is None and not _NONE.match(said[0]):
                return None
            return float(option == question.truth)
        lines = [line.strip() for line in reply.strip().split("\n")]
        answers = [line.replace("Answer:", "").strip() for line in lines if "Answer" in line]
        answer = answers[-1] if answers else reply.strip()
        one = sum(answer.count(f"{letter}.") for letter in "ABCD") == 1
        return float(one and answer.split(". ")[0] == question.truth)

    def metrics(self, items: Sequence[Row]) -> dict[str, Ratio]:
        """The metrics above."""
        return metrics(items)


def metrics(items: Sequence[Row]) -> dict[str, Ratio]:
    """Both readings' accuracy, the official one by aspect, and how sure the judge is."""
    official = score_of(items, "official")
    return {
        "official/accuracy": official,
        **by_category(items, "official/accuracy", official),
        "strict/accuracy": score_of(items, "strict"),
        "unjudged_rate": unjudged(items),
        "judge_disagreement": disagreement(items),
    }


def _choice(
    known: dict[str, Any], clip: str, aspect: str, file: Path
) -> tuple[str, str, dict[str, str]]:
    """The first multiple-choice question of a clip and aspect, its right letter, its options."""
    where = f"{file}, {clip}, {aspect}"
    asked = of_kind(known.get(clip, {}), dict, f"{file}, {clip}").get(aspect)
    if not asked:
        raise DataError("has no question, which captions need", where=where)
    row = of_kind(of_kind(asked, list, where)[0], dict, where)
    text = text_field(row, "question", where)
    return text, *truth_of("multi-choice", text, text_field(row, "answer", where), where)


RULES = judged_rules(
    metrics,
    ("official/accuracy", "strict/accuracy"),
    shown=(
        Metric("official/accuracy", "accuracy", "higher"),
        Metric("strict/accuracy", "accuracy, strict", "higher"),
    ),
    items="captions",
    meaning="A caption is right if a language model that sees it alone answers a multiple-choice "
    "question about the clip from it rightly.",
)
