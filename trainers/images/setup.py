"""What stands ready before the first step of a run over images."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from mmalign.diffusion.attention import use_attention
from mmalign.diffusion.denoiser import Denoiser
from mmalign.diffusion.load import ImagePolicy, load_policy
from mmalign.errors import SchemaMismatch, TrainingError
from mmalign.log import get_logger
from mmalign.losses.base import Need
from mmalign.records import ImagePreference
from mmalign.scores import DenoiseScores
from mmalign.store import Dataset
from trainers.advice import ran_out
from trainers.average import Average
from trainers.begun import check_unmoved, summary_of, write_start
from trainers.directory import RunDirectory
from trainers.images.config import ImageRecipe
from trainers.images.encode import make_encoded, store_of
from trainers.images.rows import ImageBatch, ImageRows
from trainers.images.validation import Validation, prompts_of
from trainers.optim import build_optimizer
from trainers.precision import AUTOCAST, in_precision
from trainers.reference import fingerprint
from trainers.rows import Survey
from trainers.sampler import Sampler, share_of, total_steps
from trainers.setup import WHOLE_POLICY, new_accelerator, switch_off_dropout
from trainers.shards import tell_engine

logger = get_logger("trainers.images")


@dataclass(frozen=True, kw_only=True)
class ImageParts:
    """What the loop works with; see `trainers.setup.Parts`, whose names these are."""

    recipe: ImageRecipe
    accelerator: Accelerator
    policy: ImagePolicy
    scorer: nn.Module
    optimizer: Any
    reference: Callable[[ImageBatch], DenoiseScores] | None
    rows: ImageRows
    survey: Survey
    sampler: Sampler
    num_steps: int
    micro_size: int
    num_micro: int
    unit: str
    summary: dict[str, Any]
    memory: ImageWatch
    average: Average | None
    validation: Validation | None
    online: None = None
    items: int = 1

    def score(self, batch: ImageBatch, frozen: DenoiseScores | None) -> DenoiseScores:
        """The policy's errors."""
        return self.scorer(batch.plan)

    def batches(self, *, first_step: int) -> Iterator[ImageBatch]:
        """This process's micro-batches from `first_step` to the end, `num_micro` for each step."""
        cuts = (
            (step, cut)
            for step in range(first_step, self.num_steps)
            for cut in self.sampler.micro_batches(
                step,
                rank=self.accelerator.process_index,
                world_size=self.accelerator.num_processes,
                micro_batch_size=self.micro_size,
                kinds=self.survey.kinds,
                tokens=self.survey.tokens,
            )
        )
        return self.rows.batches(self.survey, cuts)


@dataclass(frozen=True, kw_only=True)
class ImageWatch:
    """Says what to change where memory runs out."""

    recipe: ImageRecipe

    @contextmanager
    def told(self, batch: ImageBatch) -> Iterator[None]:
        """Raise TrainingError, with what may help, where memory does not suffice for `batch`."""
        try:
            yield
        except RuntimeError as error:
            if not ran_out(error):
                raise
            size, model = len(batch.places), self.recipe.model
            ways = [f"optim.micro_batch_size={size // 2}"] if size > 1 else []
            ways += [] if model.gradient_checkpointing else ["model.gradient_checkpointing=true"]
            ways += [] if model.lora else ["model.lora={}"]
            ways += ["a lower data.resolution"]
            raise TrainingError(
                "memory ran out",
                got=f"a micro-batch of {size} pairs at {self.recipe.data.resolution} pixels",
                fix=f"try one of {', '.join(ways)}",
            ) from error


def check_images(dataset: Dataset[Any], recipe: ImageRecipe) -> None:
    """Raise SchemaMismatch where the dataset is of another kind. Runs before a model is loaded."""
    if dataset.kind is not ImagePreference:
        raise SchemaMismatch(
            f"loss {recipe.loss.name!r} cannot train on {dataset.manifest.kind} records",
            where=str(dataset.path),
            wanted="image_preference records",
            fix="choose a loss over text, or a dataset of image pairs",
        )


