"""POVID's JSON list: two conversations about one picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_builders.importers.common import Bad
from data_builders.importers.povid import read
from mmalign.records import Media, user


def turns(*values: str) -> list[dict[str, str]]:
    return [
        {"from": ("human", "gpt")[index % 2], "value": value} for index, value in enumerate(values)
    ]


ROW = {
    "id": "000000033471",
    "image": "000000033471.jpg",
    "conversations": turns("<image>\nWhat colour is the bus?", "White and red."),
    "rejected_conversations": turns("<image>\nWhat colour is the bus?", "White and blue."),
}


def read_all(tmp_path: Path, *rows: Any) -> list[Any]:
    file = tmp_path / "povid.json"
    file.write_text(json.dumps(rows))
    return list(read(file))


def test_the_last_turns_are_the_pair(tmp_path: Path) -> None:
    (pair,) = read_all(tmp_path, ROW)
    assert pair.prompt == user("What colour is the bus?", images=1)
    assert pair.images == (Media(path="000000033471.jpg"),)
    assert (pair.chosen, pair.rejected) == ("White and red.", "White and blue.")
    assert json.loads(pair.origin.detail) == {"id": "000000033471"}


def test_rows_of_one_picture_have_ids_of_their_own(tmp_path: Path) -> None:
    assert [pair.id for pair in read_all(tmp_path, ROW, ROW)] == ["povid-0", "povid-1"]


def test_a_place_that_is_not_given_is_in_front(tmp_path: Path) -> None:
    row = ROW | {
        "conversations": turns("What?", "A bus."),
        "rejected_conversations": turns("What?", "A car."),
    }
    assert read_all(tmp_path, row)[0].prompt == user("What?", images=1)


def test_earlier_turns_stay_in_the_prompt(tmp_path: Path) -> None:
    row = ROW | {
        "conversations": turns("<image>\nWhat?", "A bus.", "Sure?", "Yes."),
        "rejected_conversations": turns("<image>\nWhat?", "A bus.", "Sure?", "No."),
    }
    (pair,) = read_all(tmp_path, row)
    assert [message.role for message in pair.prompt] == ["user", "assistant", "user"]
    assert (pair.chosen, pair.rejected) == ("Yes.", "No.")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"conversations": None}, "missing_column"),
        ({"rejected_conversations": None}, "missing_column"),
        ({"image": None}, "missing_column"),
        ({"image": 3}, "wrong_type"),
        ({"conversations": "hi"}, "wrong_type"),
        ({"rejected_conversations": turns("<image>\nWhere?", "Here.")}, "prompts_differ"),
        ({"conversations": [], "rejected_conversations": []}, "no_answer"),
        ({"conversations": ROW["conversations"][:1]}, "prompts_differ"),
        ({"rejected_conversations": turns("<image>\nWhat colour is the bus?", " ")}, "empty_text"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "unknown_role"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    (bad,) = read_all(tmp_path, ROW | changes)
    assert isinstance(bad, Bad)
    assert (bad.reason, bad.where) == (reason, "povid.json row 0")
    assert bad.detail
