"""The part of RayEngine that needs the extra `ray`: a cluster, and workers that map over items.

The items are a Ray Data dataset of one row each, mapped by a pool of actors. Ray gives the row of
an actor that died to another one for as long as it takes; we count, and stop at MAX_STARTS, for an
item that ends every worker would be tried forever. What a function raises travels as a value, so
that Ray does not take it for a failure of its own, and arrives as what it was.
"""

from __future__ import annotations

import logging
import os
import pickle
import socket
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mmalign import log
from mmalign.engines import RayEngine, note
from mmalign.errors import EngineError, MissingExtra

# So often an item may be begun: a death may be the machine's fault, three are the item's.
MAX_STARTS = 3
SECONDS_TO_CONNECT = 10.0
# What Ray Data calls its threads in this process, and how long they may take to end.
_RAY_THREADS = ("iter_threaded", "StreamingExecutor")
_SECONDS_TO_END = 30.0
# For a cluster of our own. Ray reads the second when it is imported; it makes it listen on the
# loopback address only, as is Ray's default on macOS, from which the variable has its name.
_OWN_CLUSTER = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}

logger = log.get_logger("on_ray")

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


class WorkerTraceback(Exception):
    """The traceback of an error, as its worker saw it."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


@contextmanager
def cluster(engine: RayEngine) -> Iterator[None]:
    """Be connected to the engine's cluster; one that is connected already stays so.

    Raises EngineError where there is no such cluster, or where one of our own lacks the GPUs.
    """
    ray = _import_ray(engine)
    if ray.is_initialized():
        yield
        return
    _check_address(engine)
    try:
        if engine.address is None:
            # GPUs are found; CPUs are only counted, so there are as many as are wanted.
            num_cpus = engine.workers * engine.cpus_per_worker
            ray.init(
                address="local",
                num_cpus=num_cpus,
                include_dashboard=False,
                logging_level=logging.ERROR,
            )
        else:
            ray.init(address=engine.address, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise EngineError(
            f"no Ray cluster can be reached ({_lines(error)[0]})",
            where=f"engine.address={engine.address}",
            fix="start one with `ray start --head`, or leave engine.address out",
        ) from error
    try:
        _check_room(ray, engine)
        yield
    finally:
        _let_threads_end()
        ray.shutdown()


def run(
    engine: RayEngine,
    function: Callable[[ItemT], ResultT],
    items: Sequence[ItemT],
    told: Callable[[ItemT], str],
) -> Iterator[ResultT]:
    """See RayEngine.run."""
    if not items:
        return
    with cluster(engine):
        import ray
        from ray import cloudpickle
        from ray.data import ActorPoolStrategy, DataContext
        from ray.exceptions import RayError

        DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        rows = [{"index": i, "item": cloudpickle.dumps(item)} for i, item in enumerate(items)]
        starts = ray.remote(num_cpus=0)(_Starts).remote()
        made = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
            _Worker,  # type: ignore[arg-type] # a class stands for a pool of its instances
            fn_constructor_args=(cloudpickle.dumps(function), os.getcwd(), starts),
            # One at a time for each: what waits at a busy worker, an idle one could do.
            compute=ActorPoolStrategy(
                size=min(engine.workers, len(rows)), max_tasks_in_flight_per_actor=1
            ),
            num_cpus=engine.cpus_per_worker,
            num_gpus=_gpus_per_worker(ray, engine),
        )
        batches = made.iter_batches(batch_size=None, prefetch_batches=0, batch_format="pyarrow")
        try:
            with closing(iter(batches)) as arriving:  # type: ignore[type-var]
                for batch in arriving:
                    for row in batch.to_pylist():  # type: ignore[union-attr]
                        reply: _Reply = pickle.loads(row["reply"])
                        if reply.error is None:
                            yield reply.result
                            continue
                        note(reply.error, told(items[row["index"]]))
                        raise reply.error from (
                            WorkerTraceback(reply.traceback) if reply.traceback else None
                        )
        except RayError as error:
            raise EngineError(
                # Ray tells of a cause by its traceback, whose last line says what it is.
                f"Ray's workers failed ({_lines(error)[-1]})",
                where=f"engine.address={engine.address}",
                fix="see that every machine of the cluster has this mmalign and its packages",
            ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reply:
    """What became of an item: a result, or an error and its traceback."""

    result: Any = None
    error: Exception | None = None
    traceback: str = ""


class _Starts:
    """Counts how often each item was begun; lives on the cluster, since workers may die."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()

    def add(self, index: int) -> int:
        """One more; returns how many there are now."""
        self._counts[index] += 1
        return self._counts[index]


