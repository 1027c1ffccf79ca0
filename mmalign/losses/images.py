"""Preference losses over pairs of images: MaPO in two parametrisations, Diffusion-DPO, SFT.

A candidate's score is its denoising error l, a mean over the latent. Throughout, w is the chosen
image and l_w its error, l the rejected one and l_l its error.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat
from torch import Tensor

from mmalign.losses.base import Need
from mmalign.scores import DenoiseScores, LossOutput, PairTable, Totals

# Below this, log(x / (e^x - 1)) by its series, whose next term is under 3e-13 of it there.
SERIES_BELOW = 0.5


def log_link(x: Tensor) -> Tensor:
    """log(x / (e^x - 1)) of x >= 0, elementwise, in float32 or wider: 0 at 0, falling.

    Near 0 the quotient loses its digits and its gradient more of them, so there it is the series
    -x/2 - x^2/24 + x^4/2880 - x^6/181440 + x^8/9676800; from 0.5 on, log x - x - log(1 - e^-x),
    which does not overflow.
    """
    x = x if x.dtype == torch.float64 else x.float()
    small = x < SERIES_BELOW
    # Each branch sees only what it is made for: the gradient of the other would be NaN at 0.
    near = torch.where(small, x, 0.0)
    far = torch.where(small, 1.0, x)
    square = near * near
    coefficients = (1 / 9676800, -1 / 181440, 1 / 2880, -1 / 24)
    series = torch.zeros_like(square)
    for coefficient in coefficients:
        series = (series + coefficient) * square
    series = series - near / 2
    return torch.where(small, series, far.log() - far - torch.log1p(-torch.exp(-far)))


class ImageLossConfig(BaseModel):
    """Base of a loss over images: a frozen config that is callable.

    L = mean over pairs of [ mse_weight * l_w - margin_weight * log sigmoid(z) ],  z the margin.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    own_needs: ClassVar[frozenset[Need]] = frozenset({Need.REJECTED})

    @property
    def needs(self) -> frozenset[Need]:
        """What the loss cannot do without."""
        return self.own_needs

    @property
    def weights(self) -> tuple[float, float]:
        """mse_weight and margin_weight."""
        raise NotImplementedError

    def margins(
        self, policy: DenoiseScores, reference: DenoiseScores | None, table: PairTable
    ) -> Tensor:
        """z of each pair, [P] float32; above zero where chosen is preferred."""
        raise NotImplementedError

    def __call__(
        self,
        policy: DenoiseScores,
        reference: DenoiseScores | None,
        table: PairTable,
        totals: Totals,
    ) -> LossOutput:
        """This batch's share of the step's loss."""
        of_mse, of_margin = self.weights
        chosen = policy.errors[table.chosen]
        # A term that weighs nothing is not added, so that the other one is left to the bit.
        terms = of_mse * chosen if of_mse else torch.zeros_like(chosen)
        metrics = {"chosen_error": chosen.detach()}
        if Need.REJECTED in self.needs:
            assert table.rejected is not None
            margin = self.margins(policy, reference, table)
            terms = terms - of_margin * F.logsigmoid(margin)
            metrics["rejected_error"] = policy.errors[table.rejected].detach()
            metrics["margin"] = margin.detach()
            metrics["accuracy"] = (margin.detach() > 0).float()
        weight = 1.0 if table.weight is None else table.weight
        return LossOutput(
            loss=(weight * terms).sum() / totals.num_pairs,
            per_item=terms.detach(),
            metrics={name: (weight * values).sum() for name, values in metrics.items()},
        )


