"""What comparing and reporting need to know of a benchmark: a constant beside each one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from evals.base import Row
from evals.stats import Ratio

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

    def show(self, value: float, *, sign: bool = False) -> str:
        """The number in percent or as it is, rounded."""
        # Adding 0.0 never leaves a "-0.0".
        rounded = round(100 * value if self.percent else value, self.decimals) + 0.0
        plus = "+" if sign and rounded else ""
        return f"{rounded:{plus}.{self.decimals}f}".replace("-", "−")


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How one benchmark is compared and shown.

    metrics: its numbers, from rows alone. read: fields that a row must hold. same: those that must
    agree between runs as well, beside the picture or clip. compared: metrics with their tests;
    those that a suite lacks are left out. Without it all of them, by the bootstrap. paired: metrics
    that take the items of both runs, as the values of either.

    shown: the measures of the report's tables, best known first; without any, all numbers are.
    items: what its rows are. meaning: what the measures say, for the report's readers.
    """

    metrics: Metrics
    read: tuple[str, ...]
    same: tuple[str, ...]
    compared: dict[str, Test] | None = None
    paired: Callable[[Sequence[Row], Sequence[Row]], dict[str, tuple[Ratio, Ratio]]] | None = None
    shown: tuple[Metric, ...] = ()
    items: str = "items"
    meaning: str = ""

    def tests(self, metrics: Mapping[str, Ratio]) -> dict[str, Test]:
        """The test of each of the metrics that is compared."""
        wanted = self.compared or dict.fromkeys(metrics, "bootstrap")
        return {name: test for name, test in wanted.items() if name in metrics}

    def pairs(
        self, a_items: Sequence[Row], b_items: Sequence[Row]
    ) -> Iterator[tuple[str, Test, Ratio, Ratio]]:
        """(metric, test, of a, of b) for all that is compared."""
        a, b = self.metrics(a_items), self.metrics(b_items)
        for name, test in self.tests(a).items():
            if name in b:
                yield name, test, a[name], b[name]
        if self.paired is not None:
            for name, (ours, theirs) in self.paired(a_items, b_items).items():
                yield name, "bootstrap", ours, theirs
