"""Fill the gaps of a masked answer in view of another picture: the rejected response is born."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from data_builders.base import CountingGenerator
from data_builders.masking import MASK, Masked, Refused
from mmalign.config import Strict
from mmalign.generate.base import Request, Sampling
from mmalign.records import Media, Message, prompt_text, user

INSTRUCTION = """\
Below are a question about the image and an answer to it with gaps, written {mask}. Fill in \
every gap so that the answer fits the image. Leave all other words exactly as they are. Write \
only the completed answer.

Question: {question}
Answer: {masked}
Completed answer:"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gapped:
    """One masked answer to fill, and the picture to look at; `id` names the attempt."""

    id: str
    prompt: tuple[Message, ...]
    image: Media
    masked: Masked


class InstructCompleter(Strict):
    """Ask once for the whole answer: for models that follow instructions (the paper's way)."""

    name: Literal["instruct"] = "instruct"

    def complete(
        self,
        gapped: Sequence[Gapped],
        generator: CountingGenerator,
        sampling: Sampling,
        media_root: Path,
    ) -> list[str | Refused]:
        """Complete every answer; a reply that is empty, cut short or has a gap left is refused."""
        requests = [
            Request(
                id=item.id,
                prompt=user(
                    INSTRUCTION.format(
                        mask=MASK, question=prompt_text(item.prompt), masked=item.masked.text
                    ),
                    images=1,
                ),
                images=(item.image,),
                media_root=media_root,
            )
            for item in gapped
        ]
        return [
            _checked(reply.text.strip()) if reply.finished else Refused("cut_short", reply.text)
            for reply in generator.generate(requests, sampling)
        ]


class InfillCompleter(Strict):
    """Fill the gaps one after another by continuing the text so far: for models that cannot follow.

    Each gap gets as many new tokens as the words it held. All first gaps are filled together, then
    all second ones, so the number of calls is the largest number of gaps.
    """

    name: Literal["infill"] = "infill"

    def complete(
        self,
        gapped: Sequence[Gapped],
        generator: CountingGenerator,
        sampling: Sampling,
        media_root: Path,
    ) -> list[str | Refused]:
        """Complete every answer; one in which a gap was filled with blanks is refused."""
        texts: list[str | Refused] = [item.masked.pieces[0] for item in gapped]
        for gap in range(max((len(item.masked.segments) for item in gapped), default=0)):
            unfinished = {
                row: text
                for row, (item, text) in enumerate(zip(gapped, texts, strict=True))
                if gap < len(item.masked.segments) and isinstance(text, str)
            }
            requests = [
                _continue(gapped[row], gap, text, generator, media_root)
                for row, text in unfinished.items()
            ]
            replies = generator.generate(requests, sampling)
            for (row, text), reply in zip(unfinished.items(), replies, strict=True):
                filled = " ".join(reply.text.split())
                rest = gapped[row].masked.pieces[gap + 1]
                texts[row] = text + filled + rest if filled else Refused("empty_gap", text)
        return [text if isinstance(text, Refused) else _checked(text) for text in texts]


Completer = Annotated[InstructCompleter | InfillCompleter, Field(discriminator="name")]


def _continue(
    item: Gapped, gap: int, text: str, generator: CountingGenerator, media_root: Path
) -> Request:
    """Ask for the words of one gap. The blank before a word belongs to its token: leave it out."""
    start, end = item.masked.segments[gap]
    prefill = text.rstrip()
    return Request(
        id=f"{item.id}/gap{gap + 1}",
        prompt=item.prompt,
        images=(item.image,),
        media_root=media_root,
        prefill=prefill,
        num_tokens=generator.count_tokens(text[len(prefill) :] + item.masked.chosen[start:end]),
    )


def _checked(text: str) -> str | Refused:
    if not text.strip():
        return Refused("empty_response")
    return Refused("mask_left", text) if MASK in text else text
