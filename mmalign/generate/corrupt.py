"""What a corrupted request sees: image tokens hidden from attention, or noise on its pixels."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from mmalign.generate.base import Corruption, MaskImageTokens, NoisePixels, request_seed

if TYPE_CHECKING:
    from torch import Tensor


def visible_tokens(corruption: Corruption | None, num_tokens: int, seed: int) -> Tensor:
    """Which of a request's image tokens may be attended to, [num_tokens] bool.

    m_i = 1 if rho_i >= threshold, rho_i ~ U[0, 1) independent (BDHS, arXiv 2407.02477, section 4).
    """
    import torch

    if not isinstance(corruption, MaskImageTokens):
        return torch.ones(num_tokens, dtype=torch.bool)
    stream = torch.Generator().manual_seed(request_seed(seed, corruption.key))
    return torch.rand(num_tokens, generator=stream) >= corruption.threshold


def noised(pixels: Tensor, corruption: NoisePixels, seed: int) -> Tensor:
    """sqrt(a) x + sqrt(1 - a) e of processed pixels of any shape, float32.

    a = product over k = 1..steps of (1 - b_k), b_k = sigmoid(-6 + 12 k / 1000) * (0.5e-2 - 1e-5)
    + 1e-5: the schedule of BDHS's and POVID's noise. sqrt(a) is 0.863 at 500 steps.
    """
    import torch

    betas = torch.sigmoid(-6 + 12 * torch.arange(1, corruption.steps + 1).double() / 1000)
    kept = float((1 - (betas * (0.5e-2 - 1e-5) + 1e-5)).prod())
    stream = torch.Generator().manual_seed(request_seed(seed, corruption.key))
    noise = torch.randn(pixels.shape, generator=stream)
    return math.sqrt(kept) * pixels.float() + math.sqrt(1 - kept) * noise
