"""Is a response wrong? By rules where answers are short, by a judge, or by mere difference.

Every verdict is wrong, right or unknown, with its reason. Nothing is guessed: what a rule cannot
read, or a judge does not say in form, is unknown, and no builder keeps it as a wrong response.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol

from pydantic import Field, PositiveInt

from data_builders.base import AnyGenerator, SentenceFilter, SimilarityFilter
from mmalign.answers import yes_no
from mmalign.config import Strict
from mmalign.judge import Case, Judge
from mmalign.options import chosen_option, options_of, words_of
from mmalign.similarity import TextSimilarity

Outcome = Literal["wrong", "right", "unknown"]
Kind = Literal["choice", "yes_no", "short", "open"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a response is wrong, and by what that was told, or why it could not be."""

    outcome: Outcome
    reason: str


class Verifier(Protocol):
    """Tells wrong responses from right ones."""

    def __call__(self, cases: Sequence[Case]) -> list[Verdict]:
        """One verdict for each case, in order."""
        ...


class JudgeConfig(Strict):
    """The language model that judges; give it temperature 0 where its server allows that."""

    generator: AnyGenerator
    tries: PositiveInt = 3

    def load(self, seed: int) -> Judge:
        """Load it; `seed` is for a generator that samples."""
        return Judge(
            self.generator.load(), tries=self.tries, sampling=self.generator.sampling(seed)
        )


class Rules(Strict):
    """By rule, for multiple choice, yes or no, and answers of `short_words` words at most.

    Responses to open questions, and those that no rule can read, are unknown.
    """

    name: Literal["rules"] = "rules"
    short_words: PositiveInt = 3


class ByJudge(Strict):
    """By rule where `rules` can tell; what it cannot is asked of the builder's `judge`."""

    name: Literal["judge"] = "judge"
    short_words: PositiveInt = 3


class Differs(Strict):
    """No truth is looked at: a response counts as wrong where it is not like the answer.

    For closed worlds, where every other wording is an error.
    """

    name: Literal["differs"] = "differs"
    similarity: SimilarityFilter = SentenceFilter()


Verify = Annotated[Rules | ByJudge | Differs, Field(discriminator="name")]


class RuleVerifier:
    """The rules, and behind them a judge where there is one."""

    def __init__(self, short_words: int, judge: Judge | None = None) -> None:
        self.short_words, self.judge = short_words, judge

    def __call__(self, cases: Sequence[Case]) -> list[Verdict]:
        """Rules for all, then the judge for what they could not tell, in one call."""
        verdicts = [by_rule(case, self.short_words) for case in cases]
        left = [i for i, verdict in enumerate(verdicts) if verdict.outcome == "unknown"]
        if self.judge is None or not left:
            return verdicts
        for i, ruling in zip(left, self.judge.is_correct([cases[i] for i in left]), strict=True):
            if ruling.value is None:
                verdicts[i] = Verdict("unknown", f"judge:{ruling.reason}")
            else:
                verdicts[i] = Verdict("right" if ruling.value else "wrong", "judge")
        return verdicts


class DifferenceVerifier:
    """Wrong is what is less similar to the answer than `threshold`."""

    def __init__(self, similarity: TextSimilarity, threshold: float) -> None:
        self.similarity, self.threshold = similarity, threshold

    def __call__(self, cases: Sequence[Case]) -> list[Verdict]:
        """The similarity stands in the reason."""
        answers, responses = ([getattr(c, n) for c in cases] for n in ("answer", "response"))
        return [
            Verdict("wrong" if value < self.threshold else "right", f"similarity:{value:.4f}")
            for value in self.similarity(answers, responses)
        ]


def load_verifier(config: Rules | ByJudge | Differs, judge: Judge | None) -> Verifier:
    """The verifier that a config asks for; `judge` is used by `judge` alone."""
    match config:
        case Rules():
            return RuleVerifier(config.short_words)
        case ByJudge():
            assert judge is not None
            return RuleVerifier(config.short_words, judge)
        case Differs():
            return DifferenceVerifier(config.similarity.load(), config.similarity.threshold)


def kind_of(question: str, answer: str, short_words: int) -> Kind:
    """What sort of answer a question has: by its options, then by the answer itself."""
    options = options_of(question)
    if options and chosen_option(answer, options):
        return "choice"
    words = words_of(answer)
    if yes_no(answer):
        return "yes_no"
    return "short" if 0 < len(words) <= short_words else "open"


def by_rule(case: Case, short_words: int) -> Verdict:
    """What the rules say of one response."""
    kind = kind_of(case.question, case.answer, short_words)
    if not case.response.strip():
        return Verdict("unknown", "empty")
    if kind == "open":
        return Verdict("unknown", "open")
    if kind == "short":
        return _by_words(case)
    if kind == "yes_no":
        given, wanted = yes_no(case.response), yes_no(case.answer)
    else:
        options = options_of(case.question)
        given, wanted = (chosen_option(text, options) for text in (case.response, case.answer))
    if given is None:
        return Verdict("unknown", f"{kind}:unread")
    return Verdict("right" if given == wanted else "wrong", kind)


def _by_words(case: Case) -> Verdict:
    """Short answers: equal words are right, other words wrong, more or fewer of the same unknown.

    "a dog" for "Dog." is right and "a cat" wrong. "a brown dog", and "not a dog", hold the answer,
    and who can tell.
    """
    given, wanted = words_of(case.response), words_of(case.answer)
    if given == wanted:
        return Verdict("right", "short")
    one, other = (f" {' '.join(words)} " for words in (given, wanted))
    if not given or one in other or other in one:
        return Verdict("unknown", "short:overlaps")
    return Verdict("wrong", "short")
