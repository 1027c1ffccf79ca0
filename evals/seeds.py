"""Compare several runs of each side, such as three seeds of a method with three of another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from evals.compare import Comparison, matched
from evals.stats import pooled, pooled_difference
from mmalign.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class PooledComparison(Comparison):
    """A comparison of two sides' pooled answers; a_runs, b_runs: the metric of each run alone."""

    a_runs: tuple[float, ...]
    b_runs: tuple[float, ...]


def compare_pooled(
    a_dirs: Sequence[str | Path],
    b_dirs: Sequence[str | Path],
    *,
    seed: int = 0,
    samples: int = 2000,
) -> list[PooledComparison]:
    """Compare the runs of side b with those of side a on every suite that all of them hold.

    Pictures and runs are both drawn (evals.stats.pooled_difference), for every metric. Metrics that
    are of two runs alone, such as win rates, are left out. Raises DataError as `compare` does,
    ConfigError where a side is given a run twice.
    """
    for side in (a_dirs, b_dirs):
        counts = Counter(Path(run).resolve() for run in side)
        if twice := [str(run) for run, count in counts.items() if count > 1]:
            raise ConfigError("is one run, and given twice", where=twice[0], fix="name it once")
    found: list[PooledComparison] = []
    for suite in matched([*a_dirs, *b_dirs]):
        by_run = [suite.rules.numbers(items) for items in suite.items]
        for metric in suite.rules.tests(by_run[0]):
            if any(metric not in metrics for metrics in by_run):
                continue
            ratios = [metrics[metric] for metrics in by_run]
            a, b = ratios[: len(a_dirs)], ratios[len(a_dirs) :]
            result = pooled_difference(a, b, suite.clusters, samples=samples, seed=seed)
            found.append(
                PooledComparison(
                    suite=suite.key,
                    metric=metric,
                    a=pooled(a).value,
                    b=pooled(b).value,
                    difference=result.difference,
                    interval=result.interval,
                    relative=result.relative,
                    relative_interval=result.relative_interval,
                    p_value=result.p_value,
                    test="bootstrap",
                    a_runs=tuple(one.value for one in a),
                    b_runs=tuple(one.value for one in b),
                )
            )
    return found
