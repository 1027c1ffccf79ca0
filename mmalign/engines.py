"""Where the work of a batch job is done: in this process, or by workers on a Ray cluster.

An engine maps a function over items and yields what it makes of each, as it comes; LocalEngine in
order, RayEngine in any. What a job writes does not depend on it, so no manifest tells of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import BeforeValidator, Field, NonNegativeFloat, PositiveInt, field_validator

from mmalign.config import Strict
from mmalign.log import get_logger

logger = get_logger("engines")

T = TypeVar("T")
ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


class Deferred(Generic[T]):
    """A value that each process makes for itself when it first needs it, such as a loaded model.

    To another process goes how to make it, never what was made.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make

    @cached_property
    def value(self) -> T:
        """The value; made once in each process."""
        return self._make()

    def __getstate__(self) -> dict[str, Any]:
        return {"_make": self._make}


class LocalEngine(Strict):
    """One item after another, in this process."""

    name: Literal["local"] = "local"

    def open(self) -> AbstractContextManager[None]:
        """Nothing to hold ready."""
        return nullcontext()

    def run(
        self,
        function: Callable[[ItemT], ResultT],
        items: Sequence[ItemT],
        told: Callable[[ItemT], str],
    ) -> Iterator[ResultT]:
        """function(item) of each item, in order.

        What the function raises is raised with told(item) as a note.
        """
        for item in items:
            try:
                result = function(item)
            except Exception as error:
                note(error, told(item))
                raise
            yield result

    def call(self, function: Callable[[], ResultT]) -> ResultT:
        """What the function returns here."""
        return function()


class RayEngine(Strict):
    """Workers on a Ray cluster (docs/data.md, "On several machines").

    address: of a running cluster: host:port, or `auto` for the one that this machine belongs to.
        Without it, a cluster on this machine is started and ends with the job.
    workers: that many processes, each with models of its own.
    cpus_per_worker: also the number of threads that a worker computes with.
    gpus_per_worker: by default 1 where the cluster has GPUs, else 0. Half a GPU is 0.5.
    """

    name: Literal["ray"] = "ray"
    address: str | None = None
    workers: PositiveInt = 2
    cpus_per_worker: PositiveInt = 1
    gpus_per_worker: NonNegativeFloat | None = None

    @field_validator("gpus_per_worker")
    @classmethod
    def _is_a_part_or_whole(cls, gpus: float | None) -> float | None:
        if gpus is not None and gpus > 1 and gpus != int(gpus):
            raise ValueError("above 1, wanted whole GPUs")
        return gpus

    def open(self) -> AbstractContextManager[None]:
        """Hold the cluster ready for several runs. Raises MissingExtra without ray."""
        from mmalign.on_ray import cluster

        return cluster(self)

    def run(
        self,
        function: Callable[[ItemT], ResultT],
        items: Sequence[ItemT],
        told: Callable[[ItemT], str],
    ) -> Iterator[ResultT]:
        """function(item) of each item, as the workers finish them.

        Function, items and results are pickled; a Deferred is made once in each worker. An item
        whose worker died is given to a worker again. What the function raises is raised here, with
        told(item) as a note. Raises EngineError where an item ends its worker again and again.
        """
        from mmalign.on_ray import run

        return run(self, function, items, told)

    def call(self, function: Callable[[], ResultT]) -> ResultT:
        """What the function returns in a worker."""
        (result,) = self.run(lambda _: function(), [None], lambda _: "asked before the work began")
        return result


def note(error: Exception, told: str) -> None:
    """Tell in the log and on the error what it stopped."""
    logger.error(told)
    error.add_note(told)


def _spelled_out(config: Any) -> Any:
    """An engine's settings from its bare name, or from settings of the one that has any."""
    if isinstance(config, str):
        return {"name": config}
    if isinstance(config, dict) and "name" not in config:
        return {"name": "ray", **config}
    return config


# How a config says it: `engine: ray`, or settings. Never dumped: see the module.
AnyEngine = Annotated[
    Annotated[LocalEngine | RayEngine, Field(discriminator="name")],
    BeforeValidator(_spelled_out),
]
