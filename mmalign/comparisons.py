"""Which two responses of a ranking are a comparison, and which of them is the better one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from mmalign.records import RankedResponse

Choice = Literal["all", "best_worst"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Response `better` of a ranking is preferred to response `worse`, both counted from 0.

    gap: score of the better one minus that of the worse, None where either has none; negative
    where an annotator ranked against the scores.
    """

    better: int
    worse: int
    gap: float | None


def comparisons(
    responses: Sequence[RankedResponse], *, choice: Choice = "all", min_gap: float | None = None
) -> Iterator[Comparison | str]:
    """The comparisons of a ranking, and for every two responses that are none, the reason.

    Ties are none: 1>2=3>4 gives 5 of 6, n responses of n ranks n (n - 1) / 2. `best_worst` takes
    what has the first rank with what has the last; several may have either, and none is singled
    out. `min_gap` leaves out those whose scores differ by less, or are not known. Two responses in
    the same words are none. A ranking that is all ties gives one reason for the whole of it.
    """
    ranks = [response.rank for response in responses]
    if len(set(ranks)) < 2:
        yield "all_ties"
        return
    best, worst = min(ranks), max(ranks)
    for i, j in itertools.combinations(range(len(ranks)), 2):
        better, worse = (i, j) if ranks[i] <= ranks[j] else (j, i)
        if ranks[i] == ranks[j]:
            yield "tie"
        elif choice == "best_worst" and (ranks[better], ranks[worse]) != (best, worst):
            yield "not_best_and_worst"
        else:
            yield _compared(responses, better, worse, min_gap)


def _compared(
    responses: Sequence[RankedResponse], better: int, worse: int, min_gap: float | None
) -> Comparison | str:
    one, other = responses[better], responses[worse]
    gap = None if one.score is None or other.score is None else one.score - other.score
    if one.text == other.text:
        return "same_text"
    if min_gap is not None and gap is None:
        return "no_score"
    if min_gap is not None and gap is not None and gap < min_gap:
        return "small_gap"
    return Comparison(better=better, worse=worse, gap=gap)
