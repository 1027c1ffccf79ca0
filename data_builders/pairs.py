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

from data_builders.inspect import by_reason
from mmalign.comparisons import Choice, Comparison, comparisons
from mmalign.errors import DataError
from mmalign.log import progress
from mmalign.records import Origin, Preference, Ranking
from mmalign.store import MANIFEST, Manifest, open_dataset, write_dataset

VERSION = "1"


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

    Which are pairs is mmalign.comparisons' to say. Pair i-j prefers response i of the ranking,
    counted from 0, to response j.
    """
    for found in comparisons(ranking.responses, choice=choice, min_gap=min_gap):
        yield f"dropped:{found}" if isinstance(found, str) else _pair(ranking, found)


def _pair(ranking: Ranking, compared: Comparison) -> Preference:
    i, j, gap = compared.better, compared.worse, compared.gap
    chosen, rejected = ranking.responses[i], ranking.responses[j]
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
