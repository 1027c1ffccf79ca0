"""The training loop, top to bottom: one for every loss and every model family.

Scores come from the scorer, the number to descend from the loss; here is everything else: devices,
micro-batches, the optimizer step, log lines, checkpoints. A step's loss is a sum over all its rows
divided by totals that are known before the first of them is scored, so that cutting a batch into
micro-batches, or spreading it over processes, changes nothing but rounding.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from mmalign.errors import TrainingError
from mmalign.log import get_logger
from mmalign.scores import LossOutput
from mmalign.store import open_dataset
from trainers.checkpoint import Position, load_checkpoint, save_checkpoint, save_model
from trainers.config import Recipe
from trainers.directory import RunDirectory, whole_folder
from trainers.events import Event, Finished, Saved, Stepped, Validated
from trainers.images.config import ImageRecipe
from trainers.images.rows import ImageBatch
from trainers.images.setup import ImageParts, check_images, set_up_images
from trainers.objectives.base import check_dataset, fitted
from trainers.optim import check_8bit, lr_at
from trainers.precision import LossScale
from trainers.rollouts import RolloutSource
from trainers.rows import Batch
from trainers.setup import Parts, set_up
from trainers.tracking import Tracker, Window, check_trackers

logger = get_logger("trainers.loop")


def train(recipe: Recipe | ImageRecipe) -> Iterator[Event]:
    """Train, or continue where the run in `run.output` stopped; yields what happens.

    Raises SchemaMismatch or ConfigError before a model is loaded, TrainingError where training
    cannot go on: another recipe's folder, a reference that is none, a loss that is not finite.
    """
    dataset = open_dataset(recipe.data.path)
    if isinstance(recipe, ImageRecipe):
        check_images(dataset, recipe)
    else:
        check_dataset(dataset, recipe.loss, online=recipe.data.online_rows)
    check_trackers(recipe.run.trackers)
    if recipe.optim.optimizer == "adamw_8bit":
        check_8bit()
    run = RunDirectory(recipe)
    try:
        if run.finished:
            logger.info("%s is finished: nothing to do", run.path)
            yield Finished(path=run.model)
        elif isinstance(recipe, ImageRecipe):
            yield from _train(recipe, recipe.loss, set_up_images(recipe, dataset, run), run)
        else:
            loss = fitted(recipe.loss, dataset)
            if loss != recipe.loss:
                logger.info("loss as fitted to the dataset: %s", loss)
            with closing(set_up(recipe, dataset, run)) as parts:
                yield from _train(recipe, loss, parts, run)
    finally:
        run.release()


def _train(
    recipe: Recipe | ImageRecipe, loss: Any, parts: Parts | ImageParts, run: RunDirectory
) -> Iterator[Event]:
    optim = recipe.optim
    accelerator, scorer, optimizer = parts.accelerator, parts.scorer, parts.optimizer
    average, validation = parts.average, parts.validation
    rollouts = parts.online if isinstance(parts.online, RolloutSource) else None
    scale = LossScale(recipe.run.precision, accelerator.device)
    position = Position()
    if run.newest is not None:
        # After set_up has made the reference, which must be the initial policy.
        model = parts.policy.model
        position = load_checkpoint(run.newest, accelerator, model, optimizer, average, rollouts)
        scale.restore(position.loss_scale)
        logger.info("continuing from %s", run.newest)
    window = Window(dict(position.window))
    tracker = None
    if accelerator.is_main_process:
        tracker = Tracker(recipe, total_steps=parts.num_steps, position=position)
    batches = parts.batches(first_step=position.step)
    if validation is not None and position.step == 0:
        yield Validated(step=0, metrics=validation.show(0, tracker))

    for step in range(position.step, parts.num_steps):
        started = time.perf_counter()
        lr = lr_at(step, total_steps=parts.num_steps, config=optim)
        for group in optimizer.param_groups:
            group["lr"] = lr
        places = parts.sampler.batch(step)
        step_batches: Any  # Of text or of images, as `parts` are.
        if parts.online is None:
            step_batches = islice(batches, parts.num_micro)
            totals, counts = parts.survey.totals(places), {}
        else:
            step_batches, totals, counts = parts.online_step(step)
        scored: list[tuple[Any, LossOutput]] = []
        for batch in step_batches:
            with parts.memory.told(batch), accelerator.accumulate(scorer):
                batch = batch.to(accelerator.device)
                # The reference first: switching an adapter off must not touch the policy's graph.
                frozen: Any = None if parts.reference is None else parts.reference(batch)
                scores = parts.score(batch, frozen)
                output = loss(scores, frozen, batch.table, totals)
                # Gradients get averaged over processes and micro-batches; shares must be summed.
                shares = accelerator.num_processes * parts.num_micro
                accelerator.backward(scale.scaled(output.loss * shares))
            scored.append((batch, output))
        sums = _summed(accelerator, [output for _, output in scored])
        scale.unscale(optimizer)
        norm: Any = accelerator.clip_grad_norm_(scorer.parameters(), optim.clip_norm)
        grad_norm = float(norm)
        skipped = scale.overflows(grad_norm, step + 1)
        if not (math.isfinite(sums["loss"]) and (math.isfinite(grad_norm) or skipped)):
            found = f"loss {sums['loss']}, gradient norm {grad_norm}"
            raise _not_finite(step + 1, found, scored, parts.survey.ids, places)
        if step == position.step:
            _tell_idle(scorer)
        with parts.memory.told(scored[-1][0]):  # The first step makes the moments.
            scale.step(optimizer)
        optimizer.zero_grad()
        if average is not None and not skipped:
            average.update()

        done = step + 1
        window.add(
            **sums,
            **counts,
            **scale.counts,
            grad_norm=0.0 if skipped else grad_norm,
            steps=1,
            rows=len(places) * parts.items,
            tokens=parts.survey.num_tokens(places),
            seconds=time.perf_counter() - started,
        )
        if done % recipe.run.log_every_steps == 0 or done == parts.num_steps:
            metrics = window.means(unit=parts.unit, lr=lr)
            if tracker is not None:
                tracker.log(done, metrics)
            yield Stepped(step=done, metrics=metrics)
        if validation is not None and validation.due(done, parts.num_steps):
            yield Validated(step=done, metrics=validation.show(done, tracker))
        every = recipe.run.save_every_steps
        if every is not None and done % every == 0 and done < parts.num_steps:
            num_bytes = 0 if tracker is None else tracker.num_bytes()
            position = Position(
                step=done,
                metrics_bytes=num_bytes,
                window=dict(window.sums),
                loss_scale=scale.state(),
            )
            path = save_checkpoint(
                run, accelerator, parts.policy, optimizer, position, average, rollouts
            )
            yield Saved(step=done, path=path)

    with whole_folder(accelerator, run.model) as folder:
        save_model(accelerator, parts.policy, folder, average)
    if tracker is not None:
        tracker.close()
        run.write("run.json", parts.summary)
    accelerator.wait_for_everyone()
    yield Finished(path=run.model)


def _tell_idle(scorer: nn.Module) -> None:
    """Say which weights were meant to train and got no gradient, at the first step."""
    trained = {name: p for name, p in scorer.named_parameters() if p.requires_grad}
    idle = [name for name, parameter in trained.items() if parameter.grad is None]
    if 0 < len(idle) < len(trained):  # DeepSpeed keeps all gradients to itself.
        share = f"{len(idle)} of {len(trained)}"
        logger.warning("%s trainable tensors got no gradient, such as %s", share, idle[0])


def _summed(accelerator: Accelerator, outputs: Sequence[LossOutput]) -> dict[str, float]:
    """Loss and metrics of a step, over its micro-batches and over all processes."""
    names = ["loss", *sorted(outputs[0].metrics)]
    rows = [[o.loss.detach(), *(o.metrics[name] for name in names[1:])] for o in outputs]
    sums = torch.stack([torch.stack(row).float() for row in rows]).sum(0)
    everywhere: Any = accelerator.reduce(sums, "sum")
    return dict(zip(names, everywhere.tolist(), strict=True))


def _not_finite(
    step: int,
    found: str,
    scored: Sequence[tuple[Batch | ImageBatch, LossOutput]],
    ids: Sequence[str],
    places: Sequence[int],
) -> TrainingError:
    """The error of a step that must not be taken; names the rows to look at."""
    mine = [
        ids[place]
        for batch, output in scored
        for place, fine in zip(batch.places, _finite_rows(batch, output), strict=True)
        if not fine
    ]
    rows = gather_object(mine) or [ids[place] for place in places]
    return TrainingError(
        "loss or gradient is not finite",
        where=f"step {step}",
        got=found,
        fix=f"look at rows {', '.join(rows)}; the weights are as they were before this step",
    )


def _finite_rows(batch: Batch | ImageBatch, output: LossOutput) -> list[bool]:
    """Whether each row's loss is finite; a row's pairs, if it has several, follow one another."""
    return [bool(its.isfinite().all()) for its in output.per_item.split(batch.num_pairs)]
