"""Training is the same in every layout, for every family."""

from __future__ import annotations

import pytest

from mmalign.models.families import FAMILIES
from mmalign.models.tiny import TinyModel, Tower
from trainers.loop import Stepped, train


@pytest.mark.parametrize("family", [family.name for family in FAMILIES])
def test_layouts_train_alike(family, recipe, tmp_path):
    """shared_prefix is packed here where the family allows it, and gets masks where not."""
    small = Tower(hidden=64, layers=2, heads=4, mlp=32)
    settings = {"family": family, "vision": small, "text": small}
    path = str(TinyModel(output=str(tmp_path / "tiny"), **settings).build())
    losses: dict[str, list[float]] = {}
    for layout in ("padded", "shared_prefix"):
        made = recipe(
            model={"path": path},
            scorer={"layout": layout},
            optim={"steps": 3},
            run={"output": str(tmp_path / layout)},
        )
        steps = [event for event in train(made) if isinstance(event, Stepped)]
        losses[layout] = [step.metrics["train/loss"] for step in steps]
    assert losses["shared_prefix"] == pytest.approx(losses["padded"], rel=1e-5)
    assert len(set(losses["padded"])) == 3
