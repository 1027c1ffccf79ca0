"""Notes into critiques: the person's verdict stays, and so does a note that cannot be expanded."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from data_builders.base import GeneratorConfig
from data_builders.expand_critiques import ExpandCritiques, verdict_on
from data_builders.importers.mm_rlhf import ranks_of
from data_builders.verify import JudgeConfig
from mmalign.errors import SchemaMismatch
from mmalign.generate.base import Generation, Sampling
from mmalign.judge import Judge, Note, Ruling
from mmalign.models.load import ModelConfig
from mmalign.prepare import RowDropped
from mmalign.records import Example, Media, Origin, RankedResponse, Ranking, prompt_text, user
from mmalign.store import Dataset, open_dataset, write_dataset


class Expands:
    """Writes a critique for every note, but for those that it is told to refuse."""

    name = "expands"

    def __init__(self, refuses: dict[str, str] | None = None) -> None:
        self.refuses, self.notes = refuses or {}, list[Note]()

    def expand(self, notes) -> list[Ruling[str]]:
        self.notes += notes
        return [self._ruling(note) for note in notes]

    def _ruling(self, note: Note) -> Ruling[str]:
        if (reason := self.refuses.get(note.id)) == "no such row":
            raise RowDropped("too_long", "is too long", where=note.id)
        value = None if reason else f"The response is {note.verdict}. {note.note} That is all."
        return Ruling(id=note.id, value=value, reason=reason or "ok", num_tries=1)


def ranking(
    id: str = "q",
    ranks: str = "1>2>3",
    scores: tuple[float | None, ...] = (4.5, 2.0, 1.0),
    notes: tuple[str | None, ...] = ("Right.", "Wrong color.", "Wrong."),
    **changes: Any,
) -> Ranking:
    columns = zip(ranks_of(ranks, len(scores)), scores, notes, strict=True)
    return Ranking(
        id=id,
        prompt=changes.pop("prompt", user("What color?")),
        responses=tuple(
            RankedResponse(text=f"text {n}", rank=rank, score=score, critique=note, model=f"m{n}")
            for n, (rank, score, note) in enumerate(columns)
        ),
        origin=Origin(builder="import:mm_rlhf", detail='{"ranking_reason": "colors"}'),
        **changes,
    )


def build(tmp_path: Path, rankings: list[Ranking], judge: Any, **changes: Any) -> Dataset[Ranking]:
    write_dataset(tmp_path / "in", Ranking, rankings, media_root="photos")
    settings = {
        "source": tmp_path / "in",
        "output": tmp_path / "out",
        "judge": JudgeConfig(generator=GeneratorConfig(model=ModelConfig(path="none"))),
    }
    ExpandCritiques(**(settings | changes)).build_with(judge)
    return open_dataset(tmp_path / "out", Ranking)


def critiques(record: Ranking) -> list[str | None]:
    return [response.critique for response in record.responses]


def became(record: Ranking) -> list[str]:
    return json.loads(record.origin.detail)["became"]


def test_only_critiques_and_origin_change(tmp_path: Path) -> None:
    before = ranking()
    dataset = build(tmp_path, [before], Expands())
    (after,) = dataset
    assert critiques(after) == [
        "The response is good. Right. That is all.",
        "The response is bad. Wrong color. That is all.",
        "The response is bad. Wrong. That is all.",
    ]
    kept = [(r.text, r.rank, r.score, r.model) for r in after.responses]
    assert kept == [(r.text, r.rank, r.score, r.model) for r in before.responses]
    assert (after.id, after.prompt) == (before.id, before.prompt)
    detail = json.loads(after.origin.detail)
    assert detail["notes"] == ["Right.", "Wrong color.", "Wrong."]
    assert detail["from"]["builder"] == "import:mm_rlhf"
    assert detail["from"]["detail"] == '{"ranking_reason": "colors"}'
    assert dataset.manifest.counts == {"accepted": 1}
    assert dataset.media_root == (tmp_path / "in/photos").resolve()


@pytest.mark.parametrize(
    ("ranks", "scores", "verdicts"),
    [
        ("1>2>3", (4.0, 3.5, 1.0), ["good", "good", "bad"]),
        # All are poor, the best too; the score is absolute, the rank is not.
        ("1>2>3", (2.0, 1.5, 1.0), ["bad", "bad", "bad"]),
        # At the neutral score, and without one, first and last are told apart.
        ("1>2>3", (3.0, 3.0, 3.0), ["good", None, "bad"]),
        ("1>2=3", (None, None, None), ["good", "bad", "bad"]),
        ("1=2=3", (None, None, 5.0), [None, None, "good"]),
    ],
)
def test_the_verdict_is_the_persons_or_not_known(ranks, scores, verdicts) -> None:
    record = ranking(ranks=ranks, scores=scores)
    assert [verdict_on(record, place, 3.0) for place in range(3)] == verdicts


def test_what_cannot_be_expanded_keeps_its_note_and_is_counted(tmp_path: Path) -> None:
    clip = {"prompt": user("What?", videos=1), "videos": (Media(path="a.mp4"),)}
    rankings = [
        ranking("a", notes=("Right.", None, " ")),
        ranking("b", scores=(3.0, 3.0, 3.0)),
        ranking("c", notes=(None, None, None)),
        ranking("d"),
        ranking("e", **clip),
        ranking("f"),
    ]
    refuses = {"d/0": "verdict_changed", "d/1": "no_verdict", "d/2": "no such row"}
    judge = Expands(refuses)
    dataset = build(tmp_path, rankings, judge)
    assert {record.id: became(record) for record in dataset} == {
        "a": ["expanded", "no_note", "no_note"],
        "b": ["expanded", "note_kept:verdict_not_known", "expanded"],
        "c": ["no_note"] * 3,
        "d": [f"note_kept:judge_{why}" for why in ("verdict_changed", "no_verdict", "too_long")],
        "e": ["note_kept:has_clips"] * 3,
        "f": ["expanded"] * 3,
    }
    kept = {record.id: critiques(record) for record in dataset}
    assert kept["b"][1] == "Wrong color."
    assert kept["d"] == kept["e"] == ["Right.", "Wrong color.", "Wrong."]
    assert kept["c"] == [None] * 3
    assert dataset.manifest.counts == {
        "accepted": 2,
        "accepted:some_notes_kept": 1,
        "accepted:no_notes": 1,
        "accepted:no_note_expanded": 2,
    }
    assert not any(note.id.startswith("e/") for note in judge.notes)


@pytest.mark.parametrize(
    ("limit", "critique", "fate"),
    [
        (8, "The response is good. Right. That is all.", "expanded"),
        (5, "The response is good. Right.", "expanded:cut"),
        (3, "Right.", "note_kept:critique_too_long"),
    ],
)
def test_a_long_critique_ends_at_a_sentence(tmp_path: Path, limit, critique, fate) -> None:
    (record,) = build(tmp_path, [ranking()], Expands(), max_critique_words=limit)
    assert critiques(record)[0] == critique
    assert became(record)[0] == fate


def test_a_language_model_that_judges_otherwise_changes_nothing(tmp_path: Path) -> None:
    """It finds every response good; so only the good one gets its critique."""

    class Model:
        name = "model"

        def generate(self, requests, sampling: Sampling) -> list[Generation]:
            codes = [re.findall(r'"code": "(\w+)"', prompt_text(r.prompt))[-1] for r in requests]
            verdict = {"critique": "All of it is right.", "verdict": "good"}
            return [
                Generation(
                    id=request.id,
                    text=json.dumps({"code": code, **verdict}),
                    num_tokens=1,
                    finished=True,
                )
                for request, code in zip(requests, codes, strict=True)
            ]

    (record,) = build(tmp_path, [ranking()], Judge(Model()))
    assert critiques(record) == ["All of it is right.", "Wrong color.", "Wrong."]
    assert became(record)[1:] == ["note_kept:judge_verdict_changed"] * 2


def test_chunks_change_nothing_and_a_finished_build_asks_nothing(tmp_path: Path) -> None:
    rankings = [ranking(id) for id in "abcde"]
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one = build(tmp_path / "one", rankings, Expands())
    two = build(tmp_path / "two", rankings, Expands(), shard_rows=2)
    assert list(one) == list(two)
    again = Expands()
    assert list(build(tmp_path / "two", rankings, again, shard_rows=2)) == list(two)
    assert again.notes == []


def test_the_page_shows_the_note_and_what_became_of_it(tmp_path: Path) -> None:
    build(tmp_path, [ranking("a"), ranking("b", notes=("<b>Right</b>.", None, None))], Expands())
    page = (tmp_path / "out/preview.html").read_text()
    assert "expand_critiques: 2 rankings" in page
    assert "What became of the notes" in page
    assert "Wrong color. That is all." in page
    assert "place 1 · score 4.5 · m0" in page
    assert "&lt;b&gt;Right&lt;/b&gt;." in page
    assert "<b>" not in page


def test_examples_hold_no_notes(tmp_path: Path) -> None:
    write_dataset(tmp_path / "examples", Example, [Example(id="a", prompt=user("What?"))])
    with pytest.raises(SchemaMismatch, match="holds example records; wanted ranking"):
        build(tmp_path, [ranking()], Expands(), source=tmp_path / "examples")
