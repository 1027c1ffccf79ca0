"""MM-RLHF's pairs and annotated rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_builders.importers.common import Bad, Unusable
from data_builders.importers.mm_rlhf import ranks_of, read
from mmalign.records import Media, Preference, RankedResponse, check, user

PAIR = {
    "id": "q7",
    "image": "mcq/a.png",
    "prompt": "What is it?\n<image>",
    "chosen": "A cat.",
    "rejected": "A dog.",
    "chosen_reason": "Correct answer.",
    "rejected_reason": "It is no dog.",
}
ANNOTATED = {
    "id": "q7",
    "question": "<image>\nWhat is it?",
    "answer": None,
    "image": "mcq/a.png",
    "video": "",
    "models_output": ["A cat.", "A tom.", "A dog.", "Nothing."],
    "helpfulness": [5, 4, 2, 1],
    "faithfulness": [5, 4, 1, 1],
    "ethical": [5, 5, "3", None],
    "final_ranking": [1, 2, 2, 3],
    "score_reasons": ["Correct.", "Correct, too.", "No dog.", " "],
    "ranking_reason": "The first is the shortest.",
}


def lines(tmp_path: Path, *rows: Any, name: str = "dpo_pairs.jsonl") -> Path:
    file = tmp_path / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def one(tmp_path: Path, row: Any, name: str = "dpo_pairs.jsonl") -> Any:
    (result,) = read(lines(tmp_path, row, name=name))
    return result


# --- pairs ----------------------------------------------------------------------------------


def test_a_pair_has_its_critiques_and_its_picture_in_front(tmp_path: Path) -> None:
    pair = one(tmp_path, PAIR)
    assert pair.prompt == user("What is it?", images=1)
    assert (pair.images, pair.videos) == ((Media(path="mcq/a.png"),), ())
    assert (pair.chosen, pair.rejected) == ("A cat.", "A dog.")
    assert (pair.chosen_critique, pair.rejected_critique) == ("Correct answer.", "It is no dog.")
    assert (pair.p_target, pair.score_gap, pair.contrast_images) == (1.0, None, ())
    assert list(check(pair)) == []


def test_pairs_of_one_question_have_ids_of_their_own(tmp_path: Path) -> None:
    nameless = {key: value for key, value in PAIR.items() if key != "id"}
    records = list(read(lines(tmp_path, PAIR, PAIR, nameless)))
    ids = [record.id for record in records]
    assert ids == ["q7/dpo_pairs-1", "q7/dpo_pairs-2", "dpo_pairs-3"]


def test_a_tie_is_an_even_pair(tmp_path: Path) -> None:
    assert one(tmp_path, PAIR | {"is_tie": True}).p_target == 0.5
    assert one(tmp_path, PAIR | {"is_tie": False}).p_target == 1.0


def test_the_factor_of_beta_is_kept_and_is_no_score_gap(tmp_path: Path) -> None:
    pair = one(tmp_path, PAIR | {"ls_factor": 0.7})
    assert pair.score_gap is None
    assert json.loads(pair.origin.detail) == {"id": "q7", "ls_factor": 0.7}


def test_reasons_may_be_missing_or_blank(tmp_path: Path) -> None:
    row = {key: value for key, value in PAIR.items() if key != "chosen_reason"}
    pair = one(tmp_path, row | {"rejected_reason": " "})
    assert (pair.chosen_critique, pair.rejected_critique) == (None, None)


def test_a_pair_may_be_of_words_alone_or_of_a_clip(tmp_path: Path) -> None:
    words = one(tmp_path, PAIR | {"image": None, "prompt": "2 + 2?"})
    assert (words.prompt, words.images) == (user("2 + 2?"), ())
    clip = one(tmp_path, PAIR | {"image": None, "video": "video/v1"})
    assert (clip.prompt, clip.videos) == (
        user("What is it?", videos=1),
        (Media(path="video/v1"),),
    )


def test_a_mixed_up_image_is_the_contrast(tmp_path: Path) -> None:
    pair = one(tmp_path, PAIR | {"mixed_up_image": "mcq/b.png"})
    assert pair.contrast_images == (Media(path="mcq/b.png"),)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"chosen": None}, "missing_column"),
        ({"rejected": ""}, "empty_text"),
        ({"prompt": "<image>\n"}, "empty_text"),
        ({"prompt": ["What?"]}, "wrong_type"),
        ({"image": 3}, "wrong_type"),
        ({"image": None}, "no_media"),
        ({"is_tie": "yes"}, "wrong_type"),
        ({"chosen_reason": 5}, "wrong_type"),
    ],
)
def test_a_bad_pair_is_named(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    bad = one(tmp_path, PAIR | changes)
    assert isinstance(bad, Bad)
    assert (bad.reason, bad.where) == (reason, "dpo_pairs.jsonl line 1")
    assert bad.detail


# --- rankings -------------------------------------------------------------------------------


def test_an_annotated_row_becomes_a_ranking(tmp_path: Path) -> None:
    """Means: 15/3, 13/3, 6/3; the last response lacks one of its three scores."""
    ranking = one(tmp_path, ANNOTATED, "data.jsonl")
    assert ranking.id == "q7"
    assert ranking.prompt == user("What is it?", images=1)
    assert ranking.images == (Media(path="mcq/a.png"),)
    assert ranking.responses == (
        RankedResponse(text="A cat.", rank=0, score=5.0, critique="Correct."),
        RankedResponse(text="A tom.", rank=1, score=13 / 3, critique="Correct, too."),
        RankedResponse(text="A dog.", rank=1, score=2.0, critique="No dog."),
        RankedResponse(text="Nothing.", rank=2, score=None, critique=None),
    )
    detail = json.loads(ranking.origin.detail)
    assert detail["ranking_reason"] == "The first is the shortest."
    assert detail["scores"]["faithfulness"] == [5, 4, 1, 1]
    assert list(check(ranking)) == []


def test_rankings_come_from_parquet_too(tmp_path: Path) -> None:
    rows = ANNOTATED | {"ethical": [5, 5, 3, None], "answer": "A cat."}
    pq.write_table(pa.Table.from_pylist([rows]), tmp_path / "train.parquet")
    (ranking,) = read(tmp_path)
    assert not isinstance(ranking, Bad | Preference)
    assert [response.rank for response in ranking.responses] == [0, 1, 1, 2]


def test_what_was_not_annotated_is_missing(tmp_path: Path) -> None:
    row = {key: ANNOTATED[key] for key in ("id", "models_output", "final_ranking")}
    ranking = one(tmp_path, row | {"question": "2 + 2?"}, "data.jsonl")
    assert {response.score for response in ranking.responses} == {None}
    assert {response.critique for response in ranking.responses} == {None}
    assert ranking.images == ()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"models_output": None}, "missing_column"),
        ({"models_output": ["A cat.", 3, "x", "y"]}, "wrong_type"),
        ({"question": None}, "missing_column"),
        ({"final_ranking": None}, "missing_column"),
        ({"final_ranking": [1, 2, 3]}, "bad_ranking"),
        ({"final_ranking": "1>2>3>1"}, "bad_ranking"),
        ({"helpfulness": [5]}, "wrong_length"),
        ({"score_reasons": "fine"}, "wrong_length"),
        ({"score_reasons": ["a", "b", "c", 4]}, "wrong_type"),
    ],
)
def test_a_bad_ranking_is_named(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    bad = one(tmp_path, ANNOTATED | changes, "data.jsonl")
    assert isinstance(bad, Bad)
    assert (bad.reason, bad.where) == (reason, "data.jsonl line 1")
    assert bad.detail


@pytest.mark.parametrize(
    ("ranking", "ranks"),
    [
        ("1>2=3>4", [0, 1, 1, 2]),
        (" 3 > 1 = 4 > 2 ", [1, 2, 0, 1]),
        ("1=2=3=4", [0, 0, 0, 0]),
        ([1, 2, 2, 4], [0, 1, 1, 2]),
        (["2", "1", "3", "3"], [1, 0, 2, 2]),
        ([4, 4, 4, 4], [0, 0, 0, 0]),
    ],
)
def test_ranks_by_hand(ranking: Any, ranks: list[int]) -> None:
    assert ranks_of(ranking, 4) == ranks


@pytest.mark.parametrize(
    "ranking",
    [
        "1>2>3>4>1",
        "1>2=2>3=4",
        "1>2>3",
        "0>1>2>3",
        "1>2>3>5",
        "1>2>>3>4",
        "A>B>C>D",
        "",
        [1, 2, None, 4],
        [1, 2, True, 4],
        [1, 2, float("nan"), 4],
        [1, 2, [3], 4],
        "9" * 5000,
        4,
    ],
)
def test_what_ranks_not_every_response_once_is_refused(ranking: Any) -> None:
    with pytest.raises(Unusable) as error:
        ranks_of(ranking, 4)
    assert error.value.reason == "bad_ranking"


@given(st.lists(st.integers(0, 4), min_size=1, max_size=8))
def test_both_forms_of_a_ranking_agree(given_ranks: list[int]) -> None:
    order = sorted(set(given_ranks))
    groups = [
        "=".join(str(i + 1) for i, rank in enumerate(given_ranks) if rank == level)
        for level in order
    ]
    expected = [order.index(rank) for rank in given_ranks]
    assert ranks_of(">".join(groups), len(given_ranks)) == expected
    assert ranks_of([rank + 1 for rank in given_ranks], len(given_ranks)) == expected
