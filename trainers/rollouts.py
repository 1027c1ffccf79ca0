"""Rollouts: responses that the policy samples during training, their rewards and advantages.

A batch of rollouts serves `steps` optimizer steps. For the first of them the policy is the one that
sampled; for the others the log-probabilities of then are kept, and a checkpoint in between keeps
them too. A response is scored by the tokens that were sampled, never by its text tokenised again.
Everything random depends on (run.seed, step, id), so a resumed run repeats it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from mmalign.config import Strict
from mmalign.errors import TrainingError
from mmalign.log import get_logger
from mmalign.losses.rollout import RolloutLossConfig, informative
from mmalign.records import Verifiable
from mmalign.rewards import Rewards, RewardsConfig
from mmalign.scores import RolloutTable, RolloutTotals, TokenScores
from mmalign.scoring.candidates import Candidate
from mmalign.store import write_atomically
from mmalign.verify import check_extras
from trainers.decoding import Decoding
from trainers.groups import group_requests, reply_counts, reward_counts, rollouts_of
from trainers.objectives.base import PreparedRow

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

    from mmalign.generate.local import LocalGenerator
    from mmalign.models.load import Policy
    from trainers.config import Recipe
    from trainers.rows import Batch, Rows, Survey
    from trainers.sampler import Sampler

logger = get_logger("trainers.rollouts")

# Groups of a batch of rollouts that are written out to be read.
WRITTEN = 8


class Rollouts(Strict):
    """What the policy samples, and what it is worth.

    group_size: responses to each prompt. steps: optimizer steps made of one batch of rollouts.
    redraw: rounds in which prompts whose responses are all worth the same are replaced by others
    (DAPO's dynamic sampling); judged by accuracy alone where it is among the rewards. What remains
    after the last round is kept: it has no advantage, and counts in the means.
    """

    group_size: int = Field(default=8, ge=2)
    steps: PositiveInt = 1
    redraw: NonNegativeInt = 0
    decoding: Decoding = Decoding()
    rewards: RewardsConfig = RewardsConfig()


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The rollouts of one prompt.

    number: its row in the dataset. row: its tokens, a candidate for each rollout.
    old_logps: [T_i] of each rollout under the policy that sampled; None for that policy's own step.
    counts: sums over the rollouts, for the log. texts: what to write out.
    """

    number: int
    row: PreparedRow
    advantages: list[float]
    counts: dict[str, float]
    old_logps: list[Tensor] | None = None
    texts: list[dict[str, Any]] = field(default_factory=list)


class RolloutSource:
    """Makes the micro-batches of each step with the policy as it is, or lately was.

    generator: samples from the policy itself. score: the policy's scores of a batch, as it trains.
    cuts: this process's micro-batches of a step, as places in the survey. num_rows: prompts of a
    step, over all processes.
    """

    def __init__(
        self,
        *,
        config: Rollouts,
        loss: RolloutLossConfig,
        generator: LocalGenerator,
        rewards: Rewards,
        rows: Rows,
        survey: Survey,
        cuts: Callable[[int], list[list[int]]],
        score: Callable[[Batch], TokenScores],
        num_rows: int,
        accelerator: Accelerator,
        seed: int,
        folder: Path | None,
    ) -> None:
        self.config, self.loss, self.generator, self.rewards = config, loss, generator, rewards
        self.rows, self.survey, self.cuts, self.score = rows, survey, cuts, score
        self.num_rows, self.accelerator = num_rows, accelerator
        self.seed, self.folder = seed, folder
        self._first: int | None = None
        self._groups: dict[tuple[int, int], Group] = {}

    def step(self, step: int) -> tuple[list[Batch], RolloutTotals, dict[str, float]]:
        """This process's micro-batches, the step's totals, and sums over all of its rollouts.

        Raises RewardError where a reward fails, TrainingError for rollouts of another number of
        processes.
        """
        batches, own = self._batches(step)
        names = sorted(own)
        sums = torch.tensor([own[name] for name in names], device=self.accelerator.device)
        everywhere: Any = self.accelerator.reduce(sums, "sum")
        counts = dict(zip(names, everywhere.tolist(), strict=True))
        totals = RolloutTotals(
            num_rollouts=self.num_rows * self.config.group_size,
            num_tokens=max(1.0, counts["response_tokens"]),
            max_tokens=self.config.decoding.max_new_tokens,
        )
        return batches, totals, counts | {"sampled_tokens": counts["response_tokens"]}

    def _batches(self, step: int) -> tuple[list[Batch], dict[str, float]]:
        first = step - step % self.config.steps
        if self._first != first:
            self._sample(first)
        made: list[Batch] = []
        counts: dict[str, float] = {}
        for places in self.cuts(step):
            groups = [self._group(step, place) for place in places]
            made.append(self._batch(places, groups))
            for group in groups:
                for name, value in group.counts.items():
                    counts[name] = counts.get(name, 0.0) + value
        return made, counts

    def save(self, folder: Path, rank: int, step: int) -> None:
        """Keep the rollouts that steps after `step` steps still take, if there are any."""
        if step % self.config.steps == 0:
            return
        kept = [
            {
                "step": at,
                "place": place,
                "number": group.number,
                "ids": [list(c.response_ids) for c in group.row.candidates],
                "advantages": group.advantages,
                "counts": group.counts,
                "old_logps": group.old_logps,
            }
            for (at, place), group in self._groups.items()
            if at >= step
        ]
        folder.mkdir(parents=True, exist_ok=True)
        torch.save({"first": self._first, "groups": kept}, folder / _file(rank))

    def restore(self, folder: Path, rank: int, step: int) -> None:
        """Go on from what `save` kept."""
        if step % self.config.steps == 0:
            return
        file = folder / _file(rank)
        if not file.exists():
            raise _other_processes(str(file))
        held = torch.load(file, weights_only=True)
        self._first = held["first"]
        self._groups = {
            (one["step"], one["place"]): Group(
                number=one["number"],
                row=self._with_responses(one["number"], one["ids"]),
                advantages=one["advantages"],
                counts=one["counts"],
                old_logps=one["old_logps"],
            )
            for one in held["groups"]
        }

    def close(self) -> None:
        """End what the rewards have started."""
        self.rewards.close()

    def _group(self, step: int, place: int) -> Group:
        if (step, place) not in self._groups:
            raise _other_processes(f"step {step + 1}")
        return self._groups[step, place]

    def _sample(self, first: int) -> None:
        """Sample for all steps from `first` on that share the policy as it is now."""
        steps = range(first, first + self.config.steps)
        wanted = [(s, place) for s in steps for cut in self.cuts(s) for place in cut]
        numbers = {key: self.survey.rows[key[1]] for key in wanted}
        model = self.generator.policy.model
        was_training = model.training
        model.eval()
        try:
            self._groups = self._sampled(first, numbers, tag="")
            for turn in range(self.config.redraw):
                dull = [key for key, group in self._groups.items() if group.counts["uninformative"]]
                if not dull:
                    break
                others = {key: self._other(key, turn) for key in dull}
                made = self._sampled(first, others, tag=f"again{turn}/")
                self._groups |= {k: g for k, g in made.items() if not g.counts["uninformative"]}
        finally:
            model.train(was_training)
        self._first = first
        if all(group.counts["uninformative"] for group in self._groups.values()):
            logger.warning(
                "step %d: all responses to each prompt are worth the same: nothing is learnt",
                first + 1,
            )
        self._write(first)
        for step in steps[1:]:
            self._remember(step)

    def _sampled(
        self, first: int, numbers: dict[tuple[int, int], int], tag: str
    ) -> dict[tuple[int, int], Group]:
        """A group for each wanted place; tag: tells a second draw from the first."""
        records: dict[tuple[int, int], Verifiable] = {
            key: self.rows.dataset[number] for key, number in numbers.items()
        }
        requests = [
            request
            for (step, place), record in records.items()
            for request in group_requests(
                record,
                f"step{first}/{tag}{step}/{place}/{record.id}",
                self.config.group_size,
                self.rows.dataset.media_root,
            )
        ]
        made = self.generator.generate(requests, self.config.decoding.sampling(self.seed))
        size = self.config.group_size
        groups = [made[start : start + size] for start in range(0, len(made), size)]
        return {
            key: self._judged(numbers[key], record, replies)
            for (key, record), replies in zip(records.items(), groups, strict=True)
        }

    def _judged(self, number: int, record: Verifiable, replies: Sequence[Any]) -> Group:
        """Rewards and advantages of one prompt's responses."""
        scored = self.rewards.score(rollouts_of(record, replies))
        totals = torch.tensor([[one.total for one in scored]], dtype=torch.float64)
        telling = [one.parts.get("accuracy", one.total) for one in scored]
        dull = not bool(informative(torch.tensor([telling]))[0])
        counts = reply_counts(replies) | reward_counts(scored)
        counts["uninformative"] = float(dull * len(replies))
        return Group(
            number=number,
            row=self._with_responses(number, [list(reply.token_ids) for reply in replies]),
            advantages=self.loss.advantages(totals)[0].float().tolist(),
            counts=counts,
            texts=[
                {"response": r.text, "reward": s.total, **s.parts, **s.reasons}
                for r, s in zip(replies, scored, strict=True)
            ],
        )

    def _remember(self, step: int) -> None:
        """Score a later step's rollouts with the policy that sampled them."""
        for places in self.cuts(step):
            groups = [self._groups[step, place] for place in places]
            with torch.no_grad():
                logps = self.score(self._batch(places, groups)).logps.cpu()
            row = 0
            for place, group in zip(places, groups, strict=True):
                old = []
                for candidate in group.row.candidates:
                    old.append(logps[row, : len(candidate.response_ids)].clone())
                    row += 1
                self._groups[step, place] = replace(group, old_logps=old)

    def _batch(self, places: list[int], groups: Sequence[Group]) -> Batch:
        """The micro-batch of these groups, on the CPU."""
        batch = self.rows.batch_of(places, [group.row for group in groups])
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

    def _with_responses(self, number: int, ids: Iterable[list[int]]) -> PreparedRow:
        row = self.rows.prepared(number)
        return replace(
            row, candidates=tuple(Candidate(condition=0, response_ids=own) for own in ids)
        )

    def _other(self, key: tuple[int, int], turn: int) -> int:
        """Another row of the dataset in place of one that taught nothing."""
        rng = random.Random(f"{self.seed}/{key[0]}/{key[1]}/again{turn}")
        return rng.choice(self.survey.rows)

    def _write(self, first: int) -> None:
        """Some of the rollouts, to be read by people."""
        if self.folder is None:
            return
        lines = []
        for (step, _), group in list(self._groups.items())[:WRITTEN]:
            for text in group.texts:
                lines.append(json.dumps({"step": step + 1, "id": group.row.id, **text}) + "\n")
        write_atomically(self.folder / f"step-{first + 1:06d}.jsonl", "".join(lines))


def rollout_source(
    config: Rollouts,
    recipe: Recipe,
    policy: Policy,
    rows: Rows,
    survey: Survey,
    sampler: Sampler,
    accelerator: Accelerator,
    scorer: nn.Module,
    cuts: Callable[[int], list[list[int]]],
) -> RolloutSource:
    """The source of a run that is set up otherwise. Raises MissingExtra where a verifier lacks."""
    from mmalign.generate.local import LocalGenerator

    assert isinstance(recipe.loss, RolloutLossConfig)
    check_extras(rows.dataset)
    return RolloutSource(
        config=config,
        loss=recipe.loss,
        generator=LocalGenerator(policy, batch_size=config.decoding.batch_size),
        rewards=config.rewards.load(),
        rows=rows,
        survey=survey,
        cuts=cuts,
        score=lambda batch: scorer(batch.to(accelerator.device).plan),
        num_rows=sampler.batch_size,
        accelerator=accelerator,
        seed=recipe.run.seed,
        folder=recipe.run.output / "rollouts" if accelerator.is_main_process else None,
    )


def _file(rank: int) -> str:
    return f"rollouts-{rank}.pt"


def _other_processes(where: str) -> TrainingError:
    return TrainingError(
        "the rollouts of a half-used batch belong to another number of processes",
        where=where,
        fix="resume with as many processes as before, or from another checkpoint",
    )
