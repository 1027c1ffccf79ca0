"""Rejected responses from the model's own bias: what it writes while it hardly sees the picture.

BDHS (Amirloo et al., arXiv 2407.02477): hide the picture, let the model complete every sentence of
the chosen response from a random cut of it on, and keep the result if it differs:

    for i = 1 .. tries:
        draw what of the picture stays visible, one draw for all sentences
        i = tries > 1:   the whole response written freely, returned unchecked
        otherwise:       y = y_1 y_2 …,  y_k = prefix_k + the model's continuation after
                         (true sentences before k) + prefix_k, up to its first sentence end
                         return y if similarity(chosen, y) < threshold, or tries = 1

Sentences are conditioned on the true sentences before them, never on the written ones, so one call
of the generator completes all sentences of all open items. Builders use this offline; a trainer
uses it with the current policy as the generator. Everything random is drawn from (the sampling's
seed, tag, id, try, sentence), so neighbours change nothing.

Deviations from the paper: "yes" and "no" are swapped as whole words only; a try that is empty,
leaves half a sentence, is cut short, the same text, or a refusal is no negative, nor is the last.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, PositiveInt

from mmalign.config import Strict
from mmalign.generate.base import (
    Corruption,
    Generation,
    Generator,
    MaskImageTokens,
    NoisePixels,
    Request,
    Sampling,
    request_seed,
)
from mmalign.records import Media, Message
from mmalign.sentences import cut_sentence, first_sentence, split_sentences, swap_yes_no
from mmalign.similarity import OverlapMeasure, SentenceMeasure, TextSimilarity

if TYPE_CHECKING:
    from mmalign.clips import Clip


class MaskTokens(Strict):
    """Hide image tokens from attention, each with probability `threshold` (the paper's rho_th)."""

    name: Literal["mask"] = "mask"
    threshold: float = Field(default=0.99, ge=0, le=1)

    def of(self, key: str) -> Corruption:
        """The corruption that is drawn for this key."""
        return MaskImageTokens(threshold=self.threshold, key=key)


class Noise(Strict):
    """Noise on the pixels, as after `steps` of 1000 diffusion steps: the paper's weaker variant."""

    name: Literal["noise"] = "noise"
    steps: int = Field(default=500, ge=1, le=1000)

    def of(self, key: str) -> Corruption:
        """The corruption that is drawn for this key."""
        return NoisePixels(steps=self.steps, key=key)


class Guided(Strict):
    """Complete every sentence of the chosen response from a random cut of it on.

    swap: probability that a sentence that begins with yes or no begins with the other instead.
    sentence_tokens: most new tokens of one continuation; one that is longer spoils its try.
    """

    name: Literal["guided"] = "guided"
    swap: float = Field(default=0.5, ge=0, le=1)
    sentence_tokens: PositiveInt = 64


class Unguided(Strict):
    """Write the whole response freely in every try: the paper's ablation."""

    name: Literal["unguided"] = "unguided"


class AlikeSentences(SentenceMeasure):
    """Two responses are alike from this cosine of their sentence embeddings on."""

    threshold: float = Field(default=0.97, ge=-1, le=1)


class AlikeWords(OverlapMeasure):
    """Two responses are alike from this share of common words on; no model is loaded."""

    threshold: float = Field(default=0.97, ge=0, le=1)


AnyCorruption = Annotated[MaskTokens | Noise, Field(discriminator="name")]
AnyGuidance = Annotated[Guided | Unguided, Field(discriminator="name")]
Alike = Annotated[AlikeSentences | AlikeWords, Field(discriminator="name")]


class Bias(Strict):
    """How negatives are sampled; the defaults are the paper's.

    tries: most tries of an item; of several, the last is written freely and not checked.
    similarity: what counts as alike; a try is taken where it is not.
    drop_refusals: whether "the image is too blurry to tell" and the like are tried again and, at
        last, dropped; otherwise they are taken, and counted as what they are.
    """

    corruption: AnyCorruption = MaskTokens()
    guidance: AnyGuidance = Guided()
    tries: PositiveInt = 5
    similarity: Alike = AlikeSentences()
    drop_refusals: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class BiasItem:
    """A chosen response to be spoiled, with what it answers. Two items have two ids."""

    id: str
    prompt: tuple[Message, ...]
    images: tuple[Media, ...] = ()
    videos: tuple[Media | Clip, ...] = ()
    media_root: Path | None = None
    chosen: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Negative:
    """What came of one item. text is None where no try could be used.

    reason: with a text, how it came to be: `try3` (guided, or the third of the unguided), `free`
        (the last try), `unchecked` (the only try), `refusal` (taken as `drop_refusals` is off);
        without, what was wrong with the last try: `empty` (also: a sentence without continuation),
        `cut_short` by the token limit, `same_text`, `refusal`; or `no_answer`, and none was made.
    similarity: of the last try. first_try_similarity: of the first; both 0.0 for `no_answer`.
    """

    id: str
    text: str | None
    reason: str
    try_number: int
    similarity: float
    first_try_similarity: float


@dataclass(frozen=True, slots=True)
class _Written:
    """A response as written in one try, and why it cannot be used if it cannot."""

    text: str
    trouble: str | None


def sample_negatives(
    items: Sequence[BiasItem],
    generator: Generator,
    *,
    similarity: TextSimilarity,
    settings: Bias,
    sampling: Sampling,
    tag: str = "",
) -> list[Negative]:
    """One outcome per item, in order; try after try, all sentences of all open items in one call.

    similarity: `settings.similarity`, loaded. tag: tells draws for the same item apart, such as the
    step of an online trainer; offline it is empty. Raises what the generator raises.
    """
    made: list[Negative | None] = [None] * len(items)
    first: dict[int, float] = {}
    for row, item in enumerate(items):
        if not item.chosen.strip():
            made[row] = _without(item, "no_answer")
    for number in range(1, settings.tries + 1):
        trying = [row for row, negative in enumerate(made) if negative is None]
        if not trying:
            break
        names = [_name(items[row], tag, number) for row in trying]
        open_items = [items[row] for row in trying]
        last = number == settings.tries
        if isinstance(settings.guidance, Guided) and not 1 < number == settings.tries:
            guide = settings.guidance
            written = _complete(open_items, names, generator, settings.corruption, guide, sampling)
        else:
            written = _write_freely(open_items, names, generator, settings.corruption, sampling)
        chosen = [item.chosen for item in open_items]
        scores = similarity(chosen, [one.text for one in written])
        for row, one, score in zip(trying, written, scores, strict=True):
            first.setdefault(row, score)
            text, reason = _verdict(items[row], one, score, settings, number)
            if text is not None or last:
                made[row] = Negative(
                    id=items[row].id,
                    text=text,
                    reason=reason,
                    try_number=number,
                    similarity=score,
                    first_try_similarity=first[row],
                )
    return [negative for negative in made if negative is not None]


def _verdict(
    item: BiasItem, written: _Written, score: float, settings: Bias, number: int
) -> tuple[str | None, str]:
    """The text if the try is taken, and why or why not."""
    if not written.text.strip():
        return None, "empty"
    if written.trouble:
        return None, written.trouble
    if written.text.split() == item.chosen.split():
        return None, "same_text"
    refused = is_refusal(written.text, item.chosen)
    if refused and settings.drop_refusals:
        return None, "refusal"
    if number < settings.tries:
        taken = score < settings.similarity.threshold
        reason = "refusal" if refused else f"try{number}"
        return (written.text, reason) if taken else (None, "alike")
    if refused:
        return written.text, "refusal"
    only = number == 1 and isinstance(settings.guidance, Guided)
    return written.text, "unchecked" if only else "free"


def _name(item: BiasItem, tag: str, number: int) -> str:
    """What everything random of one try is drawn from, beside the seed."""
    return f"{tag}/{item.id}/try{number}" if tag else f"{item.id}/try{number}"


def _without(item: BiasItem, reason: str) -> Negative:
    return Negative(
        id=item.id,
        text=None,
        reason=reason,
        try_number=0,
        similarity=0.0,
        first_try_similarity=0.0,
    )


def _write_freely(
    items: Sequence[BiasItem],
    names: Sequence[str],
    generator: Generator,
    corruption: AnyCorruption,
    sampling: Sampling,
) -> list[_Written]:
    """Every item's response written from its start, under the corruption."""
    requests = [
        _request(item, f"{name}/free", "", corruption.of(name))
        for item, name in zip(items, names, strict=True)
    ]
    return [
        _Written(reply.text.strip(), None if reply.finished else "cut_short")
        for reply in generator.generate(requests, sampling)
    ]


@dataclass(frozen=True, slots=True)
class _Begun:
    """One sentence of item `row`, to be begun with `prefix` in place of prefix and rest.

    lead and gap are the blanks around it.
    """

    row: int
    lead: str
    prefix: str
    rest: str
    gap: str


def _complete(
    items: Sequence[BiasItem],
    names: Sequence[str],
    generator: Generator,
    corruption: AnyCorruption,
    guide: Guided,
    sampling: Sampling,
) -> list[_Written]:
    """Every sentence of every item completed from a new cut on, under one draw for each item."""
    begun: list[_Begun] = []
    requests: list[Request] = []
    for row, (item, name) in enumerate(zip(items, names, strict=True)):
        before = ""
        for number, sentence in enumerate(split_sentences(item.chosen), start=1):
            rng = random.Random(request_seed(sampling.seed, f"{name}/sentence{number}"))
            swapped = swap_yes_no(sentence, rng, guide.swap)
            prefix, rest = cut_sentence(swapped, rng, whole=swapped != sentence)
            lead = swapped[: len(swapped) - len(swapped.lstrip())]
            gap = swapped[len(swapped.rstrip()) :]
            begun.append(_Begun(row, lead, prefix, rest, gap))
            prefill = (before + lead + prefix).rstrip()
            requests.append(
                _request(item, f"{name}/sentence{number}", prefill, corruption.of(name))
            )
            before += sentence
    sampling = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, guide.sentence_tokens))
    texts = [""] * len(items)
    troubles: list[str | None] = [None] * len(items)
    for one, reply in zip(begun, generator.generate(requests, sampling), strict=True):
        body, trouble = _continued(one, reply)
        texts[one.row] += one.lead + body + one.gap
        troubles[one.row] = troubles[one.row] or trouble
    return [_Written(text, trouble) for text, trouble in zip(texts, troubles, strict=True)]