class MaPO(ImageLossConfig):
    """Margin-aware preference optimisation, as the paper has it (Hong et al., arXiv 2406.06424 v2).

    L = l_w - (1 / beta) * log sigmoid(phi(l_w) - phi(l_l)),  phi(l) = (l / (e^l - 1))^beta.

    No reference. phi falls from 1 to 0, so that a small error is a large likelihood; 1 / beta
    undoes that phi' grows with beta, and a larger beta saturates at a smaller gap. The paper tries
    128, 256, 512 and 1024. Its gradient formula (equation 14) is not the derivative of phi, which
    autograd takes here. Unlike the released code, see MaPOReleased.
    """

    name: Literal["mapo"] = "mapo"
    beta: PositiveFloat = 512.0

    @property
    def weights(self) -> tuple[float, float]:
        """1 and 1 / beta."""
        return 1.0, 1 / self.beta

    def margins(
        self, policy: DenoiseScores, reference: DenoiseScores | None, table: PairTable
    ) -> Tensor:
        """phi(l_w) - phi(l_l), in (-1, 1)."""
        assert table.rejected is not None
        score = torch.exp(self.beta * log_link(policy.errors))
        return score[table.chosen] - score[table.rejected]


class MaPOReleased(ImageLossConfig):
    """MaPO as its released scripts optimise it, in another parametrisation than the paper's.

    L = l_w - beta * log sigmoid(scale * (phi(l_w) - phi(l_l))),  phi(l) = s l / (e^(s l) - 1),
    s = link_scale (`snr_value` there, a constant that has nothing to do with the SNR), scale the
    number of timesteps. Near zero it has the slope of the paper's beta = s * scale, and 0.1 where
    that has 1 / beta = 0.002.

    beta = 0 is `diffusion_sft`: then nothing of the rejected image is computed.
    Deviation from the released code: float32 throughout with a series near zero, where e^x - 1
    loses its digits (0 / 0 at an error of zero) before they are multiplied by 1000.
    """

    name: Literal["mapo_released"] = "mapo_released"
    beta: NonNegativeFloat = 0.1
    link_scale: PositiveFloat = 0.5
    scale: PositiveFloat = 1000.0

    @property
    def needs(self) -> frozenset[Need]:
        """The rejected image, unless its term weighs nothing."""
        return self.own_needs if self.beta else frozenset()

    @property
    def weights(self) -> tuple[float, float]:
        """1 and beta."""
        return 1.0, self.beta

    def margins(
        self, policy: DenoiseScores, reference: DenoiseScores | None, table: PairTable
    ) -> Tensor:
        """scale * (phi(l_w) - phi(l_l))."""
        assert table.rejected is not None
        # phi - 1, whose digits a difference of numbers near 1 would lose.
        score = torch.expm1(log_link(self.link_scale * policy.errors))
        return self.scale * (score[table.chosen] - score[table.rejected])


class DiffusionDPO(ImageLossConfig):
    """DPO for diffusion models (Wallace et al., arXiv 2311.12908, equation 14, as released).

    L = -log sigmoid(-(beta / 2) * [(l_w - l_w_ref) - (l_l - l_l_ref)]),
    errors averaged, not summed, over a latent; T and the timestep's weight are part of beta.
    At the reference L = log 2. The released recipe has beta 5000.
    """

    name: Literal["diffusion_dpo"] = "diffusion_dpo"
    beta: PositiveFloat = 5000.0
    own_needs: ClassVar[frozenset[Need]] = frozenset({Need.REJECTED, Need.REFERENCE})

    @property
    def weights(self) -> tuple[float, float]:
        """0 and 1."""
        return 0.0, 1.0

    def margins(
        self, policy: DenoiseScores, reference: DenoiseScores | None, table: PairTable
    ) -> Tensor:
        """-(beta / 2) times how much more the chosen image's error rose than the rejected one's."""
        assert reference is not None
        assert table.rejected is not None
        rise = policy.errors - reference.errors
        return -0.5 * self.beta * (rise[table.chosen] - rise[table.rejected])


class DiffusionSFT(ImageLossConfig):
    """The denoising error of the chosen images: the control of every preference method.

    L = mean of l_w (Ho et al., arXiv 2006.11239, equation 14).
    """

    name: Literal["diffusion_sft"] = "diffusion_sft"
    own_needs: ClassVar[frozenset[Need]] = frozenset()

    @property
    def weights(self) -> tuple[float, float]:
        """1 and 0."""
        return 1.0, 0.0


ImageLoss = Annotated[
    MaPO | MaPOReleased | DiffusionDPO | DiffusionSFT, Field(discriminator="name")
]
