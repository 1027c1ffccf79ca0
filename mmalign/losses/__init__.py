"""Losses: each is its own config, frozen and callable. A new one is one line in the union."""

from typing import Annotated

from pydantic import Field

from mmalign.losses.dpo import DPO
from mmalign.losses.rdpo import RDPO, RDPOCompetitor
from mmalign.losses.sft import SFT

Loss = Annotated[SFT | DPO | RDPO | RDPOCompetitor, Field(discriminator="name")]

__all__ = ["DPO", "RDPO", "SFT", "Loss", "RDPOCompetitor"]
