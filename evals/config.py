"""The eval recipe: a model, the benchmarks to ask it, and where the answers go."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveInt, field_validator, model_validator

from evals.benchmarks.amber import Amber
from evals.benchmarks.chair import Chair
from evals.benchmarks.gqa import Gqa
from evals.benchmarks.hallusion_bench import HallusionBench
from evals.benchmarks.llava_bench import LlavaBench
from evals.benchmarks.math_questions import MathVerse, MathVista
from evals.benchmarks.mathvision import MathVision
from evals.benchmarks.mm_vet import MmVet
from evals.benchmarks.mmbench import MmBench
from evals.benchmarks.mme import Mme
from evals.benchmarks.mmhal import MmHal
from evals.benchmarks.mmmu import Mmmu
from evals.benchmarks.multimodal_reward_bench import MultimodalRewardBench
from evals.benchmarks.object_halbench import ObjectHalBench
from evals.benchmarks.pope import Pope
from evals.benchmarks.reward_bench import RewardBench
from evals.benchmarks.safety_bench import SafetyJailbreak, SafetyVlGuard
from evals.benchmarks.science_qa import ScienceQa
from evals.benchmarks.tempcompass import TempCompass
from evals.benchmarks.tempcompass_captioning import TempCompassCaptioning
from evals.benchmarks.verifiable import VerifiableBench
from evals.benchmarks.video_choices import LongVideoBench, Mlvu, MvBench, TvBench
from evals.benchmarks.video_hallucer import VideoHallucer
from evals.benchmarks.videomme import VideoMme
from evals.benchmarks.vidhalluc import VidHallucBinary, VidHallucChoice, VidHallucOrder
from evals.benchmarks.vidhalluc_scenes import VidHallucScenes
from evals.benchmarks.vl_reward_bench import VlRewardBench
from evals.benchmarks.vqa import TextVqa, VizWiz, VqaV2
from evals.judged import JudgedBench
from evals.judging import EvalJudge
from mmalign.clips import FrameSampling
from mmalign.config import Strict
from mmalign.engines import AnyEngine, LocalEngine
from mmalign.generate.server import ServerConfig
from mmalign.models.quantization import Quantization

AnyBenchmark = Annotated[
    Pope
    | Chair
    | RewardBench
    | MmHal
    | MmVet
    | LlavaBench
    | VlRewardBench
    | MultimodalRewardBench
    | SafetyVlGuard
    | SafetyJailbreak
    | VerifiableBench
    | VideoHallucer
    | VidHallucBinary
    | VidHallucChoice
    | VidHallucOrder
    | VidHallucScenes
    | TempCompass
    | TempCompassCaptioning
    | TvBench
    | MvBench
    | Mlvu
    | LongVideoBench
    | VideoMme
    | VqaV2
    | TextVqa
    | VizWiz
    | Gqa
    | MathVista
    | MathVerse
    | MathVision
    | HallusionBench
    | Mme
    | ScienceQa
    | MmBench
    | Mmmu
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

    engine: Literal["local"] = Field(default="local", exclude=True)
    path: str
    revision: str | None = None
    adapter: str | None = None
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    attention: Literal["auto", "sdpa", "eager"] = "auto"
    trust_remote_code: bool = False
    max_pixels: PositiveInt | None = None
    frames: FrameSampling = FrameSampling()
    quantization: Quantization | None = None


def _with_engine(model: Any) -> Any:
    """A model's settings with the engine that they mean where they name none."""
    if not isinstance(model, dict) or "engine" in model:
        return model
    if "base_url" in model:
        raise ValueError("has a base_url; say engine: server as well")
    return {"engine": "local", **model}


# A checkpoint, or a model behind an OpenAI-compatible server.
AnyModel = Annotated[
    EvalModel | ServerConfig, Field(discriminator="engine"), BeforeValidator(_with_engine)
]
# What benchmarks say themselves of how answers are drawn.
_OF_BENCHMARKS = ("temperature", "top_p", "max_new_tokens")


class EvalRecipe(Strict):
    """One evaluation run. `seed` draws the bootstrap samples.

    Answers are greedy, but where a benchmark has a `decoding` of its own.

    engine: where answers are generated, local or ray (docs/evaluate.md); no result tells of it.
    judge: of benchmarks whose answers a language model judges.
    """

    name: str
    model: AnyModel
    output: Path
    benchmarks: list[AnyBenchmark] = Field(min_length=1)
    judge: EvalJudge | None = None
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

    @field_validator("model")
    @classmethod
    def _benchmarks_decode(cls, model: AnyModel) -> AnyModel:
        if isinstance(model, ServerConfig):
            given = [name for name in _OF_BENCHMARKS if name in model.model_fields_set]
            if given:
                raise ValueError(f"{', '.join(given)} is set by each benchmark; leave it out here")
        return model

    @model_validator(mode="after")
    def _judges_where_needed(self) -> EvalRecipe:
        needed = [
            one.key
            for one in self.benchmarks
            if isinstance(one, JudgedBench) or getattr(one, "judge_unread", False)
        ]
        if needed and self.judge is None:
            raise ValueError(
                f"{', '.join(needed)} takes a judge: give judge.server its model and base_url"
            )
        return self
