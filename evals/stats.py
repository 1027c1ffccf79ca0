"""How sure a score is: bootstrap intervals, and paired tests between two models.

Every metric here is a ratio of two sums over items (accuracy, F1, CHAIR, recall), or a function of
such ratios, so one resampling serves them all. Items that share a picture are drawn together: their
errors are not independent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mmalign.errors import DataError

Array = NDArray[np.float64]
Interval = tuple[float, float]

# Draws times clusters held at once: 8 MB of counts.
_CHUNK = 1_000_000


def _only(ratios: Array) -> Array:
    """The value of the one ratio that there is, [..., 1] to [...]."""
    return ratios[..., 0]


@dataclass(frozen=True, eq=False)
class Ratio:
    """A metric as sum(numerator) / sum(denominator) over items; 0.0 where the denominator is 0.

    numerator, denominator: [N] float64, one entry per item. A function of K ratios (`combined`)
    has a column for each, [N, K]; function: takes the ratios, [..., K], to the metric, [...].
    Example: F1 is Ratio(2 * tp, 2 * tp + fp + fn).
    """

    numerator: Array
    denominator: Array
    function: Callable[[Array], Array] = _only

    @property
    def value(self) -> float:
        """The metric over all items."""
        sums = [np.atleast_1d(part.sum(axis=0)) for part in (self.numerator, self.denominator)]
        return float(self.of_sums(np.concatenate(sums)))

    @property
    def columns(self) -> Array:
        """What is summed over items: the K numerators, then the K denominators, [N, 2 K]."""
        return np.column_stack([self.numerator, self.denominator])

    def of_sums(self, sums: Array, *, empty: float = 0.0) -> Array:
        """The metric from the sums of its columns, [..., 2 K] to [...]; `empty` of 0 items."""
        numerators, denominators = np.split(sums, 2, axis=-1)
        return self.function(_divide(numerators, denominators, empty))

    def drawn(self, sums: Array) -> Array:
        """The metric in each draw; NaN where a draw holds nothing that it counts."""
        return self.of_sums(sums, empty=np.nan)


def ratio(numerator: ArrayLike, denominator: ArrayLike) -> Ratio:
    """A ratio of sums from per-item counts."""
    return Ratio(np.asarray(numerator, float), np.asarray(denominator, float))


def mean(values: ArrayLike) -> Ratio:
    """A mean over items: the ratio whose denominator counts each item once."""
    values = np.asarray(values, float)
    return Ratio(values, np.ones_like(values))


def combined(function: Callable[..., Array], parts: Sequence[Ratio]) -> Ratio:
    """function(part_1, part_2, ...) over the same items, each part drawn anew in a draw.

    function: of arrays of one shape, entry by entry. Intervals are quantiles of its values over
    the draws, so that it need not be linear; they are to be trusted where it is smooth.
    Example: the geometric mean of two ratios is combined(lambda a, b: np.sqrt(a * b), [a, b]).
    """
    ends = np.cumsum([part.columns.shape[1] // 2 for part in parts])[:-1]

    def whole(ratios: Array) -> Array:
        own = np.split(ratios, ends, axis=-1)
        return function(*(part.function(one) for part, one in zip(parts, own, strict=True)))

    return Ratio(
        np.column_stack([part.numerator for part in parts]),
        np.column_stack([part.denominator for part in parts]),
        whole,
    )


def weighted_sum(parts: Sequence[tuple[float, Ratio]], constant: float = 0.0) -> Ratio:
    """constant + sum_k weight_k part_k, over the same items.

    Example: AMBER's score is weighted_sum([(-0.5, chair), (0.5, f1)], 0.5).
    """
    weights = [weight for weight, _ in parts]

    def total(*values: Array) -> Array:
        return constant + np.stack(values, axis=-1) @ np.array(weights)

    return combined(total, [part for _, part in parts])


def matthews(tp: Ratio, fp: Ratio, fn: Ratio, tn: Ratio) -> Ratio:
    """Matthews' correlation of a prediction with the truth, from its counts or shares.

    (tp tn - fp fn) / sqrt((tp + fp) (tp + fn) (tn + fp) (tn + fn)), from -1 to 1; 0 where either
    is the same for all items, as in scikit-learn.
    """
    return combined(_matthews, [tp, fp, fn, tn])


def _matthews(tp: Array, fp: Array, fn: Array, tn: Array) -> Array:
    spread = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    return _divide(tp * tn - fp * fn, np.sqrt(spread))


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
    and (1 + level) / 2 quantile of m* over the draws. A draw without anything that a metric counts,
    such as one item of a rare category, says nothing of it and is left out. Where no draw has any,
    as of hallucinated mentions where nothing is mentioned, the interval is NaN.
    clusters: one label per item, such as its picture; None makes each item its own.
    Raises DataError where there are no items.
    """
    columns = np.concatenate([metric.columns for metric in metrics.values()], axis=1)
    sums = _resampled_sums(columns, clusters, samples, seed)
    found: dict[str, Interval] = {}
    for name, metric in metrics.items():
        own, sums = np.split(sums, [metric.columns.shape[1]], axis=1)
        found[name] = _quantiles(metric.drawn(own), level)
    return found


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
    (found,) = paired_differences([(a, b)], clusters, samples=samples, seed=seed, level=level)
    return found


