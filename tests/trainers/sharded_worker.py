"""Run recipes one after the other in each process of a launch, on CPUs that speak gloo.

accelerate shards (FSDP, DeepSpeed) on GPUs alone, so its state is told that these processes have
one each; everything after that is accelerate's own path. With DDP they are CPU processes.

    accelerate launch --config_file configs/accelerate/fsdp2.yaml --num_processes 2 \
        tests/trainers/sharded_worker.py NAME.yaml[@STEP|!STEP] ...

@STEP leaves the run at its checkpoint of that step, as if it were killed, and starts it again.
!STEP makes the last process's loss of that step not a number, and leaves the weights as they are
then in NAME.kept. An error that mmalign raises is left in NAME.error.
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate.state import PartialState
from accelerate.utils import DistributedType

import trainers.loop
from mmalign.config import load_config
from mmalign.errors import MmalignError
from trainers.checkpoint import save_model
from trainers.config import Recipe
from trainers.setup import Parts


def main(arguments: list[str]) -> None:
    if os.environ.get("ACCELERATE_USE_DEEPSPEED"):
        import deepspeed.ops

        # A kernel for sums in shared memory, which would be compiled here; gloo does without.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    state = PartialState(cpu=True)
    for argument in arguments:
        found = re.fullmatch(r"(.+\.yaml)([@!]?)(\d*)", argument)
        assert found
        recipe = load_config(found[1], Recipe, [])
        kept: list[Parts] = []
        try:
            if found[2] == "@":
                run(recipe, kept, leave_at=int(found[3]))
            run(recipe, kept, spoil=int(found[3]) if found[2] == "!" else None)
        except MmalignError as error:
            if state.is_main_process:
                Path(found[1]).with_suffix(".error").write_text(str(error))
        if found[2] == "!":
            (parts,) = kept
            save_model(parts.accelerator, parts.policy, Path(found[1]).with_suffix(".kept"))
    state.wait_for_everyone()


def run(
    recipe: Recipe, kept: list[Parts], *, leave_at: int | None = None, spoil: int | None = None
) -> None:
    """Train; parts, once made, are kept in `kept`."""
    if os.environ.get("ACCELERATE_USE_FSDP") or os.environ.get("ACCELERATE_USE_DEEPSPEED"):
        # accelerate writes down what it made of the GPUs; the next run starts from GPUs again.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    def set_up(*arguments: Any) -> Parts:
        kept.append(real(*arguments))
        return kept[-1]

    real, trainers.loop.set_up = trainers.loop.set_up, set_up
    score = type(recipe.loss).__call__
    calls = 0

    def spoilt(self: Any, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        output = score(self, *arguments)
        last = PartialState().is_last_process and kept[-1].num_micro * (spoil or 0) == calls
        return replace(output, loss=output.loss * float("nan")) if last else output

    type(recipe.loss).__call__ = spoilt  # type: ignore[method-assign]
    try:
        for event in trainers.loop.train(recipe):
            if isinstance(event, trainers.loop.Saved) and event.step == leave_at:
                break
    finally:
        trainers.loop.set_up, type(recipe.loss).__call__ = real, score  # type: ignore[method-assign]


if __name__ == "__main__":
    main(sys.argv[1:])
