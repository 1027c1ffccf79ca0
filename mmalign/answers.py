"""Read a short answer out of free text. Every parser returns None when it cannot tell."""

from __future__ import annotations

import re
from typing import Literal

YesNo = Literal["yes", "no"]

_LEAD = r"^\W*(?:(?:(?:so|thus|the|my|final|correct)\s+)*answer(?:\s+is)?\W+)?"
# "No" also begins "No dogs", "No one" and "No doubt", which answer nothing by themselves.
_NO = r"no(?=\s*(?:$|[^\w\s-]|-\W|(?:there|it|this|that|the|i|we|you|they|he|she)\b))"
_STATEMENT = re.compile(rf"{_LEAD}(yes(?!-?\w)|{_NO})", re.IGNORECASE)
_LOOKS = re.compile(r"\\(?:text|textbf|textit|textrm|mathbf|mathrm|mathit|mbox)\s*\{([^{}]*)\}")
_EITHER = re.compile(r"\b(?:yes|no)\b", re.IGNORECASE)


def yes_no(text: str) -> YesNo | None:
    """The yes or no that a text states, or None.

    A sentence states one when it opens with the word, or with "the answer is" and the word, and
    does not hold the other word too. Sentences that disagree make None. "There is no dog" is None:
    whether that says no depends on the question. "Yes, but no cat" is None as well.
    """
    stated: set[str] = set()
    for sentence in re.split(r"[.!?;\n]", text):
        if _STATEMENT.match(sentence):
            stated |= {word.lower() for word in _EITHER.findall(sentence)}
    if stated == {"yes"}:
        return "yes"
    return "no" if stated == {"no"} else None


def option_letter(text: str, options: str = "ABCD") -> str | None:
    """The one option letter that a text gives: "B", "(B)", "B. a cat", "The answer is B.", or None.

    The letter must stand in capitals at the start or after "answer is", and be followed by
    punctuation or the end: "A cat" is no answer. Any other letter given so anywhere makes None.
    """
    bare = rf"(?<!\w)[{re.escape(options)}](?=\s*$|[).:,\]*])"
    given = re.match(rf"(?i:{_LEAD}(?:option\W+)?)({bare})", text.strip())
    if given is None or set(re.findall(bare, text)) != {given[1]}:
        return None
    return given[1]


def unwrapped(text: str) -> str:
    """A text without the LaTeX commands that say how letters look: `\\text{cat}` is `cat`."""
    return _LOOKS.sub(r"\1", text)
