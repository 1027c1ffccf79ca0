"""What stands ready before the first step: devices, model, rows, optimizer, reference."""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, set_seed
from torch import nn

from mmalign.attention.choose import Attention, choose
from mmalign.errors import TrainingError
from mmalign.log import get_logger
from mmalign.losses.base import Need
from mmalign.models.load import Policy, base_model, load_policy, part_table
from mmalign.models.reward_head import head_of
from mmalign.prepare import TokenLimits
from mmalign.scores import PairTable, RolloutTotals, TokenScores, Totals
from mmalign.scoring.planner import planner_of
from mmalign.scoring.scorer import Scorer
from mmalign.store import Dataset
from trainers.advice import Watch
from trainers.begun import ORIGIN, START, started_from, summary_of
from trainers.config import Recipe
from trainers.directory import RunDirectory
from trainers.features import check_features, make_features, open_features
from trainers.memory import model_sizes
from trainers.objectives.base import objective_for
from trainers.online import OnlinePairs, online_pairs
from trainers.optim import build_optimizer
from trainers.precision import AUTOCAST, check_precision, in_precision
from trainers.probe import Probe, open_questions, probe_of
from trainers.reference import Reference, adapter_off, frozen_copy
from trainers.reference_cache import cached, check_cache, open_cache
from trainers.rollout_pairs import OnlineRollouts, RolloutPairs, rollout_pairs
from trainers.rollouts import RolloutSource, rollout_source
from trainers.rows import Batch, Rows, Survey
from trainers.sampler import Sampler, share_of, total_steps
from trainers.shards import blank_for, in_pieces, layout_under, load_whole, tell_engine
from trainers.tracking import part_lines

logger = get_logger("trainers.setup")

# Where each process holds the whole policy and can sample from it by itself.
WHOLE_POLICY = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What the loop works with. scorer, optimizer: as accelerate prepared them.

    micro_size, num_micro: rows in one micro-batch, and micro-batches of one process in a step.
    asked: further scores that the loss reads of the policy, by the scorer's keywords.
    kl: whether the loss reads the KL against the reference. unit: what a row is called in the log.
    online: what makes pairs or rollouts during training, if anything does. memory: tells what
    would fit. items: what a row counts as in the log.
    validation: what is asked of the policy during training, if anything is. average: what runs
    over images can have.
    summary: what run.json will say.
    """

    recipe: Recipe
    accelerator: Accelerator
    policy: Policy
    scorer: nn.Module
    optimizer: Any
    reference: Reference | None
    rows: Rows
    survey: Survey
    sampler: Sampler
    num_steps: int
    micro_size: int
    num_micro: int
    asked: dict[str, bool]
    kl: bool
    unit: str
    summary: dict[str, Any]
    online: OnlinePairs | RolloutPairs | RolloutSource | None
    memory: Watch
    items: int = 1
    validation: Probe | None = None
    average: None = None

    def score(self, batch: Batch, frozen: TokenScores | None) -> TokenScores:
        """The policy's scores, with all that the loss reads. frozen: the reference's, if any."""
        return self.scorer(
            batch.plan,
            **self.asked,
            against=None if frozen is None else frozen.distributions,
            kl_of=batch.table.chosen if isinstance(batch.table, PairTable) and self.kl else None,
        )

    def online_step(
        self, step: int
    ) -> tuple[list[Batch], Totals | RolloutTotals, dict[str, float]]:
        """The step's micro-batches of what the policy says, their totals, and counts for the log.

        New responses have other lengths than the survey's, so all micro-batches of the step are
        made before the first is scored.
        """
        assert self.online is not None
        if isinstance(self.online, RolloutSource | RolloutPairs):
            return self.online.step(step)
        batches, tokens = [], 0.0
        for places in self.cuts(step):
            own = [self.rows.prepared(self.survey.rows[place]) for place in places]
            made = self.online.rows(step, self.rows.records(self.survey, places), own)
            tokens += sum(
                pair.weight * len(row.candidates[pair.chosen].response_ids)
                for row in made
                for pair in row.pairs
            )
            batches.append(self.rows.batch_of(places, made))
        count = torch.tensor(tokens, device=self.accelerator.device)
        everywhere: Any = self.accelerator.reduce(count, "sum")
        num_pairs = len(self.sampler.batch(step))
        totals = Totals(num_pairs=num_pairs, num_chosen_tokens=max(1, int(everywhere)))
        return batches, totals, {}

    def close(self) -> None:
        """End what was started beside training."""
        if self.online is not None:
            self.online.close()

    def cuts(self, step: int) -> list[list[int]]:
        """Places of this process's micro-batches."""
        return list(
            self.sampler.micro_batches(
                step,
                rank=self.accelerator.process_index,
                world_size=self.accelerator.num_processes,
                micro_batch_size=self.micro_size,
                kinds=self.survey.kinds,
                tokens=self.survey.tokens,
            )
        )

    def batches(self, *, first_step: int) -> Iterator[Batch]:
        """This process's micro-batches from `first_step` to the end, `num_micro` for each step."""
        cuts = (cut for step in range(first_step, self.num_steps) for cut in self.cuts(step))
        return self.rows.batches(self.survey, cuts)


