"""MATH-Vision (Wang et al., 2024, arXiv 2402.14804): competition problems with a picture.

`official/` follows the released evaluate.py, which needs no language model: it looks for a letter
at the end or the start, a number behind "is ", the text behind "the answer is", or the last box,
rewrites it, and compares it with the letter and, for a choice, also with the option's text; as
texts, else as numbers rounded to two decimal places. So "0.334" is 1/3, and 3.14 is \\pi. Its
faults are kept: without a box and without "answer is" the whole response is compared, what stands
before the last "=" is dropped, and "km" and "units" vanish out of any word.

In a list numbers are compared as they print, and "2.0" is the integer 2, "6/2" the float 3.0: so
(1,2) is (1.0,2.0), and (3,1) is not (6/2,1). \\frac12 has no value: it is not \\frac{1}{2}.

Our deviation: the script evaluates by latex2sympy2 and Python's `eval`, which runs what a response
says. Here latex_numbers.py reads numbers, fractions, roots, powers and pi; what else the script
could have evaluated (sin 30, a logarithm, 3!) is no number. lmms-eval's copy of the script lacks
the import that gives roots and pi a value, and leaves indices of roots alone; here they are as in
the repository mathllm/MATH-V.

Strict is evals.benchmarks.math_answers: one option, or what math-verify finds equal.
"""

from __future__ import annotations

import re
from typing import ClassVar, Literal

from evals.base import QuestionPrompt, text_field
from evals.benchmarks.latex_numbers import value_of
from evals.benchmarks.math_questions import MathBench
from evals.questions import Question, metrics, question_rules
from evals.sources import of_kind
from mmalign.errors import DataError

_ANNOUNCERS = (
    "the final answer is",
    "the answer is",
    "the correct answer is",
    "the answer should be",
)
# In the script's order. Blanks are gone before the units, so that "\\text{ cm}" is "{cm}".
_DROPPED = (
    (" ", ""),
    ("\\,", ""),
    ("∞", "\\infty"),
    ("+\\infty", "\\infty"),
    ("\\\\", "\\"),
    ("\n", ""),
    ("\\text", ""),
    ("\\mbox", ""),
    ("bmatrix", "pmatrix"),
    ("\\left", ""),
    ("\\right", ""),
    ("^{\\circ}", ""),
    ("^\\circ", ""),
    ("{m}^3", ""),
    ("m^3", ""),
    ("{units}", ""),
    ("units", ""),
    ("{km}", ""),
    ("km", ""),
    ("\\!", ""),
    ("\\\\", "\\"),
    ("tfrac", "frac"),
    ("dfrac", "frac"),
    ("\\left", ""),
    ("\\right", ""),
    ("^{\\circ}", ""),
    ("^\\circ", ""),
    ("\\$", ""),
    ("$", ""),
    ("\\%", ""),
    ("{.", "{0."),
)

# As int prints them: neither "01" nor "-0".
_A_OVER_B = re.compile(r"\A(0|-?[1-9][0-9]*)/(0|-?[1-9][0-9]*)\Z")


class MathVision(MathBench):
    """data: the released test.jsonl or testmini.jsonl, or parquet files or a hub name.

    images: the released repository's folder, in which the pictures lie under `images/`.
    """

    name: Literal["mathvision"] = "mathvision"
    hub_split: str = "test"
    # Of the released models/Qwen-VL.py.
    prompt: QuestionPrompt = (
        'Please solve the problem step by step and put your answer in one "\\boxed{}". If it is a '
        'multiple choice question, only one letter is allowed in the "\\boxed{}".\n{question}'
    )

    method: ClassVar[str] = (
        "official: the released script; strict: the box, answer block or last line that gives an "
        "option, or what math-verify finds equal"
    )

    def load(self) -> list[Question]:
        """The questions, in the file's order; categories are the subject and the level."""
        found: list[Question] = []
        for where, row in self.rows():
            texts = of_kind(row.get("options"), list, f"{where}, options")
            options = {chr(ord("A") + place): str(text) for place, text in enumerate(texts)}
            truth = text_field(row, "answer", where)
            if options and truth not in options:
                wanted = ", ".join(options)
                raise DataError("answer is no option", where=where, got=truth, wanted=wanted)
            listed = "" if "".join(options.values()) == "".join(options) else _listed(options)
            found.append(
                Question(
                    id=text_field(row, "id", where),
                    text=f"{text_field(row, 'question', where)}\n{listed}".rstrip("\n"),
                    truth=truth,
                    categories=(text_field(row, "subject", where), f"level {row.get('level')}"),
                    images=self.picture(row, where, "decoded_image"),
                    options=options,
                )
            )
        return found

    def by_script(self, question: Question, answer: str) -> str | None:
        """The truth where the script finds the answer right, else what it found."""
        found, truth = extracted(answer), str(question.truth)
        right = equal(truth, found) or equal(question.options.get(truth, ""), found)
        return truth if right else found or None


