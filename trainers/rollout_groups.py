"""Groups of rollouts: the responses to one prompt, with their rewards and advantages."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmalign.generate.base import Generation, Sampling
from mmalign.losses.rollout import RolloutLossConfig, informative
from mmalign.records import Verifiable
from mmalign.rewards import Rewards
from mmalign.scoring.candidates import Candidate
from trainers.groups import group_requests, reply_counts, reward_counts, rollouts_of
from trainers.objectives.base import PreparedRow
from trainers.rollout_server import RolloutSampler

if TYPE_CHECKING:
    from trainers.rows import Rows, Survey

# A step, and a place in the survey.
Key = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The rollouts of one prompt.

    number: its row in the dataset. row: its tokens, a candidate for each rollout.
    sampled_at: the step before which the weights were those that sampled.
    old_logps: [T_i] of each rollout under those weights; None for their own step.
    counts: sums over the rollouts, for the log. texts: what to write out.
    told_logps: [T_i] of each rollout as the server that sampled it says; empty without one.
    """

    number: int
    row: PreparedRow
    advantages: list[float]
    counts: dict[str, float]
    sampled_at: int
    old_logps: list[Tensor] | None = None
    texts: list[dict[str, Any]] = field(default_factory=list)
    told_logps: list[Tensor] = field(default_factory=list)


class GroupMaker:
    """Samples prompts' responses and judges them. Nothing here is a collective operation.

    So a batch may be made beside training where a server samples. group_size, redraw, sampling:
    as in the recipe.
    """

    def __init__(
        self,
        *,
        group_size: int,
        redraw: int,
        sampling: Sampling,
        loss: RolloutLossConfig,
        sampler: RolloutSampler,
        rewards: Rewards,
        rows: Rows,
        survey: Survey,
        cuts: Callable[[int], list[list[int]]],
    ) -> None:
        self.group_size, self.redraw, self.sampling = group_size, redraw, sampling
        self.loss, self.sampler, self.rewards = loss, sampler, rewards
        self.rows, self.survey, self.cuts = rows, survey, cuts

    def make(self, steps: range, *, sampled_at: int) -> dict[Key, Group]:
        """The groups of these steps, all from the weights as they are before `sampled_at`."""
        wanted = [(step, place) for step in steps for cut in self.cuts(step) for place in cut]
        numbers = {key: self.survey.rows[key[1]] for key in wanted}
        groups = self._sampled(steps[0], numbers, sampled_at, tag="")
        for turn in range(self.redraw):
            dull = [key for key, group in groups.items() if group.counts["uninformative"]]
            if not dull:
                break
            others = {key: self._other(key, turn) for key in dull}
            made = self._sampled(steps[0], others, sampled_at, tag=f"again{turn}/")
            groups |= {k: g for k, g in made.items() if not g.counts["uninformative"]}
        return groups

    def saved(self, groups: Mapping[Key, Group]) -> list[dict[str, Any]]:
        """Plain values that `restored` reads."""
        return [
            {
                "step": step,
                "place": place,
                "number": group.number,
                "ids": [list(c.response_ids) for c in group.row.candidates],
                "advantages": group.advantages,
                "counts": group.counts,
                "sampled_at": group.sampled_at,
                "old_logps": group.old_logps,
            }
            for (step, place), group in groups.items()
        ]

    def restored(self, held: Iterable[Mapping[str, Any]]) -> dict[Key, Group]:
        """The groups that were saved, but for what was only to be written out."""
        return {
            (one["step"], one["place"]): Group(
                number=one["number"],
                row=self._with_responses(one["number"], one["ids"]),
                advantages=one["advantages"],
                counts=one["counts"],
                sampled_at=one["sampled_at"],
                old_logps=one["old_logps"],
            )
            for one in held
        }

    def _sampled(
        self, first: int, numbers: Mapping[Key, int], sampled_at: int, tag: str
    ) -> dict[Key, Group]:
        """A group for each wanted place; tag: tells a second draw from the first."""
        records: dict[Key, Verifiable] = {
            key: self.rows.dataset[number] for key, number in numbers.items()
        }
        size = self.group_size
        media_root = self.rows.dataset.media_root
        requests = [
            request
            for (step, place), record in records.items()
            for request in group_requests(
                record, f"step{first}/{tag}{step}/{place}/{record.id}", size, media_root
            )
        ]
        rows = [self.rows.prepared(number) for number in numbers.values() for _ in range(size)]
        made = self.sampler.generate(requests, rows, self.sampling)
        groups = [made[start : start + size] for start in range(0, len(made), size)]
        return {
            key: self._judged(numbers[key], record, replies, sampled_at)
            for (key, record), replies in zip(records.items(), groups, strict=True)
        }

    def _judged(
        self, number: int, record: Verifiable, replies: Sequence[Generation], sampled_at: int
    ) -> Group:
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
            sampled_at=sampled_at,
            texts=[
                {"response": r.text, "reward": s.total, **s.parts, **s.reasons}
                for r, s in zip(replies, scored, strict=True)
            ],
            told_logps=[torch.tensor(r.told.logps) for r in replies if r.told is not None],
        )

    def _with_responses(self, number: int, ids: Iterable[list[int]]) -> PreparedRow:
        row = self.rows.prepared(number)
        return replace(
            row, candidates=tuple(Candidate(condition=0, response_ids=own) for own in ids)
        )

    def _other(self, key: Key, turn: int) -> int:
        """Another row of the dataset in place of one that taught nothing."""
        rng = random.Random(f"{self.sampling.seed}/{key[0]}/{key[1]}/again{turn}")
        return rng.choice(self.survey.rows)


class Ahead:
    """A batch that is being sampled beside training."""

    def __init__(self, work: Callable[[], dict[Key, Group]]) -> None:
        self._made: dict[Key, Group] = {}
        self._error: BaseException | None = None

        def run() -> None:
            try:
                self._made = work()
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=run, name="rollouts", daemon=True)
        self._thread.start()

    def result(self) -> dict[Key, Group]:
        """What was sampled, once it is. Raises what sampling raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._made