def _request(item: BiasItem, id: str, prefill: str, corruption: Corruption) -> Request:
    return Request(
        id=id,
        prompt=item.prompt,
        images=item.images,
        videos=item.videos,
        media_root=item.media_root,
        prefill=prefill,
        corruption=corruption,
    )


def _continued(begun: _Begun, reply: Generation) -> tuple[str, str | None]:
    """The sentence that a reply makes of its prefix, and what is wrong with it if anything is."""
    new = reply.text if begun.prefix else reply.text.lstrip()
    blanks = new[: len(new) - len(new.lstrip())]
    if blanks == new or "\n" in blanks or "\r" in blanks:
        # A new line ends the one before. Nothing more may come where no word was due.
        return begun.prefix, "empty" if re.search(r"\w", begun.rest) else None
    sentence, ended = first_sentence(begun.prefix + new, after=len(begun.prefix))
    return sentence, None if ended or reply.finished else "cut_short"


_MEDIA = r"(?:image|picture|photo|photograph|video|clip)"
_HOW = r"(?:to be |a (?:bit|little) |(?:very|quite|rather|so|too|just|also|\w+ly) )*"
_REFUSALS = re.compile(
    rf"\b{_MEDIA} (?:itself |provided |shown )?(?:is|was|appears|seems|looks) "
    rf"(?:{_HOW}(?:blurry|blurred|blank|unclear|pixelated|distorted|corrupted|noisy"
    r"|(?:of )?(?:low|poor)[ -](?:quality|resolution)"
    r"|not (?:clear|visible|provided|available|shown|loaded))"
    r"|(?:to be )?(?:too|all|completely|entirely|totally) (?:dark|black|white|gr[ae]y))\b"
    rf"|\b(?:blurry|blank|unclear|distorted|low[ -]quality) {_MEDIA}\b"
    rf"|\bit is {_HOW}(?:unclear|not clear)\b"
    r"|\b(?:I|we)(?:['’]m| am| are)? (?:unable|not able|sorry)\b"
    r"|\bI (?:cannot|can['’]?t|can not|don['’]t|do not) "
    r"(?:see|view|tell|say|determine|identify|make out|access|answer|describe|have)\b"
    r"|\b(?:difficult|hard|impossible|not possible) to "
    r"(?:tell|say|determine|identify|make out|answer|describe)\b"
    rf"|\bno {_MEDIA} (?:is|was|has been|to)\b"
    r"|\bas an ai\b",
    re.IGNORECASE,
)


def is_refusal(text: str, chosen: str = "") -> bool:
    """Whether a text speaks of not seeing rather than of what is to be seen, and `chosen` does not.

    "The image is blurry", "it is difficult to tell", "I cannot see", "no image is provided": the
    answers that noise on the pixels brings about. They differ from any chosen response and teach
    nothing about hallucination. By a short list of English phrases, so others pass.
    """
    return _REFUSALS.search(text) is not None and _REFUSALS.search(chosen) is None


def share_blind(threshold: float, num_tokens: int) -> float:
    """The share of draws that hide every one of `num_tokens` image tokens: threshold^num_tokens."""
    return threshold**num_tokens
