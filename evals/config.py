"""The eval recipe: a model, the benchmarks to ask it, and where the answers go."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, field_validator

from evals.amber import Amber
from evals.chair import Chair
from evals.object_halbench import ObjectHalBench
from evals.pope import Pope
from evals.reward_bench import RewardBench
from evals.tempcompass import TempCompass
from evals.verifiable import VerifiableBench
from evals.video_choices import LongVideoBench, Mlvu, MvBench, TvBench
from evals.video_hallucer import VideoHallucer
from evals.videomme import VideoMme
from evals.vidhalluc import VidHallucBinary, VidHallucChoice, VidHallucOrder
from mmalign.clips import FrameSampling
from mmalign.config import Strict
from mmalign.engines import AnyEngine, LocalEngine
from mmalign.models.quantization import Quantization

AnyBenchmark = Annotated[
    Pope
    | Chair
    | RewardBench
    | VerifiableBench
    | VideoHallucer
    | VidHallucBinary
    | VidHallucChoice
    | VidHallucOrder
    | TempCompass
    | TvBench
    | MvBench
    | Mlvu
    | LongVideoBench
    | VideoMme
    | Amber
    | ObjectHalBench,
    Field(discriminator="name"),
]


class EvalModel(Strict):
    """The checkpoint under test and how it is loaded.

    path: a local folder, or a hub name. adapter: a folder with a LoRA to merge in.
    max_pixels: larger pictures are shrunk to this. frames: which frames of a clip the model sees.
    quantization: 4-bit weights. None for those of the adapter's own base, or none.
    Give them the values that the model was trained with.
    """

    path: str
    revision: str | None = None
    adapter: str | None = None
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    attention: Literal["auto", "sdpa", "eager"] = "auto"
    trust_remote_code: bool = False
    max_pixels: PositiveInt | None = None
    frames: FrameSampling = FrameSampling()
    quantization: Quantization | None = None


class EvalRecipe(Strict):
    """One evaluation run. `seed` draws the bootstrap samples.

    Answers are greedy, but where a benchmark has a `decoding` of its own.

    engine: where answers are generated, local or ray (docs/evaluate.md); no result tells of it.
    """

    name: str
    model: EvalModel
    output: Path
    benchmarks: list[AnyBenchmark] = Field(min_length=1)
    batch_size: PositiveInt = 16
    engine: AnyEngine = Field(default=LocalEngine(), exclude=True)
    bootstrap_samples: PositiveInt = 2000
    seed: int = 0

    @field_validator("benchmarks")
    @classmethod
    def _keys_differ(cls, benchmarks: list[AnyBenchmark]) -> list[AnyBenchmark]:
        keys = [benchmark.key for benchmark in benchmarks]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        if twice:
            raise ValueError(f"{', '.join(twice)} appears twice; give each a split of its own")
        return benchmarks
