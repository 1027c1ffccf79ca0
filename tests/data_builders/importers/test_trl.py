"""TRL's preference format, in each of the shapes that TRL documents."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_builders.importers.common import Bad
from data_builders.importers.trl import read
from mmalign.records import Block, Media, Message, user


def lines(tmp_path: Path, *rows: Any) -> Path:
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def one(tmp_path: Path, row: Any) -> Any:
    (result,) = read(lines(tmp_path, row))
    return result


def says(words: Any, role: str = "assistant") -> list[dict[str, Any]]:
    return [{"role": role, "content": words}]


def png() -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", (2, 2)).save(sink, "PNG")
    return sink.getvalue()


def test_plain_texts(tmp_path: Path) -> None:
    pair = one(tmp_path, {"prompt": "Red?", "chosen": "Yes", "rejected": "No"})
    assert (pair.prompt, pair.chosen, pair.rejected) == (user("Red?"), "Yes", "No")
    assert (pair.id, pair.images) == ("pairs-1", ())
    assert (pair.origin.builder, pair.origin.source) == ("import:trl", "pairs.jsonl line 1")


def test_conversations_with_images_that_have_no_place(tmp_path: Path) -> None:
    row = {
        "id": 7,
        "prompt": [*says("Be brief.", "system"), *says("Compare.", "user")],
        "chosen": says("A"),
        "rejected": says("B"),
        "images": ["a.png", "b.png"],
    }
    pair = one(tmp_path, row)
    assert pair.id == "7"
    assert pair.prompt == (
        Message(role="system", content=(Block(type="text", text="Be brief."),)),
        *user("Compare.", images=2),
    )
    assert pair.images == (Media(path="a.png"), Media(path="b.png"))
    assert (pair.chosen, pair.rejected) == ("A", "B")


def test_typed_blocks_keep_the_place_of_the_image(tmp_path: Path) -> None:
    """As parquet stores them: every block has every key."""
    content = [{"type": "text", "text": "See "}, {"type": "image", "text": None}]
    answers = [[{"type": "text", "text": word}] for word in ("A", "B")]
    row = {
        "prompt": says(content, "user"),
        "chosen": says(answers[0]),
        "rejected": says(answers[1]),
        "image": "a.png",
    }
    pair = one(tmp_path, row)
    assert [block.type for block in pair.prompt[0].content] == ["text", "image"]
    assert (pair.chosen, pair.rejected) == ("A", "B")


def test_the_prompt_may_be_implicit(tmp_path: Path) -> None:
    shared = says("Red?", "user")
    row = {"chosen": shared + says("Yes"), "rejected": shared + says("No")}
    pair = one(tmp_path, row)
    assert (pair.prompt, pair.chosen, pair.rejected) == (user("Red?"), "Yes", "No")


def test_parquet_with_images_as_bytes_paths_and_nulls(tmp_path: Path) -> None:
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table(
        {
            "prompt": ["q"] * 3,
            "chosen": ["x"] * 3,
            "rejected": ["y"] * 3,
            "images": pa.array(
                [[{"bytes": png(), "path": "a.png"}], [{"bytes": None, "path": "b.png"}], None],
                type=pa.list_(image),
            ),
        }
    )
    pq.write_table(table, tmp_path / "p.parquet")
    for source in (tmp_path / "p.parquet", tmp_path):
        pairs: list[Any] = list(read(source))
        assert [pair.images for pair in pairs] == [
            (Media(path="a.png", bytes=png()),),
            (Media(path="b.png"),),
            (),
        ]
        assert [pair.id for pair in pairs] == ["p-0", "p-1", "p-2"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "q", "chosen": "a"}, "missing_column"),
        ({"prompt": "q", "chosen": "a", "rejected": None}, "missing_column"),
        ({"chosen": "a", "rejected": "b"}, "missing_column"),
        ({"prompt": "q", "chosen": " ", "rejected": "b"}, "empty_text"),
        ({"prompt": "q", "chosen": [], "rejected": "b"}, "no_answer"),
        ({"prompt": "q", "chosen": says("a", "user"), "rejected": "b"}, "no_answer"),
        ({"prompt": "q", "chosen": 3, "rejected": "b"}, "wrong_type"),
        ({"prompt": says("q", "narrator"), "chosen": "a", "rejected": "b"}, "unknown_role"),
        ({"prompt": [{"role": "user"}], "chosen": "a", "rejected": "b"}, "wrong_type"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "images": [3]}, "wrong_type"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "images": [{}]}, "wrong_type"),
        (
            {"chosen": says("p", "user") + says("a"), "rejected": says("q", "user") + says("b")},
            "prompts_differ",
        ),
        (["prompt", "chosen"], "malformed_json"),
    ],
)
def test_a_bad_row_is_named_and_the_next_one_is_read(tmp_path: Path, row: Any, reason: str) -> None:
    good = {"prompt": "q", "chosen": "a", "rejected": "b"}
    bad, pair = read(lines(tmp_path, row, good))
    assert isinstance(bad, Bad)
    assert (bad.reason, bad.where) == (reason, "pairs.jsonl line 1")
    assert bad.detail
    assert not isinstance(pair, Bad)
