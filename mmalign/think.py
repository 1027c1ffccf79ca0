"""The form `<think>…</think><answer>…</answer>`, and the answer that a response gives.

Where we deviate from EasyR1's released `r1v` reward: white space around the two blocks is allowed,
an answer may have several lines, a second block of either kind breaks the form, and what stands in
a box inside the answer block is the answer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_TAG = re.compile(r"<(/?)(think|answer)>")
# In the order of the form.
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_BOX = re.compile(r"\\boxed\s*\{")


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What a response thinks and answers, stripped, and what is wrong with its form.

    `think` and `answer` are the content of the one block of that kind, None where there is none or
    more than one. `problem` is the first thing wrong, or "" where the form holds: no_tags, and then
    of think before answer no_think, two_thinks, unclosed_think, unopened_think, and no_answer, …;
    then wrong_order, text_outside, empty_think, empty_answer.
    """

    think: str | None
    answer: str | None
    problem: str

    @property
    def well_formed(self) -> bool:
        """Exactly one think block, then one answer block, both with text, and nothing else."""
        return not self.problem


def parts_of(text: str) -> Parts:
    """Read a response of the form `<think>…</think> <answer>…</answer>`.

    White space may stand around the blocks and between them. Tags are matched as they are spelled:
    `<Think>` and `< think >` are text. A tag that is mentioned counts as a tag, so a response that
    repeats the prompt's description of the form is not well formed.
    """
    think, answer = _block(text, "think"), _block(text, "answer")
    return Parts(think=think, answer=answer, problem=_problem(text, think, answer))


def final_answer(text: str) -> str | None:
    """The answer that a response gives, stripped, or None; never the empty text.

    It is the content of the single answer block, or of the last box in that block where it has one.
    Without a single answer block it is the content of the last `\\boxed{…}`. A last box that is not
    closed is None: the answer was cut off, and an earlier box is none.
    """
    answer = parts_of(text).answer
    given = text if answer is None else answer
    if _BOX.search(given):
        given = boxed(given)
    elif answer is None:
        return None
    return given or None


def boxed(text: str) -> str | None:
    """The content of the last `\\boxed{…}`, stripped; None without one, or where it is not closed.

    Braces are matched; `\\{` and `\\}` are text. Linear in the length of the text.
    """
    starts = [match.end() for match in _BOX.finditer(text)]
    if not starts:
        return None
    end = closing_brace(text, starts[-1])
    return None if end is None else text[starts[-1] : end].strip()


def closing_brace(text: str, start: int) -> int | None:
    """Where the brace that is open before `start` closes, or None."""
    depth = 1
    for match in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):
        if match[0] in "{}":
            depth += 1 if match[0] == "{" else -1
            if depth == 0:
                return match.start()
    return None


def _block(text: str, name: str) -> str | None:
    """The content of the one block of a kind; stray tags of the other kind are no part of it."""
    opened, closed = f"<{name}>", f"</{name}>"
    if text.count(opened) != 1 or text.count(closed) != 1:
        return None
    start, end = text.index(opened) + len(opened), text.index(closed)
    return _TAG.sub("", text[start:end]).strip() if start <= end else None


def _problem(text: str, think: str | None, answer: str | None) -> str:
    tags = [match[0] for match in _TAG.finditer(text)]
    if not tags:
        return "no_tags"
    for name in ("think", "answer"):
        opened, closed = tags.count(f"<{name}>"), tags.count(f"</{name}>")
        if not opened and not closed:
            return f"no_{name}"
        if opened > 1 or closed > 1:
            return f"two_{name}s"
        if not closed:
            return f"unclosed_{name}"
        if not opened:
            return f"unopened_{name}"
    if tuple(tags) != TAGS:
        return "wrong_order"
    if "".join(re.split(r"<think>.*</think>|<answer>.*</answer>", text, flags=re.DOTALL)).strip():
        return "text_outside"
    if not think:
        return "empty_think"
    return "" if answer else "empty_answer"
