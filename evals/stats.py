"""How sure a score is: bootstrap intervals, and paired tests between two models.

Every metric here is a ratio of two sums over items (accuracy, F1, CHAIR, recall), so one resampling
serves them all. Items that share a picture are drawn together: their errors are not independent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mmalign.errors import DataError

Array = NDArray[np.float64]
Interval = tuple[float, float]

# Draws times clusters held at once: 8 MB of counts.
_CHUNK = 1_000_000


@dataclass(frozen=True, eq=False)
class Ratio:
    """A metric as sum(numerator) / sum(denominator) over items; 0.0 where the denominator is 0.

    numerator, denominator: [N] float64, one entry per item.
    Example: F1 is Ratio(2 * tp, 2 * tp + fp + fn).
    """

    numerator: Array
    denominator: Array

    @property
    def value(self) -> float:
        """The metric over all items."""
        return float(_divide(self.numerator.sum(), self.denominator.sum()))


def ratio(numerator: ArrayLike, denominator: ArrayLike) -> Ratio:
    """A ratio of sums from per-item counts."""
    return Ratio(np.asarray(numerator, float), np.asarray(denominator, float))


def mean(values: ArrayLike) -> Ratio:
    """A mean over items: the ratio whose denominator counts each item once."""
    values = np.asarray(values, float)
    return Ratio(values, np.ones_like(values))


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How b differs from a. Relative figures are None where a is, or may well be, 0."""

    difference: float
    interval: Interval
    relative: float | None
    relative_interval: Interval | None
    p_value: float


def intervals(
    metrics: Mapping[str, Ratio],
    clusters: Sequence[object] | None = None,
    *,
    samples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Interval]:
    """Percentile bootstrap interval of each metric, all from the same draws.

    With C clusters, each draw takes C of them with replacement, T*[c] times cluster c, and
    m* = sum_c T*[c] numerator[c] / sum_c T*[c] denominator[c]; the interval is the (1 - level) / 2
    and (1 + level) / 2 quantile of m* over the draws.
    clusters: one label per item, such as its picture; None makes each item its own.
    Raises DataError where there are no items.
    """
    columns = [c for metric in metrics.values() for c in (metric.numerator, metric.denominator)]
    sums = _resampled_sums(np.stack(columns, axis=1), clusters, samples, seed)
    draws = _divide(sums[:, 0::2], sums[:, 1::2])
    return {name: _quantiles(draws[:, i], level) for i, name in enumerate(metrics)}


