"""LAION's aesthetic head: what it is made of, and how its file is read."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from mmalign.errors import ModelError
from mmalign.models.lora import first_line

if TYPE_CHECKING:
    from torch import nn

HEAD_WIDTHS = (1024, 128, 64, 16, 1)


def aesthetic_head(width: int, path: str | None) -> nn.Module:
    """The head over embeddings [N, width] that gives [N, 1], in eval mode, with weights of `path`.

    The file holds a state dict with keys layers.0, .2, .4, .6 and .7; None for random weights.
    Raises ModelError for any other file.
    """
    import torch
    from torch import nn

    widths = (width, *HEAD_WIDTHS)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        one, two, three, four, five = (nn.Linear(*sizes) for sizes in pairwise(widths))
    dropouts = nn.Dropout(0.2), nn.Dropout(0.2), nn.Dropout(0.1)
    layers = nn.Sequential(one, dropouts[0], two, dropouts[1], three, dropouts[2], four, five)
    layers.eval()
    if path is None:
        return layers
    wanted = "a state dict of linear layers " + "-".join(map(str, widths))
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        nn.ModuleDict({"layers": layers}).load_state_dict(state)
    except Exception as error:
        # torch raises whatever it likes on a broken file; each means the same here.
        raise ModelError(
            f"aesthetic head cannot be loaded ({first_line(error)})",
            where=path,
            wanted=wanted,
            fix="use sac+logos+ava1-l14-linearMSE.pth with openai/clip-vit-large-patch14",
        ) from error
    return layers
