"""Losses: each is its own config, frozen and callable. A new one is one line in a union."""

from typing import Annotated

from pydantic import Field

from mmalign.losses.dpo import DPO, IPO, Hinge, RationaleDPO
from mmalign.losses.mm_dpo import MMDPO, MMDPOBatch
from mmalign.losses.rdpo import MDPO, RDPO, RDPOCompetitor
from mmalign.losses.reward import CritiqueReward, Reward
from mmalign.losses.rollout import DAPO, GRPO, GSPO, DrGRPO
from mmalign.losses.rrpo import RRPO, DPOWithKL
from mmalign.losses.sft import SFT
from mmalign.losses.wrappers import AnyPairLoss, Robust, SoftLabels

Loss = Annotated[
    SFT | AnyPairLoss | SoftLabels | Robust | CritiqueReward | Reward | GRPO | DrGRPO | DAPO | GSPO,
    Field(discriminator="name"),
]

__all__ = [
    "DAPO",
    "DPO",
    "GRPO",
    "GSPO",
    "IPO",
    "MDPO",
    "MMDPO",
    "RDPO",
    "RRPO",
    "SFT",
    "AnyPairLoss",
    "CritiqueReward",
    "DPOWithKL",
    "DrGRPO",
    "Hinge",
    "Loss",
    "MMDPOBatch",
    "RDPOCompetitor",
    "RationaleDPO",
    "Reward",
    "Robust",
    "SoftLabels",
]
