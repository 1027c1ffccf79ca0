"""Every shipped accelerate config on two CPU processes: one launch each, and all runs in it.

Every run is compared with the same run on one process.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mmalign.config import dump_yaml
from mmalign.errors import TrainingError
from mmalign.media import embed
from mmalign.models.load import ModelConfig, load_policy
from mmalign.models.tiny import TinyModel, Tower
from mmalign.records import Media, Preference, Verifiable, user
from mmalign.store import write_dataset
from trainers.config import Recipe
from trainers.loop import Stepped, train
from trainers.sampler import Sampler

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("sharded_worker.py")
ENGINES = ("ddp", "fsdp2", "deepspeed_zero2", "deepspeed_zero3")

LORA = {"rank": 4, "alpha": 8}
HEAD = r".*language_model.*\.(q_proj|v_proj)|.*lm_head"
SMALL = Tower(hidden=32, layers=2, heads=4, mlp=32)
PARTS = {"vision": True, "projector": True}


def write_clip(path: Path, seed: int) -> Media:
    pixels = np.random.default_rng(seed).integers(0, 255, (4, 16, 16, 3), dtype=np.uint8)
    with av.open(str(path), "w") as file:
        stream = file.add_stream("ffv1", rate=4)
        stream.width = stream.height = 16
        stream.pix_fmt = "bgr0"
        for frame in pixels:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())
    return Media(path=path.name)


def mixed_pairs(folder: Path) -> Path:
    """Twelve rows: pictures, clips and text, four of each."""
    rows = []
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 255, (16, 16, 3), dtype=np.uint8)
        images = (embed(Image.fromarray(pixels)),) * (number % 3 == 0)
        videos = (write_clip(folder / f"{number}.mkv", number),) * (number % 3 == 1)
        prompt = user(f"What is it? {number}", images=len(images), videos=len(videos))
        words = {"chosen": f"It is {number}" + "!" * (number % 4), "rejected": "A cat."}
        rows.append(
            Preference(id=f"row-{number}", prompt=prompt, images=images, videos=videos, **words)
        )
    write_dataset(folder / "data", Preference, rows, builder="test", media_root=str(folder))
    return folder / "data"


def questions(folder: Path) -> dict[str, Any]:
    """A probe of five questions, so that one process has more of them than the other."""
    rows = [
        Verifiable(id=f"row-{n}", prompt=user(f"How many? {n}"), answer="2", verifier="number")
        for n in range(5)
    ]
    write_dataset(folder, Verifiable, rows, builder="test")
    asked = {"data": str(folder), "num_rows": 5}
    return {"every_steps": 2, "id": asked, "ood": asked, "decoding": {"max_new_tokens": 8}}


def tied_model(folder: Path) -> Path:
    """Qwen2.5-VL whose vocabulary projection is its embedding, as in the 3B checkpoint."""
    plain = TinyModel(output=str(folder / "plain"), family="qwen25vl").build()
    policy = load_policy(ModelConfig(path=str(plain)))
    model: Any = policy.model
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = True
    model.lm_head.weight = model.get_input_embeddings().weight
    policy.save(folder / "tied")
    return folder / "tied"


@dataclass(frozen=True)
class Run:
    """One recipe of the launch. flags: what the worker does with it (see there)."""

    sections: dict
    flags: str = ""
    tolerance: float = 1e-5


@pytest.fixture(scope="session")
def runs(tiny_model: Path, pairs: Path, tmp_path_factory) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("mixed")
    clips = TinyModel(
        output=str(folder / "model"),
        family="llava_onevision",
        image_size=16,
        vision=SMALL,
        text=SMALL,
    ).build()
    tied = tied_model(folder)
    mixed = {"data": {"path": str(mixed_pairs(folder))}, "loss": {"name": "dpo"}}
    mixed |= {"reference": "cached"}
    frames = {"frames": {"num_frames": 4}}
    full = {"path": str(tiny_model), "train": PARTS}
    lora = {"path": str(tiny_model), "lora": LORA}
    return {
        "adapter_off": Run({"model": lora | {"train": {"projector": True}}}, flags="@2"),
        "cached": Run({"model": full | {"path": str(tied)}, "reference": "cached"}, flags="@2"),
        "bf16": Run(
            {
                "model": lora | {"dtype": "bfloat16", "gradient_checkpointing": True},
                "run": {"precision": "bf16"},
            },
            tolerance=1e-2,  # A few values fall on the other side of a 16-bit rounding.
        ),
        "frozen_copy": Run({"model": {"path": str(tiny_model)}}),
        "probed": Run(
            {
                "model": {"path": str(tiny_model)},
                "loss": {"name": "sft"},
                "probe": questions(folder / "questions"),
            },
            flags="@2",
        ),
        "mixed": Run(mixed | {"model": {"path": str(clips), "train": PARTS} | frames}),
        # With an adapter on the head too, of which peft saves the whole head.
        "frozen_tower": Run(
            mixed | {"model": {"path": str(clips), "lora": LORA | {"targets": HEAD}} | frames}
        ),
        # Pictures' features are stored, clips go through the tower.
        "features": Run(
            mixed | {"model": {"path": str(clips), "lora": LORA} | frames, "features": {}}
        ),
        "not_finite": Run({"model": full, "reference": "cached"}, flags="!2"),
    }


@pytest.fixture(scope="session")
def make(tiny_model: Path, pairs: Path) -> Callable[..., Recipe]:
    def made(output: Path, sections: dict) -> Recipe:
        values: dict = {
            "data": {"path": str(pairs)},
            "loss": {"name": "rdpo"},
            # Epsilon keeps rounding from deciding the sign of an update.
            "optim": {"lr": 1e-3, "batch_size": 4, "steps": 3, "epsilon": 1e-3},
        } | {name: section for name, section in sections.items() if name != "run"}
        values["optim"] = values["optim"] | {"micro_batch_size": 1}
        values["run"] = {"output": str(output), "log_every_steps": 1, "save_every_steps": 1}
        values["run"] |= sections.get("run", {})
        if values.get("reference") == "cached":
            # Made under each engine anew, and not read from where another left them.
            values["reference_cache"] = str(output.with_name(f"{output.name}-scores"))
        if "features" in values:
            folder = str(output.with_name(f"{output.name}-features"))
            values["features"] = {"cap_gb": 1, "folder": folder}
        return Recipe.model_validate(values)

    return made


@pytest.fixture(scope="session")
def alone(runs, make, tmp_path_factory) -> Path:
    """The runs on one process, never stopped."""
    folder = tmp_path_factory.mktemp("alone")
    for name, run in runs.items():
        for _ in train(make(folder / name, run.sections)):
            pass
    return folder


@pytest.fixture(scope="session", params=ENGINES)
def together(request, runs, make, tmp_path_factory) -> Path:
    """The runs on two processes."""
    if "deepspeed" in request.param and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs deepspeed")
    folder = tmp_path_factory.mktemp(request.param)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"]
    command += ["--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--config_file", str(ROOT / "configs" / "accelerate" / f"{request.param}.yaml")]
    command.append(str(WORKER))
    for name, run in runs.items():
        file = folder / f"{name}.yaml"
        file.write_text(dump_yaml(make(folder / name, run.sections)))
        command.append(f"{file}{run.flags}")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    environment |= {"ACCELERATE_USE_CPU": "true"} if request.param == "ddp" else {}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-6000:]
    return folder


def lines(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def refuses(folder: Path, name: str) -> bool:
    """Whether this engine has no frozen copy to offer, and cannot be probed."""
    return name in ("frozen_copy", "probed") and any(e in folder.name for e in ("fsdp2", "zero3"))


@pytest.mark.parametrize(
    "name", ["adapter_off", "cached", "bf16", "frozen_copy", "mixed", "frozen_tower", "features"]
)
def test_two_processes_equal_one(alone: Path, together: Path, runs, name: str):
    """In losses, gradients and weights, also of runs that were left and resumed (@2)."""
    if refuses(together, name):
        pytest.skip("refused, see below")
    tolerance = runs[name].tolerance
    for one, two in zip(lines(alone / name), lines(together / name), strict=True):
        for metric in ("step", "train/loss", "train/grad_norm", "train/margin", "train/nll"):
            assert abs(one[metric] - two[metric]) < tolerance, (metric, one, two)
    one, two = (weights(folder / name / "model") for folder in (alone, together))
    assert one.keys() == two.keys()
    assert all(one[n].dtype == two[n].dtype for n in one)
    assert all(torch.allclose(one[n], two[n], atol=min(tolerance, 1e-4)) for n in one)


@pytest.mark.parametrize("name", ["mixed", "frozen_tower"])
def test_the_mixed_runs_hold_what_would_hang(alone: Path, name: str):
    """Without a blank: one process with pictures or a clip while the other has none of them."""
    survey = json.loads((alone / name / "start.json").read_text())["survey"]
    sampler = Sampler(num_rows=12, batch_size=4, seed=0)
    shares = [
        sampler.micro_batches(
            0,
            rank=rank,
            world_size=2,
            micro_batch_size=1,
            kinds=survey["kinds"],
            tokens=survey["tokens"],
        )
        for rank in range(2)
    ]
    assert {*survey["kinds"]} == {"image", "video", "text"}
    beside = [{survey["kinds"][cut[0]] for cut in cuts} for cuts in zip(*shares, strict=True)]
    assert any(len(kinds) == 2 and "text" in kinds for kinds in beside), beside


def test_two_processes_store_the_features_of_one(alone: Path, together: Path):
    stored = []
    for folder in (alone, together):
        files = (folder / "features-features").glob("*/pictures-*.safetensors")
        stored.append({name: tensor for file in files for name, tensor in load_file(file).items()})
    assert len(stored[0]) == 4
    assert stored[0].keys() == stored[1].keys()
    assert all(torch.equal(stored[0][name], stored[1][name]) for name in stored[0])


def test_a_run_left_under_fsdp_ends_alone_as_if_never_left(
    alone: Path, together: Path, runs, make, tmp_path: Path
):
    if "fsdp2" not in together.name:
        pytest.skip("once is enough")
    shutil.copytree(together / "cached", tmp_path / "cached")
    (tmp_path / "cached" / "run.json").unlink()
    shutil.rmtree(tmp_path / "cached" / "model")
    events = list(train(make(tmp_path / "cached", runs["cached"].sections)))
    assert [event.step for event in events if isinstance(event, Stepped)] == [3]
    one, two = (weights(folder / "cached" / "model") for folder in (alone, tmp_path))
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)


def test_a_state_of_deepspeed_is_read_by_nothing_else(together: Path, runs, make, tmp_path: Path):
    if "deepspeed" not in together.name:
        pytest.skip("all other states are whole")
    shutil.copytree(together / "cached", tmp_path / "cached")
    (tmp_path / "cached" / "run.json").unlink()
    with pytest.raises(TrainingError, match=r"only as it was written.*no DeepSpeed.*ZeRO-\d on 2"):
        list(train(make(tmp_path / "cached", runs["cached"].sections)))


@pytest.mark.parametrize("name", ["adapter_off", "cached", "mixed", "frozen_tower"])
def test_what_was_saved_loads_without_a_key_missing(together: Path, tiny_model, name: str):
    load_policy(ModelConfig(path=str(together / name / "model")))


def test_a_frozen_copy_beside_weights_in_pieces_is_refused(together: Path):
    if not refuses(together, "frozen_copy"):
        pytest.skip("weights are whole on every process")
    told = (together / "frozen_copy.error").read_text()
    assert "reference=frozen_copy would put a whole copy on every GPU" in told


def test_a_probe_finds_on_two_processes_what_it_finds_on_one(alone: Path, together: Path):
    if refuses(together, "probed"):
        told = (together / "probed.error").read_text()
        assert "probe asks the policy for answers, whose weights are in pieces" in told
        return
    one, two = (
        [line for line in lines(folder / "probed") if "probe/id/format" in line]
        for folder in (alone, together)
    )
    assert [line["step"] for line in one] == [0, 2, 3]
    assert two == [pytest.approx(line) for line in one]
    assert one[0]["probe/id/response_tokens"] > 0


def test_a_gradient_that_is_not_finite_on_one_process_takes_no_step_on_any(together: Path):
    told = (together / "not_finite.error").read_text()
    assert "step 2" in told
    assert "not finite" in told
    before = weights(together / "not_finite" / "checkpoints" / "step-000001" / "model")
    after = weights(together / "not_finite.kept")
    assert all(torch.equal(before[name], after[name]) for name in before)