def paired_differences(
    pairs: Sequence[tuple[Ratio, Ratio]],
    clusters: Sequence[object] | None = None,
    *,
    samples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> list[Difference]:
    """paired_difference of each pair (a, b) over the same items, all from the same draws."""
    if not pairs:
        return []
    columns = [metric.columns for pair in pairs for metric in pair]
    sums = _resampled_sums(np.concatenate(columns, axis=1), clusters, samples, seed)
    own = np.split(sums, np.cumsum([part.shape[1] for part in columns])[:-1], axis=1)
    return [
        _difference(a.value, b.value, a.drawn(of_a), b.drawn(of_b), level)
        for (a, b), of_a, of_b in zip(pairs, own[0::2], own[1::2], strict=True)
    ]


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
    columns = np.concatenate([one.columns for one in (*a, *b)], axis=1)
    sums = _resampled_sums(columns, clusters, samples, seed)
    by_run = sums.reshape(samples, len(a) + len(b), -1)
    rng = np.random.default_rng([seed, 1])
    a_draws = a[0].drawn(_drawn_runs(by_run[:, : len(a)], rng))
    b_draws = b[0].drawn(_drawn_runs(by_run[:, len(a) :], rng))
    return _difference(pooled(a).value, pooled(b).value, a_draws, b_draws, level)


def pooled(runs: Sequence[Ratio]) -> Ratio:
    """The metric of several runs over the same items: the ratio of their sums."""
    numerator = np.sum([one.numerator for one in runs], axis=0)
    denominator = np.sum([one.denominator for one in runs], axis=0)
    return Ratio(numerator, denominator, runs[0].function)


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
    """From both metrics, and both in each draw, [samples]; NaN draws are left out.

    Where all are, nothing is known: the interval is NaN, and p is 1.
    """
    defined = ~np.isnan(a_draws + b_draws)
    a_draws, b_draws = a_draws[defined], b_draws[defined]
    draws = b_draws - a_draws
    extreme = min(int((draws <= 0).sum()), int((draws >= 0).sum()))
    has_base = a != 0 and len(draws) > 0 and bool((a_draws != 0).all())
    return Difference(
        difference=b - a,
        interval=_quantiles(draws, level),
        relative=(b - a) / a if a else None,
        relative_interval=_quantiles(draws / a_draws, level) if has_base else None,
        p_value=min(1.0, 2 * (extreme + 1) / (len(draws) + 1)),
    )


def _drawn_runs(sums: Array, rng: np.random.Generator) -> Array:
    """The sums of K runs drawn of K, in each draw: [samples, K, columns] to [samples, columns]."""
    samples, runs = sums.shape[:2]
    picked = rng.integers(runs, size=(samples, runs))
    return sums[np.arange(samples)[:, None], picked].sum(1)


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


def _divide(numerator: ArrayLike, denominator: ArrayLike, empty: float = 0.0) -> Array:
    """numerator / denominator, and `empty` where that is 0."""
    numerator, denominator = np.asarray(numerator, float), np.asarray(denominator, float)
    out = np.full_like(numerator, empty)
    return np.divide(numerator, denominator, out=out, where=denominator != 0)


def _quantiles(draws: Array, level: float) -> Interval:
    """Of the draws that are numbers; NaN where none is: nothing is known then."""
    draws = draws[~np.isnan(draws)]
    if not len(draws):
        return np.nan, np.nan
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
