"""Two folders of pictures: matched by stem, with a prompt, or named in the quarantine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_builders.importers.common import Bad
from data_builders.importers.image_folders import read
from mmalign.errors import DataError
from mmalign.records import ImagePreference, Media


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("chosen", "rejected"):
        (tmp_path / name).mkdir()
    return tmp_path


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"picture")


def prompts(root: Path, *rows: Any) -> None:
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    (root / "prompts.jsonl").write_text(text)


def told(root: Path) -> list[tuple[str, str]]:
    """(id, reason) of the bad ones; a good one is told by its prompt."""
    return [
        (record.id, record.reason if isinstance(record, Bad) else record.prompt)
        for record in read(root)
    ]


def test_pictures_of_one_stem_are_a_pair(root: Path) -> None:
    touch(root, "chosen/cats/1.png", "rejected/cats/1.jpg", "chosen/b.webp", "rejected/b.webp")
    prompts(root, {"id": "cats/1", "prompt": "a cat"})
    (root / "chosen" / "b.txt").write_text(" “b” 🐈\n")
    b, cat = read(root)
    assert isinstance(b, ImagePreference)
    assert isinstance(cat, ImagePreference)
    assert (b.id, b.prompt) == ("b", "“b” 🐈")
    assert (cat.id, cat.prompt, cat.p_target) == ("cats/1", "a cat", 1.0)
    assert (cat.chosen, cat.rejected) == (
        Media(path="chosen/cats/1.png"),
        Media(path="rejected/cats/1.jpg"),
    )
    assert (cat.origin.builder, cat.origin.source) == (
        "import:image_folders",
        "chosen/cats/1.png",
    )


def test_a_file_may_be_named_with_its_suffix_or_without(root: Path) -> None:
    """v1.5 is a stem with a dot in it."""
    for stem in ("a", "v1.5", "7"):
        touch(root, f"chosen/{stem}.png", f"rejected/{stem}.png")
    prompts(
        root,
        {"file": "a.png", "prompt": "one"},
        {"file": "v1.5", "prompt": "two"},
        {"id": 7, "prompt": "three"},
    )
    assert told(root) == [("7", "three"), ("a", "one"), ("v1.5", "two")]


def test_what_is_not_whole_is_named(root: Path) -> None:
    touch(root, "chosen/left.png", "rejected/right.png")
    touch(root, "chosen/mute.png", "rejected/mute.png")
    touch(root, "chosen/blank.png", "rejected/blank.png")
    (root / "chosen" / "blank.txt").write_text(" \n")
    touch(root, "chosen/latin.png", "rejected/latin.png")
    (root / "chosen" / "latin.txt").write_bytes(b"caf\xe9")
    touch(root, "chosen/twice.png", "chosen/twice.jpg", "rejected/twice.png")
    touch(root, "chosen/two.png", "rejected/two.png")
    (root / "chosen" / "two.txt").write_text("a dog")
    touch(root, "chosen/same.png", "rejected/same.png")
    (root / "chosen" / "same.txt").write_text("the same")
    prompts(
        root,
        {"id": "left", "prompt": "a cat"},
        {"id": "two", "prompt": "a cat"},
        {"id": "same", "prompt": "the same"},
        {"id": "gone", "prompt": "a cat"},
        {"id": "mute", "prompt": ""},
        {"prompt": "whose?"},
        "{broken",
    )
    assert told(root) == [
        ("", "empty_text"),
        ("", "missing_column"),
        ("", "malformed_json"),
        ("blank", "missing_prompt"),
        ("gone", "missing_side"),
        ("latin", "missing_prompt"),
        ("left", "missing_side"),
        ("mute", "missing_prompt"),
        ("right", "missing_side"),
        ("same", "the same"),
        ("twice", "two_pictures"),
        ("two", "two_prompts"),
    ]
    details = {record.id: record.detail for record in read(root) if isinstance(record, Bad)}
    assert details["left"] == "rejected holds no picture left"
    assert "chosen/twice.jpg, chosen/twice.png" in details["twice"]


def test_hidden_files_are_no_pictures(root: Path) -> None:
    touch(root, "chosen/.DS_Store", "rejected/.cache/a.png", "chosen/a.png", "rejected/a.png")
    (root / "chosen" / "a.txt").write_text("a")
    touch(root, "rejected/a.txt")
    assert told(root) == [("a", "a")]


def test_a_prompt_does_not_reach_out_of_the_folders(root: Path) -> None:
    prompts(root, {"file": "../prompts.jsonl", "prompt": "a"}, {"file": ".", "prompt": "b"})
    assert [reason for _, reason in told(root)] == ["missing_side", "missing_side"]


@pytest.mark.parametrize("kept", ["chosen", "rejected"])
def test_a_source_without_both_folders_is_refused(tmp_path: Path, kept: str) -> None:
    (tmp_path / kept).mkdir()
    with pytest.raises(DataError, match="holds no folder"):
        list(read(tmp_path))
