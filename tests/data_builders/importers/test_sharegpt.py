"""ShareGPT conversations, in the shapes that LLaMA-Factory documents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_builders.importers.common import Bad
from data_builders.importers.sharegpt import read
from mmalign.records import Block, Example, Media, Message, Preference, check, user


def turns(*values: str) -> list[dict[str, str]]:
    return [
        {"from": ("human", "gpt")[index % 2], "value": value} for index, value in enumerate(values)
    ]


def says(words: str, role: str = "gpt") -> dict[str, str]:
    return {"from": role, "value": words}


ROW = {
    "conversations": turns("<image>What is it?"),
    "chosen": says("A cat."),
    "rejected": says("A dog."),
    "images": ["a.jpg"],
}


def one(tmp_path: Path, row: Any) -> Any:
    file = tmp_path / "sharegpt.json"
    file.write_text(json.dumps([row]))
    (result,) = read(file)
    return result


def test_a_ranked_row_is_a_pair(tmp_path: Path) -> None:
    pair = one(tmp_path, ROW)
    assert pair.prompt == user("What is it?", images=1)
    assert (pair.images, pair.videos) == ((Media(path="a.jpg"),), ())
    assert (pair.chosen, pair.rejected) == ("A cat.", "A dog.")
    assert pair.id == "sharegpt-0"


def test_pictures_and_clips_keep_their_places(tmp_path: Path) -> None:
    row = ROW | {
        "conversations": turns("Is <video> like <image> or <image>?", "Yes.", "Why?"),
        "images": ["a.jpg", "b.jpg"],
        "videos": ["c.mp4"],
    }
    pair = one(tmp_path, row)
    kinds = [block.type for block in pair.prompt[0].content]
    assert kinds == ["text", "video", "text", "image", "text", "image", "text"]
    assert [message.role for message in pair.prompt] == ["user", "assistant", "user"]
    assert pair.videos == (Media(path="c.mp4"),)
    assert list(check(pair)) == []


def test_media_without_places_are_in_front_images_first(tmp_path: Path) -> None:
    row = ROW | {"conversations": turns("What?"), "videos": ["c.mp4"]}
    assert one(tmp_path, row).prompt == user("What?", images=1, videos=1)


def test_a_row_without_a_preference_is_an_example(tmp_path: Path) -> None:
    row = {"conversations": turns("<video>What?", "A race."), "videos": ["c.mp4"]}
    example = one(tmp_path, row)
    assert isinstance(example, Example)
    assert (example.prompt, example.answer) == (user("What?", videos=1), "A race.")
    assert one(tmp_path, {"conversations": turns("What?")}).answer is None


def test_roles_and_contents_as_openai_names_them(tmp_path: Path) -> None:
    row = {
        "messages": [{"role": "user", "content": "<image>What?"}],
        "chosen": {"role": "assistant", "content": "A cat."},
        "rejected": {"role": "assistant", "content": "A dog."},
        "images": "a.jpg",
    }
    pair = one(tmp_path, row)
    assert isinstance(pair, Preference)
    assert (pair.prompt, pair.chosen) == (user("What?", images=1), "A cat.")


def test_a_system_column_is_the_first_turn(tmp_path: Path) -> None:
    system = Message(role="system", content=(Block(type="text", text="Be brief."),))
    assert one(tmp_path, ROW | {"system": "Be brief."}).prompt[0] == system
    own = [says("Be brief.", "system"), *ROW["conversations"]]
    prompt = one(tmp_path, ROW | {"conversations": own, "system": "Be long."}).prompt
    assert (prompt[0], len(prompt)) == (system, 2)
    assert one(tmp_path, ROW | {"system": ""}).prompt == user("What is it?", images=1)


def test_too_few_places_are_found_by_the_check(tmp_path: Path) -> None:
    (problem,) = check(one(tmp_path, ROW | {"images": ["a.jpg", "b.jpg"]}))
    assert problem.what == "has 2 files for 1 places in the prompt"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"conversations": None}, "missing_column"),
        ({"conversations": "hi"}, "wrong_type"),
        ({"conversations": [says("tool", "observation")]}, "unknown_role"),
        ({"rejected": None}, "missing_column"),
        ({"chosen": None}, "missing_column"),
        ({"chosen": "A cat."}, "wrong_type"),
        ({"chosen": says("A cat.", "human")}, "no_answer"),
        ({"rejected": says(" ")}, "empty_text"),
        ({"images": [3]}, "wrong_type"),
        ({"videos": [["1.jpg", "2.jpg"]]}, "frames_as_clip"),
        ({"tools": '[{"name": "search"}]'}, "holds_tools"),
        ({"audios": ["a.wav"]}, "holds_audios"),
        ({"system": 3}, "wrong_type"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    bad = one(tmp_path, ROW | changes)
    assert isinstance(bad, Bad)
    assert (bad.reason, bad.where) == (reason, "sharegpt.json row 0")
    assert bad.detail
