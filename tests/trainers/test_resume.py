"""A run that is killed, at any moment, and started again ends as if nothing had happened."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mmalign.errors import TrainingError
from mmalign.records import Media, Preference
from mmalign.store import write_dataset
from trainers.config import Recipe
from trainers.loop import Finished, Saved, Stepped, train

TIMINGS = ("train/tokens_per_second", "train/pairs_per_second")


def exhaust(recipe: Recipe, prepare: Callable[[], None] = lambda: None) -> None:
    torch.set_num_threads(1)
    prepare()
    for _ in train(recipe):
        pass


def spawn(recipe: Recipe, prepare: Callable[[], None] = lambda: None) -> Any:
    process = multiprocessing.get_context("fork").Process(target=exhaust, args=(recipe, prepare))
    process.start()
    return process


def die_before(module: str, name: str, call: int) -> Callable[[], None]:
    """Makes the process kill itself at the `call`-th call of a function."""

    def prepare() -> None:
        import importlib

        owner = importlib.import_module(module)
        real, calls = getattr(owner, name), []

        def deadly(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        setattr(owner, name, deadly)

    return prepare


def outcome(folder: Path) -> tuple[bytes, list[dict[str, float]]]:
    """The final weights to the byte, and the metrics without their timings."""
    (weights,) = folder.glob("model/*.safetensors")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return weights.read_bytes(), [{k: v for k, v in m.items() if k not in TIMINGS} for m in lines]


def sections(folder: Path) -> dict[str, Any]:
    return {
        "reference": "cached",
        "optim": {"steps": 9, "lr": 1e-2, "micro_batch_size": 2},
        "run": {"output": str(folder), "save_every_steps": 2, "log_every_steps": 3},
    }


@pytest.fixture
def uninterrupted(recipe, tmp_path: Path) -> tuple[bytes, list[dict[str, float]]]:
    process = spawn(recipe(**sections(tmp_path / "whole")))
    process.join()
    return outcome(tmp_path / "whole")


def test_killed_at_every_kind_of_moment(recipe, tmp_path: Path, uninterrupted):
    folder = tmp_path / "killed"
    made = recipe(**sections(folder))
    # What kills the process, and the newest complete checkpoint that it leaves behind.
    moments = [
        ("before the first checkpoint", die_before("trainers.loop", "lr_at", 2), 0),
        ("with half of one written", die_before("trainers.checkpoint", "save_file", 2), 2),
        ("before it gets its name", die_before("trainers.directory", "_sync", 3), 2),
        ("before the oldest is deleted", die_before("trainers.checkpoint", "_prune", 2), 6),
        ("between two steps", die_before("trainers.loop", "lr_at", 2), 6),
        ("before the final model", die_before("trainers.loop", "save_model", 1), 8),
        ("before run.json", die_before("trainers.directory", "write_atomically", 1), 8),
    ]
    for moment, prepare, newest in moments:
        process = spawn(made, prepare)
        process.join()
        assert process.exitcode == -signal.SIGKILL, moment
        assert not (folder / "run.json").exists()
        complete = sorted(folder.glob("checkpoints/step-*/checkpoint.json"))
        steps = [int(file.parent.name.removeprefix("step-")) for file in complete]
        assert max(steps, default=0) == newest, moment
    exhaust(made)
    assert outcome(folder) == uninterrupted


def test_killed_at_random_moments(recipe, tmp_path: Path, uninterrupted):
    folder = tmp_path / "killed"
    made = recipe(**sections(folder))
    delays = torch.rand(5, generator=torch.Generator().manual_seed(0)) * 2
    for delay in delays.tolist():
        process = spawn(made)
        time.sleep(delay)
        process.kill()
        process.join()
    exhaust(made)
    assert outcome(folder) == uninterrupted


@pytest.mark.parametrize("kind", ["frozen_copy", "adapter_off"])
def test_a_resumed_reference_is_the_initial_policy(recipe, tmp_path: Path, kind: str):
    lora = {"lora": None} if kind == "frozen_copy" else {}
    made = [
        recipe(**(sections(tmp_path / name) | {"reference": kind, "model": lora}))
        for name in ("whole", "stopped")
    ]
    exhaust(made[0])
    for event in train(made[1]):
        if isinstance(event, Saved) and event.step == 4:
            break
    exhaust(made[1])
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")


def stop_after_first_checkpoint(recipe: Recipe) -> Path:
    for event in train(recipe):
        if isinstance(event, Saved):
            return event.path
    raise AssertionError("no checkpoint")


def steps_of(recipe: Recipe) -> list[int]:
    return [event.step for event in train(recipe) if isinstance(event, Stepped)]


def test_a_half_written_checkpoint_is_skipped_and_said(recipe, tmp_path: Path, caplog):
    made = recipe(**sections(tmp_path / "run"))
    saved = stop_after_first_checkpoint(made)
    (saved.parent / "step-000004" / "model").mkdir(parents=True)
    (saved.parent / ".step-000006.partial").mkdir()
    caplog.set_level("INFO", logger="mmalign")
    assert steps_of(made) == [3, 6, 9]
    told = [record.getMessage() for record in caplog.records]
    assert sum("incomplete" in line for line in told) == 2
    assert f"continuing from {saved}" in told


@pytest.mark.parametrize(
    "file", ["model/config.json", "model/model.safetensors", "state/optimizer.pt"]
)
def test_a_full_disk_is_said_and_what_was_saved_is_kept(recipe, tmp_path: Path, file: str):
    made = recipe(**(sections(tmp_path / "run") | {"model": {"lora": None}}))
    saved = stop_after_first_checkpoint(made)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # No file may grow to this one's size, which is how a full disk looks to its writer.
    resource.setrlimit(resource.RLIMIT_FSIZE, ((saved / file).stat().st_size - 1, before[1]))
    try:
        with pytest.raises(TrainingError, match=r"step-000004: cannot be written .*Free some"):
            exhaust(made)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [folder.name for folder in saved.parent.iterdir()] == [saved.name]
    exhaust(made)


def test_a_finished_run_says_so_and_does_nothing(recipe, tmp_path: Path, caplog):
    made = recipe(**sections(tmp_path / "run"))
    exhaust(made)
    before = outcome(tmp_path / "run")
    caplog.set_level("INFO", logger="mmalign")
    assert list(train(made)) == [Finished(path=tmp_path / "run" / "model")]
    assert any("nothing to do" in record.getMessage() for record in caplog.records)
    assert outcome(tmp_path / "run") == before


def test_another_recipe_is_refused_by_the_keys_that_differ(recipe, tmp_path: Path):
    values = sections(tmp_path / "run")
    stop_after_first_checkpoint(recipe(**values))
    changed = values | {"optim": values["optim"] | {"lr": 2e-2}}
    with pytest.raises(
        TrainingError, match=r"another recipe: optim\.lr was 0\.01 and is 0\.02\. Choose another"
    ):
        list(train(recipe(**changed)))


def test_what_changes_no_weight_may_change(recipe, tmp_path: Path):
    values = sections(tmp_path / "run")
    stop_after_first_checkpoint(recipe(**values))
    free = values["run"] | {"log_every_steps": 1, "keep_last": 1, "save_every_steps": 5}
    assert steps_of(recipe(**(values | {"run": free, "data": {"workers": 1}})))[-1] == 9


def test_a_folder_without_progress_takes_another_recipe(recipe, tmp_path: Path):
    values = sections(tmp_path / "run")
    for event in train(recipe(**(values | {"run": values["run"] | {"save_every_steps": None}}))):
        assert isinstance(event, Stepped)
        break
    changed = values | {"optim": values["optim"] | {"micro_batch_size": 1}}
    assert steps_of(recipe(**changed)) == [3, 6, 9]
    assert len(outcome(tmp_path / "run")[1]) == 3


def test_resume_never_refuses_a_folder_with_progress(recipe, tmp_path: Path):
    values = sections(tmp_path / "run")
    stop_after_first_checkpoint(recipe(**values))
    with pytest.raises(TrainingError, match=r"run\.resume=never"):
        list(train(recipe(**(values | {"run": values["run"] | {"resume": "never"}}))))


def test_a_rebuilt_dataset_is_refused(recipe, tmp_path: Path, preference):
    data = tmp_path / "data"
    write_dataset(data, Preference, [preference(n) for n in range(6)])
    made = recipe(**sections(tmp_path / "run"), data={"path": str(data)})
    stop_after_first_checkpoint(made)
    write_dataset(data, Preference, [preference(n) for n in range(7)])
    with pytest.raises(TrainingError, match="dataset changed since this run began"):
        list(train(made))


@pytest.mark.parametrize("content", ["", "[]", "half"])
def test_a_damaged_start_is_said(recipe, tmp_path: Path, content: str):
    made = recipe(**sections(tmp_path / "run"))
    stop_after_first_checkpoint(made)
    file = tmp_path / "run" / "start.json"
    values = json.loads(file.read_text())
    del values["survey"]["tokens"]
    file.write_text(json.dumps(values) if content == "half" else content)
    with pytest.raises(TrainingError, match=r"start\.json: is damaged .*Put it back"):
        list(train(made))


def test_damaged_reference_scores_are_made_again(recipe, tmp_path: Path, uninterrupted, caplog):
    folder = tmp_path / "run"
    made = recipe(**sections(folder))
    stop_after_first_checkpoint(made)
    (file,) = folder.glob("reference/*/rows-*.parquet")
    whole = file.read_bytes()
    file.write_bytes(whole[:-5])
    caplog.set_level("INFO", logger="mmalign")
    exhaust(made)
    assert any("is damaged" in record.getMessage() for record in caplog.records)
    assert file.read_bytes() == whole
    assert outcome(folder) == uninterrupted


@pytest.fixture
def by_path(recipe, tmp_path: Path, preference) -> tuple[Recipe, Path]:
    """A recipe whose rows name their pictures by path, and the folder of the pictures."""
    media = tmp_path / "data" / "media"
    media.mkdir(parents=True)
    rows = []
    for number in range(4):
        row = preference(number)
        (media / f"{number}.png").write_bytes(row.images[0].bytes)
        rows.append(replace(row, images=(Media(path=f"{number}.png"),)))
    write_dataset(media.parent, Preference, rows)
    return recipe(**sections(tmp_path / "run"), data={"path": str(media.parent)}), media


def test_replaced_pictures_are_refused(by_path):
    made, media = by_path
    stop_after_first_checkpoint(made)
    (media / "0.png").write_bytes((media / "1.png").read_bytes())
    with pytest.raises(TrainingError, match=r"/data: the media changed since this run began"):
        list(train(made))


def test_replaced_pictures_are_surveyed_again_before_the_first_checkpoint(by_path):
    made, media = by_path
    file = made.run.output / "start.json"
    run = made.run.model_copy(update={"save_every_steps": None})
    plain = {"reference": "adapter_off", "reference_cache": None, "run": run}
    found = []
    for replaced in (b"", b"", (media / "1.png").read_bytes()):
        if replaced:
            (media / "0.png").write_bytes(replaced)
        started = train(made.model_copy(update=plain))
        next(started)
        started.close()
        found.append(file.read_bytes())
    assert found[0] == found[1] != found[2]
    (media / "0.png").write_bytes(b"no picture")
    next(train(made.model_copy(update=plain)))
    assert json.loads(file.read_text())["survey"]["dropped"] == {"unreadable_media": ["row-0"]}


def test_two_runs_in_one_folder_are_refused(recipe, tmp_path: Path):
    made = recipe(**sections(tmp_path / "run"))
    first = train(made)
    next(first)
    with pytest.raises(TrainingError, match="another process is training"):
        list(train(made))
    first.close()
    assert steps_of(made) == [3, 6, 9]
