from __future__ import annotations

import pytest
import torch

from mmalign.errors import MmalignError, TrainingError
from trainers.checkpoint import _step_device
from trainers.config import OptimConfig
from trainers.optim import build_optimizer, lr_at


def config(**changes) -> OptimConfig:
    return OptimConfig(lr=1e-3, batch_size=8, **changes)


def rates(total: int, **changes) -> list[float]:
    return [lr_at(step, total_steps=total, config=config(**changes)) for step in range(total)]


def test_warm_up_is_linear_and_never_zero():
    assert rates(100, warmup_fraction=0.04)[:5] == pytest.approx(
        [0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3]
    )


def test_cosine_is_half_way_down_in_the_middle_and_ends_near_its_floor():
    found = rates(1000, warmup_fraction=0.0, min_lr_fraction=0.1)
    assert found[500] == pytest.approx(0.55e-3)
    assert found[-1] == pytest.approx(0.1e-3, rel=1e-4)
    assert found == sorted(found, reverse=True)


def test_constant_stays():
    assert set(rates(50, schedule="constant", warmup_fraction=0.0)) == {1e-3}


def test_only_what_trains_is_optimised():
    model = torch.nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    optimizer = build_optimizer(model.parameters(), config(weight_decay=0.1))
    (group,) = optimizer.param_groups
    assert group["params"] == [model.weight]
    assert group["weight_decay"] == 0.1


def test_bfloat16_weights_are_refused():
    model = torch.nn.Linear(2, 2).to(torch.bfloat16)
    with pytest.raises(TrainingError, match="must be float32"):
        build_optimizer(model.parameters(), config())


def test_a_step_count_is_where_torch_keeps_it():
    weight = torch.nn.Parameter(torch.empty(2, device="meta"))
    assert _step_device({"fused": True}, weight) == torch.device("meta")
    assert _step_device({"fused": None, "capturable": True}, weight) == torch.device("meta")
    assert _step_device({"fused": False, "capturable": False}, weight) == torch.device("cpu")
    assert _step_device({}, weight) == torch.device("cpu")


def test_nothing_to_train_is_refused():
    model = torch.nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(TrainingError, match="nothing trains"):
        build_optimizer(model.parameters(), config())


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_8bit_without_cuda_says_why():
    with pytest.raises(MmalignError, match=r"CUDA GPU|bitsandbytes"):
        build_optimizer(torch.nn.Linear(2, 2).parameters(), config(optimizer="adamw_8bit"))
