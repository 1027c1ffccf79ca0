"""Dataset directories: what is written is read back, and every broken one is refused in words."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmalign import store
from mmalign.errors import DataError, SchemaMismatch
from mmalign.records import (
    KINDS,
    Example,
    ImagePreference,
    Media,
    Preference,
    RankedResponse,
    Ranking,
    Verifiable,
    user,
)
from mmalign.store import MANIFEST, open_dataset, read_manifest, write_atomically, write_dataset

ONE_OF_EACH = {
    "example": Example(id="a", prompt=user("q", images=1), images=(Media(bytes=b"1"),)),
    "preference": Preference(id="a", prompt=user("q"), chosen="x", rejected="y", score_gap=0.5),
    "ranking": Ranking(id="a", prompt=user("q"), responses=(RankedResponse(text="x", rank=0),)),
    "image_preference": ImagePreference(
        id="a", prompt="a cat", chosen=Media(path="a"), rejected=Media(path="b")
    ),
    "verifiable": Verifiable(id="a", prompt=user("q"), answer="4", verifier="number"),
}


def examples(count: int, *, picture: bytes | None = None) -> Iterator[Example]:
    for index in range(count):
        images = (Media(bytes=picture),) if picture else ()
        yield Example(id=f"{index}", prompt=user("q", images=len(images)), images=images)


def edit_manifest(path: Path, **changes: Any) -> None:
    data = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps(data | changes))


# --- round trips ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_is_read_back_as_written(tmp_path: Path, name: str) -> None:
    write_dataset(tmp_path, KINDS[name], [ONE_OF_EACH[name]])
    assert list(open_dataset(tmp_path, KINDS[name])) == [ONE_OF_EACH[name]]


def test_shards_keep_their_order_and_index_like_a_list(tmp_path: Path) -> None:
    manifest = write_dataset(tmp_path, Example, examples(25), shard_rows=10, seed=7)
    dataset = open_dataset(tmp_path, Example)
    assert manifest.shards == tuple(f"shard-0000{i}.parquet" for i in range(3))
    assert (len(dataset), dataset.manifest.seed) == (25, 7)
    assert [record.id for record in dataset] == [str(i) for i in range(25)] == dataset.column("id")
    assert (dataset[13].id, dataset[-1].id) == ("13", "24")
    with pytest.raises(IndexError):
        dataset[25]


def test_an_empty_dataset_is_a_dataset(tmp_path: Path) -> None:
    write_dataset(tmp_path, Preference, [])
    assert list(open_dataset(tmp_path, Preference)) == []


def test_shards_open_with_datasets_and_no_code_of_ours(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    write_dataset(tmp_path / "d", Preference, [ONE_OF_EACH["preference"]])
    rows = datasets.load_dataset(
        "parquet",
        data_files=str(tmp_path / "d" / "*.parquet"),
        cache_dir=str(tmp_path / "cache"),
        split="train",
    )
    assert rows[0]["prompt"][0]["content"][0] == {"type": "text", "text": "q"}
    assert (rows[0]["chosen"], rows[0]["images"], rows[0]["score_gap"]) == ("x", [], 0.5)


def test_a_shard_ends_at_its_bytes_so_that_arrow_offsets_cannot_overflow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "SHARD_BYTES", 100)
    manifest = write_dataset(tmp_path, Example, examples(4, picture=bytes(50)))
    assert len(manifest.shards) == 2
    assert len(open_dataset(tmp_path, Example)) == 4


def test_writing_again_leaves_no_shard_of_before(tmp_path: Path) -> None:
    write_dataset(tmp_path, Example, examples(30), shard_rows=10)
    write_dataset(tmp_path, Example, examples(5), shard_rows=10)
    assert [file.name for file in tmp_path.glob("*.parquet")] == ["shard-00000.parquet"]


def test_the_hash_follows_the_rows_and_nothing_else(tmp_path: Path) -> None:
    hashes = [
        write_dataset(tmp_path / name, Example, examples(count), seed=seed).content_hash
        for name, count, seed in (("a", 3, 0), ("b", 3, 1), ("c", 4, 0))
    ]
    assert hashes[0] == hashes[1] != hashes[2]


def test_reading_twenty_thousand_rows_takes_a_moment(tmp_path: Path) -> None:
    """About a second on one core: rows are read in batches."""
    write_dataset(tmp_path, Example, examples(20_000, picture=os.urandom(1024)))
    dataset = open_dataset(tmp_path, Example)
    start = time.process_time()
    assert sum(1 for _ in dataset) == 20_000
    assert time.process_time() - start < 4


# --- media root -----------------------------------------------------------------------------


def test_the_media_root_is_relative_to_the_directory_or_absolute(tmp_path: Path) -> None:
    write_dataset(tmp_path / "a", Example, examples(1))
    write_dataset(tmp_path / "b", Example, examples(1), media_root=str(tmp_path / "photos"))
    assert open_dataset(tmp_path / "a").media_root == (tmp_path / "a" / "media").resolve()
    assert open_dataset(tmp_path / "b").media_root == (tmp_path / "photos").resolve()


# --- broken directories ---------------------------------------------------------------------


def test_a_repeated_id_is_refused_before_its_shard_is_written(tmp_path: Path) -> None:
    rows = [*examples(3), *examples(1)]
    with pytest.raises(DataError, match="id appears twice; got 0"):
        write_dataset(tmp_path, Example, rows, shard_rows=2)
    assert [file.name for file in tmp_path.iterdir()] == ["shard-00000.parquet"]


def test_an_unfinished_directory_is_no_dataset(tmp_path: Path) -> None:
    write_dataset(tmp_path / "d", Example, examples(1))
    (tmp_path / "d" / MANIFEST).unlink()
    with pytest.raises(DataError, match=r"no manifest\.json\. Run its builder again"):
        open_dataset(tmp_path / "d")
    with pytest.raises(DataError, match="no such dataset"):
        open_dataset(tmp_path / "absent")


@pytest.mark.parametrize("text", ['{"kind": "example", "num_rec', "", "[]", "{}", "null"])
def test_a_half_written_manifest_is_refused(tmp_path: Path, text: str) -> None:
    write_dataset(tmp_path, Example, examples(1))
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(DataError, match="is not a manifest"):
        read_manifest(tmp_path)


def test_a_newer_schema_is_refused_even_where_its_manifest_has_new_keys(tmp_path: Path) -> None:
    write_dataset(tmp_path, Example, examples(1))
    edit_manifest(tmp_path, schema_version=99, licence="CC0")
    with pytest.raises(DataError, match=r"newer mmalign; got schema 99.*Upgrade mmalign"):
        open_dataset(tmp_path)


def test_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path, Example, examples(1))
    edit_manifest(tmp_path, kind="trilogy")
    with pytest.raises(DataError, match="holds 'trilogy' records; wanted one of example"):
        open_dataset(tmp_path)


def test_another_kind_than_wanted_is_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path, Example, examples(1))
    with pytest.raises(SchemaMismatch, match="holds example records; wanted preference"):
        open_dataset(tmp_path, Preference)


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    write_dataset(tmp_path, Preference, [ONE_OF_EACH["preference"]])
    shard = tmp_path / "shard-00000.parquet"
    pq.write_table(pq.read_table(shard).drop_columns(["rejected", "weight"]), shard)
    with pytest.raises(SchemaMismatch, match=r"shard-00000.parquet: column rejected, weight is mi"):
        open_dataset(tmp_path)


def test_a_column_of_another_type_is_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path, Preference, [ONE_OF_EACH["preference"]])
    shard = tmp_path / "shard-00000.parquet"
    table = pq.read_table(shard)
    index = table.column_names.index("p_target")
    pq.write_table(table.set_column(index, "p_target", pa.array(["certain"])), shard)
    with pytest.raises(DataError, match=r"shard cannot be read .*certain"):
        open_dataset(tmp_path)


def test_a_truncated_or_missing_shard_is_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path, Example, examples(9))
    shard = tmp_path / "shard-00000.parquet"
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(DataError, match="shard cannot be read"):
        open_dataset(tmp_path)
    shard.unlink()
    with pytest.raises(DataError, match="shard cannot be read"):
        open_dataset(tmp_path)


def test_a_manifest_that_counts_other_rows_is_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path, Example, examples(9))
    edit_manifest(tmp_path, num_records=10)
    with pytest.raises(DataError, match="disagree; got 9 rows; wanted 10"):
        open_dataset(tmp_path)


# --- a full disk ----------------------------------------------------------------------------


def test_a_full_disk_keeps_the_earlier_shards_and_leaves_no_partial_file(tmp_path: Path) -> None:
    """The kernel itself refuses the second shard: files may not grow past 20,000 bytes."""
    program = """
import os, resource, sys
from mmalign.errors import DataError
from mmalign.records import Example, Media, user
from mmalign.store import write_dataset

def rows():
    for index, size in enumerate([100, 100_000]):
        picture = Media(bytes=os.urandom(size))
        yield Example(id=str(index), prompt=user("q", images=1), images=(picture,))

resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    write_dataset(sys.argv[1], Example, rows(), shard_rows=1)
except DataError as error:
    print(error)
"""
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert "shard-00001.parquet: cannot be written (File too large)" in result.stdout
    assert "Free some space" in result.stdout
    assert [file.name for file in tmp_path.iterdir()] == ["shard-00000.parquet"]
    assert pq.read_table(tmp_path / "shard-00000.parquet").num_rows == 1


def test_a_file_that_cannot_be_replaced_keeps_its_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_atomically(tmp_path / "a.txt", "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="No space left on device"):
        write_atomically(tmp_path / "a.txt", "new")
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


def test_a_folder_that_cannot_be_made_is_an_error_in_words(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        write_atomically(tmp_path / "file" / "a.txt", "new")
