"""Engines without a cluster: how they are named, what travels to a worker, what is missing."""

from __future__ import annotations

import pickle
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import Field

from mmalign import on_ray
from mmalign.clips import ClipReader, FrameSampling
from mmalign.config import Strict, apply_overrides, dump_yaml, validate
from mmalign.engines import AnyEngine, Deferred, LocalEngine, RayEngine
from mmalign.errors import ConfigError, EngineError, MissingExtra, ModelError
from mmalign.generate.base import Generation
from mmalign.generate.server import Unanswered
from mmalign.prepare import RowDropped


class Recipe(Strict):
    engine: AnyEngine = Field(default=LocalEngine(), exclude=True)


def engine(*overrides: str) -> LocalEngine | RayEngine:
    return validate(apply_overrides({}, overrides, "c.yaml"), Recipe, "c.yaml").engine


def test_the_command_line_names_an_engine_or_its_settings() -> None:
    assert engine() == engine("engine=local") == LocalEngine()
    assert engine("engine=ray") == RayEngine()
    four = RayEngine(workers=4, address="auto")
    assert engine("engine.workers=4", "engine.address=auto") == four
    assert engine("engine=ray", "engine.workers=4", "engine.address=auto") == four
    assert engine("engine={name: ray, workers: 4, address: auto}") == four
    assert RayEngine(gpus_per_worker=0.5) == engine("engine.gpus_per_worker=0.5")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("engine=rey", "engine.name: is 'rey'; one of 'local', 'ray'"),
        ("engine.worker=4", "did you mean engine.workers?"),
        ("engine.workers=0", "engine.workers: input should be greater than 0"),
        ("engine.gpus_per_worker=1.5", "engine.gpus_per_worker: above 1, wanted whole GPUs"),
    ],
)
def test_mistakes_are_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        engine(override)
    assert message in str(caught.value)


def test_no_manifest_tells_of_the_engine() -> None:
    assert "engine" not in dump_yaml(Recipe(engine=RayEngine()))


def test_a_deferred_value_is_made_once_and_never_travels() -> None:
    made = []
    one = Deferred(lambda: made.append("model") or object())
    assert one.value is one.value
    assert made == ["model"]
    there = pickle.loads(pickle.dumps(loaded := Deferred(object)))
    assert type(there.value) is object
    assert loaded.value is not there.value
    assert "value" not in pickle.loads(pickle.dumps(loaded)).__dict__


def test_local_tells_what_an_error_stopped() -> None:
    def half(number: int) -> float:
        return 1 / number

    results = LocalEngine().run(half, [1, 2, 0, 4], lambda number: f"stopped at {number}")
    assert [next(results), next(results)] == [1.0, 0.5]
    with pytest.raises(ZeroDivisionError) as caught:
        next(results)
    assert caught.value.__notes__ == ["stopped at 0"]


def test_errors_survive_pickling() -> None:
    answer = Generation(id="a", text="x", num_tokens=1, finished=True)
    for error in (
        ModelError("is none", where="m", got=1, fix="take another"),
        RowDropped("too_long", "has too many tokens", got=9),
        Unanswered([answer, None], [None, "refused"], where="server", first="b"),
    ):
        error.add_note("shard 3")
        there = pickle.loads(pickle.dumps(error))
        assert type(there) is type(error)
        assert str(there) == str(error)
        assert there.__dict__ == error.__dict__


def test_a_clip_reader_travels_without_its_child() -> None:
    with ClipReader(sampling=FrameSampling(num_frames=3), timeout_seconds=7) as reader:
        there = pickle.loads(pickle.dumps(reader))
    assert (there.sampling, there.timeout_seconds) == (reader.sampling, 7)
    there.close()


def test_without_ray_the_line_that_installs_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"pip install 'mmalign\[ray\]'"):
        list(RayEngine().run(str, [1], str))


@pytest.mark.parametrize(
    ("settings", "resources", "message"),
    [
        ({"workers": 2}, {"CPU": 2.0}, None),
        ({"workers": 2}, {"CPU": 2.0, "GPU": 2.0}, None),
        ({"workers": 2, "gpus_per_worker": 0.5}, {"CPU": 2.0, "GPU": 1.0}, None),
        ({"workers": 2, "gpus_per_worker": 0}, {"CPU": 2.0, "GPU": 1.0}, None),
        ({"workers": 2}, {"CPU": 2.0, "GPU": 1.0}, "got 2 of 1 GPUs each; wanted at most 1"),
        ({"workers": 1, "gpus_per_worker": 2}, {"CPU": 1.0}, "got 1 of 2 GPUs each; wanted at"),
    ],
)
def test_more_workers_than_gpus_are_refused_on_a_cluster_of_our_own(
    settings: dict[str, Any], resources: dict[str, float], message: str | None
) -> None:
    ray, engine = SimpleNamespace(cluster_resources=lambda: resources), RayEngine(**settings)
    if message is None:
        on_ray._check_room(ray, engine)
        return
    with pytest.raises(EngineError, match=message):
        on_ray._check_room(ray, engine)
    on_ray._check_room(ray, engine.model_copy(update={"address": "auto"}))  # It may grow.


def test_jobs_do_not_import_ray(repo_root: Path) -> None:
    code = "import sys, mmalign.jobs, mmalign.on_ray; assert 'ray' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=repo_root)


def test_no_thread_of_rays_asks_a_cluster_that_is_shut_down(monkeypatch):
    # Ray Data leaves one behind when a dataset is closed early, as by an error; and for one that
    # asks too late, Ray ends the whole process.
    thread = threading.Thread(target=time.sleep, args=(0.3,), name="iter_threaded")
    alive = []
    ray = SimpleNamespace(
        is_initialized=lambda: False,
        init=lambda **_: None,
        cluster_resources=lambda: {"CPU": 2},
        shutdown=lambda: alive.append(thread.is_alive()),
    )
    monkeypatch.setattr(on_ray, "_import_ray", lambda engine: ray)
    with RayEngine(workers=2).open():
        thread.start()
    assert alive == [False]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
def test_an_address_where_nothing_listens_is_told_at_once(host):
    pytest.importorskip("ray")
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # Held, so that nobody listens there meanwhile.
        address = f"{host}:{held.getsockname()[1]}"
        with pytest.raises(EngineError, match="no Ray cluster answers") as caught:
            RayEngine(address=address).open().__enter__()
    assert address in str(caught.value)
