"""Noise schedules are those of diffusers' own schedulers."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from mmalign.diffusion.schedule import Schedule, schedule_of
from mmalign.errors import ModelError

SDXL = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
STEPS = torch.tensor([0, 17, 500, 999])


def drawn() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    clean, eps = (torch.randn(4, 3, 5, 5, generator=generator) for _ in range(2))
    return clean, eps


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_noise_and_targets_are_those_of_ddpm(kind):
    scheduler = DDPMScheduler(**SDXL, prediction_type=kind)
    schedule, (clean, eps) = schedule_of(scheduler), drawn()
    assert len(schedule) == 1000
    wanted = scheduler.add_noise(clean, eps, STEPS)
    assert torch.allclose(schedule.noised(clean, eps, STEPS), wanted, atol=1e-6)
    target = eps if kind == "epsilon" else scheduler.get_velocity(clean, eps, STEPS)
    assert torch.allclose(schedule.target(clean, eps, STEPS), target, atol=1e-6)
    assert torch.equal(schedule.times[STEPS], STEPS.float())


@pytest.mark.parametrize("kind", [DDIMScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler])
def test_a_pipelines_sampler_has_the_schedule_it_was_trained_with(kind):
    scheduler = kind(**SDXL)
    scheduler.set_timesteps(20)
    one, other = schedule_of(scheduler), schedule_of(DDPMScheduler(**SDXL))
    assert torch.allclose(one.signal, other.signal, atol=1e-6)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching_goes_straight_from_latent_to_noise(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    before = schedule_of(scheduler)
    scheduler.set_timesteps(10)  # What sampling leaves behind does not matter.
    schedule, (clean, eps) = schedule_of(scheduler), drawn()
    assert torch.equal(schedule.noise, before.noise)
    assert len(schedule) == 1000
    fresh = FlowMatchEulerDiscreteScheduler(shift=shift)
    wanted = fresh.scale_noise(clean, fresh.timesteps[STEPS], eps)
    assert torch.allclose(schedule.noised(clean, eps, STEPS), wanted, atol=1e-5)
    assert torch.allclose(schedule.times[STEPS], fresh.timesteps[STEPS], atol=1e-3)
    # One step along the target reaches the clean latent.
    sigma = schedule.noise[STEPS].view(-1, 1, 1, 1)
    back = schedule.noised(clean, eps, STEPS) - sigma * schedule.target(clean, eps, STEPS)
    assert torch.allclose(back, clean, atol=1e-5)


def test_min_snr_weighs_the_error_of_the_clean_latent_alike_in_both_predictions():
    """Weight times d(error)/d(x_0 error) is min(SNR, gamma) for epsilon and v."""
    one, other = (
        schedule_of(DDPMScheduler(**SDXL, prediction_type=kind))
        for kind in ("epsilon", "v_prediction")
    )
    snr = one.snr(STEPS)
    assert snr[0] > 5 > snr[-1]
    # eps error = SNR * x_0 error; v error = (SNR + 1) * x_0 error.
    for weights, factor in (
        (one.min_snr_weights(STEPS, 5.0), snr),
        (other.min_snr_weights(STEPS, 5.0), snr + 1),
    ):
        assert torch.allclose(weights * factor, snr.clamp_max(5.0), rtol=1e-4)


def test_a_timestep_without_signal_or_noise_has_a_finite_weight():
    schedule = Schedule(
        signal=torch.tensor([1.0, 0.0]),
        noise=torch.tensor([0.0, 1.0]),
        times=torch.arange(2.0),
        prediction="epsilon",
    )
    assert schedule.min_snr_weights(torch.tensor([0, 1]), 5.0).tolist() == [0.0, 0.0]


def test_what_is_not_known_is_refused():
    with pytest.raises(ModelError, match="prediction_type is not known"):
        schedule_of(DDPMScheduler(prediction_type="sample"))
    with pytest.raises(ModelError, match="not defined"):
        schedule_of(FlowMatchEulerDiscreteScheduler()).min_snr_weights(STEPS, 5.0)
