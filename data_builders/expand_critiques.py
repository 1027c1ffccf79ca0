"""Short notes of annotators into full critiques, the verdict kept: rankings in, rankings out.

MM-RLHF (arXiv 2502.10391) lets GPT-4o write out what its annotators noted down, and trains its
reward model on that. Here a judge does, one response at a time, and a critique counts only where
the judge's own verdict on the response, good or bad, is the person's:

    a score above `neutral_score` is good, below it bad; at it, or without one, the best rank is
    good and the last is bad, where these differ. For what lies between, no verdict is known.

Ranks, scores and responses stay as they are. A response whose note cannot be expanded (no verdict,
the judge finds otherwise or gives none, too long) keeps its note: the person's judgement is worth
more than its length, and dropping the response would drop its pairs. Each is counted, in the
record's origin and on the page; the origin also holds the notes.

Launch: mmalign build configs/build/critiques_expand.yaml
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

from pydantic import PositiveInt

from data_builders.base import Builder
from data_builders.judging import asked, question_of, reason_of, shortened
from data_builders.ranking_page import write_ranking_page
from data_builders.verify import JudgeConfig
from mmalign.errors import MediaError
from mmalign.jobs import Outcome
from mmalign.judge import Note, Ruling
from mmalign.prepare import RowDropped
from mmalign.records import Origin, RankedResponse, Ranking
from mmalign.store import open_dataset
from mmalign.verdicts import Quality

VERSION = "1"
EXPANDED, NOTE_KEPT, NO_NOTE = "expanded", "note_kept", "no_note"


class Expander(Protocol):
    """Writes critiques; mmalign.judge.Judge does. Notes are named `id of the ranking/place`."""

    @property
    def name(self) -> str:
        """What identifies it in manifests."""
        ...

    def expand(self, notes: Sequence[Note]) -> list[Ruling[str]]:
        """One ruling for each note, in order."""
        ...


class ExpandCritiques(Builder):
    """Settings of the builder. `source` is a dataset of rankings, such as an import of MM-RLHF."""

    name: Literal["expand_critiques"] = "expand_critiques"
    source: Path  # type: ignore[assignment] # no folder of pictures holds rankings
    judge: JudgeConfig
    max_critique_words: PositiveInt = 200
    neutral_score: float = 3.0

    def build(self) -> Path:
        """Load the judge and build the dataset; returns its directory."""
        self.check_source()
        return self._build(lambda: self.judge.load(self.seed))

    def build_with(self, judge: Expander) -> Path:
        """Build with a judge that is loaded already."""
        return self._build(lambda: judge)

    def _build(self, load: Callable[[], Expander]) -> Path:
        dataset = open_dataset(self.source, Ranking)
        root = dataset.media_root
        rankings = sorted(dataset, key=lambda ranking: ranking.id)[: self.limit]

        def expansions() -> _Expansions:
            return _Expansions(config=self, media_root=root, judge=load())

        if self.run_job(rankings, expansions, Ranking, VERSION, root) is not None:
            write_ranking_page(self.output)
        return self.output


@dataclass(kw_only=True)
class _Expansions:
    """The work function of the job, with the judge that it needs."""

    config: ExpandCritiques
    media_root: Path
    judge: Expander

    @property
    def names(self) -> dict[str, str]:
        return {"judge": self.judge.name}

    def make(self, rankings: list[Ranking]) -> list[Outcome]:
        """One outcome per ranking; the notes of a chunk all together."""
        notes = [note for ranking in rankings for note in self._notes(ranking)]
        rulings = asked(self.judge.expand, notes, _failed) if notes else []
        written = {ruling.id: self._written(ruling) for ruling in rulings}
        return [self._outcome(ranking, written) for ranking in rankings]

    def _notes(self, ranking: Ranking) -> list[Note]:
        """The notes of one ranking that can be asked for."""
        if ranking.videos:
            return []  # The judge is shown pictures only.
        question = question_of(ranking.prompt)
        return [
            Note(
                id=f"{ranking.id}/{place}",
                question=question,
                response=response.text,
                note=response.critique or "",
                verdict=verdict,
                images=ranking.images,
                media_root=self.media_root,
            )
            for place, response in enumerate(ranking.responses)
            if (response.critique or "").strip()
            and (verdict := verdict_on(ranking, place, self.config.neutral_score))
        ]

    def _written(self, ruling: Ruling[str]) -> tuple[str | None, str]:
        """The critique within its budget, or None where the note stays; and what to count it as."""
        if ruling.value is None:
            return None, f"{NOTE_KEPT}:judge_{ruling.reason}"
        critique = shortened(ruling.value, self.config.max_critique_words)
        if critique is None:
            return None, f"{NOTE_KEPT}:critique_too_long"
        return critique, EXPANDED if critique == ruling.value else f"{EXPANDED}:cut"

    def _outcome(self, ranking: Ranking, written: dict[str, tuple[str | None, str]]) -> Outcome:
        responses, became = list[RankedResponse](), list[str]()
        for place, response in enumerate(ranking.responses):
            unasked = None, _unasked(ranking, place)
            critique, fate = written.get(f"{ranking.id}/{place}", unasked)
            responses.append(response if critique is None else replace(response, critique=critique))
            became.append(fate)
        reason = _reason(became)
        detail = {
            "notes": [response.critique for response in ranking.responses],
            "became": became,
            "from": {
                "builder": ranking.origin.builder,
                "source": ranking.origin.source,
                "reason": ranking.origin.reason,
                "detail": ranking.origin.detail,
            },
        }
        record = replace(
            ranking,
            images=self.config.stored(ranking.images, self.media_root),
            videos=self.config.stored(ranking.videos, self.media_root),
            responses=tuple(responses),
            origin=Origin(
                builder="expand_critiques",
                version=VERSION,
                source=ranking.id,
                reason=reason,
                detail=json.dumps(detail, ensure_ascii=False),
            ),
        )
        return Outcome(id=ranking.id, record=record, reason=reason)


def verdict_on(ranking: Ranking, place: int, neutral_score: float) -> Quality | None:
    """Whether the person found a response good or bad, None where neither score nor rank tells."""
    response = ranking.responses[place]
    if response.score is not None and response.score != neutral_score:
        return "good" if response.score > neutral_score else "bad"
    ranks = [other.rank for other in ranking.responses]
    best, worst = min(ranks), max(ranks)
    if best == worst or response.rank not in (best, worst):
        return None
    return "good" if response.rank == best else "bad"


def _unasked(ranking: Ranking, place: int) -> str:
    """Why the judge was not asked for a critique of this response."""
    if not (ranking.responses[place].critique or "").strip():
        return NO_NOTE
    return f"{NOTE_KEPT}:{'has_clips' if ranking.videos else 'verdict_not_known'}"


def _reason(became: Sequence[str]) -> str:
    """What the manifest counts a ranking as."""
    noted = [one for one in became if one != NO_NOTE]
    num_kept = sum(one.startswith(NOTE_KEPT) for one in noted)
    if not noted:
        return "accepted:no_notes"
    if num_kept == 0:
        return "accepted"
    return "accepted:no_note_expanded" if num_kept == len(noted) else "accepted:some_notes_kept"


def _failed(note: Note, error: MediaError | RowDropped) -> Ruling[str]:
    """A picture that cannot be read is the row's fault; what does not fit the judge is not."""
    if isinstance(error, MediaError):
        raise error
    return Ruling(id=note.id, value=None, reason=reason_of(error), num_tries=0)