class _Worker:
    """What Ray runs in each process of the pool. It makes nothing before its first item.

    Raised by a constructor, an error would reach the caller as one of Ray's.
    """

    def __init__(self, function: bytes, folder: str, starts: Any) -> None:
        self._pickled, self._folder, self._starts = function, folder, starts
        self._function: Callable[[Any], Any] | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row's index and a pickled _Reply."""
        return {"index": row["index"], "reply": self._reply(row)}

    def _reply(self, row: dict[str, Any]) -> bytes:
        import ray
        from ray import cloudpickle

        num_starts: Any = ray.get(self._starts.add.remote(int(row["index"])))
        if num_starts > MAX_STARTS:
            error = EngineError(
                f"ended its worker {MAX_STARTS} times, each time without an error",
                fix="most often memory ran out: give a worker more of it, or a smaller batch",
            )
            return pickle.dumps(_Reply(error=error))
        try:
            if self._function is None:
                self._function = self._begin()
            return cloudpickle.dumps(_Reply(result=self._function(pickle.loads(row["item"]))))
        except Exception as error:
            return _failure(error)

    def _begin(self) -> Callable[[Any], Any]:
        log.configure()
        # A config's paths start where the command was given.
        if not Path(self._folder).is_dir():
            raise EngineError(
                "is not there on a machine of the Ray cluster",
                where=self._folder,
                fix="run from a folder that all of them share, for all read and write in it",
            )
        os.chdir(self._folder)
        return pickle.loads(self._pickled)


def _failure(error: Exception) -> bytes:
    """A reply with this error, or with its words where it cannot be pickled."""
    told = traceback.format_exc()
    try:
        reply = pickle.dumps(_Reply(error=error, traceback=told))
        pickle.loads(reply)
    except Exception:
        words = EngineError(f"{type(error).__name__}: {error}")
        return pickle.dumps(_Reply(error=words, traceback=told))
    return reply


def _import_ray(engine: RayEngine) -> Any:
    if engine.address is None and "ray" not in sys.modules:
        for name, value in _OWN_CLUSTER.items():
            os.environ.setdefault(name, value)
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise MissingExtra(
            f"engine=ray needs Ray, which cannot be imported ({error})",
            fix="install it: pip install 'mmalign[ray]'",
        ) from None
    return ray


def _check_address(engine: RayEngine) -> None:
    """Raise EngineError where nothing listens at host:port, which Ray would try for minutes."""
    host, _, port = (engine.address or "").rpartition(":")
    if not host or "/" in host or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), SECONDS_TO_CONNECT).close()
    except OSError as error:
        raise EngineError(
            f"no Ray cluster answers ({error.strerror or error})",
            where=f"engine.address={engine.address}",
            fix="start one with `ray start --head`, or leave engine.address out",
        ) from None


def _let_threads_end() -> None:
    """Wait for the threads of a dataset that was closed before its end.

    Ray Data does not. One that asked the cluster after its shutdown would have Ray end this process
    on the spot, and the error that closed the dataset would never be told.
    """
    for thread in threading.enumerate():
        if thread.name.startswith(_RAY_THREADS):
            thread.join(_SECONDS_TO_END)


def _gpus_per_worker(ray: Any, engine: RayEngine) -> float:
    if engine.gpus_per_worker is not None:
        return engine.gpus_per_worker
    return 1.0 if ray.cluster_resources().get("GPU") else 0.0


def _check_room(ray: Any, engine: RayEngine) -> None:
    """Say where not all workers can start; a cluster of others' may grow, one of ours may not."""
    gpus = _gpus_per_worker(ray, engine)
    there = ray.cluster_resources()
    rooms = [there.get("CPU", 0) // engine.cpus_per_worker]
    if gpus:
        rooms.append(there.get("GPU", 0) // gpus)
    room = int(min(rooms))
    if room >= engine.workers:
        return
    if engine.address is None:
        raise EngineError(
            "this machine has no room for as many workers",
            where="engine.workers",
            got=f"{engine.workers} of {gpus:g} GPUs each",
            wanted=f"at most {room}",
            fix="lower engine.workers or engine.gpus_per_worker, or name an engine.address",
        )
    logger.warning(
        "the Ray cluster has room for %d of %d workers now; it is waited for the others",
        room,
        engine.workers,
    )


def _lines(error: Exception) -> list[str]:
    return [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
