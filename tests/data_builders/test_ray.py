"""Builders with engine=ray: what goes to a worker is little, and what comes back is the same."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data_builders.config import BUILDERS
from mmalign.cli import run
from mmalign.config import validate
from mmalign.engines import LocalEngine
from mmalign.models.tiny import TinyModel
from mmalign.records import Example, Preference, RankedResponse, Ranking, user
from mmalign.store import write_dataset

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="needs the extra ray")
CONFIGS = Path(__file__).parents[2] / "configs" / "build"
NO_MODEL = {"model": {"path": "none"}}
OVERLAP = {"name": "token_overlap"}
WORDS = "a red three and a blue seven " * 40


class Sent(Exception):
    """Holds what would have gone to a worker."""


class Sends(LocalEngine):
    """Goes no further than to what it would send."""

    def call(self, function: Callable[[], Any]) -> Any:
        from ray import cloudpickle

        raise Sent(cloudpickle.dumps(function))

    def run(self, function: Callable[[Any], Any], items: Any, told: Any) -> Any:
        return self.call(function)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "kind", "settings"),
    [
        ("on_policy", Example, {"generator": NO_MODEL, "similarity": OVERLAP}),
        ("bdhs", Example, {"generator": NO_MODEL}),
        ("realign", Example, {"generator": NO_MODEL, "masker": {"name": "rule"}}),
        ("rrpo_video", Example, {"generator": NO_MODEL}),
        (
            "critiques",
            Example,
            {
                "generators": [{"name": n, "generator": NO_MODEL} for n in "ab"],
                "judge": {"generator": NO_MODEL},
            },
        ),
        ("expand_critiques", Ranking, {"judge": {"generator": NO_MODEL}}),
        ("score", Preference, {"model": {"path": "none"}}),
        ("crops", Preference, {}),
    ],
)
def test_neither_models_nor_the_source_are_sent(
    tmp_path: Path, name: str, kind: type, settings: dict[str, Any]
) -> None:
    columns: dict[type, dict[str, Any]] = {
        Example: {"answer": WORDS},
        Preference: {"chosen": WORDS, "rejected": "no"},
        Ranking: {"responses": tuple(RankedResponse(text=WORDS, rank=r) for r in (1, 2))},
    }
    rows = [kind(id=f"{i}", prompt=user("What?"), **columns[kind]) for i in range(300)]
    write_dataset(tmp_path / "in", kind, rows)
    config = {"source": str(tmp_path / "in"), "output": str(tmp_path / "out"), **settings}
    builder = validate({"name": name, **config}, BUILDERS[name], "c.yaml")
    with pytest.raises(Sent) as caught:
        builder.model_copy(update={"engine": Sends()}).build()
    (data,) = caught.value.args
    assert len(data) < 50_000 < 300 * len(WORDS)
    assert callable(pickle.loads(data))


@pytest.mark.slow
def test_two_workers_with_models_of_their_own_equal_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The shipped Re-Align config, on a cluster that the command starts and ends."""
    monkeypatch.chdir(tmp_path)
    TinyModel(output="base").build()
    Path("photos").mkdir()
    for number in range(6):
        picture = Image.new("RGB", (20 + 9 * number, 50), (40 * number, 255 - 40 * number, 90))
        picture.paste((255 - 40 * number, 10, 40 * number), (0, 0, 12, 25))
        picture.save(f"photos/n{number}_sea_lion.jpg")
    Path("photos/n9_torn.jpg").write_bytes(b"\xff\xd8\xff")
    arguments = ["source.images=photos", "generator.model.path=base", "shard_rows=2", "k=2"]
    arguments += ["near_duplicate=1.0"]
    realign = ["build", str(CONFIGS / "realign_photos.yaml"), *arguments]
    assert run([*realign, "output=ray", "engine=ray", "engine.workers=2"]) == 0
    assert "6  preference records in ray" in capsys.readouterr().out
    import ray  # Not before the command: for a cluster of its own it decides where Ray listens.

    assert not ray.is_initialized()
    assert run([*realign, "output=local"]) == 0
    for file in sorted(Path("local").rglob("*")):
        if file.is_file() and file.name != "preview.html":
            assert file.read_bytes() == (Path("ray") / file.relative_to("local")).read_bytes()
