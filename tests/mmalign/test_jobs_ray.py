"""Jobs on a real Ray cluster of two workers: one is killed, and the result is that of local."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

from mmalign.engines import Deferred, RayEngine
from mmalign.errors import EngineError, MediaError
from mmalign.jobs import Outcome, run_job
from mmalign.prepare import RowDropped
from mmalign.records import Example, user
from mmalign.store import open_dataset

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="needs the extra ray")
RAY = RayEngine(workers=2)


@pytest.fixture(scope="module", autouse=True)
def two_workers() -> Iterator[None]:
    """A cluster of this machine's; when it is closed, no process of it is left."""
    with RAY.open():
        from ray import cloudpickle

        # Workers cannot import a test module.
        cloudpickle.register_pickle_by_value(sys.modules[__name__])
        yield
        cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
        began = descendants()
        assert began
    deadline = time.monotonic() + 30
    while left := [pid for pid in began if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def descendants() -> set[int]:
    """Every process under this one."""
    parents = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(file.parent.name)] = int(file.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {os.getpid()}


@dataclass(frozen=True)
class Notes:
    """A file that any process may append lines to."""

    path: Path

    def add(self, line: object) -> None:
        with open(self.path, "a") as file:
            file.write(f"{line}\n")

    def lines(self) -> list[str]:
        return self.path.read_text().split() if self.path.exists() else []

    def chunks(self) -> set[int]:
        """The first ids of chunks among the lines; others come from chunks that were halved."""
        return {int(line) for line in self.lines() if int(line) % 2 == 0}


def rows(count: int) -> list[Example]:
    return [Example(id=f"{i:03d}", prompt=user(f"q{i}"), answer="a") for i in range(count)]


def work(batch: list[Example]) -> list[Outcome]:
    """Every third is dropped, one cannot be read."""
    if any(row.id == "007" for row in batch):
        raise MediaError("cannot be decoded", where="007.jpg")
    return [
        Outcome(id=row.id, record=row, reason="kept")
        if int(row.id) % 3
        else Outcome(id=row.id, reason="dropped:third")
        for row in batch
    ]


def do(out: Path, work: Callable[[list[Example]], list[Outcome]], **options) -> None:
    run_job(rows(20), work, out, Example, shard_rows=2, builder="t", seed=1, **options)


def files(folder: Path) -> dict[str, bytes]:
    """Every file, by name, to the byte; but what a killed worker was just writing."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not file.name.endswith(".partial")
    }


def test_a_killed_worker_changes_no_byte(tmp_path: Path) -> None:
    loads, began, mark = Notes(tmp_path / "loads"), Notes(tmp_path / "began"), tmp_path / "killed"

    def load() -> Callable[[list[Example]], list[Outcome]]:
        loads.add(os.getpid())
        deadline = time.monotonic() + 60
        while len(set(loads.lines())) < 2:  # Both have work before one is killed.
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return work

    model = Deferred(load)

    def one_dies(batch: list[Example]) -> list[Outcome]:
        do_work = model.value
        began.add(batch[0].id)
        if batch[0].id == "008" and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return do_work(batch)

    do(tmp_path / "ray", one_dies, engine=RAY)
    do(tmp_path / "local", work)
    assert files(tmp_path / "ray") == files(tmp_path / "local")
    assert "007.jpg: cannot be decoded" in (tmp_path / "ray/quarantine.jsonl").read_text()
    assert mark.exists()
    assert began.lines().count("008") == 2
    # Two workers, and the one in the place of the dead; each loaded once.
    assert len(loads.lines()) == len(set(loads.lines())) == 3
    assert str(os.getpid()) not in loads.lines()


def test_an_error_reads_as_in_local_and_what_is_complete_is_kept(tmp_path: Path) -> None:
    began = Notes(tmp_path / "began")

    def failing(batch: list[Example]) -> list[Outcome]:
        if batch[0].id == "012":
            raise RuntimeError("no such model")
        began.add(batch[0].id)
        return work(batch)

    told = []
    for name, options in (("ray", {"engine": RAY}), ("local", {})):
        with pytest.raises(RuntimeError) as caught:
            do(tmp_path / name, failing, **options)
        assert str(caught.value) == "no such model"
        told.append([note.replace(f"/{name}", "/out") for note in caught.value.__notes__])
    assert told[0] == told[1]
    assert told[0][0].startswith("shard 6 stopped at 012, 013; what is complete is kept in")

    # Another engine goes on with it, and does nothing twice.
    began.path.unlink()
    kept = {2 * int(file.stem[-5:]) for file in tmp_path.glob("ray/progress/*.json")}
    assert kept
    do(tmp_path / "ray", lambda batch: began.add(batch[0].id) or work(batch))
    assert began.chunks()
    assert not began.chunks() & kept
    do(tmp_path / "whole", work)
    assert files(tmp_path / "ray") == files(tmp_path / "whole")


def test_ray_finishes_what_local_began(tmp_path: Path) -> None:
    began = Notes(tmp_path / "began")
    do(tmp_path / "out", work, shard=(0, 2))
    do(tmp_path / "out", lambda batch: began.add(batch[0].id) or work(batch), engine=RAY)
    assert began.chunks() == set(range(2, 20, 4))
    do(tmp_path / "whole", work)
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    do(tmp_path / "out", lambda batch: [], engine=RAY)  # Complete: nothing is asked.


def test_an_error_with_arguments_of_its_own_arrives_whole(tmp_path: Path) -> None:
    def dropped(batch: list[Example]) -> list[Outcome]:
        raise RowDropped("too_long", "has too many tokens", where=batch[0].id, got=9)

    with pytest.raises(RowDropped, match="has too many tokens; got 9") as caught:
        run_job(rows(1), dropped, tmp_path, Example, engine=RAY)
    assert caught.value.reason == "too_long"
    assert "in dropped" in str(caught.value.__cause__)  # the worker's traceback


def test_an_error_that_cannot_be_pickled_arrives_in_words(tmp_path: Path) -> None:
    class Held(Exception):
        def __init__(self, lock: object) -> None:
            super().__init__("holds a lock")
            self.lock = lock

    def failing(batch: list[Example]) -> list[Outcome]:
        import threading

        raise Held(threading.Lock())

    with pytest.raises(EngineError, match="Held: holds a lock"):
        run_job(rows(1), failing, tmp_path, Example, engine=RAY)


def test_what_ends_every_worker_stops_the_job_by_its_name(tmp_path: Path) -> None:
    def deadly(batch: list[Example]) -> list[Outcome]:
        if batch[0].id == "002":
            os.kill(os.getpid(), signal.SIGKILL)
        return work(batch)

    with pytest.raises(EngineError, match="ended its worker 3 times") as caught:
        run_job(rows(4), deadly, tmp_path, Example, shard_rows=2, engine=RAY)
    assert caught.value.__notes__[0].startswith("shard 1 stopped at 002, 003;")
    do_rest = run_job(rows(4), work, tmp_path, Example, shard_rows=2)
    assert do_rest is not None
    assert open_dataset(tmp_path, Example).column("id") == ["001", "002"]
