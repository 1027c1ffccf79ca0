"""What comparing and reporting need to know of a benchmark: a constant beside each one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from evals.base import Row
from evals.stats import Ratio, ratio

Test = Literal["mcnemar", "bootstrap"]
Metrics = Callable[[Sequence[Row]], dict[str, Ratio]]


@dataclass(frozen=True)
class Metric:
    """How one number is shown: its key in results.json, its words, and which way is better."""

    key: str
    label: str
    better: Literal["lower", "higher"] | None = None
    percent: bool = True
    decimals: int = 1

    def of(self, category: str) -> Metric:
        """The same number of one category alone."""
        return replace(self, key=f"{self.key}/{category}")

    def show(self, value: float, *, sign: bool = False) -> str:
        """The number in percent or as it is, rounded."""
        # Adding 0.0 never leaves a "-0.0".
        rounded = round(100 * value if self.percent else value, self.decimals) + 0.0
        plus = "+" if sign and rounded else ""
        return f"{rounded:{plus}.{self.decimals}f}".replace("-", "−")


_OFFICIAL, _JUDGED = "official/", "judged/"
YES_RATIO = Metric("yes_ratio", "yes ratio")
ANSWER_TOKENS = Metric("answer_tokens", "tokens", percent=False)


def answer_tokens(items: Sequence[Row]) -> dict[str, Ratio]:
    """`answer_tokens`: the mean length of the answers that there are, where rows hold lengths.

    A model that says less is wrong less often: read it beside every number. Rows of several
    requests, such as the rewards of two responses, have no one answer, and no length.
    """
    if any("num_tokens" not in row or "requests" in row for row in items):
        return {}
    there = [row["answer"] is not None for row in items]
    tokens = [row["num_tokens"] * had for row, had in zip(items, there, strict=True)]
    return {ANSWER_TOKENS.key: ratio(tokens, there)}


def judged_metrics(metrics: Metrics, items: Sequence[Row]) -> dict[str, Ratio]:
    """`judged/` for each number of `official/`, where rows have a judge's reading; else nothing."""
    if not items or any("judged" not in row for row in items):
        return {}
    read = [
        {**row, "official": row["judged"], "correct_official": row["correct_judged"]}
        for row in items
    ]
    return {
        _JUDGED + name.removeprefix(_OFFICIAL): number
        for name, number in metrics(read).items()
        if name.startswith(_OFFICIAL)
    }


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How one benchmark is compared and shown.

    metrics: its numbers, from rows alone. read: fields that a row must hold. same: those that must
    agree between runs as well, beside the picture or clip. compared: metrics with their tests;
    those that a suite lacks are left out. Without it all of them, by the bootstrap. McNemar's test
    is of plain shares: a metric that weighs its items, such as a mean over tasks, has the
    bootstrap's p in its place. paired: metrics that take the items of both runs, as the values of
    either.

    shown: the measures of the report's tables, best known first; without any, all numbers are. The
    yes ratio and the length of answers stand behind them, where there are such numbers.
    length: whether answers are counted in tokens; not where they are no text, or the metrics have a
    length of their own. items: what its rows are. meaning: what the measures say, for the report's
    readers.
    """

    metrics: Metrics
    read: tuple[str, ...]
    same: tuple[str, ...]
    compared: dict[str, Test] | None = None
    paired: Callable[[Sequence[Row], Sequence[Row]], dict[str, tuple[Ratio, Ratio]]] | None = None
    shown: tuple[Metric, ...] = ()
    length: bool = True
    items: str = "items"
    meaning: str = ""

    def numbers(self, items: Sequence[Row]) -> dict[str, Ratio]:
        """The metrics of rows as a run keeps them: with a judge's reading, if there is one, and
        the length of answers.
        """
        lengths = answer_tokens(items) if self.length else {}
        return self.metrics(items) | judged_metrics(self.metrics, items) | lengths

    def columns(self, metrics: Collection[str]) -> tuple[Metric, ...]:
        """What tables show, of a suite that has these metrics."""
        shown = self.shown or tuple(Metric(key, key, percent=False) for key in metrics)
        judged = (
            replace(
                one, key=_JUDGED + one.key.removeprefix(_OFFICIAL), label=f"{one.label}, judged"
            )
            for one in shown
            if one.key.startswith(_OFFICIAL)
        )
        shown = (*shown, *(one for one in judged if one.key in metrics))
        known = {metric.key for metric in shown}
        extra = (one for one in (YES_RATIO, ANSWER_TOKENS) if one.key in {*metrics} - known)
        return (*shown, *extra)

    def tests(self, metrics: Mapping[str, Ratio]) -> dict[str, Test]:
        """The test of each of the metrics that is compared."""
        wanted: dict[str, Test] = self.compared or dict.fromkeys(metrics, "bootstrap")
        for name, test in [*wanted.items()]:
            if name.startswith(_OFFICIAL):
                wanted = {**wanted, _JUDGED + name.removeprefix(_OFFICIAL): test}
        for extra in (YES_RATIO, ANSWER_TOKENS):
            wanted = {**wanted, extra.key: wanted.get(extra.key, "bootstrap")}
        return {name: test for name, test in wanted.items() if name in metrics}

    def pairs(
        self, a_items: Sequence[Row], b_items: Sequence[Row]
    ) -> Iterator[tuple[str, Test, Ratio, Ratio]]:
        """(metric, test, of a, of b) for all that is compared."""
        a, b = self.numbers(a_items), self.numbers(b_items)
        for name, test in self.tests(a).items():
            if name in b:
                plain = _are_shares(a[name], b[name])
                yield name, test if plain else "bootstrap", a[name], b[name]
        if self.paired is not None:
            for name, (ours, theirs) in self.paired(a_items, b_items).items():
                yield name, "bootstrap", ours, theirs


def _are_shares(a: Ratio, b: Ratio) -> bool:
    """Whether both are the shares that are right of the same items, each counting once."""
    ones = all(np.isin(part, (0, 1)).all() for part in (a.numerator, a.denominator, b.numerator))
    return ones and np.array_equal(a.denominator, b.denominator)
