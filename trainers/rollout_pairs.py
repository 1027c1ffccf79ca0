"""Pairs of rollouts: online DPO on prompts whose answers a program, a model or a judge can rate.

To each prompt the policy of the moment samples a group of responses, by the code that samples
GRPO's; an annotator says which is the best and which the worst, and these two are the row's pair,
behind its one prompt. They are scored by the tokens that were sampled, never by their text
tokenised again. Everything random depends on (run.seed, step, id), so a resumed run repeats it,
and there is nothing to keep in a checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field

from mmalign.config import Strict
from mmalign.generate.base import Generation, Generator
from mmalign.log import get_logger
from mmalign.losses.base import Need
from mmalign.records import Verifiable
from mmalign.rewards import Rewards
from mmalign.scores import Totals
from mmalign.scoring.candidates import Candidate
from mmalign.verify import check_extras
from trainers.annotators import (
    Annotator,
    ByJudge,
    ByReward,
    ByRule,
    Verdict,
    annotator_of,
    best_and_worst,
    verdicts,
)
from trainers.decoding import Decoding, evaluating
from trainers.groups import (
    group_requests,
    reply_counts,
    reward_counts,
    rollouts_of,
    write_lines,
)
from trainers.objectives.base import PreparedRow, RowPair
from trainers.together import summed

if TYPE_CHECKING:
    from accelerate import Accelerator

    from mmalign.models.load import Policy
    from trainers.rows import Batch, Rows, Survey
    from trainers.sampler import Sampler
    from trainers.setup import Parts

logger = get_logger("trainers.rollout_pairs")

# Groups of a step that are written out to be read.
WRITTEN = 8


class OnlineRollouts(Strict):
    """The best and the worst of a group of responses from the current policy.

    group_size: responses to each prompt. annotator: what rates them.
    """

    name: Literal["rollouts"] = "rollouts"
    group_size: int = Field(default=4, ge=2)
    annotator: Annotated[ByRule | ByReward | ByJudge, Field(discriminator="name")] = ByRule()
    decoding: Decoding = Decoding()


@dataclass(frozen=True, slots=True, kw_only=True)
class Rated:
    """What an annotator found in a group of responses.

    counts: sums over the responses, for the log. lines: of each response, what to write out.
    """

    verdict: Verdict
    counts: dict[str, float]
    lines: list[dict[str, Any]]


class RolloutPairs:
    """Makes the pairs of each step with the policy as it is then.

    annotator: rewards, or what scores texts. cuts: this process's micro-batches of a step, as
    places in the survey. soft: whether the loss reads how certain a pair is.
    """

    def __init__(
        self,
        *,
        config: OnlineRollouts,
        policy: Policy,
        generator: Generator,
        annotator: Annotator | Rewards,
        rows: Rows,
        survey: Survey,
        sampler: Sampler,
        cuts: Callable[[int], list[list[int]]],
        accelerator: Accelerator,
        soft: bool,
        seed: int,
        folder: Path | None,
    ) -> None:
        self.config, self.policy, self.generator = config, policy, generator
        self.annotator, self.soft = annotator, soft
        self.rows, self.survey, self.sampler, self.cuts = rows, survey, sampler, cuts
        self.accelerator, self.seed, self.folder = accelerator, seed, folder

    def step(self, step: int) -> tuple[list[Batch], Totals, dict[str, float]]:
        """This process's micro-batches, the step's totals, and sums over all of its rows.

        What is said of responses is the mean over a row's. Raises RewardError where a reward fails
        or is no number.
        """
        cuts = self.cuts(step)
        places = [place for cut in cuts for place in cut]
        records = self.rows.records(self.survey, places)
        groups = self._sampled(step, places, records)
        rated = self._rated(records, groups, f"step{step}")
        made = [
            self._pair(self.rows.prepared(self.survey.rows[place]), group, one.verdict)
            for place, group, one in zip(places, groups, rated, strict=True)
        ]
        self._write(step, records, rated)
        left = iter(made)
        batches = [self.rows.batch_of(cut, [next(left) for _ in cut]) for cut in cuts]
        counts = self._summed(made, rated)
        num_rows = len(self.sampler.batch(step))
        if counts["paired"] == 0:
            logger.warning("step %d: no prompt gave a pair: nothing is learnt", step + 1)
        totals = Totals(
            num_pairs=num_rows, num_chosen_tokens=max(1, int(counts.pop("chosen_tokens")))
        )
        return batches, totals, counts

    def close(self) -> None:
        """End what the rewards have started."""
        if isinstance(self.annotator, Rewards):
            self.annotator.close()

    def _sampled(
        self, step: int, places: Sequence[int], records: Sequence[Verifiable]
    ) -> list[Sequence[Generation]]:
        """A group of responses for each place."""
        size = self.config.group_size
        requests = [
            request
            for place, record in zip(places, records, strict=True)
            # GRPO's names, so that its rollouts of the first step are these.
            for request in group_requests(
                record,
                f"step{step}/{step}/{place}/{record.id}",
                size,
                self.rows.dataset.media_root,
            )
        ]
        with evaluating(self.policy.model):
            made = self.generator.generate(requests, self.config.decoding.sampling(self.seed))
        return [made[start : start + size] for start in range(0, len(made), size)]

    def _rated(
        self, records: Sequence[Verifiable], groups: Sequence[Sequence[Generation]], tag: str
    ) -> list[Rated]:
        if isinstance(self.annotator, Rewards):
            return [
                _by_rule(self.annotator, record, group)
                for record, group in zip(records, groups, strict=True)
            ]
        found = verdicts(self.annotator, records, groups, tag)
        return [
            Rated(
                verdict=verdict,
                counts=reply_counts(group),
                lines=[{"response": reply.text} for reply in group],
            )
            for group, verdict in zip(groups, found, strict=True)
        ]

    def _pair(self, own: PreparedRow, group: Sequence[Generation], verdict: Verdict) -> PreparedRow:
        """The row's pair behind its prompt.

        Without a verdict one keeps its place, for processes must make equally many forward passes;
        it weighs nothing, and a token on each side is enough.
        """
        if verdict.reason == "ok":
            sides = [list(group[p].token_ids) for p in (verdict.chosen, verdict.rejected)]
            pair = RowPair(rejected=1, p_target=self._p_target(verdict))
        else:
            sides = [list(group[0].token_ids[:1])] * 2
            pair = RowPair(rejected=1, weight=0.0)
        return replace(
            own,
            candidates=tuple(Candidate(condition=0, response_ids=ids) for ids in sides),
            pairs=(pair,),
        )

    def _p_target(self, verdict: Verdict) -> float:
        """What Bradley and Terry's model of the two rewards gives, where the loss reads it."""
        if not self.soft:
            return 1.0
        return 1 / (1 + math.exp(verdict.rejected_score - verdict.chosen_score))

    def _summed(self, made: Sequence[PreparedRow], rated: Sequence[Rated]) -> dict[str, float]:
        """Counts over the rows of all processes, and the tokens of their chosen responses."""
        counts = dict.fromkeys(
            ("paired", "tied", "too_few", "no_verdict", "chosen_score", "rejected_score"), 0.0
        )
        counts |= {"chosen_tokens": 0.0, "sampled_tokens": 0.0}
        for row, one in zip(made, rated, strict=True):
            verdict = one.verdict
            counts["paired" if verdict.reason == "ok" else verdict.reason] += 1
            counts["chosen_score"] += verdict.chosen_score
            counts["rejected_score"] += verdict.rejected_score
            counts["chosen_tokens"] += row.pairs[0].weight * row.num_chosen_tokens
            counts["sampled_tokens"] += one.counts["response_tokens"]
            for name, value in one.counts.items():
                counts[name] = counts.get(name, 0.0) + value / self.config.group_size
        return summed(self.accelerator, counts, torch.float64)

    def _write(self, step: int, records: Sequence[Verifiable], rated: Sequence[Rated]) -> None:
        """Some of the responses, to be read by people."""
        if self.folder is None:
            return
        lines = []
        for record, one in list(zip(records, rated, strict=True))[:WRITTEN]:
            found = one.verdict
            for place, line in enumerate(one.lines):
                side = {found.chosen: "chosen", found.rejected: "rejected"}.get(place)
                said = side if found.reason == "ok" else found.reason
                lines.append({"step": step + 1, "id": record.id, "pair": said, **line})
        write_lines(self.folder, step + 1, lines)


