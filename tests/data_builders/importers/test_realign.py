"""Re-Align's JSON list of dual preferences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_builders.importers.common import Bad
from data_builders.importers.realign import read
from mmalign.records import Block, Media, user


def turns(*contents: str) -> list[dict[str, str]]:
    return [
        {"role": ("user", "assistant")[index % 2], "content": content}
        for index, content in enumerate(contents)
    ]


ROW = {
    "image": "a.jpg",
    "retrieved_image": "b.jpg",
    "chosen": turns("What is it?\n<image>", "A cat."),
    "rejected": turns("What is it?\n<image>", "A dog."),
}


def one(tmp_path: Path, row: Any) -> Any:
    file = tmp_path / "preference.json"
    file.write_text(json.dumps([row]))
    (result,) = read(file)
    return result


def test_the_retrieved_image_is_the_contrast_and_the_image_goes_to_the_front(
    tmp_path: Path,
) -> None:
    pair = one(tmp_path, ROW)
    assert pair.prompt == user("What is it?", images=1)
    assert (pair.images, pair.contrast_images) == ((Media(path="a.jpg"),), (Media(path="b.jpg"),))
    assert (pair.chosen, pair.rejected) == ("A cat.", "A dog.")


def test_multi_turn_pairs_differ_in_their_last_turn(tmp_path: Path) -> None:
    row = ROW | {
        "chosen": turns("<image>\nWhat?", "A cat.", "Sure?", "Yes."),
        "rejected": turns("<image>\nWhat?", "A cat.", "Sure?", "No."),
    }
    pair = one(tmp_path, row)
    assert [message.role for message in pair.prompt] == ["user", "assistant", "user"]
    assert pair.prompt[0].content[0] == Block(type="image")
    assert (pair.chosen, pair.rejected) == ("Yes.", "No.")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rejected": turns("Where is it?\n<image>", "A dog.")}, "prompts_differ"),
        ({"retrieved_image": None}, "missing_column"),
        ({"chosen": turns("What is it?\n<image>", "")}, "empty_text"),
        ({"chosen": []}, "prompts_differ"),
        ({"chosen": [], "rejected": []}, "no_answer"),
        ({"chosen": "A cat."}, "wrong_type"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    bad = one(tmp_path, ROW | changes)
    assert isinstance(bad, Bad)
    assert bad.reason == reason
