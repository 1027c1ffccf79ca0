"""Are two mathematical expressions equal? math-verify's judgement, in a process that may hang.

sympy may take forever, or all memory, over a short expression, and math-verify's own time limits
work in a program's main thread only. So it runs in a child, which is killed when it is late.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import re
from typing import Any

from mmalign.checked import Checked
from mmalign.errors import MissingExtra
from mmalign.guard import Channel, Crashed, Guarded, Hung, end_after

MAX_MEMORY_BYTES = 2 * 2**30

_LEAD = re.compile(r"^\W*(?:(?:so|thus|hence|the|my|final|correct)\s+)*answer\s*(?:is|:)\s*", re.I)
_MIXED = re.compile(r"(?<![\w.])(\d+)\s+(\d+)\s*/\s*(\d+)(?![\w.])")
_SCIENTIFIC = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)e([-+]?\d+)(?![\w.])", re.I)
_COMMAND = re.compile(
    r"\\(?:text|textbf|mathbf|mathrm|mbox|operatorname|begin|end)\s*\{[^{}]*\}|\\[A-Za-z]+"
)
_WORD = re.compile(r"[A-Za-z]{3}")


class MathVerifier:
    """A verifier whose child is kept over many checks, and replaced when it dies or is late.

    Equal is what math-verify finds so: 1/2 and 0.5, 2/4 and 1/2, \\sqrt{8} and 2\\sqrt{2}, x = 5
    for the truth 5, 0.333333 for 1/3 (six decimals), 50% for both 50 and 0.5, and the same set in
    any order. (1,2) is neither [1,2] nor (2,1). Words are not compared: sympy takes "cat" and "act"
    for the same product of letters, so words are unread unless they are the truth's own text.
    """

    def __init__(self, *, timeout_seconds: float = 5.0) -> None:
        self.timeout_seconds = timeout_seconds
        # What its child must do by itself if this process is killed first.
        settings = 2 * timeout_seconds + 5
        self._guarded = Guarded(f"{__name__}:serve", settings, what="compares mathematics")
        # Rollouts of one group mostly give the same answer, also the same one that hangs.
        self._compare = functools.lru_cache(maxsize=4096)(self._ask)

    def __call__(self, answer: str, truth: str, question: str = "") -> Checked:
        """Whether the two are equal; None where that cannot be told in time, or at all."""
        if answer.strip() == truth.strip():
            return Checked(True, "equal")
        given, wanted = legible(answer), legible(truth)
        if given is None or wanted is None:
            return Checked(None, "unread" if wanted is not None else "truth_unread")
        return Checked(*self._compare(given, wanted))

    def close(self) -> None:
        """End the child. A verifier that is used again starts another one."""
        self._guarded.close()

    def _ask(self, answer: str, truth: str) -> tuple[bool | None, str]:
        check_installed()
        try:
            return self._guarded.ask((answer, truth), self.timeout_seconds)
        except Hung:
            return None, "timeout"
        except Crashed:
            return None, "crashed"


def check_installed() -> None:
    """Raise MissingExtra where math-verify is not installed."""
    if importlib.util.find_spec("math_verify") is None:
        raise MissingExtra(
            "the verifier math needs the package math-verify",
            fix="install it: pip install 'mmalign[math]'",
        )


def legible(text: str) -> str | None:
    """An expression as math-verify reads it right, or None where it would read something else.

    It adds up what stands side by side ("7 3/4" and "1 2" become 2.5 and 3), takes 1e3 for a
    product with Euler's number, and finds a box's end at the last brace.
    """
    text = _LEAD.sub("", text.strip()).strip().removesuffix(".").strip()
    for start, end in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
        inner = text.removeprefix(start).removesuffix(end)
        if len(text) >= len(start + end) and text == f"{start}{inner}{end}":
            text = inner.strip()
    text = _MIXED.sub(r"\1\\frac{\2}{\3}", text)
    text = _SCIENTIFIC.sub(r"\1\\cdot 10^{\2}", text)
    text = re.sub(r"(?<![A-Za-z\\])pi(?![A-Za-z])", r"\\pi ", text)
    if not text or re.search(r"\d\s+\d", text) or not _balanced(text):
        return None
    return text


def serve(channel: Channel) -> None:
    """What the child runs: one comparison after the other, until the channel closes."""
    import logging
    import resource

    end_after_seconds: float = channel.receive()
    # Not every system has such a limit; the time limit holds everywhere.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    # It warns that no time limit of its own is set.
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    import math_verify  # noqa: F401  before the first task, whose time is limited

    channel.send(None)
    while True:
        answer, truth = channel.receive()
        end_after(end_after_seconds)
        channel.give_back_shared(truncate=False)
        channel.send(_compared(answer, truth))
        end_after(0)


def _compared(answer: str, truth: str) -> tuple[bool | None, str]:
    import math_verify

    try:
        wanted, given = _parsed(truth), _parsed(answer)
        if wanted is None:
            return None, "truth_unread"
        if given is None:
            return None, "unread"
        equal = math_verify.verify(wanted, given, timeout_seconds=None, raise_on_error=True)
    except Exception:
        # Whatever sympy raises over an expression, MemoryError too: we cannot tell.
        return None, "failed"
    return (True, "equal") if equal else (False, "different")


def _parsed(text: str) -> list[Any] | None:
    """What math-verify reads, or None where that is no expression.

    Only its LaTeX grammar is used: its other reader hands text to sympy's, which runs it as code.
    """
    from math_verify import LatexExtractionConfig, parse

    config = [LatexExtractionConfig(boxed_match_priority=0)]
    found = parse(f"\\boxed{{{text}}}", config, parsing_timeout=0, raise_on_error=True)
    # [expression, its normalised text], or the text alone where it did not parse.
    if len(found) != 2 or _WORD.search(_COMMAND.sub(" ", str(found[1]))):
        return None
    return found


def _balanced(text: str) -> bool:
    depth = 0
    for brace in re.findall(r"\\.|[{}]", text, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(brace, 0)
        if depth < 0:
            return False
    return depth == 0
