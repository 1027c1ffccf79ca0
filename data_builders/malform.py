"""The form of a response, broken or completed without a change of its words.

Form is what `mmalign.think.parts_of` reads. White space beside tags may change, nothing else may
but where a function says so. What was broken once is not broken further by the same function.
"""

from __future__ import annotations

import re
from typing import Literal, get_args

from mmalign.sentences import split_sentences
from mmalign.think import TAGS, parts_of

# Four of SPECS's five kinds of corruption; the fifth is not told, and unclosed_think is ours.
Kind = Literal[
    "strip_all_tags", "strip_answer_tags", "shifted_tags", "plain_words", "unclosed_think"
]
KINDS: tuple[Kind, ...] = get_args(Kind)

_TAG = re.compile("|".join(map(re.escape, TAGS)))


def malformed(text: str, kind: Kind) -> str:
    """A well-formed response with its form broken in this way."""
    match kind:
        case "strip_all_tags":
            return strip_all_tags(text)
        case "strip_answer_tags":
            return strip_answer_tags(text)
        case "shifted_tags":
            return shifted_tags(text)
        case "plain_words":
            return plain_words(text)
        case "unclosed_think":
            return unclosed_think(text)


def strip_all_tags(text: str) -> str:
    """No tags at all: plain text, whose answer is then only to be found in a box."""
    return _without(text, *TAGS)


def strip_answer_tags(text: str) -> str:
    """The thinking in its block, and the answer in none."""
    return _without(text, "<answer>", "</answer>")


def shifted_tags(text: str) -> str:
    """The thinking ends where the answer has begun: `<think> … <answer> </think> … </answer>`."""
    return re.sub(r"</think>(\s*)<answer>", r"<answer>\1</think>", text)


def plain_words(text: str) -> str:
    """No tags, and the words "Answer:" where the answer begins."""
    return _without(re.sub(r"<answer>\s*", "Answer: ", text), *TAGS)


def unclosed_think(text: str) -> str:
    """The thinking is never closed."""
    return _without(text, "</think>")


def completed(text: str) -> str | None:
    """The response with tags added or moved so that it is well formed, or None.

    The answer begins at <answer>, or after </think>, or without either with the last sentence,
    where that holds a box. None where that is not told, a tag comes twice or too early, text
    follows </answer>, or a block would be empty.
    """
    tags = {match[0]: match for match in _TAG.finditer(text)}
    if _TAG.findall(text) != [tag for tag in TAGS if tag in tags]:
        return None
    if "</answer>" in tags and text[tags["</answer>"].end() :].strip():
        return None
    if "<answer>" in tags:
        begin = tags["<answer>"].start()
    elif "</think>" in tags:
        begin = tags["</think>"].end()
    else:
        last = split_sentences(text.rstrip())[-1:]
        if not last or "\\boxed" not in last[0]:
            return None
        begin = len(text.rstrip()) - len(last[0])
    think, answer = _without(text[:begin], *TAGS), _without(text[begin:], *TAGS)
    made = f"<think> {think} </think>\n<answer> {answer} </answer>"
    return made if parts_of(made).well_formed else None


def _without(text: str, *tags: str) -> str:
    """The text without these tags; a line break beside one stays, other white space is a blank."""
    tag = "|".join(map(re.escape, tags))
    broken = re.sub(rf"\s*(?:(?:{tag})\s*)+", lambda run: "\n" if "\n" in run[0] else " ", text)
    return broken.strip()
