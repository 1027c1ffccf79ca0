"""Phrases that differ between two responses: found by words, kept as characters, used as tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import SequenceMatcher

from mmalign.records import Span

_WORDS = re.compile(r"\w+|[^\w\s]")


def differing_spans(chosen: str, rejected: str) -> tuple[tuple[Span, ...], tuple[Span, ...]]:
    """The phrases in which two responses differ, word by word: (chosen's, rejected's).

    Phrases are numbered from 1 in order; a phrase that only one side has (an insertion or a
    deletion) has no span on the other. A span covers whole words and the blanks between them.
    RRPO's released VideoChat2 code drops one-sided phrases and lets difflib's auto-junk skip
    frequent words of long texts; neither happens here.
    """
    ours, theirs = (list(_WORDS.finditer(text)) for text in (chosen, rejected))
    words = [[match.group() for match in side] for side in (ours, theirs)]
    matcher = SequenceMatcher(None, *words, autojunk=False)
    spans: tuple[list[Span], list[Span]] = ([], [])
    changes = [code for code in matcher.get_opcodes() if code[0] != "equal"]
    for phrase, (_, i, j, k, m) in enumerate(changes, start=1):
        for side, matches in zip(spans, (ours[i:j], theirs[k:m]), strict=True):
            if matches:
                side.append(Span(start=matches[0].start(), end=matches[-1].end(), phrase=phrase))
    return tuple(spans[0]), tuple(spans[1])


def one_sided(chosen: Sequence[Span], rejected: Sequence[Span]) -> int:
    """How many phrases only one of the responses has."""
    return len({span.phrase for span in chosen} ^ {span.phrase for span in rejected})


def marked_tokens(
    spans: Sequence[Span], offsets: Sequence[tuple[int, int]], num_characters: int
) -> list[bool]:
    """Which response tokens lie in a span, the end-of-turn token included as the last of them.

    offsets: characters [start, end) of each token but the end-of-turn one. A token is marked if it
    overlaps a span. The end-of-turn token holds no characters; it is marked where one span covers
    the whole text, as then the whole response is the phrase.
    """
    tokens = [
        any(span.start < end and start < span.end for span in spans) for start, end in offsets
    ]
    whole = any(span.start == 0 and span.end >= num_characters for span in spans)
    return [*tokens, whole]
