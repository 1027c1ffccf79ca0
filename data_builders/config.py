"""Every builder, by name. A new one is a file beside this and a name in the union."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import get_args

from data_builders.bdhs import BDHS
from data_builders.critiques import Critiques
from data_builders.crops import Crops
from data_builders.digit_clips import DigitClips
from data_builders.digit_pictures import DigitPictures
from data_builders.digit_scenes import DigitScenes
from data_builders.digit_sums import DigitSums
from data_builders.expand_critiques import ExpandCritiques
from data_builders.image_pairs import ImagePairs
from data_builders.instruct import Instruct
from data_builders.on_policy import OnPolicy
from data_builders.realign import ReAlign
from data_builders.rrpo_video import RRPOVideo
from data_builders.score import Score
from data_builders.specs import Specs
from mmalign.config import apply_overrides, read_yaml, validate
from mmalign.errors import ConfigError

# Each is its own config, told apart by `name`, and has `output` and `build()`.
AnyBuilder = (
    BDHS
    | Critiques
    | Crops
    | DigitClips
    | DigitPictures
    | DigitScenes
    | DigitSums
    | ExpandCritiques
    | ImagePairs
    | Instruct
    | OnPolicy
    | ReAlign
    | RRPOVideo
    | Score
    | Specs
)

BUILDERS: dict[str, type[AnyBuilder]] = {
    kind.model_fields["name"].default: kind for kind in get_args(AnyBuilder)
}


def load_builder(path: str | Path, overrides: Iterable[str] = ()) -> AnyBuilder:
    """Read a build config. Raises ConfigError listing every problem in it."""
    data = apply_overrides(read_yaml(path), overrides, str(path))
    name = data.get("name")
    if not isinstance(name, str) or name not in BUILDERS:
        raise ConfigError(
            "names no builder", where=str(path), got=f"name: {name}", wanted=", ".join(BUILDERS)
        )
    return validate(data, BUILDERS[name], str(path))
