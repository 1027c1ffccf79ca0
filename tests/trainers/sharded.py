"""Run recipes one after the other in each process of a sharded launch, on CPUs that speak gloo.

accelerate shards (FSDP, DeepSpeed) on GPUs alone, so its state is told that these processes have
one each; everything after that is accelerate's own path.

    accelerate launch --config_file configs/accelerate/fsdp2.yaml --num_processes 2 \
        tests/trainers/sharded.py NAME.yaml[@STEP] ...

@STEP leaves a run at its checkpoint of that step, as if it were killed. An error that mmalign
raises is left in NAME.error.
"""

from __future__ import annotations

import sys
from pathlib import Path

from accelerate.state import PartialState
from accelerate.utils import DistributedType

from mmalign.config import load_config
from mmalign.errors import MmalignError
from trainers.config import Recipe
from trainers.loop import Saved, train


def main(names: list[str]) -> None:
    state = PartialState(cpu=True)
    for name in names:
        # accelerate writes down what it made of the GPUs; a second run starts from GPUs again.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        file, _, stop = name.partition("@")
        try:
            for event in train(load_config(file, Recipe, [])):
                if isinstance(event, Saved) and stop and event.step == int(stop):
                    break
        except MmalignError as error:
            if state.is_main_process:
                Path(file).with_suffix(".error").write_text(str(error))
    state.wait_for_everyone()


if __name__ == "__main__":
    main(sys.argv[1:])
