"""GQA (Hudson & Manning, 2019, arXiv 1902.09506): questions made from scene graphs.

Official: equality, as in the released eval.py. It compares predictions as they are submitted; LLaVA
puts them into lower case and takes the full stops off their end first, and so is it done here.

Strict: a single line of at most 5 words is an answer, anything else is declined; answer and truth
are then rewritten as VQA's script does it (evals.benchmarks.vqa_words), so that "The cat" is "cat".

Of the released numbers, accuracy is here, and that of binary and open questions and of both kinds
of types, as categories. What needs all questions, not the balanced ones alone, or scene graphs is
left out: consistency, validity, plausibility, distribution, grounding.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from evals.base import text_field
from evals.benchmarks.vqa import ShortAnswers, id_field
from evals.benchmarks.vqa_words import official, short
from evals.questions import Question, Reading, metrics, question_rules
from evals.sources import of_kind, read_json

# What the file abbreviates.
_SEMANTIC = {
    "attr": "attribute",
    "cat": "category",
    "global": "scene",
    "obj": "object",
    "rel": "relation",
}


class Gqa(ShortAnswers):
    """questions: the released testdev_balanced_questions.json. images: the folder of its pictures.

    Of a file with all questions, only those of the balanced set are asked, as only they count.
    """

    name: Literal["gqa"] = "gqa"
    questions: Path

    method: ClassVar[str] = (
        "official: equal but for case and last full stops; strict: a line of at most 5 words, "
        "rewritten as VQA does"
    )

    def load(self) -> list[Question]:
        """The questions, in the file's order; binary or open, and their two types."""
        found: list[Question] = []
        for id, row in read_json(self.questions, dict).items():
            where = f"{self.questions}, question {id}"
            if of_kind(row, dict, where).get("isBalanced") is False:
                continue
            types = of_kind(row.get("types"), dict, f"{where}, types")
            structural = text_field(types, "structural", f"{where}, types")
            semantic = text_field(types, "semantic", f"{where}, types")
            image = id_field(row, "imageId", where)
            found.append(
                Question(
                    id=id,
                    text=text_field(row, "question", where),
                    truth=text_field(row, "answer", where),
                    categories=(
                        "open" if structural == "query" else "binary",
                        structural,
                        _SEMANTIC.get(semantic, semantic),
                    ),
                    images=(self.picture(row, f"{image}.jpg", where),),
                )
            )
        return found

    def read(self, question: Question, answer: str, reading: Reading) -> str | None:
        """The answer's words; the truth itself where the strict reading finds no difference."""
        if reading == "official":
            return answer.strip().rstrip(".").lower()
        if not short(answer, self.max_words):
            return None
        truth, said = str(question.truth), official(answer)
        return truth if said == official(truth) else said


RULES = question_rules(
    metrics,
    meaning="One answer is right, in a word or two. Strict takes only answers of a few words.",
)
