"""LLaVA's JSON list."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_builders.importers.common import Bad
from data_builders.importers.llava import read
from mmalign.records import Block, Media, Message, user


def turns(*values: str) -> list[dict[str, str]]:
    return [
        {"from": ("human", "gpt")[index % 2], "value": value} for index, value in enumerate(values)
    ]


def one(tmp_path: Path, row: Any) -> Any:
    file = tmp_path / "llava.json"
    file.write_text(json.dumps([row]))
    (result,) = read(file)
    return result


def test_single_turn(tmp_path: Path) -> None:
    row = {"id": "7", "image": "a.jpg", "conversations": turns("<image>\nWhat is it?", "A cat.")}
    example = one(tmp_path, row)
    assert example.id == "7"
    assert example.prompt == user("What is it?", images=1)
    assert example.images == (Media(path="a.jpg"),)
    assert example.answer == "A cat."


def test_multi_turn_keeps_the_earlier_turns_in_the_prompt(tmp_path: Path) -> None:
    row = {"image": "a.jpg", "conversations": turns("What?\n<image>", "A cat.", "Sure?", "Yes.")}
    example = one(tmp_path, row)
    assert [message.role for message in example.prompt] == ["user", "assistant", "user"]
    assert example.prompt[0].content == (Block(type="text", text="What?"), Block(type="image"))
    assert example.answer == "Yes."
    assert example.id == "llava-0"


def test_an_image_inside_a_sentence_keeps_its_place(tmp_path: Path) -> None:
    row = {
        "image": ["a.jpg", "b.jpg"],
        "conversations": turns("Is <image> like <image>?", "No."),
    }
    assert one(tmp_path, row).prompt[0].content == (
        Block(type="text", text="Is "),
        Block(type="image"),
        Block(type="text", text=" like "),
        Block(type="image"),
        Block(type="text", text="?"),
    )


def test_an_image_without_a_place_goes_to_the_front(tmp_path: Path) -> None:
    row = {"image": "a.jpg", "conversations": turns("What?", "A cat.")}
    assert one(tmp_path, row).prompt == user("What?", images=1)


def test_text_only_rows_are_examples_too(tmp_path: Path) -> None:
    example = one(tmp_path, {"conversations": turns("2 + 2?", "4")})
    assert (example.images, example.prompt) == ((), user("2 + 2?"))


def test_a_question_alone_has_no_known_answer(tmp_path: Path) -> None:
    assert one(tmp_path, {"conversations": turns("What?")}).answer is None


def test_image_tags_in_an_answer_are_words(tmp_path: Path) -> None:
    example = one(
        tmp_path, {"conversations": turns("Which tag?", "<image>", "Why?", "<image> it is")}
    )
    assert example.prompt[1] == Message(
        role="assistant", content=(Block(type="text", text="<image>"),)
    )
    assert example.answer == "<image> it is"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"image": "a.jpg"}, "missing_column"),
        ({"conversations": "hi"}, "wrong_type"),
        ({"conversations": turns("What?", "")}, "empty_text"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "unknown_role"),
        ({"conversations": [{"from": "human"}]}, "wrong_type"),
        ({"conversations": turns("What?", "A cat."), "image": 3}, "wrong_type"),
        ("hi", "malformed_json"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: Any, reason: str) -> None:
    bad = one(tmp_path, row)
    assert isinstance(bad, Bad)
    assert (bad.reason, bad.where) == (reason, "llava.json row 0")
