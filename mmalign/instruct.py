"""Ask for the form of an answer: an instruction at the end of a prompt.

Pairs, rollouts and evaluations that go together must ask alike, word by word.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mmalign.errors import DataError
from mmalign.records import Block, Message

# SPECS's own words are not published; this asks for what its figure shows.
FORM = (
    "First think about the question step by step, then answer it. Write the thinking between "
    "<think> and </think>, then the answer between <answer> and </answer>, with the final result "
    "in \\boxed{}: <think> the thinking </think> <answer> the answer is \\boxed{…} </answer>"
)


def instructed(prompt: Sequence[Message], instruction: str) -> tuple[Message, ...]:
    """The prompt with the instruction on a new line at its end.

    A prompt that ends with it already stays as it is, so that asking twice asks once. Raises
    DataError where the last turn is not the user's.
    """
    if not prompt or prompt[-1].role != "user":
        raise DataError(
            "a prompt that does not end with a user's turn cannot be given an instruction",
            got=prompt[-1].role if prompt else "no messages",
        )
    *before, last = prompt
    content = last.content
    if content and content[-1].type == "text":
        if content[-1].text.rstrip().endswith(instruction.rstrip()):
            return tuple(prompt)
        text = f"{content[-1].text}\n{instruction}"
        content = (*content[:-1], replace(content[-1], text=text))
    else:
        content = (*content, Block(type="text", text=instruction))
    return (*before, replace(last, content=content))
