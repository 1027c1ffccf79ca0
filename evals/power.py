"""How many questions a difference needs before a paired test is likely to find it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np

from evals.compare import Matched, matched
from evals.stats import Array
from mmalign.errors import ConfigError

LEVEL, POWER = 0.05, 0.8


@dataclass(frozen=True, kw_only=True)
class Power:
    """What one suite of two runs says of a comparison's size.

    discordance: share of the items that only one of the runs has right. design: how many times as
    many items it takes because those of a picture are right or wrong together.
    needed: items for the difference asked about. detectable: the difference that the items that are
    there are enough for.
    """

    suite: str
    metric: str
    num_items: int
    discordance: float
    design: float
    needed: int
    detectable: float


def num_needed(
    difference: float, discordance: float, *, level: float = LEVEL, power: float = POWER
) -> int:
    """Paired items with which McNemar's test finds a difference with the given chance.

    n = (z_{1 - level/2} sqrt(q) + z_{power} sqrt(q - d^2))^2 / d^2, q the discordance and d the
    difference of the two shares (Connor 1987, Biometrics 43:207), items independent, rounded up.
    Raises ConfigError where d is not in (0, q], which it cannot exceed, or q not in (0, 1].
    """
    if not 0 < discordance <= 1:
        raise ConfigError("is no share of items", where="discordance", got=discordance)
    if not 0 < difference <= discordance:
        raise ConfigError(
            "two runs differ by no more than the share of items that only one has right",
            where="difference",
            got=difference,
            wanted=f"above 0, at most {discordance:g}",
        )
    z, q, d = NormalDist().inv_cdf, discordance, difference
    root = z(1 - level / 2) * math.sqrt(q) + z(power) * math.sqrt(q - d * d)
    # An exact whole number may come out a little above itself.
    return math.ceil(root * root / (d * d) - 1e-9)


def detectable(
    num_items: float, discordance: float, *, level: float = LEVEL, power: float = POWER
) -> float:
    """The smallest difference that so many paired items are enough for, to 1e-6.

    No more than the discordance, also where even that would take more items.
    """
    low, high = 0.0, discordance
    while high - low > 1e-6:
        middle = (low + high) / 2
        enough = num_needed(middle, discordance, level=level, power=power) <= num_items
        low, high = (low, middle) if enough else (middle, high)
    return high


def design_effect(difference: Array, clusters: Sequence[object]) -> float:
    """Variance of a mean of [N] values with clusters drawn whole, over that of free items.

    sum_c (sum_{i in c} (x_i - mean))^2 / sum_i (x_i - mean)^2; 1.0 where no value differs.
    """
    apart = difference - difference.mean()
    free = float((apart**2).sum())
    if free == 0:
        return 1.0
    totals: dict[object, float] = {}
    for cluster, value in zip(clusters, apart.tolist(), strict=True):
        totals[cluster] = totals.get(cluster, 0.0) + value
    return sum(total**2 for total in totals.values()) / free


def power_of(
    a: str | Path,
    b: str | Path,
    difference: float,
    *,
    level: float = LEVEL,
    power: float = POWER,
) -> list[Power]:
    """Every suite's right-or-wrong metrics, those that McNemar's test compares.

    Items are those that a metric counts: questions, or groups of them that are right together.
    Their numbers are multiplied by the design effect, where that is above 1. Where the runs
    disagree on less than the difference, it is taken that all further disagreement is for one side.
    Suites on which the runs never disagree say nothing, and are left out.
    """
    return plans(matched([a, b]), difference, level=level, power=power)


def plans(
    suites: Iterable[Matched], difference: float, *, level: float = LEVEL, power: float = POWER
) -> list[Power]:
    """What power_of says, of suites of two runs each."""
    found: list[Power] = []
    for suite in suites:
        for metric, test, ours, theirs in suite.rules.pairs(*suite.items):
            if test != "mcnemar":
                continue
            # Groups count at their first row, and some rows for other metrics only.
            counted = ours.denominator != 0
            gaps = (theirs.numerator - ours.numerator)[counted]
            clusters = [one for one, here in zip(suite.clusters, counted, strict=True) if here]
            discordance = float(np.mean(gaps != 0))
            if discordance == 0:
                continue
            design = max(1.0, design_effect(gaps, clusters))
            wanted = max(difference, discordance)
            needed = num_needed(difference, wanted, level=level, power=power)
            found.append(
                Power(
                    suite=suite.key,
                    metric=metric,
                    num_items=len(gaps),
                    discordance=discordance,
                    design=design,
                    needed=math.ceil(needed * design),
                    detectable=detectable(
                        len(gaps) / design, discordance, level=level, power=power
                    ),
                )
            )
    return found
