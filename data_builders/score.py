"""Rewards of a trained reward model, written into a dataset of pairs or of rankings.

A preference gets score_gap = r(chosen) - r(rejected), which MM-DPO trains with; a ranking gets a
score for every response. All else stays. Critiques that the model writes to judge by are kept where
a row has none.

Launch: mmalign build configs/build/score_pairs.yaml
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import PositiveInt

from mmalign.config import Strict
from mmalign.errors import DataError
from mmalign.jobs import Outcome, run_job
from mmalign.log import get_logger
from mmalign.models.load import ModelConfig
from mmalign.prepare import RowDropped
from mmalign.records import Preference, Ranking, kind_name
from mmalign.reward import Critics, Judged, Judgement
from mmalign.store import MANIFEST, open_dataset, read_manifest

if TYPE_CHECKING:
    from mmalign.reward import RewardModel

VERSION = "1"
Scorable = Preference | Ranking

logger = get_logger("data_builders.score")


class Score(Strict):
    """Settings of the builder. `model` is a reward model; `critics` says what it judges by."""

    name: Literal["score"] = "score"
    source: Path
    output: Path
    model: ModelConfig
    critics: Critics = Critics()
    batch_size: PositiveInt = 16
    shard_rows: PositiveInt = 256

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
        loaded = RewardModel.from_checkpoint(self.model, batch_size=self.batch_size)
        return self.build_with(loaded)

    def build_with(self, model: RewardModel) -> Path:
        """Build with a model that is loaded already."""
        dataset = open_dataset(self.source)
        work = _Scoring(config=self, model=model, media_root=dataset.media_root)
        run_job(
            list(dataset),
            work.make,
            self.output,
            dataset.kind,
            shard_rows=self.shard_rows,
            builder=self.name,
            builder_version=VERSION,
            config=self.model_dump(mode="json", exclude={"output"}),
            seed=self.critics.seed,
            model={"reward": model.name, "source": dataset.manifest.content_hash},
            media_root=str(dataset.media_root),
        )
        if dataset.kind is Preference and (self.output / MANIFEST).exists():
            gaps = open_dataset(self.output, Preference).column("score_gap")
            agreed = sum(gap > 0 for gap in gaps)
            logger.info("%s: %d of %d pairs ranked as labelled", self.output, agreed, len(gaps))
        return self.output


@dataclass(kw_only=True)
class _Scoring:
    """The work function of the job."""

    config: Score
    model: RewardModel
    media_root: Path

    def make(self, rows: list[Any]) -> list[Outcome]:
        """One outcome per row; all responses of a chunk are judged together."""
        outcomes: dict[str, Outcome] = {}
        judged = self._judged(rows, outcomes)
        for row in rows:
            if row.id not in outcomes:
                record = _scored(row, judged[row.id])
                outcomes[row.id] = Outcome(id=row.id, record=record, reason="accepted")
        return [outcomes[row.id] for row in rows]

    def _judged(
        self, rows: Sequence[Scorable], outcomes: dict[str, Outcome]
    ) -> dict[str, list[Judged]]:
        """Judgements by row, in the order of its responses.

        A chunk with a row that the model cannot be asked about is judged row by row, and that row
        is dropped.
        """
        items = [self._items(row) for row in rows]
        try:
            found = self.model.judge([item for some in items for item in some], self.config.critics)
        except RowDropped as drop:
            if len(rows) == 1:
                reason = f"dropped:{drop.reason}"
                outcomes[rows[0].id] = Outcome(id=rows[0].id, reason=reason, detail=str(drop))
                return {}
            half = len(rows) // 2
            first = self._judged(rows[:half], outcomes)
            return first | self._judged(rows[half:], outcomes)
        result, start = {}, 0
        for row, some in zip(rows, items, strict=True):
            result[row.id] = found[start : start + len(some)]
            start += len(some)
        return result

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


def _responses(row: Scorable) -> list[tuple[str, str | None]]:
    """(response, critique) of each response of a row."""
    if isinstance(row, Ranking):
        return [(response.text, response.critique) for response in row.responses]
    return [(row.chosen, row.chosen_critique), (row.rejected, row.rejected_critique)]


def _scored(row: Scorable, judged: Sequence[Judged]) -> Scorable:
    """The row with what was found, and with the model's critiques where it has none."""
    written = [one.critiques[0] if one.critiques else None for one in judged]
    if isinstance(row, Ranking):
        responses = tuple(
            replace(response, score=one.reward, critique=response.critique or text)
            for response, one, text in zip(row.responses, judged, written, strict=True)
        )
        return replace(row, responses=responses)
    return replace(
        row,
        score_gap=judged[0].reward - judged[1].reward,
        chosen_critique=row.chosen_critique or written[0],
        rejected_critique=row.rejected_critique or written[1],
    )
