"""A model's own responses to verifiable rows: sampled, verified, judged, and told apart.

What became of a row that no try settles is the fate of the try that came furthest: a text, then a
right answer, then its form, then the judge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from data_builders.base import AnyGenerator
from data_builders.in_turn import InTurn
from data_builders.judging import asked, question_of, reason_of
from data_builders.malform import completed
from mmalign.checked import Checked
from mmalign.errors import MediaError
from mmalign.generate.base import Generation, Request, request_for
from mmalign.generate.server import Unanswered
from mmalign.instruct import instructed
from mmalign.jobs import Outcome
from mmalign.judge import Argument, Judge, Ruling
from mmalign.prepare import RowDropped
from mmalign.records import Message, Verifiable
from mmalign.think import final_answer, parts_of
from mmalign.verify import Verifiers

GENERATOR, BASE, JUDGE = "generator", "base_generator", "judge"


class Fate(NamedTuple):
    """How a try ended, and how far it came: 0 no text, 1 no right answer, 2 no form, 3 judged."""

    stage: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """A text that was verified, and the words that were sampled; they differ if supplemented."""

    row: Verifiable
    number: int
    text: str
    sampled: str

    @property
    def supplemented(self) -> bool:
        """Its form was completed."""
        return self.text != self.sampled


@dataclass(kw_only=True)
class Chunk:
    """Rows that are asked together; `outcomes` fills with what becomes of those that are left out.

    tries: samples of a row at most, for each of `choose` and `others`.
    """

    rows: Sequence[Verifiable]
    media_root: Path
    seed: int
    tries: int
    instruction: str | None
    models: InTurn
    verifiers: Verifiers
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    def prompt(self, row: Verifiable) -> tuple[Message, ...]:
        """What is asked, and stored."""
        return row.prompt if self.instruction is None else instructed(row.prompt, self.instruction)

    def choose(
        self,
        config: AnyGenerator,
        judge: Callable[[], Judge] | None,
        *,
        supplement: bool,
    ) -> list[Response]:
        """Correct and well-formed responses, in the rows' order; rows without get an outcome.

        What the generator wrote well goes before what had to be completed (`supplement`).
        """
        chosen: dict[str, Response] = {}
        fates: dict[str, list[Fate]] = {row.id: [] for row in self.rows}
        spare: dict[str, list[Response]] = {row.id: [] for row in self.rows}
        for number in range(1, self.tries + 1):
            found: list[Response] = []
            for row, text in self._sampled(self.rows, chosen, GENERATOR, config, f"try{number}"):
                read = text if isinstance(text, Fate) else self._read(row, number, text, supplement)
                if isinstance(read, Fate):
                    fates[row.id].append(read)
                elif read.supplemented:
                    spare[row.id].append(read)
                else:
                    found.append(read)
            self._judge(found, judge, chosen, fates)
        for place in range(self.tries):
            found = [
                few[place] for id, few in spare.items() if id not in chosen and place < len(few)
            ]
            self._judge(found, judge, chosen, fates)
        for row in self.rows:
            if row.id not in chosen and row.id not in self.outcomes:
                self.outcomes[row.id] = _dropped(row, fates[row.id], "chosen")
        return [chosen[row.id] for row in self.rows if row.id in chosen]

    def others(
        self, rows: Sequence[Verifiable], model: str, config: AnyGenerator, *, correct: bool
    ) -> dict[str, Response]:
        """A response of any form for each row, correct or (`correct` false) wrong, by row id."""
        found: dict[str, Response] = {}
        fates: dict[str, list[Fate]] = {row.id: [] for row in rows}
        for number in range(1, self.tries + 1):
            for row, text in self._sampled(rows, found, model, config, f"base{number}"):
                if isinstance(text, Fate):
                    fates[row.id].append(text)
                    continue
                checked = self.verifiers.check_response(text, row)
                if gives(checked, correct=correct):
                    found[row.id] = Response(row=row, number=number, text=text, sampled=text)
                else:
                    fates[row.id].append(Fate(1, _why(checked)))
        for row in rows:
            if row.id not in found and row.id not in self.outcomes:
                self.outcomes[row.id] = _dropped(row, fates[row.id], "rejected")
        return found

    def _sampled(
        self,
        rows: Sequence[Verifiable],
        settled: dict[str, Response],
        model: str,
        config: AnyGenerator,
        label: str,
    ) -> Iterator[tuple[Verifiable, str | Fate]]:
        """One more response of the model to each row that is open, or why there is no text.

        A row that cannot be asked at all gets its outcome.
        """
        trying = [row for row in rows if row.id not in settled and row.id not in self.outcomes]
        if not trying:
            return
        generator = self.models.get(model)
        requests = [
            replace(
                request_for(row, id=f"{row.id}/{label}", media_root=self.media_root),
                prompt=self.prompt(row),
            )
            for row in trying
        ]

        def ask(some: list[Request]) -> list[Generation | str | MediaError | RowDropped]:
            try:
                return [*generator.generate(some, config.sampling(self.seed))]
            except Unanswered as error:
                both = zip(error.generations, error.reasons, strict=True)
                return [one or reason or "unanswered" for one, reason in both]

        for row, reply in zip(trying, asked(ask, requests, lambda _, e: e), strict=True):
            match reply:
                case Generation():
                    text = reply.text.strip()
                    yield row, Fate(0, "cut") if not reply.finished else text or Fate(0, "blank")
                case str():
                    yield row, Fate(0, reply)
                case MediaError():
                    why = "quarantined:unreadable"
                    self.outcomes[row.id] = Outcome(id=row.id, reason=why, detail=str(reply))
                case RowDropped():
                    why = f"dropped:{reply.reason}"
                    self.outcomes[row.id] = Outcome(id=row.id, reason=why, detail=str(reply))

    def _read(self, row: Verifiable, number: int, text: str, supplement: bool) -> Response | Fate:
        """The response, completed where that is needed and allowed, if it is correct."""
        problem = parts_of(text).problem
        whole = (completed(text) if supplement else None) if problem else text
        checked = self.verifiers.check_response(whole or text, row)
        if not checked.correct:
            return Fate(1, _why(checked))
        if whole is None:
            return Fate(2, problem)
        return Response(row=row, number=number, text=whole, sampled=text)

    def _judge(
        self,
        found: list[Response],
        judge: Callable[[], Judge] | None,
        chosen: dict[str, Response],
        fates: dict[str, list[Fate]],
    ) -> None:
        """Choose those whose reasoning comes to their answer, or all where there is no judge."""
        if judge is None or not found:
            chosen |= {response.row.id: response for response in found}
            return
        arguments = [_argument(response) for response in found]
        rulings = asked(judge().is_consistent, arguments, _not_asked)
        for response, ruling in zip(found, rulings, strict=True):
            if ruling.value:
                chosen[response.row.id] = response
            else:
                told = "inconsistent" if ruling.value is False else f"judge_{ruling.reason}"
                fates[response.row.id].append(Fate(3, told))


def gives(checked: Checked, *, correct: bool) -> bool:
    """Whether an answer was given, and is the right one, or (`correct` false) another."""
    return checked.correct is correct and checked.reason != "no_answer"


def _argument(response: Response) -> Argument:
    parts, answer = parts_of(response.text), final_answer(response.text)
    assert parts.think, "it is well formed"
    assert answer, "its answer was verified"
    return Argument(
        id=f"{response.row.id}/try{response.number}",
        question=question_of(response.row.prompt),
        reasoning=parts.think,
        answer=answer,
    )


def _not_asked(argument: Argument, error: MediaError | RowDropped) -> Ruling[bool]:
    return Ruling(id=argument.id, value=None, reason=reason_of(error), num_tries=0)


def _why(checked: Checked) -> str:
    """What to call an answer that is not the wanted one."""
    if checked.correct is None:
        return "undecided"
    return {"different": "wrong", "equal": "right"}.get(checked.reason, checked.reason)


def _dropped(row: Verifiable, fates: list[Fate], side: str) -> Outcome:
    """The row's outcome by the try that came furthest, the last of several; all are told."""
    furthest = max(reversed(fates), key=lambda fate: fate.stage)
    told = ", ".join(fate.reason for fate in fates)
    return Outcome(id=row.id, reason=f"dropped:{side}_{furthest.reason}", detail=told)
