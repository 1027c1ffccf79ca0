"""The denoiser: a backbone and noised images in, denoising errors out. The scorer of images."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mmalign.diffusion.backbones import Backbone
from mmalign.diffusion.schedule import Schedule
from mmalign.scores import DenoiseScores


@dataclass(frozen=True, slots=True, kw_only=True)
class DenoisePlan:
    """One forward pass over N images.

    latents, noise: [N, C, h, w] float32, clean latents as the backbone knows them, and what is
    added to them. steps: [N] int64, timesteps. conditions: prompts and sizes, each [N, ...].
    """

    latents: Tensor
    noise: Tensor
    steps: Tensor
    conditions: dict[str, Tensor]

    def to(self, device: torch.device | str) -> DenoisePlan:
        """The same plan on `device`."""
        return replace(
            self,
            latents=self.latents.to(device, non_blocking=True),
            noise=self.noise.to(device, non_blocking=True),
            steps=self.steps.to(device, non_blocking=True),
            conditions={
                name: values.to(device, non_blocking=True)
                for name, values in self.conditions.items()
            },
        )


class Denoiser(nn.Module):
    """Wraps a backbone so that one forward call gives the error of every image of a plan.

    A module, like the scorer of text, so that DDP and FSDP can wrap it.
    min_snr_gamma: weighs each error by its timestep; see `Schedule.min_snr_weights`.
    """

    def __init__(
        self,
        model: nn.Module,
        backbone: Backbone,
        schedule: Schedule,
        min_snr_gamma: float | None = None,
    ) -> None:
        super().__init__()
        self.model, self.backbone = model, backbone
        self.schedule, self.min_snr_gamma = schedule, min_snr_gamma

    def forward(self, plan: DenoisePlan) -> DenoiseScores:
        """Mean squared errors, float32, whatever the backbone computes in."""
        schedule = self.schedule = self.schedule.to(plan.latents.device)
        noised = schedule.noised(plan.latents, plan.noise, plan.steps)
        times = schedule.times[plan.steps]
        predicted = self.backbone.predict(self.model, noised, times, plan.conditions)
        target = schedule.target(plan.latents, plan.noise, plan.steps)
        errors = (predicted.float() - target.float()).square().flatten(1).mean(1)
        if self.min_snr_gamma is not None:
            errors = errors * schedule.min_snr_weights(plan.steps, self.min_snr_gamma)
        return DenoiseScores(errors=errors)