def _by_rule(rewards: Rewards, record: Verifiable, group: Sequence[Generation]) -> Rated:
    """By GRPO's rewards. What was cut off takes part, as it does there."""
    scored = rewards.score(rollouts_of(record, group))
    return Rated(
        verdict=best_and_worst([one.total for one in scored], record.id),
        counts=reply_counts(group) | reward_counts(scored),
        lines=[
            {"response": reply.text, "reward": one.total, **one.parts, **one.reasons}
            for reply, one in zip(group, scored, strict=True)
        ],
    )


def rollout_pairs(config: OnlineRollouts, parts: Parts) -> RolloutPairs:
    """The source of a run that is set up otherwise. Raises MissingExtra where a verifier lacks."""
    from mmalign.generate.local import LocalGenerator

    recipe, policy, rows, accelerator = parts.recipe, parts.policy, parts.rows, parts.accelerator
    if isinstance(config.annotator, ByRule):
        check_extras(rows.dataset)
        annotator: Annotator | Rewards = config.annotator.rewards.load()
    else:
        annotator = annotator_of(config.annotator, rows.dataset.media_root)
    return RolloutPairs(
        config=config,
        policy=policy,
        generator=LocalGenerator(policy, batch_size=config.decoding.batch_size),
        annotator=annotator,
        rows=rows,
        survey=parts.survey,
        sampler=parts.sampler,
        cuts=parts.cuts,
        accelerator=accelerator,
        soft=Need.P_TARGET in recipe.loss.needs,
        seed=recipe.run.seed,
        folder=recipe.run.output / "rollouts" if accelerator.is_main_process else None,
    )
