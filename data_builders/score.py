"""Rewards of a trained reward model, written into a dataset of pairs or of rankings.

A preference gets score_gap = r(chosen) - r(rejected), which MM-DPO trains with; a ranking gets a
score for every response. What the model cannot be asked about is dropped; all else stays, and
critiques that the model wrote to judge by may be kept where a row has none.

Launch: mmalign build configs/build/score_pairs.yaml
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import PositiveInt

from data_builders.base import Builder
from mmalign.errors import DataError
from mmalign.jobs import Outcome
from mmalign.log import get_logger
from mmalign.models.load import ModelConfig
from mmalign.prepare import RowDropped
from mmalign.records import Preference, Ranking, kind_name
from mmalign.reward import Critics, Judged, Judgement
from mmalign.store import open_dataset, read_manifest

if TYPE_CHECKING:
    from mmalign.reward import RewardModel

VERSION = "1"
Scorable = Preference | Ranking

logger = get_logger("data_builders.score")


class Score(Builder):
    """Settings of the builder. `source` is a dataset of preferences or of rankings.

    model: a reward model. critics: what it judges by.
    keep_critiques: whether critiques that it wrote go into rows that have none, the first of
        several. Its own words are no ground truth: train on them knowingly.
    """

    name: Literal["score"] = "score"
    source: Path  # type: ignore[assignment] # no folder of pictures holds responses
    model: ModelConfig
    critics: Critics = Critics()
    keep_critiques: bool = False
    batch_size: PositiveInt = 16

    def build(self) -> Path:
        """Load the reward model and build the dataset; returns its directory."""
        from mmalign.reward import RewardModel

        kind = read_manifest(self.source).kind
        if kind not in (kind_name(Preference), kind_name(Ranking)):
            raise DataError(
                "holds nothing to score",
                where=str(self.source),
                got=f"{kind} records",
                wanted="preference or ranking",
            )
        return self._build(
            lambda: RewardModel.from_checkpoint(self.model, batch_size=self.batch_size)
        )

    def build_with(self, model: RewardModel) -> Path:
        """Build with a model that is loaded already."""
        return self._build(lambda: model)

    def _build(self, load: Callable[[], RewardModel]) -> Path:
        dataset = open_dataset(self.source)
        root = dataset.media_root
        rows = sorted(dataset, key=lambda row: row.id)[: self.limit]

        def scoring() -> _Scoring:
            return _Scoring(config=self, model=load(), media_root=root)

        manifest = self.run_job(rows, scoring, dataset.kind, VERSION, root)
        if manifest is not None and dataset.kind is Preference:
            gaps = open_dataset(self.output, Preference).column("score_gap")
            agreed = sum(gap > 0 for gap in gaps)
            logger.info("%s: %d of %d pairs ranked as labelled", self.output, agreed, len(gaps))
        return self.output


@dataclass(kw_only=True)
class _Scoring:
    """The work function of the job, with the model that it needs."""

    config: Score
    model: RewardModel
    media_root: Path

    @property
    def names(self) -> dict[str, str]:
        return {"reward_model": self.model.name}

    def make(self, rows: list[Any]) -> list[Outcome]:
        """One outcome per row, in order; all responses of a chunk are judged together.

        A chunk with a row that the model cannot be asked about is halved until that row is alone.
        """
        items = [self._items(row) for row in rows]
        try:
            judged = iter(
                self.model.judge(
                    [item for some in items for item in some],
                    self.config.critics,
                    seed=self.config.seed,
                )
            )
        except RowDropped as drop:
            if len(rows) == 1:
                return [Outcome(id=rows[0].id, reason=f"dropped:{drop.reason}", detail=str(drop))]
            half = len(rows) // 2
            return self.make(rows[:half]) + self.make(rows[half:])
        return [
            self._outcome(row, [next(judged) for _ in some])
            for row, some in zip(rows, items, strict=True)
        ]

    def _items(self, row: Scorable) -> list[Judgement]:
        return [
            Judgement(
                id=f"{row.id}/{number}",
                prompt=row.prompt,
                response=response,
                images=row.images,
                videos=row.videos,
                media_root=self.media_root,
                critique=critique,
            )
            for number, (response, critique) in enumerate(_responses(row))
        ]

    def _outcome(self, row: Scorable, judged: Sequence[Judged]) -> Outcome:
        written = [
            one.critiques[0] if one.critiques and self.config.keep_critiques else None
            for one in judged
        ]
        changes: dict[str, Any] = dict(self._media(row))
        if isinstance(row, Ranking):
            changes["responses"] = tuple(
                replace(response, score=one.reward, critique=response.critique or text)
                for response, one, text in zip(row.responses, judged, written, strict=True)
            )
        else:
            changes["score_gap"] = judged[0].reward - judged[1].reward
            changes["chosen_critique"] = row.chosen_critique or written[0]
            changes["rejected_critique"] = row.rejected_critique or written[1]
        cut = any(one.num_cut for one in judged)
        return Outcome(
            id=row.id,
            record=replace(row, **changes),
            reason="accepted:critique_cut" if cut else "accepted",
        )

    def _media(self, row: Scorable) -> Iterator[tuple[str, Any]]:
        columns = ["images", "videos"]
        if isinstance(row, Preference):
            columns += ["contrast_images", "contrast_videos"]
        for column in columns:
            yield column, self.config.stored(getattr(row, column), self.media_root)


def _responses(row: Scorable) -> list[tuple[str, str | None]]:
    """(response, critique) of each response of a row."""
    if isinstance(row, Ranking):
        return [(response.text, response.critique) for response in row.responses]
    return [(row.chosen, row.chosen_critique), (row.rejected, row.rejected_critique)]
