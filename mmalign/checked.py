"""The result of comparing an answer with the truth, and what every verifier is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Checked:
    """Whether an answer is correct, None where that cannot be told, and why, in a word or two.

    Reasons are few, so that they can be counted: equal, different, unread (the answer says nothing
    that this verifier reads), too_long, no_answer; of mathematics also truth_unread, timeout,
    failed and crashed.
    """

    correct: bool | None
    reason: str


class Verifier(Protocol):
    """Compares an answer with the truth; the question is there for what it offers to choose."""

    def __call__(self, answer: str, truth: str, question: str) -> Checked:
        """Never raises for what an answer says."""
        ...
