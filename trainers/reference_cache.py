"""The reference's scores of every row: stored ones read, missing ones made, then kept in memory."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from mmalign.attention.choose import Attention
from mmalign.errors import TrainingError
from mmalign.log import get_logger, progress
from mmalign.models.load import Policy
from mmalign.scores import TokenScores
from mmalign.store import Dataset
from trainers.advice import Watch
from trainers.config import Recipe
from trainers.reference_key import address, cache_folder, made_with, scores_key
from trainers.reference_store import ANEW, ELSEWHERE, ReferenceCache, RowScores
from trainers.rows import Batch, Rows, Survey
from trainers.sampler import even_share
from trainers.together import from_first

logger = get_logger("trainers.reference")

SHARD_ROWS = 256


class Cached:
    """The initial policy's token scores, from memory. `rows` are in the order of the survey."""

    def __init__(self, rows: Sequence[RowScores]) -> None:
        self.rows = rows

    def __call__(self, batch: Batch) -> TokenScores:
        """The stored scores, laid out as the scorer would.

        Raises TrainingError where a row is not in the tokens that were scored.
        """
        rows = [self.rows[place] for place in batch.places]
        for row, digest in zip(rows, batch.digests, strict=True):
            if row.digest != digest:
                raise TrainingError(
                    "the row's tokens are not those that the stored reference scores are of",
                    where=f"row {row.id}",
                    got=f"digest {digest[:12]}",
                    wanted=f"{row.digest[:12]}",
                    fix=f"{ANEW}; or {ELSEWHERE}",
                )
        rivals = [row.competitor_logps for row in rows]
        return TokenScores(
            logps=_spread([row.logps for row in rows], batch),
            mask=batch.plan.mask,
            marked=batch.plan.marked,
            competitor_logps=None if None in rivals else _spread(rivals, batch),  # type: ignore[arg-type]
        )


def open_cache(
    recipe: Recipe,
    dataset: Dataset[Any],
    policy: Policy,
    accelerator: Accelerator,
    attention: Attention,
) -> ReferenceCache:
    """The recipe's cache, not yet looked into. Takes the policy as loaded, before devices.

    Where each process loads a share of the weights, or none, the first one's key is everyone's.
    """
    key = from_first(accelerator, lambda: scores_key(recipe, dataset, policy))
    made = made_with(recipe, accelerator.device, attention)
    about = {"of": address(recipe), "made with": made}
    return ReferenceCache(cache_folder(recipe), key, about)


def check_cache(cache: ReferenceCache, accelerator: Accelerator) -> None:
    """Raise TrainingError where what is stored is stale, which `cached` finds out too, later."""
    from_first(accelerator, cache.check)


def cached(
    cache: ReferenceCache,
    rows: Rows,
    survey: Survey,
    scorer: nn.Module,
    accelerator: Accelerator,
    memory: Watch,
    *,
    micro_size: int,
    competitor: bool,
) -> Cached:
    """The scores of every surveyed row: those that are stored, and those that are not yet made now.

    `scorer` holds the initial policy. Processes share the work of each file and make equally many
    forward passes; the first one writes. All of them must see the folder.
    Raises TrainingError where stored scores are stale, or the folder cannot be written.
    """
    files = [rows.files_of(row) for row in survey.rows]
    if from_first(accelerator, lambda: cache.missing(survey.ids, files)):
        todo = from_first(accelerator, lambda: cache.claim(survey.ids, files))
        try:
            _fill(cache, todo, rows, survey, scorer, accelerator, memory, micro_size, competitor)
        finally:
            cache.release()
    stored = cache.read()
    if unseen := [name for name in survey.ids if name not in stored]:
        raise TrainingError(
            "the first process has reference scores here that this one does not see",
            where=str(cache.folder),
            got=f"{len(unseen)} rows missing, such as {unseen[0]}",
            fix=f"{ELSEWHERE}, one that all machines share",
        )
    logger.info("reference scores read from %s", cache.folder)
    return Cached([stored[name] for name in survey.ids])


def _fill(
    cache: ReferenceCache,
    todo: Sequence[int],
    rows: Rows,
    survey: Survey,
    scorer: nn.Module,
    accelerator: Accelerator,
    memory: Watch,
    micro_size: int,
    competitor: bool,
) -> None:
    """Score the places `todo`, file by file."""
    rank, world = accelerator.process_index, accelerator.num_processes
    # Whole rounds of micro-batches, so that where a file ends changes no batch.
    size = max(1, SHARD_ROWS // (micro_size * world)) * micro_size * world
    shards = [todo[start : start + size] for start in range(0, len(todo), size)]
    cuts: list[list[list[int]]] = []
    for shard in shards:
        mine = [shard[i] for i in even_share(len(shard), rank=rank, world_size=world)]
        cuts.append([mine[i : i + micro_size] for i in range(0, len(mine), micro_size)])
    logger.info(
        "reference scores: %d of %d rows to be made, in %s",
        len(todo), len(survey.rows), cache.folder,
    )  # fmt: skip
    started = time.perf_counter()
    batches = rows.batches(survey, [cut for shard in cuts for cut in shard])
    batches = progress(batches, label="reference", total=sum(map(len, cuts)))
    for shard, own in zip(shards, cuts, strict=True):
        made: list[tuple[int, RowScores]] = []
        for batch in islice(batches, len(own)):
            scored = _score(batch, scorer, accelerator, memory, competitor)
            names = [(survey.ids[place], rows.files_of(survey.rows[place])) for place in scored]
            made += [
                (place, RowScores(id=name, files=its, **parts))
                for (place, parts), (name, its) in zip(scored.items(), names, strict=True)
            ]
        # Places that several processes scored, to be equally many, count once.
        by_place = dict(gather_object(made))
        ready = [by_place[place] for place in shard]
        first = survey.rows[shard[0]]
        from_first(accelerator, lambda first=first, ready=ready: cache.write(first, ready))
    if todo and accelerator.is_main_process:
        seconds = time.perf_counter() - started
        logger.info(
            "reference scores: %d rows in %.1f s, %.2f per second; %.1f MB on disk",
            len(todo), seconds, len(todo) / seconds, cache.num_bytes / 1e6,
        )  # fmt: skip


def _score(
    batch: Batch, scorer: nn.Module, accelerator: Accelerator, memory: Watch, competitor: bool
) -> dict[int, dict[str, Any]]:
    """What is stored of each place of a batch, by RowScores' names."""
    moved = batch.to(accelerator.device)
    with torch.no_grad(), memory.told(moved):
        scores = scorer(moved.plan, competitor=competitor)
    lengths = [sum(sizes) for sizes in batch.sizes]
    own = _cut(scores.logps, scores.mask, lengths)
    rivals: Sequence[Tensor | None] = [None] * len(own)
    if scores.competitor_logps is not None:
        rivals = _cut(scores.competitor_logps, scores.mask, lengths)
    return {
        place: {"digest": digest, "sizes": sizes, "logps": logps, "competitor_logps": rival}
        for place, digest, sizes, logps, rival in zip(
            batch.places, batch.digests, batch.sizes, own, rivals, strict=True
        )
    }


def _cut(values: Tensor, mask: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    """The true cells of [N, T], row after row; no views, which would travel whole."""
    return [part.clone() for part in values[mask].float().cpu().split(list(lengths))]


def _spread(values: Sequence[Tensor], batch: Batch) -> Tensor:
    """The rows' tokens, end to end, into the true cells of the mask: [N, T]."""
    mask = batch.plan.mask
    result = torch.zeros(mask.shape, device=mask.device)
    result[mask] = torch.cat(list(values)).to(mask.device)
    return result
