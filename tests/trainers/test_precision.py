"""fp16: losses are scaled, steps that overflow are skipped and counted, and not for ever."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType

from mmalign.errors import TrainingError
from trainers.loop import Stepped, train
from trainers.precision import MOST_SKIPPED, LossScale, check_precision
from trainers.tracking import Window

CPU = torch.device("cpu")


def descended(scale: LossScale, weight: torch.nn.Parameter, optimizer: Any, factor: float) -> bool:
    """One step down `factor` times the weight; whether it was taken."""
    scale.scaled((factor * weight).sum()).backward()
    scale.unscale(optimizer)
    assert weight.grad is not None
    skipped = scale.overflows(float(weight.grad.norm()), 1)
    scale.step(optimizer)
    optimizer.zero_grad()
    return not skipped


def test_a_step_that_overflows_is_not_taken_and_halves_the_scale():
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scale = LossScale("fp16", CPU)
    before = scale.state()["scale"]
    assert not descended(scale, weight, optimizer, float("inf"))
    assert (weight.item(), scale.counts) == (0.0, {"skipped_steps": 1.0})
    assert scale.state()["scale"] == before / 2
    assert descended(scale, weight, optimizer, 2.0)
    assert (weight.item(), scale.counts) == (-2.0, {"skipped_steps": 0.0})


def test_a_scale_goes_on_where_it_was():
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    first, second = LossScale("fp16", CPU), LossScale("fp16", CPU)
    for factor in (float("inf"), 1.0, 1.0, float("inf")):
        descended(first, weight, optimizer, factor)
    second.restore(first.state())
    assert second.state() == first.state()
    assert second.state()["in_a_row"] == 1


def test_too_many_skipped_steps_in_a_row_are_an_error():
    scale = LossScale("fp16", CPU)
    for _ in range(MOST_SKIPPED - 1):
        assert scale.overflows(float("nan"), 7)
    assert not scale.overflows(1.0, 7)  # One that fits begins the count anew.
    for _ in range(MOST_SKIPPED - 1):
        assert scale.overflows(float("inf"), 7)
    with pytest.raises(TrainingError, match="step 7: gradients overflow float16 in 25 steps"):
        scale.overflows(float("inf"), 7)


def test_other_precisions_scale_and_skip_nothing():
    for precision in ("float32", "bf16"):
        scale = LossScale(precision, CPU)
        assert scale.scaled(torch.tensor(2.0)).item() == 2.0
        assert not scale.overflows(float("inf"), 1)  # The loop's own error.
        assert scale.counts == scale.state() == {}


def test_skipped_steps_are_counted_and_leave_the_mean_norm_alone():
    window = Window()
    common = {"loss": 1.0, "steps": 1, "rows": 4, "tokens": 4, "seconds": 1.0}
    window.add(**common, grad_norm=0.0, skipped_steps=1.0)
    window.add(**common, grad_norm=3.0, skipped_steps=0.0)
    metrics = window.means(unit="pairs", lr=0.1)
    assert (metrics["train/skipped_steps"], metrics["train/grad_norm"]) == (1.0, 3.0)


def test_fp16_is_refused_where_the_policy_is_in_pieces():
    fsdp: Any = SimpleNamespace(distributed_type=DistributedType.FSDP)
    with pytest.raises(TrainingError, match="got FSDP"):
        check_precision(fsdp, "fp16", whole=False)
    check_precision(fsdp, "bf16", whole=False)
    check_precision(fsdp, "fp16", whole=True)


@pytest.mark.parametrize("layout", ["padded", "shared_prefix"])
def test_text_trains_in_fp16(recipe, layout):
    found = []
    for precision in ("float32", "fp16"):
        output = recipe(loss={"name": "sft"}).run.output.parent / precision
        made = recipe(
            loss={"name": "sft"},
            scorer={"layout": layout},
            run={"precision": precision, "output": str(output), "log_every_steps": 1},
        )
        found.append([event.metrics for event in train(made) if isinstance(event, Stepped)])
    single, half = found
    assert sum(m["train/skipped_steps"] for m in half) == 0
    for one, other in zip(single, half, strict=True):
        assert other["train/loss"] != one["train/loss"]
        assert other["train/loss"] == pytest.approx(one["train/loss"], rel=1e-2)
