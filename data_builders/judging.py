"""What builders share that ask a judge: the question in words, the budget, rows that cannot be."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TypeVar

from mmalign.errors import MediaError
from mmalign.prepare import RowDropped
from mmalign.records import Message, prompt_text
from mmalign.sentences import split_sentences

T = TypeVar("T")
R = TypeVar("R")

# Signs of scripts without blanks are a word each.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\s\u3040-\u30ff\u3400-\u9fff]+")


def shortened(critique: str, max_words: int) -> str | None:
    """The critique up to the end of the last sentence within `max_words` words.

    None where not even its first sentence is that short. Words stand between blanks; of Chinese
    and Japanese, every sign is one.
    """
    if len(_WORD.findall(critique)) <= max_words:
        return critique
    kept, num_words = [], 0
    for sentence in split_sentences(critique):
        num_words += len(_WORD.findall(sentence))
        if num_words > max_words:
            break
        kept.append(sentence)
    return "".join(kept).rstrip() or None


def question_of(prompt: Sequence[Message]) -> str:
    """What the judge is told was asked; of several turns each after the name of its role."""
    if len(prompt) == 1:
        return prompt_text(prompt)
    return "\n".join(f"{message.role}: {prompt_text([message])}" for message in prompt)


def asked(
    ask: Callable[[list[T]], list[R]],
    items: list[T],
    failed: Callable[[T, MediaError | RowDropped], R],
) -> list[R]:
    """Ask for all at once; where one cannot be asked at all, halve down to it and keep the rest."""
    try:
        return ask(items)
    except (MediaError, RowDropped) as error:
        if len(items) == 1:
            return [failed(items[0], error)]
        half = len(items) // 2
        return asked(ask, items[:half], failed) + asked(ask, items[half:], failed)


def reason_of(error: MediaError | RowDropped) -> str:
    """A short name to count a refusal by."""
    return error.reason if isinstance(error, RowDropped) else "unreadable"
