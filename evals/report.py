"""What the before/after report says: evaluation directories in, tested differences out.

    report = collect(load_config("configs/eval/report_example.yaml", ReportRecipe))
    path = write(report)  # evals.report_page

A difference that the tests do not support is called not significant.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from evals.base import read_jsonl
from evals.compare import Comparison, compare, read_items, read_results
from evals.image_preference import BENCHMARK, WINS
from evals.known import RULES, title_of
from evals.rules import Metric
from mmalign.config import Strict
from mmalign.errors import ConfigError, DataError

ALPHA = 0.05
# Enough for a p-value to stay small after Holm's correction multiplies it.
_SAMPLES = 10_000


class ReportRun(Strict):
    """One trained model: its evaluation directory and, for the curves, its training run."""

    name: str
    eval: Path
    train: Path | None = None


class ReportRecipe(Strict):
    """What to compare with what; `suites` limits the report to some suite keys."""

    title: str = "Before and after"
    output: Path
    base: Path
    base_name: str = "base"
    runs: list[ReportRun] = Field(min_length=1)
    suites: list[str] | None = None
    gallery: int = Field(default=8, ge=0)
    note: str = ""

    @model_validator(mode="after")
    def _names_differ(self) -> ReportRecipe:
        names = [self.base_name, *(run.name for run in self.runs)]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"every run needs its own name; repeated: {', '.join(repeated)}")
        folders = {one.absolute() for one in (self.base, *(run.eval for run in self.runs))}
        if self.output.absolute() in folders:
            raise ValueError("output is the folder of a run, whose results it would replace")
        return self


@dataclass(frozen=True)
class Evaluation:
    """One evaluation directory, read."""

    name: str
    folder: Path
    results: dict[str, Any]

    @cached_property
    def suites(self) -> dict[str, dict[str, Any]]:
        """Its suites by key, in the order they were run."""
        return {suite["key"]: suite for suite in self.results["suites"]}

    def value(self, suite: str, metric: str) -> float | None:
        """One number, or None where the suite or the metric is absent or undefined."""
        return finite(self.suites.get(suite, {}).get("metrics", {}).get(metric))

    def interval(self, suite: str, metric: str) -> tuple[float, float] | None:
        """The 95% interval of one number, where there is one."""
        low, high = self.suites.get(suite, {}).get("intervals", {}).get(metric) or (None, None)
        low, high = finite(low), finite(high)
        return None if low is None or high is None else (low, high)

    def reading(self, suite: str) -> dict[str, Any]:
        """How the answers of one suite were read: in words, and by which judge if by any."""
        known = self.suites.get(suite, {})
        return {key: known[key] for key in ("method", "judge") if known.get(key)}

    def items(self, suite: str) -> dict[str, dict[str, Any]]:
        """The scored items of one suite, by id."""
        return read_items(self.folder, self.suites[suite])


@dataclass(frozen=True)
class Finding:
    """A paired test of one number, run against base, with its p-value corrected within the run."""

    comparison: Comparison
    metric: Metric
    label: str
    p_holm: float

    @property
    def verdict(self) -> Literal["better", "worse", "changed", "not significant"]:
        """What the test supports, in a word."""
        if self.p_holm >= ALPHA or self.comparison.difference == 0:
            return "not significant"
        if self.metric.better is None:
            return "changed"
        rose = self.comparison.difference > 0
        return "better" if rose == (self.metric.better == "higher") else "worse"


@dataclass(frozen=True)
class Report:
    """Everything the report says, before it is written.

    suites: those shown, by key, as the first evaluation that holds one describes it.
    findings: by run name. histories: the metrics of each training run, by run name, then by step.
    """

    recipe: ReportRecipe
    base: Evaluation
    runs: list[Evaluation]
    suites: dict[str, dict[str, Any]]
    findings: dict[str, list[Finding]]
    histories: dict[str, dict[int, dict[str, Any]]]

    @property
    def evaluations(self) -> list[Evaluation]:
        """Base first, then the runs in the recipe's order."""
        return [self.base, *self.runs]

    def finding(self, run: str, suite: str, metric: str) -> Finding | None:
        """The test of one number of a run, if there was one."""
        of_run = (f for f in self.findings.get(run, ()) if f.comparison.suite == suite)
        return next((f for f in of_run if f.metric.key == metric), None)


def collect(recipe: ReportRecipe) -> Report:
    """Read every directory of the recipe and run the paired tests.

    Raises DataError for a directory without results, ConfigError for a suite nobody has.
    """
    base = Evaluation(recipe.base_name, recipe.base, read_results(recipe.base))
    runs = [Evaluation(run.name, run.eval, read_results(run.eval)) for run in recipe.runs]
    suites = _suites([base, *runs], recipe.suites)
    findings = {
        run.name: _findings(
            suites, compare(base.folder, run.folder, suites=suites, samples=_SAMPLES)
        )
        for run in runs
    }
    histories = {run.name: _history(run.train) for run in recipe.runs if run.train}
    return Report(recipe, base, runs, suites, findings, histories)