def extracted(response: str) -> str:
    """The answer that the script finds in a response, rewritten."""
    text = response.strip()
    for letter in "ABCDE":
        ends = (f" {letter}.", f" ({letter}).")
        begins = (f"{letter}\n", f"({letter})\n", f"({letter}) {letter}\n")
        if text.endswith(ends) or text.startswith(begins):
            text = letter
    behind = text.split("is ")[-1].rstrip(".")
    if _is_number(behind):
        text = behind
    if "oxed{" not in text:
        for announcer in _ANNOUNCERS:
            for spelled in (announcer, announcer.replace("the", "The")):
                announced = spelled in text
                text = text.split(spelled)[-1].strip()
                if announced:
                    text = text.split("\n")[0].split(". ")[0]
    elif text.count("oxed{") > 1:
        text = "\\boxed{" + text.split("oxed{")[-1]
    text = rewritten(text)
    for left, right in ("()", "{}"):
        for letter in "abcde":
            text = text.replace(f"{left}{letter}{right}", letter)
    return text.rstrip(".").lstrip(":").strip()


def rewritten(text: str) -> str:
    """A text, or the content of its box, as the script rewrites it before it compares."""
    text = text.lower().replace("{}", "")
    boxes = re.findall(r"oxed{(.*)}", text, re.DOTALL)
    text = boxes[-1] if boxes else text
    closed, opened = text.find("}"), text.find("{")
    if closed != -1 and (opened == -1 or closed < opened):
        text = text[:closed]
    text = text.split("=")[-1].split("\\approx")[-1]
    for dropped, instead in _DROPPED:
        text = text.replace(dropped, instead)
    text = f"0{text}" if text.startswith(".") else text
    if "sqrt" in text:
        text = re.sub(r"\\sqrt(?!\{|\\sqrt)(.)", r"\\sqrt{\1}", text)
        text = _braced_fractions(text)
    if text == "0.5":
        return "\\frac{1}{2}"
    return _A_OVER_B.sub(r"\\frac{\1}{\2}", text)


def equal(truth: str, said: str) -> bool:
    """Whether the script finds them equal: as texts, as lists of numbers, or as two numbers."""
    truth, said = truth.lower(), said.lower()
    if not truth.replace(" ", "") or not said.replace(" ", ""):
        return False
    if truth.strip() == said.strip() or _members(truth) == _members(said):
        return True
    wanted, given = value_of(truth), value_of(said)
    return wanted is not None and given is not None and round(wanted, 2) == round(given, 2)


def _members(text: str) -> str:
    """A list in brackets, its numbers as Python prints their values to two places, or the text."""
    members = text[1:-1].split(",")
    if text[0] + text[-1] not in ("()", "[]") or len(members) < 2:
        return text
    told: list[str] = []
    for member in members:
        if "infty" in member or member in ("a", "-a"):
            told.append(member)
        elif (value := value_of(member)) is not None:
            told.append(str(round(value, 2)))
        else:
            return text
    return f"{text[0]}{','.join(told)}{text[-1]}"


def _braced_fractions(text: str) -> str:
    """\\frac12 as \\frac{1}{2}; the script does so only where there is a root as well."""
    first, *parts = text.split("\\frac")
    found = first
    for part in parts:
        if part.startswith("{"):
            found += f"\\frac{part}"
        elif len(part) < 2:
            return text
        elif part[1] == "{":
            found += f"\\frac{{{part[0]}}}{part[1:]}"
        else:
            found += f"\\frac{{{part[0]}}}{{{part[1]}}}{part[2:]}"
    return found


def _listed(options: dict[str, str]) -> str:
    return "".join(f"({letter}) {text}\n" for letter, text in options.items())


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


RULES = question_rules(
    metrics,
    meaning="Official is the released script's rule; strict reads the one answer that a response "
    "gives, an option or what math-verify finds equal.",
)