def set_up(recipe: Recipe, dataset: Dataset[Any], run: RunDirectory) -> Parts:
    """Load the initial policy and all around it; writes recipe.yaml and start.json.

    A resumed run comes through here too: what it trained so far is read afterwards, so that the
    reference is made of the initial policy, and checked to be.
    """
    optim, needs = recipe.optim, recipe.loss.needs
    questions = [] if recipe.probe is None else open_questions(recipe.probe)
    accelerator = new_accelerator()
    whole = accelerator.distributed_type in WHOLE_POLICY
    check_precision(accelerator, recipe.run.precision, whole=whole)
    world = accelerator.num_processes
    share = share_of(optim.batch_size, world)
    micro_size = min(optim.micro_batch_size or share, share)
    num_micro = -(-share // micro_size)
    accelerator.gradient_accumulation_steps = num_micro

    if recipe.model.quantization and not whole:
        raise TrainingError(
            "4-bit weights stay whole on every GPU, and cannot be spread over several",
            got=f"{accelerator.distributed_type.value}",
            fix="use DDP, or drop model.quantization",
        )
    layout = layout_under(accelerator, recipe.scorer.layout)
    load_whole(accelerator)
    set_seed(recipe.run.seed)
    limits = TokenLimits(
        max_tokens=recipe.data.max_tokens, min_response_tokens=recipe.data.min_response_tokens
    )
    policy = load_policy(recipe.model, limits)
    switch_off_dropout(policy.model)
    freeze_unread(policy, needs)
    assert accelerator.ddp_handler is not None
    accelerator.ddp_handler.find_unused_parameters = _may_idle(policy)
    objective = objective_for(recipe.loss, policy.preparer, dataset.media_root, kind=dataset.kind)
    attention = attention_of(recipe, policy, accelerator)
    planner = planner_of(policy, layout, attention)
    pictures = None
    if recipe.features is not None:
        pictures = open_features(recipe, policy, accelerator)
    rows = Rows(dataset, objective, planner, recipe.data, pictures)
    kind = recipe.reference_kind() if Need.REFERENCE in needs else "none"
    cache = None
    if kind == "cached":
        cache = open_cache(recipe, dataset, policy, accelerator, attention)
    if cache is not None and run.newest is None:
        # Before the survey, which takes its time. A resumed run is first compared with its start.
        check_cache(cache, accelerator)
    if pictures is not None and run.newest is None:
        check_features(pictures, accelerator)
    survey = started_from(recipe, run, dataset, policy, rows, accelerator)
    steps = total_steps(
        num_rows=len(survey.rows),
        batch_size=optim.batch_size,
        epochs=optim.epochs,
        steps=optim.steps,
    )
    blank = blank_for(accelerator, policy, survey.kinds, stored=recipe.features is not None)
    scorer = Scorer(policy.model, policy.family, attention, blank).train()
    in_precision(scorer, recipe.run.precision, accelerator.device)
    tell_engine(accelerator, scorer, micro_size=micro_size, clip_norm=optim.clip_norm)
    optimizer = build_optimizer(scorer.parameters(), optim)
    # Counted while the weights are whole.
    memory = _watch(recipe, policy, accelerator, packed=attention.packs)
    scorer, optimizer = accelerator.prepare(scorer, optimizer)

    asked = {"competitor": Need.COMPETITOR in needs, "rewards": Need.REWARD_HEAD in needs}
    kl = Need.KL in needs
    wanted = asked | {"distributions": kl}
    if recipe.features is not None:
        make_features(recipe.features, rows, survey, scorer, accelerator)
    reference: Reference | None = None
    if kind == "adapter_off":
        reference = adapter_off(policy, scorer, asked=wanted)
    elif kind == "frozen_copy":
        reference = frozen_copy(policy, accelerator, attention, recipe.run.precision, asked=wanted)
    elif cache is not None:
        reference = cached(
            cache, rows, survey, scorer, accelerator, memory,
            micro_size=micro_size, competitor=asked["competitor"],
        )  # fmt: skip

    online, rollouts = recipe.data.online, recipe.rollouts
    if (online is not None or rollouts is not None) and not whole:
        name = "data.online" if rollouts is None else "rollouts"
        raise TrainingError(
            f"{name} samples from the policy, whose weights are in pieces",
            got=f"{accelerator.distributed_type.value}",
            fix="use DDP, or one process",
        )
    if recipe.probe is not None and in_pieces(accelerator):
        raise TrainingError(
            "probe asks the policy for answers, whose weights are in pieces",
            got=f"{accelerator.distributed_type.value}",
            fix="use DDP or ZeRO-2, or drop probe",
        )
    logger.info("dataset %s, hash %s", dataset.path, dataset.manifest.content_hash[:12])
    logger.info("%s", survey.describe())
    for line in part_lines(part_table(policy)):
        logger.info("%s", line)
    logger.info(
        "%d steps of %d %s: %d processes x %d micro-batches of %d; reference %s; layout %s, "
        "attention %s",
        steps, optim.batch_size, objective.unit, world, num_micro, micro_size, kind,
        layout, attention.name,
    )  # fmt: skip
    summary = summary_of(
        dataset, survey, steps=steps, reference=kind, processes=world,
        packages=("mmalign", "torch", "transformers", "peft"),
    )  # fmt: skip
    parts = Parts(
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
        asked=asked,
        kl=kl,
        unit=objective.unit,
        memory=memory,
        validation=probe_of(
            recipe, questions, policy, accelerator, AUTOCAST.get(recipe.run.precision)
        ),
        online=None,
        summary=summary | {ORIGIN: run.read(START).get(ORIGIN)},
    )
    if rollouts is not None:
        return replace(parts, online=rollout_source(rollouts, parts), items=rollouts.group_size)
    if online is None:
        return parts
    if isinstance(online.source, OnlineRollouts):
        return replace(parts, online=rollout_pairs(online.source, parts))
    pairs = online_pairs(online, policy, objective, dataset.media_root, recipe.run.seed)
    return replace(parts, online=pairs)


def attention_of(recipe: Recipe, policy: Policy, accelerator: Accelerator) -> Attention:
    """The attention of the recipe, tried on the device and in the precision that will train."""
    model = base_model(policy.model)
    dtype = AUTOCAST.get(recipe.run.precision) or model.get_input_embeddings().weight.dtype
    config = model.config.get_text_config()
    return choose(recipe.model.attention, policy.family, config, accelerator.device.type, dtype)


def switch_off_dropout(model: nn.Module) -> None:
    """Set every dropout probability to zero, in modules and in attention.

    A shared prefix is run once for several responses, and a reference without dropout would
    differ from the policy at the first step; both need a forward pass that is a function.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        # transformers' attention keeps its own probability, under one name or the other.
        for name in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def freeze_unread(policy: Policy, needs: Set[Need]) -> None:
    """Freeze the head that the loss does not read: DDP waits for a gradient of all that trains.

    A reward head is read by reward losses alone, and the vocabulary projection, unless it is the
    embedding too, by all but a reward loss without critiques.
    """
    base = base_model(policy.model)
    head, words = head_of(base), base.get_output_embeddings()
    if head is not None and Need.REWARD_HEAD not in needs:
        head.requires_grad_(False)
    if {Need.REWARD_HEAD, Need.CRITIQUES} & needs == {Need.REWARD_HEAD}:
        for parameter in words.parameters():
            if parameter is not base.get_input_embeddings().weight:
                parameter.requires_grad_(False)


def new_accelerator() -> Accelerator:
    """Accelerate as this run was launched, without settings that an earlier one left behind."""
    # accelerate keeps its settings for the life of the process; an earlier user's may be others.
    AcceleratorState._reset_state()
    return Accelerator(
        mixed_precision="no",  # See trainers/precision.py.
        kwargs_handlers=[DistributedDataParallelKwargs()],
    )


def _may_idle(policy: Policy) -> bool:
    """Whether a batch may leave trainable weights without a gradient, which DDP must be told.

    Only the language model takes part in every batch: a row may have no picture, and a tower's
    last layer may go unread.
    """
    outside = (part for part in part_table(policy) if part.name != "language_model")
    return any(part.num_trainable for part in outside)


def _watch(recipe: Recipe, policy: Policy, accelerator: Accelerator, *, packed: bool) -> Watch:
    config, pixels = base_model(policy.model).config, policy.family.token_pixels
    whole = accelerator.distributed_type in WHOLE_POLICY
    shards = 1 if whole else accelerator.num_processes
    return Watch(
        recipe=recipe,
        sizes=model_sizes(policy.model, policy.family, part_table(policy), shards=shards),
        packed=packed,
        token_pixels=None if pixels is None else pixels(config),
        device=accelerator.device,
    )