def set_up_images(recipe: ImageRecipe, dataset: Dataset[Any], run: RunDirectory) -> ImageParts:
    """Encode what is not encoded yet, load the backbone and all around it."""
    optim = recipe.optim
    accelerator = new_accelerator()
    if accelerator.distributed_type not in WHOLE_POLICY:
        raise TrainingError(
            "diffusion models are trained by one process or DDP",
            got=f"{accelerator.distributed_type.value}",
            fix="use configs/accelerate/ddp.yaml",
        )
    share = share_of(optim.batch_size, accelerator.num_processes)
    micro_size = min(optim.micro_batch_size or share, share)
    num_micro = -(-share // micro_size)
    accelerator.gradient_accumulation_steps = num_micro
    torch.manual_seed(recipe.run.seed)

    policy = load_policy(recipe.model)
    switch_off_dropout(policy.model)
    computed = AUTOCAST.get(recipe.run.precision) or next(policy.model.parameters()).dtype
    attention = use_attention(policy.model, recipe.model.attention, accelerator.device, computed)
    rows = ImageRows(
        dataset,
        recipe,
        policy.backbone,
        with_rejected=Need.REJECTED in recipe.loss.needs,
        num_steps=len(policy.schedule),
    )
    survey = _started_from(recipe, run, dataset, policy, rows, accelerator)
    store = store_of(recipe)
    pictures, prompts = rows.wanted()
    if recipe.validation is not None:
        prompts |= prompts_of(recipe.validation)
    make_encoded(recipe, policy.backbone, store, pictures, prompts, dataset.media_root, accelerator)
    rows.store = store
    steps = total_steps(
        num_rows=len(survey.rows),
        batch_size=optim.batch_size,
        epochs=optim.epochs,
        steps=optim.steps,
    )
    policy.model.to(accelerator.device)
    kind = recipe.reference_kind()
    reference = None if kind == "none" else _reference(recipe, policy, accelerator)
    denoiser = _denoiser(recipe, policy, policy.model).train()
    in_precision(denoiser, recipe.run.precision, accelerator.device)
    tell_engine(accelerator, denoiser, micro_size=micro_size, clip_norm=optim.clip_norm)
    optimizer = build_optimizer(denoiser.parameters(), optim)
    scorer, optimizer = accelerator.prepare(denoiser, optimizer)
    average = None
    if recipe.ema is not None and accelerator.is_main_process:
        average = Average(policy.model, recipe.ema.decay)
    validation = None
    if recipe.validation is not None:
        validation = Validation(
            recipe=recipe,
            config=recipe.validation,
            policy=policy,
            store=store,
            average=average,
            accelerator=accelerator,
            run_hash=run.recipe_hash,
        )

    trained = sum(p.numel() for p in policy.model.parameters() if p.requires_grad)
    whole = sum(p.numel() for p in policy.model.parameters())
    logger.info("dataset %s, hash %s", dataset.path, dataset.manifest.content_hash[:12])
    logger.info("%s", survey.describe())
    logger.info(
        "%s: %s parameters, %s trainable", policy.backbone.part, f"{whole:,}", f"{trained:,}"
    )
    logger.info(
        "%d steps of %d pairs: %d processes x %d micro-batches of %d; reference %s; %s prediction; "
        "attention %s",
        steps, optim.batch_size, accelerator.num_processes, num_micro, micro_size, kind,
        policy.schedule.prediction, attention,
    )  # fmt: skip
    return ImageParts(
        recipe=recipe,
        accelerator=accelerator,
        policy=policy,
        scorer=scorer,
        optimizer=optimizer,
        reference=reference,
        rows=rows,
        survey=survey,
        sampler=Sampler(
            num_rows=len(survey.rows), batch_size=optim.batch_size, seed=recipe.run.seed
        ),
        num_steps=steps,
        micro_size=micro_size,
        num_micro=num_micro,
        unit="pairs" if rows.with_rejected else "examples",
        memory=ImageWatch(recipe=recipe),
        average=average,
        validation=validation,
        summary=summary_of(
            dataset,
            survey,
            steps=steps,
            reference=kind,
            processes=accelerator.num_processes,
            packages=("mmalign", "torch", "diffusers", "peft"),
        ),
    )


def _denoiser(recipe: ImageRecipe, policy: ImagePolicy, model: nn.Module) -> Denoiser:
    return Denoiser(model, policy.backbone, policy.schedule, recipe.denoiser.min_snr_gamma)


def _reference(
    recipe: ImageRecipe, policy: ImagePolicy, accelerator: Accelerator
) -> Callable[[ImageBatch], DenoiseScores]:
    """Scores by the initial backbone, with the noise that the policy sees."""
    copied = recipe.reference_kind() == "frozen_copy"
    model = copy.deepcopy(policy.model).requires_grad_(False).eval() if copied else policy.model
    scorer = _denoiser(recipe, policy, model)
    in_precision(scorer, recipe.run.precision, accelerator.device)

    def score(batch: ImageBatch) -> DenoiseScores:
        with torch.no_grad():
            if copied:
                return scorer(batch.plan)
            with policy.without_adapter():
                return scorer(batch.plan)

    return score


def _started_from(
    recipe: ImageRecipe,
    run: RunDirectory,
    dataset: Dataset[Any],
    policy: ImagePolicy,
    rows: ImageRows,
    accelerator: Accelerator,
) -> Survey:
    """The rows that can be used. Raises TrainingError where a resumed run would find others."""
    survey = rows.survey(accelerator)
    facts = {
        "dataset": dataset.manifest.content_hash,
        "pictures": rows.media_hash(),
        "policy": fingerprint(policy.model),
        "recipe": run.recipe_hash,
    }
    if not check_unmoved(run, dataset, facts):
        write_start(run, recipe, facts, survey, accelerator)
    return survey