# Judges whose score is a share.
_SHARES = ("digit_reader",)


def _judge_metrics(judges: Sequence[str]) -> tuple[Metric, ...]:
    """Each judge's mean score, and how often it prefers the run's picture to base's."""
    scores = [
        Metric(name, name, "higher", percent=name in _SHARES, decimals=1 if name in _SHARES else 2)
        for name in judges
    ]
    return (*scores, *(Metric(WINS + name, f"wins by {name}", "higher") for name in judges))


def measures(suite: Mapping[str, Any]) -> tuple[Metric, ...]:
    """The measures of a benchmark; one this file does not know shows all of its numbers."""
    if suite["benchmark"] == BENCHMARK:
        return _judge_metrics([*suite["metrics"]])
    known = RULES.get(suite["benchmark"])
    if known is None:
        return tuple(Metric(key, key, percent=False) for key in suite["metrics"])
    return known.columns(suite["metrics"])


def headline(suite: Mapping[str, Any]) -> Metric | None:
    """The best known of the measures that the suite has."""
    return next((one for one in measures(suite) if one.key in suite["metrics"]), None)


def categories(suite: Mapping[str, Any]) -> dict[Metric, list[str]]:
    """The measures that the suite has by category too, as `<measure>/<category>`."""
    shown = {metric.key: metric for metric in measures(suite)}
    found: dict[Metric, list[str]] = {}
    for name in suite["metrics"]:
        # Of two measures one of which begins like the other, the longer one's.
        owners = [key for key in shown if name.startswith(f"{key}/")]
        if owners and name not in shown:
            key = max(owners, key=len)
            found.setdefault(shown[key], []).append(name.removeprefix(f"{key}/"))
    return found


def suite_title(suite: Mapping[str, Any], metric: Metric | None = None) -> str:
    """The suite in words, such as "POPE adversarial", or one of its measures: "CHAIR recall"."""
    name, label = title_of(str(suite["benchmark"])), metric.label if metric else ""
    # "CHAIR CHAIR_i" says one thing twice.
    parts = ["" if label.startswith(name) else name, suite.get("split"), label]
    return " ".join(part for part in parts if part)


def spread(items: Mapping[str, Mapping[str, Any]], count: int) -> tuple[list[str], int]:
    """Ids of up to `count` items that all evaluations hold, evenly spread: nobody chose them.

    items: of each evaluation, by id. Also returns how many such items there are.
    """
    ids = sorted(set.intersection(*(set(rows) for rows in items.values())))
    return evenly(ids, count), len(ids)


def evenly(ids: Sequence[str], count: int) -> list[str]:
    """Up to `count` of them, evenly spread, the first among them."""
    count = min(count, len(ids))
    return [ids[number * len(ids) // count] for number in range(count)]


def finite(value: object) -> float | None:
    """The value if it is a number that JSON can hold, else None."""
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: the family-wise error of the whole list stays below alpha.

    p'_(i) = max over j <= i of min(1, (n - j + 1) p_(j)), with p sorted ascending (Holm 1979).
    """
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def _suites(
    evaluations: Sequence[Evaluation], wanted: Sequence[str] | None
) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for evaluation in evaluations:
        for key, suite in evaluation.suites.items():
            found.setdefault(key, suite)
    for key in wanted or ():
        if key not in found:
            held = ", ".join(found)
            raise ConfigError("no evaluation holds it", where="suites", got=key, wanted=held)
    return {key: suite for key, suite in found.items() if wanted is None or key in wanted}


def _findings(
    suites: Mapping[str, dict[str, Any]], comparisons: Sequence[Comparison]
) -> list[Finding]:
    """The comparisons the tables show; they are the family that Holm's correction covers."""
    shown = {
        (key, metric.key): (metric, suite_title(suite, metric))
        for key, suite in suites.items()
        for metric in measures(suite)
    }
    # A metric that counts nothing that is there, such as hallucinations of a model that names no
    # object, can be neither better nor worse.
    family = [c for c in comparisons if (c.suite, c.metric) in shown and c.testable]
    adjusted = holm([c.p_value for c in family])
    return [Finding(c, *shown[c.suite, c.metric], p) for c, p in zip(family, adjusted, strict=True)]


def _history(folder: Path) -> dict[int, dict[str, Any]]:
    """Metrics by step; a step that a resumed run repeated counts once, as it went last."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        raise DataError(
            "holds no metrics.jsonl, so there are no curves to draw",
            where=str(folder),
            fix="name the folder of the training run, or leave `train` out",
        )
    history: dict[int, dict[str, Any]] = {}
    for where, row in read_jsonl(path):
        if not isinstance(row.get("step"), int):
            raise DataError("is of no step", where=where, got=f"fields {', '.join(row)}")
        history[row["step"]] = history.get(row["step"], {}) | row
    return dict(sorted(history.items()))
