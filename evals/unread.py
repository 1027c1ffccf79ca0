"""A third reading: a language model reads the answers that the official rule does not.

Several released scorers (MathVista, MathVerse, MMBench in VLMEvalKit, TempCompass, HallusionBench)
ask a language model about answers that their rule cannot read, so that the rule alone is a lower
bound of their numbers. With `judge_unread` a benchmark of questions does likewise: the recipe's
judge is shown question and answer, never the truth, and says which answer was given. What it says
is read by the benchmark's own rules, the official one first. `judged/` has the numbers of
`official/` with these readings in.

The judge is asked in our words, not in each script's, and what it cannot tell stays wrong.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from evals.base import Row, Suite
from evals.judging import Judge
from evals.rules import judged_metrics
from mmalign.generate.base import Request
from mmalign.judge import RULE, code_for
from mmalign.records import user

if TYPE_CHECKING:
    from evals.questions import Question, QuestionBench

PROMPT = """\
A model was asked a question. Say which answer its response gives. Do not answer the question \
yourself, and do not judge whether the response is right: if it gives no answer, or more than one \
and does not settle on one, say none.

{rule}

[BEGIN question {code}]
{question}
[END question {code}]

[BEGIN response {code}]
{answer}
[END response {code}]

Reply with one line and nothing else:
Answer: {form}"""
_LINE = re.compile(r"^\W*answer\s*:\s*(\S.*?)\s*$", re.IGNORECASE | re.MULTILINE)


def with_readings(
    bench: QuestionBench, suite: Suite, answers: Mapping[str, str], judge: Judge
) -> Suite:
    """The suite with the judge's readings: `judged` of each row, its credit, and the numbers.

    The judge is asked about answers that the official rule did not read. Of several repeats the
    reading that most give counts, of ties the first.
    """
    questions = {question.id: question for question in bench.selected()}

    def holds(id: str, reply: str) -> bool:
        """Whether a reply names one answer, or says that there is none."""
        return _none(reply) or _said(bench, questions[id], reply) is not None

    requests = [
        Request(id=id, prompt=user(_asked(questions[id], answers[id])))
        for id in (row["id"] for row in suite.items if row["official"] is None)
        if id in answers
    ]
    judged = judge.judge(bench.key, requests, holds)
    items: list[Row] = []
    for row in suite.items:
        question, replies = questions[row["id"]], judged.texts.get(row["id"], [])
        found = [_said(bench, question, reply) for reply in replies]
        said = Counter(found).most_common(1)[0][0] if found else row["official"]
        right = row["correct_official"] if not found else bench.right(question, said)
        items.append({**row, "replies": replies, "judged": said, "correct_judged": right})
    metrics = suite.metrics | judged_metrics(bench.metrics, items)
    told = judged.told | {"asked": hashlib.sha256(PROMPT.encode()).hexdigest()}
    method = f"{suite.method}; judged: official, and a language model where it cannot read"
    return replace(suite, items=items, metrics=metrics, judge=told, method=method)


def _asked(question: Question, answer: str) -> str:
    code = code_for(question.text, answer)
    if question.options:
        form = f"one of {', '.join(question.options)}, or none"
    elif question.truth in ("yes", "no"):
        form = "yes, no or none"
    else:
        form = "the answer alone, in the response's own words or number, or none"
    values = {
        "rule": RULE.format(code=code),
        "code": code,
        "question": question.text,
        "answer": answer,
        "form": form,
    }
    return re.sub(r"\{(rule|code|question|answer|form)\}", lambda place: values[place[1]], PROMPT)


def _line(reply: str) -> str | None:
    """What stands after "Answer:", where one line has that and no other says otherwise."""
    found = set(_LINE.findall(reply))
    return found.pop() if len(found) == 1 else None


def _none(reply: str) -> bool:
    return (_line(reply) or "").strip(" .*").lower() == "none"


def _said(bench: QuestionBench, question: Question, reply: str) -> str | None:
    line = _line(reply)
    if line is None or _none(reply):
        return None
    said = bench.read(question, line, "official")
    return bench.read(question, line, "strict") if said is None else said
