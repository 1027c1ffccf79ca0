"""From a wrong response to the rejected one: as it is, or written into the answer by a judge.

The policy's own words differ from the answer in style and length as well, which is nothing that a
phrase-wise loss should learn. RRPO therefore lets a language model put what is wrong in a response
into the right answer, in two turns; what is already short stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from data_builders.verify import kind_of
from mmalign.config import Strict
from mmalign.judge import Case, Judge


class AsItIs(Strict):
    """The rejected response is the policy's own."""

    name: Literal["none"] = "none"


class JudgeRewrites(Strict):
    """In two turns the builder's `judge` names the key differences, then writes them in.

    Options and answers of `short_words` words at most need none of that: what the policy said
    differs in all that it says, and is taken as it is.
    """

    name: Literal["judge"] = "judge"
    short_words: PositiveInt = 3


Rewrite = Annotated[AsItIs | JudgeRewrites, Field(discriminator="name")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewritten:
    """The rejected response, or None and the reason; what the judge named, where it was asked."""

    text: str | None
    reason: str = "ok"
    detail: str = ""
    differences: str | None = None


def rewritten(
    config: AsItIs | JudgeRewrites, wrong: Sequence[Case], judge: Judge | None
) -> list[Rewritten]:
    """The rejected response of each case, in order; the judge gets all that it gets at once.

    Reasons: no_key_difference where the judge finds none, not_rewritten where it says nothing that
    can be used.
    """
    results = [Rewritten(text=case.response) for case in wrong]
    if isinstance(config, AsItIs):
        return results
    assert judge is not None
    long = [i for i, case in enumerate(wrong) if not _is_short(case, config.short_words)]
    named: dict[int, str] = {}
    for i, ruling in zip(long, judge.key_differences([wrong[i] for i in long]), strict=True):
        if ruling.value is None:
            results[i] = _unused("not_rewritten", f"differences: {ruling.reason}")
        elif not ruling.value:
            results[i] = _unused("no_key_difference", wrong[i].response)
        else:
            named[i] = ruling.value
    rulings = judge.rewrite([wrong[i] for i in named], list(named.values()))
    for (i, differences), ruling in zip(named.items(), rulings, strict=True):
        if ruling.value is None:
            results[i] = _unused("not_rewritten", f"rewrite: {ruling.reason}")
        else:
            results[i] = Rewritten(text=ruling.value, differences=differences)
    return results


def _is_short(case: Case, short_words: int) -> bool:
    is_choice = kind_of(case.question, case.answer, short_words) == "choice"
    return is_choice or len(case.answer.split()) <= short_words


def _unused(reason: str, detail: str) -> Rewritten:
    return Rewritten(text=None, reason=reason, detail=detail)
