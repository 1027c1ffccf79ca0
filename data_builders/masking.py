"""Which words of an answer depend on the picture: replace them by `[MASK]`.

Re-Align (arXiv 2502.13146) asks a strong model to mask the objects, attributes and logical
relations of the chosen response. Where the world is small, a list of words does as well.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from mmalign.config import Strict
from mmalign.generate.base import Generator, Request, Sampling
from mmalign.records import Example, prompt_text, user

MASK = "[MASK]"

# Words that say little about a picture; all others are masked where a recipe names no words.
STOP_WORDS = frozenset(
    re.findall(
        r"\w+",
        "a about after also an and are as at be because been before being but by can could did do "
        "does each for from had has have he her hers him his how i if in into is it its itself "
        "just may me might more most my no nor not of on one or other our out over own same she "
        "should so some such than that the their them then there these they this those through "
        "to too under until up very was we were what when where which while who whom why will "
        "with would yes you your image picture photo photograph shows show shown depicts depict "
        "seen appears",
    )
)
_WORD = re.compile(r"\w+(?:['’-]\w+)*")

INSTRUCTION = """\
Below are a question about the image and its answer. Replace every word or phrase of the answer \
that names an object, an attribute or a logical relation in the image by {mask}. Leave all other \
words, their order and the punctuation exactly as they are. Write only the masked answer.

Question: {question}
Answer: {answer}
Masked answer:"""


@dataclass(frozen=True, slots=True)
class Masked:
    """A text with gaps: `segments` are the characters [start, end) of `chosen` that are masked.

    Example: Masked("a red cup.", ((2, 5),)), whose text is "a [MASK] cup."
    """

    chosen: str
    segments: tuple[tuple[int, int], ...]

    @property
    def pieces(self) -> list[str]:
        """What stays: one more piece than there are segments, the outer two perhaps empty."""
        edges = [0, *(edge for segment in self.segments for edge in segment), len(self.chosen)]
        return [self.chosen[a:b] for a, b in zip(edges[::2], edges[1::2], strict=True)]

    @property
    def text(self) -> str:
        """The chosen text with `[MASK]` for each segment."""
        return MASK.join(self.pieces)


@dataclass(frozen=True, slots=True)
class Refused:
    """Why a text could not be masked or completed; `reason` is counted, `detail` is read."""

    reason: str
    detail: str = ""


def locate(pieces: Sequence[str], text: str) -> tuple[tuple[int, int], ...] | None:
    """The gaps between `pieces` in `text`, or None where it is not those pieces with filled gaps.

    The first piece must start the text, the last must end it, and no gap may be empty.
    """
    first, *middle, last = pieces
    if not text.startswith(first):
        return None
    gaps, start = [], len(first)
    for piece in middle:
        # The first place that leaves a character for the gap: if any choice works, this one does.
        end = text.find(piece, start + 1)
        if end < 0:
            return None
        gaps.append((start, end))
        start = end + len(piece)
    end = len(text) - len(last)
    if end <= start or not text.endswith(last):
        return None
    return (*gaps, (start, end))


class RuleMasker(Strict):
    """Mask the given words, or every word that is not a stop word; no model is asked.

    Masked words with nothing but blanks between them become one segment.
    """

    name: Literal["rule"] = "rule"
    words: tuple[str, ...] | None = None

    def mask(
        self,
        examples: Sequence[Example],
        generator: Generator,
        sampling: Sampling,
        media_root: Path,
    ) -> list[Masked | Refused]:
        """Mask every example's answer."""
        return [self._mask(example.answer or "") for example in examples]

    def _mask(self, chosen: str) -> Masked | Refused:
        wanted = None if self.words is None else {word.lower() for word in self.words}
        segments: list[tuple[int, int]] = []
        for match in _WORD.finditer(chosen):
            word = match.group().lower()
            if word in STOP_WORDS if wanted is None else word not in wanted:
                continue
            start, end = match.span()
            if segments and not chosen[segments[-1][1] : start].strip():
                start = segments.pop()[0]
            segments.append((start, end))
        return Masked(chosen, tuple(segments)) if segments else Refused("nothing_to_mask", chosen)


class ModelMasker(Strict):
    """Ask the model to mask the answer in view of the picture, and check that it did only that."""

    name: Literal["model"] = "model"

    def mask(
        self,
        examples: Sequence[Example],
        generator: Generator,
        sampling: Sampling,
        media_root: Path,
    ) -> list[Masked | Refused]:
        """Mask every example's answer; a reply that is not the answer with gaps is refused.

        So is one that the token limit cut: a mask at its end would align with the whole rest.
        """
        requests = [
            Request(
                id=f"{example.id}/mask",
                prompt=user(
                    INSTRUCTION.format(
                        mask=MASK, question=prompt_text(example.prompt), answer=example.answer
                    ),
                    images=len(example.images),
                ),
                images=example.images,
                media_root=media_root,
            )
            for example in examples
        ]
        replies = generator.generate(requests, sampling)
        return [
            read_masked(reply.text, example.answer or "")
            if reply.finished
            else Refused("cut_short", reply.text)
            for reply, example in zip(replies, examples, strict=True)
        ]


Masker = Annotated[RuleMasker | ModelMasker, Field(discriminator="name")]


def read_masked(reply: str, chosen: str) -> Masked | Refused:
    """Find where a model put its masks: the offsets are those of `chosen`."""
    text = re.sub(r"\[MASK\](\s*\[MASK\])*", MASK, reply.strip())
    if MASK not in text:
        return Refused("nothing_masked", reply)
    lead = len(chosen) - len(chosen.lstrip())
    gaps = locate(text.split(MASK), chosen.strip())
    if gaps is None:
        return Refused("mask_not_aligned", reply)
    return Masked(chosen, tuple((start + lead, end + lead) for start, end in gaps))
