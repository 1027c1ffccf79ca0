"""Rankings into pairs: which, in what order, and what becomes of the rest."""

from __future__ import annotations

import itertools
import json
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_builders.importers.mm_rlhf import ranks_of
from data_builders.pairs import make_pairs, pairs_of
from mmalign import cli
from mmalign.errors import DataError, SchemaMismatch
from mmalign.records import Media, Preference, RankedResponse, Ranking, check, user
from mmalign.store import open_dataset, read_manifest, write_dataset

IMAGE = Media(path="a.png", sha256="0" * 64)


def ranking(ranks: list[int], scores: list[float | None] | None = None, id: str = "q") -> Ranking:
    return Ranking(
        id=id,
        prompt=user("What?", images=1),
        images=(IMAGE,),
        responses=tuple(
            RankedResponse(text=f"text {i}", rank=rank, score=score, critique=f"critique {i}")
            for i, (rank, score) in enumerate(
                zip(ranks, scores or [None] * len(ranks), strict=True)
            )
        ),
    )


def split(made: Any) -> tuple[list[Preference], list[str]]:
    made = list(made)
    pairs = [one for one in made if isinstance(one, Preference)]
    return pairs, [one for one in made if isinstance(one, str)]


def names(pairs: list[Preference]) -> list[str]:
    return [pair.id for pair in pairs]


# --- one ranking ----------------------------------------------------------------------------


def test_one_tie_of_four_leaves_five_pairs() -> None:
    pairs, reasons = split(pairs_of(ranking(ranks_of("1>2=3>4", 4))))
    assert names(pairs) == ["q/0-1", "q/0-2", "q/0-3", "q/1-3", "q/2-3"]
    assert reasons == ["dropped:tie"]


def test_the_better_one_is_chosen_wherever_it_stands() -> None:
    pairs, _ = split(pairs_of(ranking([1, 0])))
    assert names(pairs) == ["q/1-0"]
    assert (pairs[0].chosen, pairs[0].rejected) == ("text 1", "text 0")
    assert (pairs[0].chosen_critique, pairs[0].rejected_critique) == ("critique 1", "critique 0")


def test_a_pair_keeps_prompt_pictures_and_where_it_came_from() -> None:
    (pair,), _ = split(pairs_of(ranking([0, 1], [4.5, 2.0])))
    assert (pair.prompt, pair.images) == (user("What?", images=1), (IMAGE,))
    assert (pair.score_gap, pair.annotator, pair.p_target) == (2.5, None, 1.0)
    assert (pair.origin.source, pair.origin.reason) == ("q", "accepted")
    assert json.loads(pair.origin.detail) == {
        "ranks": [0, 1],
        "scores": [4.5, 2.0],
        "models": [None, None],
    }
    assert list(check(pair)) == []


def test_all_ties_give_none_and_one_reason() -> None:
    assert split(pairs_of(ranking([0, 0, 0, 0]))) == ([], ["dropped:all_ties"])


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        ([0, 1, 1, 2], ["q/0-3"]),
        ([2, 1, 0], ["q/2-0"]),
        ([0, 0, 1, 2, 2], ["q/0-3", "q/0-4", "q/1-3", "q/1-4"]),
    ],
)
def test_best_against_worst(ranks: list[int], expected: list[str]) -> None:
    pairs, reasons = split(pairs_of(ranking(ranks), choice="best_worst"))
    assert names(pairs) == expected
    assert set(reasons) <= {"dropped:tie", "dropped:not_best_and_worst"}


def test_a_score_against_the_rank_is_kept_and_named() -> None:
    (pair,), _ = split(pairs_of(ranking([0, 1], [2.0, 3.0])))
    assert (pair.score_gap, pair.origin.reason) == (-1.0, "accepted:negative_gap")


def test_without_both_scores_there_is_no_gap() -> None:
    (pair,), _ = split(pairs_of(ranking([0, 1], [2.0, None])))
    assert pair.score_gap is None


def test_a_least_gap_drops_what_is_closer_or_not_known() -> None:
    pairs, reasons = split(pairs_of(ranking([0, 1, 2, 3], [5.0, 4.5, 4.0, None]), min_gap=1.0))
    assert names(pairs) == ["q/0-2"]
    assert sorted(reasons) == ["dropped:no_score"] * 3 + ["dropped:small_gap"] * 2


def test_the_same_words_are_no_pair() -> None:
    twice = Ranking(
        id="q",
        prompt=user("What?"),
        responses=(RankedResponse(text="same", rank=0), RankedResponse(text="same", rank=1)),
    )
    assert split(pairs_of(twice)) == ([], ["dropped:same_text"])


