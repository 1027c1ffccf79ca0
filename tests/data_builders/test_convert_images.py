"""What convert does with image preferences, and what the other verbs say of the result."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_builders.convert import convert
from data_builders.importers import hpdv2, image_folders, pickapic
from data_builders.importers.common import Bad
from data_builders.inspect import stats
from mmalign import cli
from mmalign.errors import DataError
from mmalign.media import open_image
from mmalign.records import ImagePreference, Media, Origin
from mmalign.store import open_dataset, read_manifest, write_dataset


def picture(seed: int, width: int = 8, height: int = 8, mode: str = "RGB") -> Image.Image:
    random = np.random.RandomState(seed)
    if mode == "I;16":
        return Image.fromarray(random.randint(0, 65536, (height, width), dtype=np.uint16))
    pixels = random.randint(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(image: Image.Image, format: str = "PNG") -> bytes:
    sink = io.BytesIO()
    image.save(sink, format=format)
    return sink.getvalue()


A, B = encoded(picture(1)), encoded(picture(2))


def row(**changes: Any) -> dict[str, Any]:
    start = {"caption": "a cat", "jpg_0": A, "jpg_1": B, "label_0": 1.0, "label_1": 0.0}
    return start | changes


def table(path: Path, *rows: dict[str, Any]) -> Path:
    pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return path


def told(out: Path) -> list[tuple[str, str]]:
    lines = map(json.loads, (out / "quarantine.jsonl").read_text().splitlines())
    return [(entry["where"], entry["reason"]) for entry in lines]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run `mmalign data …`; returns the exit code and what it printed."""
    verb = EntryPoint("data", "data_builders.data_cli:app", cli.GROUP)
    monkeypatch.setattr(cli, "verbs", lambda: {"data": verb})

    def call(*arguments: object) -> tuple[int, str]:
        code = cli.run(["data", *map(str, arguments)])
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return call


# --- what becomes a record ------------------------------------------------------------------


def test_pick_a_pic_becomes_pairs_with_their_pictures_inside(tmp_path: Path) -> None:
    source = table(tmp_path / "train.parquet", row(), row(label_0=0.0, label_1=1.0))
    manifest = convert(source, tmp_path / "out", pickapic.read)
    assert (manifest.kind, manifest.counts) == ("image_preference", {"imported": 2})
    one, other = open_dataset(tmp_path / "out", ImagePreference)
    assert one.chosen == Media(bytes=A, sha256=hashlib.sha256(A).hexdigest())
    assert other.chosen.bytes == B
    assert one.origin.builder == "import:pickapic"


def test_sizes_and_colour_modes_may_differ(tmp_path: Path) -> None:
    kinds = [("L", "PNG"), ("RGBA", "PNG"), ("CMYK", "JPEG"), ("I;16", "PNG"), ("P", "PNG")]
    rows = [
        row(jpg_1=encoded(picture(n, 9 + n, 30 - n, mode), format))
        for n, (mode, format) in enumerate(kinds)
    ]
    manifest = convert(table(tmp_path / "a.parquet", *rows), tmp_path / "out", pickapic.read)
    assert manifest.counts == {"imported": 5}
    for n, pair in enumerate(open_dataset(tmp_path / "out", ImagePreference)):
        image = open_image(pair.rejected)
        assert (image.mode, image.size) == ("RGB", (9 + n, 30 - n))


def test_what_cannot_be_used_is_written_down_and_the_rest_kept(tmp_path: Path) -> None:
    source = table(
        tmp_path / "a.parquet",
        row(),
        row(label_0=0.5, label_1=0.5),
        row(jpg_1=B[:60]),
        row(jpg_0=None),
        row(jpg_1=A),
        row(jpg_1=b"no picture"),
        row(caption="ねこ 🐈"),
        row(caption=""),
        row(label_1=1.0),
    )
    manifest = convert(source, tmp_path / "out", pickapic.read)
    assert told(tmp_path / "out") == [
        ("a.parquet row 1", "tie"),
        ("a.parquet row 2", "unreadable_media"),
        ("a.parquet row 3", "missing_side"),
        ("a.parquet row 4", "same_image"),
        ("a.parquet row 5", "unreadable_media"),
        ("a.parquet row 7", "empty_text"),
        ("a.parquet row 8", "bad_labels"),
    ]
    assert manifest.counts["imported"] == 2
    assert [pair.prompt for pair in open_dataset(tmp_path / "out")] == ["a cat", "ねこ 🐈"]


