"""Rankings: N responses under one condition, and a pair of every comparison between them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any

from mmalign.comparisons import Comparison, comparisons
from mmalign.errors import SchemaMismatch
from mmalign.losses import Loss
from mmalign.losses.base import Need
from mmalign.prepare import Preparer, RowDropped
from mmalign.records import RankedResponse, Ranking
from mmalign.scoring.candidates import Candidate
from mmalign.store import Dataset
from trainers.objectives.base import PreparedRow, RowPair, check_row

# What a loss can have of a ranking. Phrases that differ depend on the pair, and a candidate is in
# several; other pictures, rationales and critics' prompts belong to one pair too.
GIVEN = {Need.REJECTED, Need.REFERENCE, Need.SCORE_GAP, Need.KL}


class RankingObjective:
    """Rows are [response, ...], best first, and one pair for each comparison of two of them.

    A pair weighs 1 / number of the row's pairs, so that a ranking counts once however many
    responses it has. All share the picture as the longest of them leaves room for it.
    """

    unit = "rankings"

    def __init__(self, preparer: Preparer, media_root: Path, *, needs: Set[Need]) -> None:
        self.preparer, self.media_root, self.needs = preparer, media_root, needs

    def prepare(self, record: Ranking) -> PreparedRow:
        """The row's candidates: each wording that is compared with another, once.

        Raises RowDropped as `data_builders.pairs` counts (all_ties, same_text), and where the loss
        reads score gaps and the ranking gives none.
        """
        check_row(record)
        found = list(comparisons(record.responses))
        compared = [one for one in found if isinstance(one, Comparison)]
        if not compared:
            reason = "all_ties" if "all_ties" in found else "same_text"
            raise RowDropped(reason, "no two responses can be compared", where=record.id)
        used = _used(compared, self.needs)
        if not used:
            what = "of no two responses that can be compared both have a score"
            raise RowDropped(f"no_{Need.SCORE_GAP}", what, where=record.id)
        # Of `compared` and not of `used`: losses that differ in needing scores share the stored
        # scores of the reference.
        responses = record.responses
        places = {i for one in compared for i in (one.better, one.worse)}
        order = sorted(places, key=lambda i: (responses[i].rank, i))
        texts = list(dict.fromkeys(responses[i].text for i in order))
        place = {text: number for number, text in enumerate(texts)}
        condition, ids = self.preparer.fit(
            record.prompt,
            record.images,
            texts,
            self.media_root,
            videos=record.videos,
            id=record.id,
        )
        return PreparedRow(
            id=record.id,
            conditions=(condition,),
            candidates=tuple(Candidate(condition=0, response_ids=own) for own in ids),
            pairs=tuple(
                RowPair(
                    chosen=place[responses[one.better].text],
                    rejected=place[responses[one.worse].text],
                    score_gap=one.gap,
                    weight=1 / len(used),
                )
                for one in used
            ),
        )


def check_rankings(dataset: Dataset[Any], loss: Loss, *, online: bool) -> None:
    """Raise SchemaMismatch where no row of a dataset of rankings has what the loss needs.

    online: as in trainers.objectives.base.check_dataset.
    """
    expand = f"make pairs of them: `mmalign data pairs {dataset.path} OUT`"
    if online:
        raise SchemaMismatch(
            "data.online makes a new pair beside a row's own one, and a ranking has several",
            where=str(dataset.path),
            wanted="preference records",
            fix=expand,
        )
    if Need.REJECTED not in loss.needs:
        raise SchemaMismatch(
            f"loss {loss.name!r} compares nothing, and cannot train on ranking records",
            where=str(dataset.path),
            wanted="example or preference records",
            fix=f"{expand}, whose chosen responses it learns; or choose another loss",
        )
    if lacking := sorted(loss.needs - GIVEN):
        raise SchemaMismatch(
            f"loss {loss.name!r} reads {', '.join(lacking)}, which rankings do not give",
            where=str(dataset.path),
            fix=f"{expand}; or choose another loss",
        )
    reasons: Counter[str] = Counter()
    for responses in _responses(dataset):
        found = list(comparisons(responses))
        if _used([one for one in found if isinstance(one, Comparison)], loss.needs):
            return
        reasons.update(one if isinstance(one, str) else f"no_{Need.SCORE_GAP}" for one in found)
    unscored = f"no_{Need.SCORE_GAP}" in reasons
    raise SchemaMismatch(
        f"loss {loss.name!r} needs two responses of different rank"
        + " that both have a score" * unscored
        + ", and no ranking has them",
        where=str(dataset.path),
        got=", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        or "no rankings",
        fix="score them: `mmalign build configs/build/score_pairs.yaml`, with this dataset as "
        "source; or choose another loss"
        if unscored
        else "look at its ranks with `mmalign data preview`: ties teach no preference",
    )


def score_gaps(dataset: Dataset[Any]) -> Iterator[float]:
    """The score gap of every comparison that has one, as `mmalign data pairs` would write it."""
    for responses in _responses(dataset):
        for one in comparisons(responses):
            if isinstance(one, Comparison) and one.gap is not None:
                yield one.gap


def _responses(dataset: Dataset[Any]) -> Iterator[list[RankedResponse]]:
    """Each row's responses, without decoding its pictures."""
    for row in dataset.column("responses"):
        yield [RankedResponse(**values) for values in row]


def _used(compared: list[Comparison], needs: Set[Need]) -> list[Comparison]:
    return [one for one in compared if one.gap is not None or Need.SCORE_GAP not in needs]
