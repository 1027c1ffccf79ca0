"""The recipe of a training run: everything a run depends on, in one file that is read whole."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from mmalign.config import Strict
from mmalign.losses import Loss
from mmalign.losses.base import Need
from mmalign.models.load import ModelConfig
from mmalign.scoring.plan import Layout
from trainers.annotators import ByReward
from trainers.objectives.base import OnlineRows
from trainers.online import Online
from trainers.probe import ProbeConfig
from trainers.rollout_pairs import OnlineRollouts
from trainers.rollout_server import VllmServer
from trainers.rollouts import Rollouts

Fraction = float
Precision = Literal["float32", "bf16", "fp16"]
# What a hash of weights begins with, in start.json and in start_from.
HASH_PREFIX = "weights:"
ReferenceKind = Literal["adapter_off", "frozen_copy", "cached"]


class DataConfig(Strict):
    """Which dataset, and how its rows become tokens.

    cache_mb bounds the prepared rows kept in memory (of each loader process, where workers > 0);
    preparing is deterministic, so the cache changes speed only.
    online: pairs made during training from what the policy says then, instead of or beside the
    dataset's own.
    """

    path: Path
    max_tokens: PositiveInt | None = None
    min_response_tokens: PositiveInt = 1
    limit: PositiveInt | None = None
    workers: NonNegativeInt = 0
    cache_mb: NonNegativeInt = 512
    online: Online | None = None

    @property
    def online_rows(self) -> OnlineRows | None:
        """What rows are to `online`, if there is any."""
        if self.online is None:
            return None
        return "prompts" if isinstance(self.online.source, OnlineRollouts) else "pairs"


class FeaturesConfig(Strict):
    """Store what a frozen tower makes of each picture, and train from that.

    cap_gb: most that they may take on disk, in 10^9 bytes; beyond it nothing is computed.
    folder: where they lie; by default beside the dataset.
    """

    cap_gb: PositiveFloat
    folder: Path | None = None


class ScorerConfig(Strict):
    """How candidates are laid out for the model; both layouts give the same scores.

    auto: for each micro-batch the one that costs less, told from its token counts.
    """

    layout: Literal["auto"] | Layout = "auto"


class OptimConfig(Strict):
    """The optimizer and its schedule.

    batch_size counts rows (pairs, rankings or examples) per optimizer step, all processes together;
    micro_batch_size is what one process holds at once, by default its whole share. Cutting a batch
    changes memory, not the gradient. `steps`, where set, overrides `epochs`.
    """

    lr: PositiveFloat
    batch_size: PositiveInt
    micro_batch_size: PositiveInt | None = None
    epochs: PositiveFloat = 1.0
    steps: PositiveInt | None = None
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_fraction: Fraction = Field(default=0.03, ge=0, le=1)
    min_lr_fraction: Fraction = Field(default=0.0, ge=0, le=1)
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    clip_norm: PositiveFloat = 1.0

    @model_validator(mode="after")
    def _micro_fits(self) -> OptimConfig:
        if self.micro_batch_size and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} is no multiple of micro_batch_size "
                f"{self.micro_batch_size}"
            )
        return self


class RunConfig(Strict):
    """Where a run writes, and how it is watched, saved and resumed."""

    output: Path
    seed: NonNegativeInt = 0
    precision: Precision = "float32"
    save_every_steps: PositiveInt | None = None
    keep_last: PositiveInt = 2
    log_every_steps: PositiveInt = 10
    resume: Literal["auto", "never"] = "auto"
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()


class Recipe(Strict):
    """One training run. `reference` says what a loss that needs one compares the policy with:

    adapter_off: the same weights with the LoRA adapter off; costs no memory.
    frozen_copy: a second copy of the initial policy.
    cached: the initial policy's scores of every row, stored beside the dataset, or in the folder
        `reference_cache`; made before the first step where they are not there yet.
    auto: adapter_off with LoRA, else frozen_copy.

    features: where given, pictures go through the tower once and their features are stored.
    rollouts: what losses over rollouts are given; without such a loss there are none.
    probe: questions that the policy answers during training.
    start_from: the weights that model.path must hold: a folder, a hub name, or the hash that the
        start.json of a run tells. Another model is refused.
    """

    model: ModelConfig
    start_from: str | None = None
    data: DataConfig
    loss: Loss
    reference: Literal["auto"] | ReferenceKind = "auto"
    reference_cache: Path | None = None
    features: FeaturesConfig | None = None
    rollouts: Rollouts | None = None
    probe: ProbeConfig | None = None
    scorer: ScorerConfig = ScorerConfig()
    optim: OptimConfig
    run: RunConfig

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        if self.reference == "adapter_off" and self.model.lora is None:
            raise ValueError(
                "reference=adapter_off needs an adapter to switch off, and model.lora is not set; "
                "use frozen_copy or cached"
            )
        if self.reference_cache is not None and self.reference != "cached":
            raise ValueError(
                "reference_cache is read by reference=cached alone; set that, or drop it"
            )
        if self.reference == "cached" and Need.KL in self.loss.needs:
            raise ValueError(
                f"loss {self.loss.name!r} compares whole distributions over the vocabulary with "
                "the reference, which reference=cached does not keep; use frozen_copy, or LoRA "
                "with adapter_off"
            )
        if self.features is not None and (self.model.train.vision or self.model.train.projector):
            raise ValueError(
                "features are stored of a tower and a projector that stay as they are, and "
                "model.train.vision or model.train.projector trains them; set both to false, or "
                "drop features"
            )
        if self.data.online is not None:
            self._check_online()
        self._check_rollouts()
        if self.probe is not None and Need.REWARD_HEAD in self.loss.needs:
            raise ValueError(
                f"probe asks the policy for answers, and loss {self.loss.name!r} trains a reward "
                "model; drop it"
            )
        if self.model.reward_head is not None and Need.REWARD_HEAD not in self.loss.needs:
            raise ValueError(
                f"model.reward_head asks for a reward head, which loss {self.loss.name!r} does not "
                "read; drop it, or use loss.name=critique_reward or reward"
            )
        if self.model.quantization is not None and self.model.lora is None:
            raise ValueError(
                "model.quantization keeps weights in 4 bits, which cannot train themselves; set "
                "model.lora, such as model.lora={}, or drop model.quantization"
            )
        whole = self.model.train.vision or self.model.train.projector or self.model.lora is None
        if self.model.dtype in ("bfloat16", "float16") and whole:
            raise ValueError(
                f"model.dtype={self.model.dtype} would train 16-bit weights, which lose small "
                "updates; use model.dtype=float32 with run.precision=bf16, or train nothing but "
                "LoRA adapters: model.lora set, model.train.vision and model.train.projector false"
            )
        return self

    def _check_online(self) -> None:
        if Need.REFERENCE not in self.loss.needs:
            raise ValueError(
                f"data.online makes pairs, which loss {self.loss.name!r} has no use for"
            )
        if self.reference == "cached":
            raise ValueError(
                "data.online makes responses that reference=cached could not have scored before; "
                "use frozen_copy, or LoRA with adapter_off"
            )
        if self.features is not None:
            raise ValueError(
                "data.online shows the policy pictures, which rows with stored features do not "
                "keep; drop features"
            )
        if self.data.workers:
            raise ValueError("data.online needs the policy where batches are made: data.workers=0")
        needs = self.loss.needs & {Need.SCORE_GAP, Need.RATIONALE}
        if needs:
            raise ValueError(
                f"loss {self.loss.name!r} reads {', '.join(needs)}, which new pairs have not"
            )
        assert self.data.online is not None
        if isinstance(self.data.online.source, OnlineRollouts):
            self._check_pairs_of_rollouts(self.data.online.source)

    def _check_pairs_of_rollouts(self, source: OnlineRollouts) -> None:
        given = {Need.REJECTED, Need.REFERENCE, Need.KL, Need.P_TARGET}
        if lacking := sorted(self.loss.needs - given):
            raise ValueError(
                f"loss {self.loss.name!r} reads {', '.join(lacking)}, which pairs of rollouts have "
                "not; use dpo, ipo, hinge, dpo_kl or robust"
            )
        if Need.P_TARGET in self.loss.needs and not isinstance(source.annotator, ByReward):
            raise ValueError(
                f"loss {self.loss.name!r} reads how certain a pair is, which annotator="
                f"{source.annotator.name} does not say; use annotator=reward, or loss.name=robust "
                "for a known rate of wrong labels"
            )

    def _check_rollouts(self) -> None:
        if (self.rollouts is not None) != (Need.ROLLOUTS in self.loss.needs):
            raise ValueError(
                f"loss {self.loss.name!r} is over rollouts, and none are asked for: give rollouts, "
                "such as rollouts={}"
                if self.rollouts is None
                else f"loss {self.loss.name!r} takes no rollouts: drop them, or use grpo"
            )
        if self.rollouts is None:
            return
        for there, what in (
            (self.reference == "cached", "reference=cached keeps scores of responses that were"),
            (self.features is not None, "features are stored for responses that were"),
            (self.data.online is not None, "data.online makes pairs beside responses that were"),
        ):
            if there:
                raise ValueError(f"{what} there before training, and rollouts are not; drop it")
        whole = self.model.train.vision or self.model.train.projector
        if isinstance(self.rollouts.generator, VllmServer) and self.model.lora and whole:
            raise ValueError(
                "vLLM serves no adapter with whole modules beside it: set model.train.vision and "
                "model.train.projector to false, or leave rollouts.generator out"
            )

    @property
    def from_prompts(self) -> bool:
        """Whether rows are prompts alone, whose responses are all made during training."""
        return self.data.online_rows == "prompts" or self.rollouts is not None

    def reference_kind(self) -> ReferenceKind:
        """`reference` with auto decided."""
        if self.reference == "auto":
            return "frozen_copy" if self.model.lora is None else "adapter_off"
        return self.reference
