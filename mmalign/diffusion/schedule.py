"""What noise does to a clean latent at each timestep, and what a backbone is asked to predict.

x_t = signal_t * x_0 + noise_t * eps

epsilon       predicts eps                                (arXiv 2006.11239, equation 14)
v_prediction  predicts signal_t * eps - noise_t * x_0     (arXiv 2202.00512, appendix D)
flow          predicts eps - x_0, signal_t = 1 - noise_t  (arXiv 2403.03206, equation 13)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from mmalign.errors import ModelError

Prediction = Literal["epsilon", "v_prediction", "flow"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """T timesteps of training, numbered from 0.

    signal, noise: [T] float32, the factors above. times: [T] float32, what the backbone is told.
    """

    signal: Tensor
    noise: Tensor
    times: Tensor
    prediction: Prediction

    def __len__(self) -> int:
        return len(self.times)

    def to(self, device: torch.device | str) -> Schedule:
        """The same schedule on `device`."""
        moved = {name: getattr(self, name).to(device) for name in ("signal", "noise", "times")}
        return replace(self, **moved)

    def noised(self, clean: Tensor, eps: Tensor, steps: Tensor) -> Tensor:
        """x_t of clean latents and noise, each [N, ...], at timesteps `steps`, [N] int64."""
        return _beside(self.signal[steps], clean) * clean + _beside(self.noise[steps], clean) * eps

    def target(self, clean: Tensor, eps: Tensor, steps: Tensor) -> Tensor:
        """What the backbone should predict of each latent, [N, ...]."""
        if self.prediction == "epsilon":
            return eps
        if self.prediction == "flow":
            return eps - clean
        return _beside(self.signal[steps], clean) * eps - _beside(self.noise[steps], clean) * clean

    def snr(self, steps: Tensor) -> Tensor:
        """signal^2 / noise^2 at each timestep, [N]; infinite without noise."""
        return (self.signal[steps] / self.noise[steps]) ** 2

    def min_snr_weights(self, steps: Tensor, gamma: float) -> Tensor:
        """Weights of each timestep's error, [N] (Hang et al., arXiv 2303.09556, section 3.4).

        min(SNR, gamma) / SNR for epsilon, min(SNR, gamma) / (SNR + 1) for v: in both the error of
        x_0 weighs min(SNR, gamma). Raises ModelError for flow, for which the paper has none.
        """
        if self.prediction == "flow":
            raise ModelError(
                "min-SNR weights are not defined for a model that predicts a flow",
                fix="drop min_snr_gamma",
            )
        snr = self.snr(steps)
        if self.prediction == "v_prediction":
            return snr.clamp_max(gamma) / (snr + 1)
        # gamma / SNR would be infinite at a timestep without signal, where nothing can be learned.
        return (gamma / snr).clamp_max(1.0).where(snr > 0, 0.0)


def schedule_of(scheduler: Any) -> Schedule:
    """The training schedule of a diffusers scheduler, as its config has it.

    Raises ModelError where it predicts something else than the three above.
    """
    config = scheduler.config
    name = type(scheduler).__name__
    if hasattr(scheduler, "alphas_cumprod"):
        kind = config.get("prediction_type", "epsilon")
        if kind not in ("epsilon", "v_prediction"):
            raise ModelError(
                "the scheduler's prediction_type is not known here",
                where=name,
                got=str(kind),
                wanted="epsilon or v_prediction",
            )
        left = scheduler.alphas_cumprod.double()
        return Schedule(
            signal=left.sqrt().float(),
            noise=(1 - left).sqrt().float(),
            times=torch.arange(len(left), dtype=torch.float32),
            prediction=kind,
        )
    if "FlowMatch" in name:
        # Anew from the config: a pipeline that has sampled leaves its own few sigmas behind.
        fresh = type(scheduler).from_config(config)
        sigmas = fresh.sigmas[: config.num_train_timesteps].float().cpu()
        return Schedule(
            signal=1 - sigmas,
            noise=sigmas,
            times=sigmas * config.num_train_timesteps,
            prediction="flow",
        )
    raise ModelError(
        "nothing is known of how this scheduler adds noise",
        where=name,
        wanted="one with alphas_cumprod, such as DDPM, or one of flow matching",
    )


def _beside(values: Tensor, latents: Tensor) -> Tensor:
    """[N] as [N, 1, …], to multiply latents."""
    return values.view(-1, *[1] * (latents.dim() - 1))
