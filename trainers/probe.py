"""Probes: during training the policy answers a few questions, as it stands.

How many answers are in the form of `mmalign.think`, and how many are right, in distribution (`id`,
asked as in training) and out of it (`ood`, asked in other words); and of the two form rates the
Generalization Factor. Of all that trains, nothing is changed by it.

runs/X/probe/
  first.json             the first probe, which gains are counted from
  step-000025.jsonl      some answers of each kind, to be read
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from mmalign.config import Strict
from mmalign.errors import MediaError, SchemaMismatch, TrainingError
from mmalign.generalization import generalization_factors
from mmalign.generate.base import request_for
from mmalign.log import get_logger
from mmalign.records import Verifiable
from mmalign.rewards import FormatReward
from mmalign.store import Dataset, open_dataset, write_atomically
from mmalign.verify import Verifiers, check_extras, truth_problem
from trainers.decoding import Decoding, evaluating
from trainers.groups import rollouts_of
from trainers.randomness import untouched_randomness
from trainers.together import summed

if TYPE_CHECKING:
    from accelerate import Accelerator

    from mmalign.models.load import Policy
    from trainers.config import Recipe
    from trainers.tracking import Tracker

logger = get_logger("trainers.probe")

# Answers of each kind that are written out to be read.
WRITTEN = 8


class ProbeSet(Strict):
    """Questions of one kind: a dataset of verifiable records, and how many of its rows.

    They are spread evenly over the dataset, and so the same in every run.
    """

    data: Path
    num_rows: PositiveInt = 64


class ProbeDecoding(Decoding):
    """How the policy answers: greedily, unless told otherwise."""

    temperature: NonNegativeFloat = 0.0


class ProbeConfig(Strict):
    """What the policy is asked during training: before the first step, after every `every_steps`,
    and at the end.

    id: asked as in training. ood: asked otherwise; with it there is a Generalization Factor, of
    which `beta` says how many times more out of distribution counts.
    """

    every_steps: PositiveInt = 25
    id: ProbeSet
    ood: ProbeSet | None = None
    decoding: ProbeDecoding = ProbeDecoding()
    beta: PositiveFloat = 2.0
    math_timeout_seconds: PositiveFloat = 5.0

    @property
    def sets(self) -> dict[str, ProbeSet]:
        """By the name that they are logged under."""
        return {"id": self.id} | ({} if self.ood is None else {"ood": self.ood})


@dataclass(frozen=True, slots=True, kw_only=True)
class Questions:
    """The rows of one kind.

    checkable: ids of rows whose own answer their verifier can read; the others count for the form
    alone.
    """

    name: str
    dataset: Dataset[Verifiable]
    rows: list[Verifiable]
    checkable: frozenset[str]


def open_questions(config: ProbeConfig) -> list[Questions]:
    """The questions of a probe, before a model is loaded.

    Raises SchemaMismatch for another kind of records, and where there are fewer rows than asked
    for; MissingExtra where a verifier lacks.
    """
    found = []
    for name, asked in config.sets.items():
        dataset = open_dataset(asked.data, Verifiable)
        if len(dataset) < asked.num_rows:
            raise SchemaMismatch(
                f"probe.{name} asks for more rows than there are",
                where=str(asked.data),
                got=f"{len(dataset)} rows",
                wanted=f"{asked.num_rows}",
                fix=f"lower probe.{name}.num_rows",
            )
        places = [place * len(dataset) // asked.num_rows for place in range(asked.num_rows)]
        rows = [dataset[place] for place in places]
        check_extras(rows)
        checkable = frozenset(row.id for row in rows if truth_problem(row) is None)
        found.append(Questions(name=name, dataset=dataset, rows=rows, checkable=checkable))
    return found


@dataclass(kw_only=True)
class Probe:
    """Asks the policy of a run; processes share the questions, and all know the result.

    autocast: what it computes in, as in training; None for the weights' own dtype.
    """

    config: ProbeConfig
    questions: list[Questions]
    policy: Policy
    accelerator: Accelerator
    autocast: torch.dtype | None
    folder: Path
    seed: int
    _first: dict[str, float] | None = field(default=None, init=False)

    def due(self, step: int, num_steps: int) -> bool:
        """Whether the policy is asked after step `step`, counted from 1."""
        return step % self.config.every_steps == 0 or step == num_steps

    def show(self, step: int, tracker: Tracker | None) -> dict[str, float]:
        """Ask, and log what came of it; the same metrics on every process.

        Raises MediaError for an unreadable picture, RowDropped, naming the row, for a question that
        the model's family does not take.
        """
        metrics: dict[str, float] = {}
        texts: list[dict[str, Any]] = []
        with self._asking() as verifiers:
            for questions in self.questions:
                metrics |= self._answered(step, questions, verifiers, texts)
        if "probe/ood/format" in metrics:
            kept = self._since(step, metrics)
            now, first = (
                (rates["probe/id/format"], rates["probe/ood/format"]) for rates in (metrics, kept)
            )
            factors = generalization_factors(now, first, beta=self.config.beta)
            metrics |= {f"gf/{mode}": value for mode, value in factors.items()}
        if self.accelerator.is_main_process:
            lines = "".join(json.dumps(text) + "\n" for text in texts)
            write_atomically(self.folder / f"step-{step:06d}.jsonl", lines)
        if tracker is not None:
            tracker.log(step, metrics)
        return metrics

    @contextmanager
    def _asking(self) -> Iterator[Verifiers]:
        """The model as it answers, and all as before afterwards."""
        device, enabled = self.accelerator.device.type, self.autocast is not None
        with (
            untouched_randomness(),
            evaluating(self.policy.model),
            torch.autocast(device, self.autocast, enabled=enabled),
            Verifiers(math_timeout_seconds=self.config.math_timeout_seconds) as verifiers,
        ):
            yield verifiers

    def _answered(
        self, step: int, questions: Questions, verifiers: Verifiers, texts: list[dict[str, Any]]
    ) -> dict[str, float]:
        """The metrics of one kind of questions; some answers go to `texts`."""
        from mmalign.generate.local import LocalGenerator

        name, config = questions.name, self.config
        mine = questions.rows[self.accelerator.process_index :: self.accelerator.num_processes]
        requests = [
            # The step is left out: what chance decides is the same in every probe.
            request_for(row, id=f"probe/{name}/{row.id}", media_root=questions.dataset.media_root)
            for row in mine
        ]
        generator = LocalGenerator(self.policy, batch_size=config.decoding.batch_size)
        try:
            replies = generator.generate(requests, config.decoding.sampling(self.seed))
        except MediaError as error:
            raise MediaError(
                f"a picture of probe.{name} cannot be shown to the policy ({error})",
                where=str(questions.dataset.path),
                fix="`mmalign data validate` names the rows; mend them, or take another dataset",
            ) from error
        names = ("format", "right", "undecided", "finished", "response_tokens")
        counts: dict[str, float] = dict.fromkeys(names, 0.0)
        for place, (row, reply) in enumerate(zip(mine, replies, strict=True)):
            (rollout,) = rollouts_of(row, [reply])
            in_form = FormatReward()(rollout, verifiers)
            correct, reason = None, "truth_unread"
            if row.id in questions.checkable:
                checked = verifiers.check_response(reply.text, row)
                correct, reason = checked.correct, checked.reason
                counts["right"] += float(correct is True)
                counts["undecided"] += float(correct is None)
            counts["format"] += in_form
            counts["finished"] += float(reply.finished)
            counts["response_tokens"] += rollout.num_tokens
            if place < WRITTEN:
                told = {"set": name, "id": row.id, "response": reply.text, "format": in_form}
                texts.append({"step": step, **told, "correct": correct, "reason": reason})
        found = summed(self.accelerator, counts)
        right, undecided = found.pop("right"), found.pop("undecided")
        rates = {key: value / len(questions.rows) for key, value in found.items()}
        if checkable := len(questions.checkable):
            rates |= {"accuracy": right / checkable, "undecided": undecided / checkable}
        return {f"probe/{name}/{key}": value for key, value in rates.items()}

    def _since(self, step: int, metrics: dict[str, float]) -> dict[str, float]:
        """The first probe of the run, which this one is, or which an earlier start has kept."""
        if self._first is None and step > 0:
            self._first = self._kept()
        if self._first is None:
            self._first = metrics
            if step > 0:
                logger.warning(
                    "no first probe by these settings in %s: gf/relative counts from step %d on",
                    self.folder,
                    step,
                )
            if self.accelerator.is_main_process:
                kept = {"settings": self._settings, "step": step, "metrics": metrics}
                write_atomically(self.folder / "first.json", json.dumps(kept, indent=1))
        return self._first

    def _kept(self) -> dict[str, float] | None:
        file = self.folder / "first.json"
        if not file.exists():
            return None
        try:
            kept = json.loads(file.read_text())
            settings, metrics = kept["settings"], kept["metrics"]
        except (ValueError, KeyError, TypeError) as error:
            raise TrainingError(
                f"is damaged ({error})",
                where=str(file),
                fix="put it back from a copy, or delete it: gains then count from the next probe",
            ) from None
        return metrics if settings == self._settings else None

    @property
    def _settings(self) -> dict[str, Any]:
        """What decides the answers of a model; with another `every_steps` they are the same."""
        told = self.config.model_dump(mode="json", exclude={"every_steps", "beta"})
        hashes = {q.name: q.dataset.manifest.content_hash for q in self.questions}
        return {**told, "seed": self.seed, "datasets": hashes}


def probe_of(
    recipe: Recipe,
    questions: list[Questions],
    policy: Policy,
    accelerator: Accelerator,
    autocast: torch.dtype | None,
) -> Probe | None:
    """The probe of a run that is set up otherwise, if it has one."""
    if recipe.probe is None:
        return None
    for one in questions:
        logger.info(
            "probe %s: %d rows of %s, hash %s; %d of them with an answer that can be checked",
            one.name, len(one.rows), one.dataset.path, one.dataset.manifest.content_hash[:12],
            len(one.checkable),
        )  # fmt: skip
    return Probe(
        config=recipe.probe,
        questions=questions,
        policy=policy,
        accelerator=accelerator,
        autocast=autocast,
        folder=recipe.run.output / "probe",
        seed=recipe.run.seed,
    )
