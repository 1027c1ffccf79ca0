"""TempCompass (Liu et al., 2024, arXiv 2403.00476): action, direction, speed, order, change.

Three of its tasks, each in its released question file; `official/accuracy` is the mean of the
tasks' accuracies, as papers report it, and `/<task>` and `/<aspect>` have each one's own.

The released scripts match answers by rule, and ask a language model where the rule fails.
`official` is their rule alone, as with their switch `disable_llm`: what it does not match is
wrong, and `match_rate` says how much it matched. With a judge the released number is higher, by
whatever the judge lets pass. The fourth task is evals.benchmarks.tempcompass_captioning.

    multi-choice      A to D alone, or first and followed by "." or ")"
    yes_no            how the answer begins: "Not sure" begins with no
    caption_matching  an option whole, its sentence, or its name ("Caption A", "A", "Option 1.")

Strict: mmalign.options.chosen_option and mmalign.answers.yes_no, which decline.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from evals.base import Row, text_field
from evals.questions import (
    READ_TWICE,
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
from evals.stats import Ratio, mean
from mmalign.answers import yes_no
from mmalign.errors import DataError
from mmalign.options import chosen_option

Task = Literal["multi-choice", "yes_no", "caption_matching"]
ASPECTS = ("action", "direction", "speed", "order", "attribute_change")
_ASKED = {
    "multi-choice": "\nPlease directly give the best option:",
    "yes_no": "\nPlease answer yes or no:",
    "caption_matching": "\nPlease directly give the best option:",
}


class TempCompass(QuestionBench):
    """questions: the released folder of <task>.json, {clip: {aspect: [{question, answer}]}}.

    tasks: those asked. limit: questions, of the first tasks. The released prompts are asked.
    """

    name: Literal["tempcompass"] = "tempcompass"
    videos: Path
    questions: Path
    tasks: tuple[Task, ...] = Field(
        default=("multi-choice", "yes_no", "caption_matching"), min_length=1
    )
    max_new_tokens: int = Field(default=64, ge=1)

    method: ClassVar[str] = (
        "official: the released rules, no judge; strict: one option or yes or no, else unread"
    )

    def load(self) -> list[Question]:
        """The questions of every task, in the files' order."""
        return [
            question
            for task in self.tasks
            for question in _task(task, self.questions / f"{task}.json")
        ]

    def read(self, question: Question, answer: str, reading: Reading) -> str | None:
        """A key of the options: a letter, yes or no, or the name of a caption."""
        if reading == "strict":
            if not question.options:
                return yes_no(answer)
            named = {_short(name): text for name, text in question.options.items()}
            found = chosen_option(_without_name(answer), named)
            return next((name for name in question.options if _short(name) == found), None)
        answer = answer.replace("</s>", "").strip()
        if not question.options:
            return next((w for w in ("yes", "no") if answer.lower().startswith(w)), None)
        if "multi-choice" in question.categories:
            found = re.match(r"([A-D])(?:$|[.)])", answer)
            return found[1] if found else None
        return _official_caption(answer, question.options)

    def metrics(self, items: Sequence[Row]) -> dict[str, Ratio]:
        """The metrics above."""
        return metrics(items)


def metrics(items: Sequence[Row]) -> dict[str, Ratio]:
    """Both readings' means over tasks, the official one by task and aspect, and what was read."""
    return {
        "official/accuracy": accuracy(items, "official", macro=True),
        **by_category(items, "official/accuracy", accuracy(items, "official")),
        "strict/accuracy": accuracy(items, "strict", macro=True),
        "match_rate": mean([row["official"] is not None for row in items]),
        "unparsed_rate": unparsed(items),
    }


def _task(task: Task, file: Path) -> list[Question]:
    questions: list[Question] = []
    for clip, aspects in read_json(file, dict).items():
        for aspect, asked in of_kind(aspects, dict, f"{file}, {clip}").items():
            where = f"{file}, {clip}, {aspect}"
            if aspect not in ASPECTS:
                raise DataError("is no aspect", where=where, wanted=", ".join(ASPECTS))
            for number, row in enumerate(of_kind(asked, list, where), start=1):
                here = f"{where}, question {number}"
                text = text_field(of_kind(row, dict, here), "question", here)
                truth, options = truth_of(task, text, text_field(row, "answer", here), here)
                questions.append(
                    Question(
                        id=f"{task}/{clip}/{aspect}/{number}",
                        video=f"{clip}.mp4",
                        text=text + _ASKED[task],
                        truth=truth,
                        categories=(task, aspect),
                        cluster=clip,
                        options=options,
                    )
                )
    return questions


def truth_of(task: Task, text: str, answer: str, where: str) -> tuple[str, dict[str, str]]:
    """The right answer's key, and the options by key; yes and no have none."""
    answer, options = answer.strip(), {}
    if task == "yes_no":
        truth, known = answer.lower(), ("yes", "no")
    else:
        pattern = r"([A-D])[.)]\s*(.+)" if task == "multi-choice" else r"(\w+ [AB12]): (.+)"
        lines = [line.strip() for line in text.split("\n")[1:]]
        options = {m[1]: m[2] for line in lines if (m := re.fullmatch(pattern, line))}
        found = re.fullmatch(pattern, answer)
        truth, known = found[1] if found else answer, tuple(options)
    if truth not in known:
        raise DataError("answer is wrong", where=where, got=repr(answer), wanted=", ".join(known))
    return truth, options


def _official_caption(answer: str, options: Mapping[str, str]) -> str | None:
    """The option that an answer is, where a later and shorter form of naming one wins."""
    chosen = next((name for name, text in options.items() if answer == f"{name}: {text}"), None)
    after = answer.split(") ")[1] if ") " in answer else answer
    for name, text in options.items():
        # The script cuts a sentence at its first colon.
        if text.split(": ")[0] in (answer, after):
            chosen = name
    bare = answer.replace(".", "")
    for name in options:
        if {name, _short(name)} & {answer, bare}:
            chosen = name
    return chosen


def _short(name: str) -> str:
    """A of "Caption A"; of a letter itself."""
    return name.rpartition(" ")[2]


def _without_name(answer: str) -> str:
    """An answer whose first word names the kind of option: "Caption A: …" is "A: …"."""
    return re.sub(r"^\W*(?:caption|option|sentence)\s+(?=[AB12]\b)", "", answer, flags=re.I)


RULES = question_rules(metrics, shown=(*READ_TWICE, Metric("match_rate", "matched")))
