"""Rollouts: responses that the policy samples during training, their rewards and advantages.

A batch of rollouts serves `steps` optimizer steps. For the first of them the policy is the one that
sampled; for the others the log-probabilities of then are kept, and a checkpoint in between keeps
them too. A response is scored by the tokens that were sampled, never by its text tokenised again.
Everything random depends on (run.seed, step, id), so a resumed run repeats it.

With `overlap` a server samples the next batch while this one is learnt from. Its log-probabilities
are taken by the weights that sampled it, put back for as long as that takes. A checkpoint waits for
that batch and keeps it: a server need not say the same twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from mmalign.config import Strict
from mmalign.errors import TrainingError
from mmalign.log import get_logger
from mmalign.losses.rollout import RolloutLossConfig
from mmalign.rewards import RewardsConfig
from mmalign.scores import RolloutTable, RolloutTotals, TokenScores
from mmalign.verify import check_extras
from trainers.decoding import Decoding
from trainers.groups import write_lines
from trainers.rollout_groups import Ahead, Group, GroupMaker, Key
from trainers.rollout_server import (
    PolicyItself,
    PolicySampler,
    RolloutSampler,
    ServerSampler,
    VllmServer,
)
from trainers.together import summed

if TYPE_CHECKING:
    from accelerate import Accelerator

    from trainers.rows import Batch
    from trainers.setup import Parts

logger = get_logger("trainers.rollouts")

# Groups of a batch of rollouts that are written out to be read.
WRITTEN = 8


class Rollouts(Strict):
    """What the policy samples, and what it is worth.

    group_size: responses to each prompt. steps: optimizer steps made of one batch of rollouts.
    redraw: rounds in which prompts whose responses are all worth the same are replaced by others
    (DAPO's dynamic sampling); judged by accuracy alone where it is among the rewards. What remains
    after the last round is kept: it has no advantage, and counts in the means.
    generator: the training processes, or a server.
    """

    group_size: int = Field(default=8, ge=2)
    steps: PositiveInt = 1
    redraw: NonNegativeInt = 0
    generator: Annotated[PolicyItself | VllmServer, Field(discriminator="engine")] = PolicyItself()
    decoding: Decoding = Decoding()
    rewards: RewardsConfig = RewardsConfig()

    @property
    def overlap(self) -> bool:
        """Whether the next batch is sampled while one is learnt from."""
        return isinstance(self.generator, VllmServer) and self.generator.overlap


@dataclass(frozen=True, kw_only=True)
class _Drawn:
    """A batch of rollouts. first: its first step.

    gap: mean over tokens of |log-probability by the server - by the policy| in nats; 0 without one.
    """

    first: int
    groups: dict[Key, Group]
    gap: float


class RolloutSource:
    """Makes the micro-batches of each step with the policy as it is, or lately was.

    score: the policy's scores of a batch, as it trains. trained: its weights that train.
    cuts: this process's micro-batches of a step, as places in the survey. num_rows: prompts of a
    step, over all processes. num_steps: of the run.
    """

    def __init__(
        self,
        *,
        config: Rollouts,
        maker: GroupMaker,
        score: Callable[[Batch], TokenScores],
        trained: Sequence[Tensor],
        num_rows: int,
        num_steps: int,
        accelerator: Accelerator,
        folder: Path | None,
    ) -> None:
        self.config, self.maker, self.score, self.trained = config, maker, score, trained
        self.num_rows, self.num_steps, self.accelerator = num_rows, num_steps, accelerator
        self.folder = folder
        self._drawn: _Drawn | None = None
        self._next: _Drawn | None = None
        self._ahead: Ahead | None = None
        self._kept: list[Tensor] = []

    def step(self, step: int) -> tuple[list[Batch], RolloutTotals, dict[str, float]]:
        """This process's micro-batches, the step's totals, and sums over all of its rollouts.

        Raises RewardError where a reward fails, TrainingError where a server does, or for rollouts
        of another number of processes.
        """
        batches, own = self._batches(step)
        counts = summed(self.accelerator, own)
        totals = RolloutTotals(
            num_rollouts=self.num_rows * self.config.group_size,
            num_tokens=max(1.0, counts["response_tokens"]),
            max_tokens=self.config.decoding.max_new_tokens,
        )
        return batches, totals, counts | {"sampled_tokens": counts["response_tokens"]}

    def save(self, folder: Path, rank: int, step: int) -> None:
        """Keep the rollouts that steps after `step` steps still take, if there are any.

        A batch that is being sampled is waited for: a server might not sample it again.
        """
        self._finish_ahead()
        drawn, coming = self._drawn, self._next
        rest = {}
        if drawn is not None and step % self.config.steps:
            rest = {key: group for key, group in drawn.groups.items() if key[0] >= step}
        kept = {
            name: {"first": one.first, "gap": one.gap, "groups": self.maker.saved(groups)}
            for name, one, groups in (
                ("drawn", drawn, rest),
                ("next", coming, coming.groups if coming else {}),
            )
            if one is not None and groups
        }
        if kept:
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(kept, folder / _file(rank))

    def restore(self, folder: Path, rank: int, step: int) -> None:
        """Go on from what `save` kept."""
        file, size = folder / _file(rank), self.config.steps
        following = -(-step // size) * size
        ahead = self.config.overlap and step > 0 and following < self.num_steps
        if step % size == 0 and not ahead:
            return
        if not file.exists():
            raise _other_processes(str(file))
        held = {
            name: _Drawn(
                first=one["first"], gap=one["gap"], groups=self.maker.restored(one["groups"])
            )
            for name, one in torch.load(file, weights_only=True).items()
        }
        self._drawn, self._next = held.get("drawn"), held.get("next")

    def close(self) -> None:
        """End what the rewards have started, and what is still being sampled."""
        self.maker.sampler.close()
        self.maker.rewards.close()

    def _batches(self, step: int) -> tuple[list[Batch], dict[str, float]]:
        first = step - step % self.config.steps
        if self._drawn is None or self._drawn.first != first:
            self._begin(first)
        assert self._drawn is not None
        made: list[Batch] = []
        counts: dict[str, float] = {}
        for places in self.maker.cuts(step):
            groups = [self._group(step, place) for place in places]
            made.append(self._batch(places, groups))
            for group in groups:
                size = len(group.advantages)
                own = group.counts | {"off_policy_steps": float((step - group.sampled_at) * size)}
                if isinstance(self.config.generator, VllmServer):
                    own["sampler_gap"] = self._drawn.gap * size
                for name, value in own.items():
                    counts[name] = counts.get(name, 0.0) + value
        return made, counts

    def _group(self, step: int, place: int) -> Group:
        assert self._drawn is not None
        if (step, place) not in self._drawn.groups:
            raise _other_processes(f"step {step + 1}")
        return self._drawn.groups[step, place]

    def _begin(self, first: int) -> None:
        """Have the rollouts of the batch whose first step this is, and the next begun."""
        size, sampler = self.config.steps, self.maker.sampler
        self._finish_ahead()
        self._drawn, self._next = self._next, None
        if self._drawn is None or self._drawn.first != first:
            sampler.sync(first)
            steps = range(first, first + size)
            groups = self.maker.make(steps, sampled_at=first)
            self._drawn = self._scored(first, groups, later=steps[1:])
            self._write(self._drawn)
        if all(group.counts["uninformative"] for group in self._drawn.groups.values()):
            logger.warning(
                "step %d: all responses to each prompt are worth the same: nothing is learnt",
                first + 1,
            )
        following = first + size
        if self.config.overlap and following < self.num_steps:
            sampler.sync(first)
            self._kept = [tensor.detach().cpu().clone() for tensor in self.trained]
            steps = range(following, following + size)
            self._ahead = Ahead(lambda: self.maker.make(steps, sampled_at=first))

    def _finish_ahead(self) -> None:
        """Wait for the batch that is being sampled, and score it by the weights that did so."""
        if self._ahead is None:
            return
        groups, self._ahead = self._ahead.result(), None
        first = min(step for step, _ in groups)
        with self._as_kept():
            steps = range(first, first + self.config.steps)
            self._next = self._scored(first, groups, later=steps)
        self._write(self._next)

    @contextmanager
    def _as_kept(self) -> Iterator[None]:
        """The weights that were kept in the place of those that train, then these again."""
        now = [tensor.detach().cpu().clone() for tensor in self.trained]
        try:
            _put(self._kept, self.trained)
            yield
        finally:
            _put(now, self.trained)
            self._kept = []

    def _scored(self, first: int, groups: dict[Key, Group], later: Sequence[int]) -> _Drawn:
        """The batch with its log-probabilities by the weights as they are, for the `later` steps.

        Raises TrainingError where a server's are others.
        """
        for step in later:
            for places in self.maker.cuts(step):
                own = [groups[step, place] for place in places]
                for place, group, old in zip(places, own, self._logps(places, own), strict=True):
                    groups[step, place] = replace(group, old_logps=old)
        config = self.config.generator
        if not isinstance(config, VllmServer):
            return _Drawn(first=first, groups=groups, gap=0.0)
        # The first micro-batch stands for all: it is scored for this alone where it is on policy.
        places = self.maker.cuts(first)[0]
        own = [groups[first, place] for place in places]
        ours = [group.old_logps for group in own if group.old_logps is not None]
        ours = ours or self._logps(places, own)
        theirs = [logps for group in own for logps in group.told_logps]
        apart = torch.cat([logps for old in ours for logps in old]) - torch.cat(theirs)
        gap = float(apart.abs().mean())
        if config.max_gap is not None and not gap <= config.max_gap:
            raise _other_scores(config, first, gap)
        return _Drawn(first=first, groups=groups, gap=gap)

    def _logps(self, places: list[int], groups: Sequence[Group]) -> list[list[Tensor]]:
        """[T_i] of each rollout of each group, by the weights as they are."""
        with torch.no_grad():
            logps = self.score(self._batch(places, groups)).logps.float().cpu()
        rows = iter(logps)
        return [
            [next(rows)[: len(c.response_ids)].clone() for c in group.row.candidates]
            for group in groups
        ]

    def _batch(self, places: list[int], groups: Sequence[Group]) -> Batch:
        """The micro-batch of these groups, on the CPU."""
        batch = self.maker.rows.batch_of(places, [group.row for group in groups])
        sizes = [len(group.row.candidates) for group in groups]
        kept = [old for group in groups for old in group.old_logps or ()]
        old_logps = None
        if kept:
            old_logps = torch.nn.utils.rnn.pad_sequence(kept, batch_first=True)
        table = RolloutTable(
            advantages=torch.tensor([a for group in groups for a in group.advantages]),
            old_logps=old_logps,
            group=torch.repeat_interleave(torch.arange(len(groups)), torch.tensor(sizes)),
        )
        return replace(batch, table=table, num_pairs=sizes)

    def _write(self, drawn: _Drawn) -> None:
        """Some of the rollouts, to be read by people."""
        lines = [
            {"step": step + 1, "id": group.row.id, **text}
            for (step, _), group in list(drawn.groups.items())[:WRITTEN]
            for text in group.texts
        ]
        if self.folder is not None:
            write_lines(self.folder, drawn.first + 1, lines)


def rollout_source(config: Rollouts, parts: Parts) -> RolloutSource:
    """The source of a run that is set up otherwise. Raises MissingExtra where a verifier lacks."""
    recipe, policy, accelerator = parts.recipe, parts.policy, parts.accelerator
    assert isinstance(recipe.loss, RolloutLossConfig)
    check_extras(parts.rows.dataset)
    server = config.generator
    sampler: RolloutSampler = PolicySampler(policy, config.decoding.batch_size)
    if isinstance(server, VllmServer):
        folder = server.folder or recipe.run.output / "weights"
        adapter = recipe.model.lora is not None
        sampler = ServerSampler(server, policy, accelerator, folder=folder, adapter=adapter)
    maker = GroupMaker(
        group_size=config.group_size,
        redraw=config.redraw,
        sampling=config.decoding.sampling(recipe.run.seed),
        loss=recipe.loss,
        sampler=sampler,
        rewards=config.rewards.load(),
        rows=parts.rows,
        survey=parts.survey,
        cuts=parts.cuts,
    )
    return RolloutSource(
        config=config,
        maker=maker,
        score=lambda batch: parts.scorer(batch.to(accelerator.device).plan),
        trained=[weight for weight in policy.model.parameters() if weight.requires_grad],
        num_rows=parts.sampler.batch_size,
        num_steps=parts.num_steps,
        accelerator=accelerator,
        folder=recipe.run.output / "rollouts" if accelerator.is_main_process else None,
    )


def _put(values: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
    for value, weight in zip(values, weights, strict=True):
        weight.detach().copy_(value)


def _file(rank: int) -> str:
    return f"rollouts-{rank}.pt"


def _other_processes(where: str) -> TrainingError:
    return TrainingError(
        "the rollouts of a half-used batch belong to another number of processes",
        where=where,
        fix="resume with as many processes as before, or from another checkpoint",
    )


def _other_scores(config: VllmServer, first: int, gap: float) -> TrainingError:
    return TrainingError(
        f"the server gives the rollouts of step {first + 1} other log-probabilities than the "
        "policy: its weights, its pictures or its precision are others",
        where=config.base_url,
        got=f"{gap:.3g} nats apart in the mean over tokens",
        wanted=f"at most {config.max_gap:g} (rollouts.generator.max_gap)",
        fix="see that it serves this policy's base in a like precision, or raise max_gap",
    )
