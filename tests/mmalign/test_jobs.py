"""Jobs: killed at any moment and started again, or split over processes, the result is the same."""

from __future__ import annotations

import json
import random
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmalign.errors import DataError, MediaError
from mmalign.jobs import Outcome, run_job
from mmalign.records import Example, user
from mmalign.store import open_dataset, read_manifest

SCRIPT = """
import sys, time
from mmalign.jobs import Outcome, run_job
from mmalign.records import Example, user

def work(rows):
    time.sleep(0.03)
    kept = {r.id for r in rows if int(r.id) % 3}
    return [
        Outcome(id=r.id, record=r, reason="kept")
        if r.id in kept
        else Outcome(id=r.id, reason="dropped:third")
        for r in rows
    ]

out, index, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
rows = [Example(id=f"{i:03d}", prompt=user(f"q{i}"), answer="a") for i in range(90)]
run_job(rows, work, out, Example, shard_rows=2, shard=(index, count), builder="t", seed=1)
"""


def start(script: Path, out: Path, index: int = 0, count: int = 1) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, str(script), str(out), str(index), str(count)])


def whole_run(script: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same script in this process, uninterrupted."""
    monkeypatch.setattr(sys, "argv", [str(script), str(out), "0", "1"])
    runpy.run_path(str(script))


def rows(count: int) -> list[Example]:
    return [Example(id=f"{i:03d}", prompt=user(f"q{i}"), answer="a") for i in range(count)]


def keep(batch: list[Example]) -> list[Outcome]:
    return [Outcome(id=row.id, record=row, reason="kept") for row in batch]


def test_killed_again_and_again_it_equals_an_uninterrupted_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "job.py"
    script.write_text(SCRIPT)
    whole_run(script, tmp_path / "whole", monkeypatch)

    killed, out, draw = 0, tmp_path / "killed", random.Random(3)
    for _ in range(5):
        before = len(list(out.glob("progress/*.json")))
        process = start(script, out)
        while process.poll() is None and len(list(out.glob("progress/*.json"))) == before:
            time.sleep(0.005)
        time.sleep(draw.uniform(0.0, 0.15))
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
    assert killed >= 3, "the job must be slow enough to be killed in the middle"
    assert not (out / "manifest.json").exists()
    assert start(script, out).wait() == 0

    assert (out / "manifest.json").read_bytes() == (tmp_path / "whole/manifest.json").read_bytes()
    kept = open_dataset(out, Example).column("id")
    assert kept == [f"{i:03d}" for i in range(90) if i % 3]
    assert read_manifest(out).counts == {"dropped:third": 30, "kept": 60}


def test_two_processes_equal_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "job.py"
    script.write_text(SCRIPT)
    both = [start(script, tmp_path / "two", index, 2) for index in (0, 1)]
    assert [process.wait() for process in both] == [0, 0]
    whole_run(script, tmp_path / "one", monkeypatch)
    one, two = tmp_path / "one", tmp_path / "two"
    assert (one / "manifest.json").read_bytes() == (two / "manifest.json").read_bytes()


def test_a_process_does_its_own_chunks_only_and_waits_for_the_others(tmp_path: Path) -> None:
    seen: list[str] = []

    def work(batch: list[Example]) -> list[Outcome]:
        seen.extend(row.id for row in batch)
        return keep(batch)

    assert run_job(rows(7), work, tmp_path, Example, shard_rows=2, shard=(1, 2)) is None
    assert seen == ["002", "003", "006"]
    assert not (tmp_path / "manifest.json").exists()
    manifest = run_job(rows(7), work, tmp_path, Example, shard_rows=2, shard=(0, 2))
    assert manifest is not None
    assert manifest.num_records == 7


def test_finished_chunks_are_never_done_again(tmp_path: Path) -> None:
    calls: list[list[str]] = []

    def failing(batch: list[Example]) -> list[Outcome]:
        calls.append([row.id for row in batch])
        if batch[0].id == "004":
            raise RuntimeError("out of memory")
        return keep(batch)

    with pytest.raises(RuntimeError, match="out of memory") as caught:
        run_job(rows(8), failing, tmp_path, Example, shard_rows=2)
    assert "004, 005" in caught.value.__notes__[0]
    calls.clear()
    run_job(
        rows(8),
        lambda b: calls.append([r.id for r in b]) or keep(b),
        tmp_path,
        Example,
        shard_rows=2,
    )
    assert calls == [["004", "005"], ["006", "007"]]
    assert open_dataset(tmp_path, Example).column("id") == [f"{i:03d}" for i in range(8)]


def test_a_shard_without_its_progress_file_is_written_anew(tmp_path: Path) -> None:
    run_job(rows(4), keep, tmp_path, Example, shard_rows=2)
    whole = read_manifest(tmp_path)
    for name in ("manifest.json", "progress/shard-00001.json"):
        (tmp_path / name).unlink()
    (tmp_path / "shard-00001.parquet").write_bytes(b"torn")
    run_job(rows(4), keep, tmp_path, Example, shard_rows=2)
    assert read_manifest(tmp_path) == whole


def test_a_media_error_quarantines_only_the_input_at_fault(tmp_path: Path) -> None:
    def work(batch: list[Example]) -> list[Outcome]:
        for row in batch:
            if row.id in ("002", "005"):
                raise MediaError("cannot be decoded", where=f"{row.id}.jpg")
        return keep(batch)

    manifest = run_job(rows(8), work, tmp_path, Example, shard_rows=8)
    assert manifest is not None
    assert manifest.counts == {"kept": 6, "quarantined:unreadable": 2}
    quarantine = [
        json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()
    ]
    assert [row["id"] for row in quarantine] == ["002", "005"]
    assert quarantine[0]["detail"] == "002.jpg: cannot be decoded"


def test_a_record_that_fails_its_checks_is_quarantined_with_the_problem(tmp_path: Path) -> None:
    bad = Example(id="a", prompt=user("no file for the place", images=1), answer="x")
    manifest = run_job([bad], keep, tmp_path, Example)
    assert manifest is not None
    assert manifest.counts == {"quarantined:invalid": 1}
    assert "has 0 files for 1 places" in (tmp_path / "quarantine.jsonl").read_text()


def test_repeated_ids_are_refused_before_any_work(tmp_path: Path) -> None:
    def never(batch: list[Example]) -> list[Outcome]:
        raise AssertionError("work must not start")

    with pytest.raises(DataError, match="id appears twice among the inputs; got 001"):
        run_job([*rows(3), rows(2)[1]], never, tmp_path / "out", Example)
    assert not (tmp_path / "out").exists()


def test_the_order_of_the_inputs_is_of_no_account(tmp_path: Path) -> None:
    shuffled = rows(20)
    random.Random(0).shuffle(shuffled)
    one = run_job(rows(20), keep, tmp_path / "a", Example, shard_rows=3)
    two = run_job(shuffled, keep, tmp_path / "b", Example, shard_rows=3)
    assert one == two


@pytest.mark.parametrize("finished", [False, True])
def test_other_settings_in_the_same_directory_are_named(tmp_path: Path, finished: bool) -> None:
    run_job(
        rows(4), keep, tmp_path, Example, shard_rows=2, config={"k": 10, "masker": {"name": "rule"}}
    )
    if not finished:
        (tmp_path / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"config\.k was 10, is 5"):
        run_job(
            rows(4),
            keep,
            tmp_path,
            Example,
            shard_rows=2,
            config={"k": 5, "masker": {"name": "rule"}},
        )
    with pytest.raises(DataError, match="num_inputs was 4, is 5"):
        run_job(
            rows(5),
            keep,
            tmp_path,
            Example,
            shard_rows=2,
            config={"k": 10, "masker": {"name": "rule"}},
        )


def test_changed_inputs_with_the_same_ids_are_noticed(tmp_path: Path) -> None:
    run_job(rows(2), keep, tmp_path, Example)
    changed = [Example(id=row.id, prompt=row.prompt, answer="b") for row in rows(2)]
    with pytest.raises(DataError, match="inputs was"):
        run_job(changed, keep, tmp_path, Example)


def test_no_inputs_make_an_empty_dataset(tmp_path: Path) -> None:
    manifest = run_job([], keep, tmp_path, Example)
    assert manifest is not None
    assert manifest.num_records == 0
    assert len(open_dataset(tmp_path, Example)) == 0
    assert (tmp_path / "shard-00000.parquet").exists()


def test_a_work_function_that_loses_an_input_is_caught(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="one outcome per input"):
        run_job(rows(3), lambda batch: keep(batch)[1:], tmp_path, Example)


def test_a_chunk_whose_shard_cannot_be_written_is_not_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> str:
        raise DataError("cannot be written (No space left on device)")

    with monkeypatch.context() as patch:
        patch.setattr("mmalign.jobs.write_shard", full)
        with pytest.raises(DataError, match="No space left"):
            run_job(rows(2), keep, tmp_path, Example)
    assert not list(tmp_path.glob("progress/*.json"))
    manifest = run_job(rows(2), keep, tmp_path, Example)
    assert manifest is not None
    assert manifest.num_records == 2