def test_one_damaged_picture_of_a_ranking_loses_its_own_pairs(tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    for n in range(4):
        picture(n).save(tmp_path / "test" / f"{n}.png")
    (tmp_path / "test" / "1.png").write_bytes(b"broken")
    values = {"prompt": "a", "image_path": [f"{n}.png" for n in range(4)], "rank": [3, 1, 2, 4]}
    (tmp_path / "test.json").write_text(json.dumps([values]))
    manifest = convert(
        tmp_path / "test.json", tmp_path / "out", hpdv2.read, media_root=tmp_path / "test"
    )
    assert manifest.counts == {"imported": 3, "quarantined:unreadable_media": 3}
    pairs = open_dataset(tmp_path / "out", ImagePreference)
    assert [pair.id for pair in pairs] == ["test-0/2-0", "test-0/0-3", "test-0/2-3"]
    assert (pairs[0].chosen.path, pairs[0].chosen.bytes) == ("2.png", None)


def test_two_folders_become_pairs_by_path_or_with_their_pictures(tmp_path: Path) -> None:
    for n, side in enumerate(("chosen", "rejected")):
        (tmp_path / "set" / side).mkdir(parents=True)
        picture(n).save(tmp_path / "set" / side / "a.png")
    (tmp_path / "set" / "chosen" / "a.txt").write_text("a cat")
    convert(tmp_path / "set", tmp_path / "out", image_folders.read)
    (pair,) = open_dataset(tmp_path / "out", ImagePreference)
    data = (tmp_path / "set" / "chosen" / "a.png").read_bytes()
    assert pair.chosen == Media(path="chosen/a.png", sha256=hashlib.sha256(data).hexdigest())
    convert(tmp_path / "set", tmp_path / "held", image_folders.read, embed_media=True)
    assert open_dataset(tmp_path / "held", ImagePreference)[0].chosen.bytes == data


@pytest.mark.parametrize("format", ["pickapic", "hpdv2", "image_folders"])
def test_every_format_makes_a_dataset_that_validates(run: Any, tmp_path: Path, format: str) -> None:
    for n, side in enumerate(("chosen", "rejected")):
        (tmp_path / side).mkdir()
        picture(n).save(tmp_path / side / "a.png")
    (tmp_path / "prompts.jsonl").write_text('{"id": "a", "prompt": "a cat"}')
    values = {
        "prompt": "a",
        "image_path": ["chosen/a.png", "rejected/a.png"],
        "human_preference": [1, 0],
    }
    sources = {
        "pickapic": table(tmp_path / "a.parquet", row()),
        "hpdv2": tmp_path / "train.json",
        "image_folders": tmp_path,
    }
    (tmp_path / "train.json").write_text(json.dumps([values]))
    out = tmp_path / "out"
    assert run("convert", sources[format], out, "--from", format) == (
        0,
        f"{out}: 1 image_preference records\n",
    )
    assert run("validate", out)[0] == 0


# --- limits ---------------------------------------------------------------------------------


def test_a_limit_counts_good_records_and_nothing_more_is_read(tmp_path: Path) -> None:
    rows = [
        row(label_0=0.5, label_1=0.5),
        row(jpg_0=b"broken"),
        row(caption="first"),
        row(label_0=0.5, label_1=0.5),
        row(caption="second"),
        row(caption="third"),
    ]
    source = table(tmp_path / "a.parquet", *rows)
    taken: list[str] = []

    def watched(path: Path) -> Iterator[ImagePreference | Bad]:
        for record in pickapic.read(path):
            taken.append(record.origin.source if not isinstance(record, Bad) else record.where)
            yield record

    manifest = convert(source, tmp_path / "out", watched, limit=2)
    assert [pair.prompt for pair in open_dataset(tmp_path / "out")] == ["first", "second"]
    assert taken == [f"a.parquet row {n}" for n in range(5)]
    assert manifest.counts == {
        "imported": 2,
        "quarantined:tie": 2,
        "quarantined:unreadable_media": 1,
    }
    assert len(told(tmp_path / "out")) == 3
    assert manifest.config["limit"] == 2


def test_later_files_of_a_folder_stay_closed(run: Any, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    table(tmp_path / "set" / "train-00000-of-00002.parquet", row(), row())
    (tmp_path / "set" / "train-00001-of-00002.parquet").write_bytes(b"not there yet")
    convert_it = ("convert", tmp_path / "set")
    assert run(*convert_it, tmp_path / "two", "--from", "pickapic", "--limit", 2)[0] == 0
    assert read_manifest(tmp_path / "two").num_records == 2
    code, text = run(*convert_it, tmp_path / "three", "--from", "pickapic", "--limit", 3)
    assert (code, "train-00001-of-00002.parquet" in text) == (2, True)
    assert run(*convert_it, tmp_path / "none", "--from", "pickapic", "--limit", 0)[0] == 2


def test_a_limit_larger_than_the_source_takes_all_of_it(tmp_path: Path) -> None:
    source = table(tmp_path / "a.parquet", row(), row())
    assert convert(source, tmp_path / "out", pickapic.read, limit=9).num_records == 2


def test_a_source_of_ties_is_refused(tmp_path: Path) -> None:
    source = table(tmp_path / "a.parquet", row(label_0=0.5, label_1=0.5))
    with pytest.raises(DataError, match="no usable row among 1; got 1 tie"):
        convert(source, tmp_path / "out", pickapic.read, limit=1)


# --- looking --------------------------------------------------------------------------------


def pair(id: str, chosen: bytes, rejected: bytes, **changes: Any) -> ImagePreference:
    values: dict[str, Any] = {
        "prompt": "a cat",
        "chosen": Media(bytes=chosen),
        "rejected": Media(bytes=rejected),
        "origin": Origin(builder="test", reason="imported"),
    }
    return ImagePreference(id=id, **(values | changes))


@pytest.fixture
def looked(tmp_path: Path) -> Path:
    wide = encoded(picture(3, 20, 10))
    records = [
        pair("0", A, B),
        pair("1", A, B, p_target=0.5),
        pair("2", A, A, p_target=0.2),
        pair("3", wide, encoded(picture(4, 8, 8, "RGBA")), prompt="ねこ"),
        pair("4", encoded(picture(5, 10, 20, "CMYK"), "JPEG"), b"broken", prompt="three"),
    ]
    write_dataset(tmp_path / "looked", ImagePreference, records)
    return tmp_path / "looked"


def test_stats_by_hand(run: Any, looked: Path) -> None:
    numbers = stats(open_dataset(looked))
    assert numbers["picture_pairs"] == {
        "ties": 1,
        "reversed": 1,
        "different_sizes": 1,
        "unreadable": 1,
        "sizes": {"8x8": 7, "20x10": 1, "10x20": 1},
        "num_sizes": 3,
        "colour_modes": {"RGB": 7, "RGBA": 1, "CMYK": 1},
    }
    assert numbers["duplicates"] == {"same_prompt_and_media": 1, "chosen_is_rejected": 1}
    assert numbers["lengths"]["prompt"]["characters"]["mean"] == (3 * 5 + 2 + 5) / 5
    code, text = run("stats", looked)
    assert code == 0
    for words in (
        "pairs whose pictures are equal: 1",
        "ties: 1; reversed (p_target below 0.5): 1",
        "pairs of two sizes: 1",
        "pairs with a picture that cannot be read: 1",
        "sizes of pictures: 7 of 8x8, 1 of 20x10, 1 of 10x20",
        "colour modes of the files: 7 RGB, 1 RGBA, 1 CMYK",
    ):
        assert words in text


def test_a_set_of_many_sizes_tells_the_most_frequent(run: Any, tmp_path: Path) -> None:
    records = [pair(str(n), A, encoded(picture(n, 9 + n))) for n in range(12)]
    write_dataset(tmp_path / "d", ImagePreference, records)
    numbers = stats(open_dataset(tmp_path / "d"))["picture_pairs"]
    assert (numbers["num_sizes"], len(numbers["sizes"]), numbers["sizes"]["8x8"]) == (13, 10, 12)
    assert "3 sizes more" in run("stats", tmp_path / "d")[1]


def test_validate_names_equal_and_unreadable_pictures(run: Any, looked: Path) -> None:
    code, text = run("validate", looked)
    assert code == 1
    assert "row 2 (id 2): rejected is the chosen picture; drop the row: it teaches nothing" in text
    assert "row 4 (id 4): rejected embedded image is no picture in a known format" in text
    assert "2 problems in 2 of 5 rows" in text


def test_a_preview_names_the_two_pictures_side_by_side(run: Any, looked: Path) -> None:
    assert run("preview", looked)[0] == 0
    html = (looked / "preview.html").read_text()
    fourth = html.split('class="pictures"')[4].partition("<dl>")[0]
    assert fourth.index("<figcaption>chosen, 20 x 10") < fourth.index("<figcaption>rejected, 8 x 8")
    assert html.count("<figcaption>chosen, ") == 5
    assert html.count("<figcaption>rejected, ") == 4  # one is broken, and told
    assert "is no picture in a known format" in html
    assert "<dt>p_target</dt><dd>0.5</dd>" in html
    assert "ねこ" in html
