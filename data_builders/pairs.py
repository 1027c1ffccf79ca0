"""Rankings into pairs: every two responses of different rank, or the best against the worst.

Ties are no pairs. 1>2=3>4 gives 5 pairs of 6, n responses of n ranks n (n - 1) / 2. A pair carries
the critiques of its two responses and the difference of their scores; where an annotator ranked
against the scores, that difference is negative, and the pair is kept and counted.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from data_builders.inspect import by_reason
from mmalign.errors import DataError
from mmalign.log import progress
from mmalign.records import Origin, Preference, RankedResponse, Ranking
from mmalign.store import MANIFEST, Manifest, open_dataset, write_dataset

VERSION = "1"

Choice = Literal["all", "best_worst"]


def make_pairs(
    rankings: Path, out: Path, *, choice: Choice = "all", min_gap: float | None = None
) -> Manifest:
    """Expand a dataset of rankings into a dataset of preferences; see `pairs_of`.

    The manifest counts two responses at a time, by reason, and `dropped:all_ties` counts rankings
    in which no two ranks differ. Media stay where they are.
    Raises DataError when `out` is a dataset already or there is no pair, and SchemaMismatch when
    `rankings` holds something else.
    """
    if (out / MANIFEST).exists():
        raise DataError("is a dataset already", where=str(out), fix="delete it or choose another")
    dataset = open_dataset(rankings, Ranking)
    counts: dict[str, int] = {}

    def pairs() -> Iterator[Preference]:
        for ranking in progress(dataset, label="pairing", total=len(dataset)):
            for made in pairs_of(ranking, choice=choice, min_gap=min_gap):
                reason = made if isinstance(made, str) else made.origin.reason
                counts[reason] = counts.get(reason, 0) + 1
                if isinstance(made, Preference):
                    yield made

    records = pairs()
    first = next(records, None)
    if first is None:
        reasons = ", ".join(f"{count} {reason}" for reason, count in by_reason(counts).items())
        raise DataError("gives no pairs", where=str(rankings), got=reasons or "no rankings")
    return write_dataset(
        out,
        Preference,
        itertools.chain([first], records),
        builder="pairs",
        builder_version=VERSION,
        config={"source": str(rankings), "pairs": choice, "min_gap": min_gap},
        counts=counts,  # filled while the pairs are written
        media_root=str(dataset.media_root),
    )


def pairs_of(
    ranking: Ranking, *, choice: Choice = "all", min_gap: float | None = None
) -> Iterator[Preference | str]:
    """The pairs of one ranking, and for every two responses that are none, the reason.

    Pair i-j prefers response i of the ranking, counted from 0, to response j. `best_worst` pairs
    what has the first rank with what has the last; several may have either, and none is singled
    out. `min_gap` drops pairs whose scores differ by less, or are not known. A ranking that is all
    ties gives one reason for the whole of it.
    """
    ranks = [response.rank for response in ranking.responses]
    if len(set(ranks)) < 2:
        yield "dropped:all_ties"
        return
    best, worst = min(ranks), max(ranks)
    for i, j in itertools.combinations(range(len(ranks)), 2):
        better, worse = (i, j) if ranks[i] <= ranks[j] else (j, i)
        if ranks[i] == ranks[j]:
            yield "dropped:tie"
        elif choice == "best_worst" and (ranks[better], ranks[worse]) != (best, worst):
            yield "dropped:not_best_and_worst"
        else:
            yield _pair(ranking, better, worse, min_gap)


def _pair(ranking: Ranking, i: int, j: int, min_gap: float | None) -> Preference | str:
    chosen, rejected = ranking.responses[i], ranking.responses[j]
    gap = _gap(chosen, rejected)
    if chosen.text == rejected.text:
        return "dropped:same_text"
    if min_gap is not None and gap is None:
        return "dropped:no_score"
    if min_gap is not None and gap is not None and gap < min_gap:
        return "dropped:small_gap"
    detail = {
        "ranks": [chosen.rank, rejected.rank],
        "scores": [chosen.score, rejected.score],
        "models": [chosen.model, rejected.model],
    }
    return Preference(
        id=f"{ranking.id}/{i}-{j}",
        prompt=ranking.prompt,
        images=ranking.images,
        videos=ranking.videos,
        chosen=chosen.text,
        rejected=rejected.text,
        chosen_critique=chosen.critique,
        rejected_critique=rejected.critique,
        score_gap=gap,
        origin=Origin(
            builder="pairs",
            version=VERSION,
            source=ranking.id,
            reason="accepted:negative_gap" if gap is not None and gap < 0 else "accepted",
            detail=json.dumps(detail),
        ),
    )


def _gap(chosen: RankedResponse, rejected: RankedResponse) -> float | None:
    if chosen.score is None or rejected.score is None:
        return None
    return chosen.score - rejected.score
