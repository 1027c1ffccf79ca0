"""Checkpoints: what is saved so that a resumed run equals an uninterrupted one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmalign.config import dump_yaml
from mmalign.diffusion.load import ImagePolicy
from mmalign.errors import TrainingError
from mmalign.models.load import Policy
from trainers.average import Average
from trainers.directory import RunDirectory, whole_folder
from trainers.randomness import random_state, set_random_state
from trainers.rollouts import RolloutSource
from trainers.shards import in_pieces, like, saved_weights, whole, zero_stage

# Names the engine that wrote a checkpoint's state.
ENGINE = "engine.txt"
AVERAGE = "average.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """Where a run stands after `step` optimizer steps; the sampler needs no more than the step.

    metrics_bytes: length of metrics.jsonl. window: sums since the last log line.
    loss_scale: the state of float16's loss scaling; empty without it.
    """

    step: int = 0
    metrics_bytes: int = 0
    window: dict[str, float] = field(default_factory=dict)
    loss_scale: dict[str, float] = field(default_factory=dict)


def save_checkpoint(
    run: RunDirectory,
    accelerator: Accelerator,
    policy: Policy | ImagePolicy,
    optimizer: Any,
    position: Position,
    average: Average | None = None,
    rollouts: RolloutSource | None = None,
) -> Path:
    """Write checkpoints/step-N, then delete the oldest beyond run.keep_last.

    With an average, that is the model which is saved; the state holds it and the weights as they
    are, so that training goes on from these. Of rollouts, what steps to come still take.
    """
    final = run.checkpoints / f"step-{position.step:06d}"
    with whole_folder(accelerator, final) as folder:
        save_model(accelerator, policy, folder / "model", average)
        _save_state(accelerator, policy.model, optimizer, folder / "state")
        if rollouts is not None:
            rollouts.save(folder / "state", accelerator.process_index, position.step)
        if accelerator.is_main_process:
            if average is not None:
                average.save(folder / "state" / AVERAGE)
            (folder / "recipe.yaml").write_text(dump_yaml(run.recipe))
            (folder / "checkpoint.json").write_text(json.dumps(asdict(position)))
    if accelerator.is_main_process:
        _prune(run)
    return final


def _prune(run: RunDirectory) -> None:
    complete = sorted(run.checkpoints.glob("step-*/checkpoint.json"))
    for old in complete[: -run.recipe.run.keep_last]:
        old.unlink()  # First, so that a crash leaves an incomplete folder, not a false one.
        shutil.rmtree(old.parent)


def load_checkpoint(
    folder: Path,
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Any,
    average: Average | None = None,
    rollouts: RolloutSource | None = None,
) -> Position:
    """Put weights, optimizer and random numbers back as they were; returns where the run stood.

    Raises TrainingError where DeepSpeed would have to read another engine's state, or its own of
    another number of processes. All else is kept whole, and fits any number of them.
    """
    state = folder / "state"
    written, here = _engine(state), _this_engine(accelerator)
    if written != here:
        raise TrainingError(
            "DeepSpeed's state can be read only as it was written",
            where=str(folder),
            got=here,
            wanted=written,
            fix="start it as before, or train on from its model/ with another run.output",
        )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        accelerator.load_state(str(state), load_module_strict=False)
    else:
        weights = load_file(state / "weights.safetensors")
        for name, tensor in _moving(model).items():
            tensor.detach().copy_(like(weights[name], tensor))
        moments = torch.load(state / "optimizer.pt", weights_only=True)
        inner = optimizer.optimizer
        groups = {p: group for group in inner.param_groups for p in group["params"]}
        for name, parameter in model.named_parameters():
            if name in moments:
                restored = {
                    key: like(value, parameter) if isinstance(value, Tensor) else value
                    for key, value in moments[name].items()
                }
                if isinstance(step := restored.get("step"), Tensor):
                    restored["step"] = step.to(_step_device(groups[parameter], parameter))
                inner.state[parameter] = restored
    if average is not None:
        average.restore(state / AVERAGE)
    position = Position(**json.loads((folder / "checkpoint.json").read_text()))
    if rollouts is not None:
        rollouts.restore(state, accelerator.process_index, position.step)
    set_random_state(torch.load(state / "random.pt", weights_only=True))
    return position


def save_model(
    accelerator: Accelerator,
    policy: Policy | ImagePolicy,
    path: Path,
    average: Average | None = None,
) -> None:
    """The model or adapter with its processor, as from_pretrained reads them.

    With an average, its weights in place of those that train.
    """
    # Gathering is done by every process together; writing by one.
    weights = saved_weights(accelerator, policy.model) if in_pieces(accelerator) else None
    if accelerator.is_main_process:
        with nullcontext() if average is None else average.in_place():
            policy.save(path, weights)


def _save_state(accelerator: Accelerator, model: nn.Module, optimizer: Any, folder: Path) -> None:
    main = accelerator.is_main_process
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        # Each process writes its share, and frozen weights are those of the initial policy.
        accelerator.save_state(str(folder), exclude_frozen_parameters=True)
        weights, moments = {}, {}
    else:
        weights = {name: whole(tensor, keep=main) for name, tensor in _moving(model).items()}
        inner = optimizer.optimizer.state
        moments = {
            name: {
                k: whole(v, keep=main) if isinstance(v, Tensor) else v for k, v in inner[p].items()
            }
            for name, p in model.named_parameters()
            if p in inner
        }
    if not main:
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ENGINE).write_text(_this_engine(accelerator))
    _torch_save(random_state(), folder / "random.pt")
    if weights:
        save_file(weights, folder / "weights.safetensors")
        _torch_save(moments, folder / "optimizer.pt")


def _torch_save(values: Any, path: Path) -> None:
    try:
        torch.save(values, path)
    except RuntimeError as error:
        # What torch makes of a full disk, in several wordings.
        raise OSError(f"{path.name}: {error}") from error


def _moving(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that training can change: parameters that train, and buffers."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {**trained, **dict(model.named_buffers())}


def _this_engine(accelerator: Accelerator) -> str:
    """What a state depends on beside the run itself: nothing, but for DeepSpeed's."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return "no DeepSpeed"
    return f"ZeRO-{zero_stage(accelerator)} on {accelerator.num_processes} processes"


def _engine(state: Path) -> str:
    file = state / ENGINE
    return file.read_text() if file.exists() else "no DeepSpeed"


def _step_device(group: Mapping[str, Any], parameter: Tensor) -> torch.device:
    """Where torch expects a step count: with its parameter if fused, else on the CPU."""
    beside = group.get("fused") or group.get("capturable")
    return parameter.device if beside else torch.device("cpu")
