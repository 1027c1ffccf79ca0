"""MM-Vet (Yu et al., 2023, arXiv 2308.02490): open questions that take several abilities at once.

A judge gives each of 218 answers 0.0 to 1.0 for how right it is by the reference, in which <AND>
joins what must all be there, and <OR> what will do each by itself.

    score                 the mean
    score/<ability>       over the questions that take it: rec, ocr, know, gen, spat, math
    integration/<a+b>     over the questions that take just these

    official  what stands before the reply's first blank, as a number of 0 to 1; any other reply
              counts 0, as in the released script when its last try fails
    strict    one line that is a number of 0 to 1, whatever else is said; others are left out

The paper's judge is gpt-4-0613 at temperature 0, with a prompt of seven examples, 3 new tokens, and
five runs. While a reply begins with no number of 0 to 1 the script asks again, with a further line
and rising temperature, up to five times. So it is here, up to `tries` times, with the same words:
the official reading says whether a reply will do, and where strict cannot read that one it leaves
the answer out. The script takes "nan" for a number, which makes its total one too; here it is none.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

from evals.base import Row, text_field
from evals.judged import JudgedBench, disagreement, judged_rules, score_of, unjudged
from evals.judging import Holds
from evals.questions import READINGS, Question, Reading, by_category
from evals.rules import Metric
from evals.sources import of_kind, read_json
from evals.stats import Ratio
from mmalign.errors import DataError
from mmalign.records import Media

_NUMBER_LINE = re.compile(r"^[ \t]*(\d+(?:\.\d+)?)[ \t]*$", re.MULTILINE)


class MmVet(JudgedBench):
    """data: the released mm-vet.json, by id: imagename, question, answer, capability.

    images: the folder of its pictures. judge_prompt has the usual places; the released prompt ends
    in a line "{question} | {reference} | {answer} | ".
    """

    name: Literal["mm_vet"] = "mm_vet"
    images: Path | None = None
    data: Path

    method: ClassVar[str] = (
        "official: the number before the first blank, 0 without; strict: one line that is a number"
    )
    default_prompt: ClassVar[str] = """\
A vision-language model was asked about a picture that you do not see. Judge how right its answer \
is by the reference answer, from 0.0 (all wrong) to 1.0 (all right) in steps of 0.1.

<AND> in the reference joins parts that must all be in the answer; with some of them it is partly \
right. <OR> joins parts of which any one is enough. What the answer says beyond the reference \
neither helps nor harms, unless it contradicts it. Other words for the same are as good.

{rule}

[BEGIN question {code}]
{question}
[END question {code}]

[BEGIN reference answer {code}]
{reference}
[END reference answer {code}]

[BEGIN answer to be judged {code}]
{answer}
[END answer to be judged {code}]

Reply with one line, which holds the number and nothing else, such as 0.4"""

    def load(self) -> list[Question]:
        """One question for each key of the file."""
        questions: list[Question] = []
        for id, row in read_json(self.data, dict).items():
            where = f"{self.data}, {id}"
            of_kind(row, dict, where)
            takes = of_kind(row.get("capability"), list, f"{where}, capability")
            if not takes or not all(isinstance(one, str) for one in takes):
                raise DataError("names no capability", where=where, got=takes)
            answer = text_field(row, "answer", where)
            questions.append(
                Question(
                    id=id,
                    text=text_field(row, "question", where),
                    # As the released script sets it, for the judge to read.
                    truth=answer.replace("<AND>", " <AND> ").replace("<OR>", " <OR> "),
                    categories=tuple(dict.fromkeys(takes)),
                    images=(Media(path=text_field(row, "imagename", where)),),
                )
            )
        return questions

    def read_verdict(self, question: Question, reply: str, reading: Reading) -> float | None:
        """0.0 to 1.0."""
        if reading == "strict":
            lines = _NUMBER_LINE.findall(reply)
            return _share(lines[0]) if len(lines) == 1 else None
        return _official(reply)

    def reader(self) -> Holds:
        """Whether (question id, reply) gives a number under the official reading, as released."""
        return lambda _, reply: _official(reply) is not None

    def metrics(self, items: Sequence[Row]) -> dict[str, Ratio]:
        """The metrics above."""
        return metrics(items)


def metrics(items: Sequence[Row]) -> dict[str, Ratio]:
    """Both readings' scores, the official one by ability and by what is taken together.

    A question counts for each ability that it takes. An unanswered one has 0 officially.
    """
    found = {f"{reading}/score": score_of(items, reading) for reading in READINGS}
    whole = found["official/score"]
    together = [{"categories": ["+".join(sorted(row["categories"]))]} for row in items]
    found |= by_category(items, "official/score", whole)
    found |= by_category(together, "official/integration", whole)
    found["unjudged_rate"] = unjudged(items)
    found["judge_disagreement"] = disagreement(items)
    return found


def _official(reply: str) -> float | None:
    return _share(reply.split(" ")[0].strip())


def _share(text: str) -> float | None:
    """A number of 0 to 1; None for all else."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if 0.0 <= number <= 1.0 else None


RULES = judged_rules(
    metrics,
    ("official/score", "strict/score"),
    shown=(
        Metric("official/score", "score", "higher"),
        Metric("strict/score", "score, strict", "higher"),
    ),
    meaning="MM-Vet asks questions that take several abilities, and a language model says how "
    "right each answer is, from 0 to 100.",
)
