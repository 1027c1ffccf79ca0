"""Sentences of a response: where they end, and how one is cut or turned into its contrary."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator

# fmt: off
# A full stop after these words ends nothing.
_NEVER = frozenset((
    "e.g", "i.e", "eg", "ie", "cf", "vs", "viz", "approx", "ca", "dr", "mr", "mrs", "ms", "mx",
    "prof", "st", "mt", "fig", "figs", "eq", "vol", "pp", "ed", "eds", "gen", "gov", "rep", "sen",
    "rev", "hon", "capt", "col", "lt", "sgt",
))
# After these it does where the next word does not begin with a small letter.
_SOMETIMES = frozenset((
    "etc", "al", "a.m", "p.m", "u.s", "u.k", "u.s.a", "u.n", "e.u", "d.c", "inc", "ltd", "co",
    "corp", "jr", "sr", "dept", "ave", "blvd", "ft", "ph.d", "b.c", "a.d",
))
# fmt: on

_CLOSERS = "\"'”’)\\]*_»"
_BREAK = re.compile(
    rf"(?P<mark>[.!?…]+[{_CLOSERS}]*)\s+"  # a mark and the blanks after it
    r"|[。！？]+[”’」』）]*\s*"  # marks that need no blank after them
    r"|[\r\n]\s*"  # a line break
)
_LAST_WORD = re.compile(r"\S*\Z")
_ENDED = re.compile(rf"[.!?…。！？]+[{_CLOSERS}」』）]*$")


def split_sentences(text: str) -> list[str]:
    """Sentences with the blanks after them: "".join(split_sentences(text)) == text.

    A sentence ends at a run of . ! ? … (closing quotes, brackets and asterisks included) before a
    blank, at their East Asian forms, and at every line break, so that each line of a list is one.
    No end is the full stop of 3.5, of an abbreviation (e.g., Dr.), of a single capital (J. Smith,
    option B.), or of the number that opens a line (1. ). Blanks before the first sentence belong
    to it.
    """
    starts = [0, *_breaks(text), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(starts) if a < b]


def first_sentence(text: str, *, after: int = 0) -> tuple[str, bool]:
    """`text` up to the first sentence end that lies after character `after`, and whether it ended.

    Without such an end, all of it; that too has ended where it closes with a mark.
    """
    for place in _breaks(text):
        body = text[:place].rstrip()
        if len(body) > after:
            return body, True
    body = text.rstrip()
    return body, len(body) > after and _ENDED.search(body) is not None


def _breaks(text: str) -> Iterator[int]:
    """Where a new sentence begins, but for the first and for the text's end."""
    start = 0
    for match in _BREAK.finditer(text):
        place = match.end()
        if place == len(text) or not text[start:place].strip():
            continue
        if match["mark"] is None or _ends(text, start, match):
            yield place
            start = place


def _ends(text: str, start: int, match: re.Match[str]) -> bool:
    """Whether a mark with blanks after it ends the sentence that began at `start`."""
    blanks = text[match.end("mark") : match.end()]
    if match["mark"][0] != "." or match["mark"][1:2] == "." or "\n" in blanks or "\r" in blanks:
        return True
    before = text[start : match.start()]
    found = _LAST_WORD.search(before)
    word = (found.group() if found else "").lstrip("(\"'“‘[*_-•")
    if word.isdecimal() and before.strip("(\"'“‘[*_-•# \t\r\n") == word:
        return False
    if word.lower() in _SOMETIMES:
        return not text[match.end()].islower()
    return word.lower() not in _NEVER and not (len(word) == 1 and word.isupper())


_YES_NO = re.compile(r"(\s*)(Yes|yes|No|no)(?![\w'’-])")
_OTHER = {"Yes": "No", "yes": "no", "No": "Yes", "no": "yes"}


def swap_yes_no(sentence: str, rng: random.Random, probability: float = 0.5) -> str:
    """The sentence with its leading yes or no swapped for the other, with this probability.

    Whole words only: the published pattern lacks a word boundary and would also take Now, Not and
    Nothing. Case and blanks before the word stay.
    """
    match = _YES_NO.match(sentence)
    if match is None or rng.random() >= probability:
        return sentence
    return match[1] + _OTHER[match[2]] + sentence[match.end() :]


_WORD = re.compile(r"\S+")
_CLOSING = re.compile(r"(?<=\w)[.!?…。！？]+[\"'”’)\]*_]*$")


def cut_sentence(sentence: str, rng: random.Random, *, whole: bool = False) -> tuple[str, str]:
    """Prefix and rest of a sentence cut at random, both without the blanks at their ends.

    A cut lies before a word, or before the punctuation that closes the sentence, all equally
    likely: before the first word leaves no prefix, and there is always a rest. With `whole`, a
    sentence without closing punctuation may also stay uncut: a swapped "No" is worth keeping.
    """
    body = sentence.strip()
    cuts = [match.start() for match in _WORD.finditer(body)]
    if closing := _CLOSING.search(body):
        cuts.append(closing.start())
    elif whole:
        cuts.append(len(body))
    cut = rng.choice(cuts)
    return body[:cut].rstrip(), body[cut:]