def paired_difference(
    a: Ratio,
    b: Ratio,
    clusters: Sequence[object] | None = None,
    *,
    samples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Difference:
    """Paired bootstrap of b - a and of (b - a) / a: both models meet the same draws of items.

    The two-sided p inverts the percentile interval of d* = b* - a*:
    k = min(#{d* <= 0}, #{d* >= 0}), p = min(1, 2 (k + 1) / (samples + 1)). The one counts the
    measured difference among the draws, on either side, so p is never below 2 / (samples + 1).
    Raises DataError where there are no items.
    """
    columns = np.stack([a.numerator, a.denominator, b.numerator, b.denominator], axis=1)
    sums = _resampled_sums(columns, clusters, samples, seed)
    a_draws, b_draws = _divide(sums[:, 0], sums[:, 1]), _divide(sums[:, 2], sums[:, 3])
    return _difference(a.value, b.value, a_draws, b_draws, level)


def pooled_difference(
    a: Sequence[Ratio],
    b: Sequence[Ratio],
    clusters: Sequence[object] | None = None,
    *,
    samples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Difference:
    """Bootstrap of b - a where each side is several runs, such as seeds, over the same items.

    A side's metric is that of its runs' sums. Each draw takes clusters of items with replacement,
    the same for all runs, and of each side as many of its runs with replacement: the difference is
    then of methods, not of these runs. Of k runs this sees (k - 1) / k of the variance between
    them: three are few. One run on each side is paired_difference.
    Raises DataError where there are no items, or a side has no run.
    """
    if not a or not b:
        raise DataError("each side needs a run", got=f"{len(a)} and {len(b)}")
    columns = [c for one in (*a, *b) for c in (one.numerator, one.denominator)]
    sums = _resampled_sums(np.stack(columns, axis=1), clusters, samples, seed)
    rng = np.random.default_rng([seed, 1])
    a_draws = _drawn_runs(sums[:, : 2 * len(a)], rng)
    b_draws = _drawn_runs(sums[:, 2 * len(a) :], rng)
    return _difference(pooled(a).value, pooled(b).value, a_draws, b_draws, level)


def pooled(runs: Sequence[Ratio]) -> Ratio:
    """The metric of several runs over the same items: the ratio of their sums."""
    numerator = np.sum([one.numerator for one in runs], axis=0)
    return Ratio(numerator, np.sum([one.denominator for one in runs], axis=0))


def mcnemar(a_correct: ArrayLike, b_correct: ArrayLike) -> float:
    """Exact two-sided McNemar test that two models are right equally often on the same items.

    With n items that only one model has right, m of them the rarer one's,
    p = min(1, 2 sum_{k<=m} C(n, k) / 2^n); 1.0 when the models never disagree.
    Takes items as independent: pictures that share many questions make it optimistic.
    """
    a, b = np.asarray(a_correct, bool), np.asarray(b_correct, bool)
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    n = only_a + only_b
    term = tail = 1
    for k in range(min(only_a, only_b)):
        term = term * (n - k) // (k + 1)
        tail += term
    # Integers all the way: C(n, k) overflows a float long before a benchmark's size.
    return min(1.0, 2 * tail / 2**n)


def _difference(a: float, b: float, a_draws: Array, b_draws: Array, level: float) -> Difference:
    """From both metrics, and both in each draw, [samples]."""
    draws = b_draws - a_draws
    extreme = min(int((draws <= 0).sum()), int((draws >= 0).sum()))
    has_base = a != 0 and bool((a_draws != 0).all())
    return Difference(
        difference=b - a,
        interval=_quantiles(draws, level),
        relative=(b - a) / a if a else None,
        relative_interval=_quantiles(draws / a_draws, level) if has_base else None,
        p_value=min(1.0, 2 * (extreme + 1) / (len(draws) + 1)),
    )


def _drawn_runs(sums: Array, rng: np.random.Generator) -> Array:
    """The metric of K runs drawn of K, in each draw: [samples, 2 K] sums to [samples]."""
    samples, runs = len(sums), sums.shape[1] // 2
    picked = rng.integers(runs, size=(samples, runs))
    rows = np.arange(samples)[:, None]
    return _divide(sums[rows, 2 * picked].sum(1), sums[rows, 2 * picked + 1].sum(1))


def _resampled_sums(
    columns: Array, clusters: Sequence[object] | None, samples: int, seed: int
) -> Array:
    """Column sums of `samples` bootstrap draws of clusters: [N, K] to [samples, K]."""
    totals = columns if clusters is None else _cluster_sums(columns, clusters)
    n = len(totals)
    if n == 0:
        raise DataError("an interval needs items", got="none", wanted="one at least")
    rng = np.random.default_rng(seed)
    sums = np.empty((samples, columns.shape[1]))
    rows = max(1, _CHUNK // n)
    for start in range(0, samples, rows):
        draws = rng.integers(n, size=(min(rows, samples - start), n))
        draws += n * np.arange(len(draws))[:, None]
        counts = np.bincount(draws.ravel(), minlength=draws.size).reshape(draws.shape)
        sums[start : start + len(draws)] = counts @ totals
    return sums


def _cluster_sums(columns: Array, clusters: Sequence[object]) -> Array:
    """Column sums within each cluster, in the order in which clusters first appear."""
    number: dict[object, int] = {}
    of_item = [number.setdefault(cluster, len(number)) for cluster in clusters]
    totals = np.zeros((len(number), columns.shape[1]))
    np.add.at(totals, of_item, columns)
    return totals


def _divide(numerator: ArrayLike, denominator: ArrayLike) -> Array:
    numerator, denominator = np.asarray(numerator, float), np.asarray(denominator, float)
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator != 0)


def _quantiles(draws: Array, level: float) -> Interval:
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