@given(st.lists(st.integers(0, 5), min_size=2, max_size=7))
def test_every_two_responses_are_a_pair_or_a_reason(ranks: list[int]) -> None:
    pairs, reasons = split(pairs_of(ranking(ranks)))
    num_ties = sum(a == b for a, b in itertools.combinations(ranks, 2))
    num_all = len(ranks) * (len(ranks) - 1) // 2
    assert len(pairs) == num_all - num_ties
    if len(set(ranks)) == len(ranks):
        assert len(pairs) == num_all
    assert len(reasons) == (num_ties if pairs else 1)
    assert len(set(names(pairs))) == len(pairs)
    for pair in pairs:
        chosen, rejected = map(int, pair.id.removeprefix("q/").split("-"))
        assert ranks[chosen] < ranks[rejected]


# --- datasets -------------------------------------------------------------------------------


def rankings(path: Path) -> Path:
    records = [
        ranking(ranks_of("1>2=3>4", 4), [5.0, 4.0, 4.0, 4.5], id="a"),
        ranking([0, 0], id="b"),
    ]
    write_dataset(path, Ranking, records, media_root="photos")
    return path


def test_a_dataset_of_pairs_counts_and_validates(tmp_path: Path) -> None:
    manifest = make_pairs(rankings(tmp_path / "r"), tmp_path / "p")
    assert manifest.counts == {
        "accepted": 3,
        "accepted:negative_gap": 2,
        "dropped:tie": 1,
        "dropped:all_ties": 1,
    }
    dataset = open_dataset(tmp_path / "p", Preference)
    assert [pair.id for pair in dataset] == ["a/0-1", "a/0-2", "a/0-3", "a/1-3", "a/2-3"]
    assert [pair.score_gap for pair in dataset] == [1.0, 1.0, 0.5, -0.5, -0.5]
    assert dataset.media_root == (tmp_path / "r" / "photos").resolve()
    assert (manifest.builder, manifest.config["pairs"]) == ("pairs", "all")


def test_the_same_rankings_give_the_same_bytes(tmp_path: Path) -> None:
    first = make_pairs(rankings(tmp_path / "r"), tmp_path / "p")
    second = make_pairs(tmp_path / "r", tmp_path / "q")
    assert first.content_hash == second.content_hash


def test_embedded_pictures_come_along(tmp_path: Path) -> None:
    record = Ranking(
        id="a",
        prompt=user("What?", images=1),
        images=(Media(bytes=b"1"),),
        responses=(RankedResponse(text="x", rank=0), RankedResponse(text="y", rank=1)),
    )
    write_dataset(tmp_path / "r", Ranking, [record])
    make_pairs(tmp_path / "r", tmp_path / "p")
    assert open_dataset(tmp_path / "p", Preference)[0].images == (Media(bytes=b"1"),)


def test_no_pairs_are_told_in_a_sentence(tmp_path: Path) -> None:
    write_dataset(tmp_path / "r", Ranking, [ranking([0, 0]), ranking([1, 1, 1], id="b")])
    with pytest.raises(DataError, match="gives no pairs; got 2 dropped:all_ties"):
        make_pairs(tmp_path / "r", tmp_path / "p")
    assert not (tmp_path / "p" / "manifest.json").exists()
    write_dataset(tmp_path / "empty", Ranking, [])
    with pytest.raises(DataError, match="gives no pairs; got no rankings"):
        make_pairs(tmp_path / "empty", tmp_path / "p")


def test_what_is_no_dataset_of_rankings_is_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path / "d", Preference, [])
    with pytest.raises(SchemaMismatch, match="holds preference records; wanted ranking"):
        make_pairs(tmp_path / "d", tmp_path / "p")
    with pytest.raises(DataError, match="is a dataset already"):
        make_pairs(rankings(tmp_path / "r"), tmp_path / "d")


def test_the_verb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    verb = EntryPoint("data", "data_builders.data_cli:app", cli.GROUP)
    monkeypatch.setattr(cli, "verbs", lambda: {"data": verb})
    source, out = str(rankings(tmp_path / "r")), str(tmp_path / "p")
    assert cli.run(["data", "pairs", source, out, "--pairs", "best_worst", "--min-gap", "0"]) == 0
    assert read_manifest(out).config["min_gap"] == 0.0
    printed = capsys.readouterr().out
    assert f"{out}: 1 preference records\n" in printed
    assert "4  dropped:not_best_and_worst" in printed
    assert cli.run(["data", "pairs", source, out]) == 2
    assert "is a dataset already" in capsys.readouterr().err
