"""The report's tables: every suite at a glance, each before and after, and what changed."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evals.known import RULES
from evals.report import Evaluation, Finding, Report, headline, measures, suite_title
from evals.rules import Metric
from mmalign.report.page import Kind, Marked

Cell = str | Marked | None
_KINDS: dict[str, Kind] = {"better": "good", "worse": "bad"}


def plain(text: str) -> str:
    """Text as Markdown that shows it as it is, in one line: no markup, end of a cell or HTML."""
    escaped = re.sub(r"([\\`*_\[\]#|~$>:@-])", r"\\\1", " ".join(text.split()))
    return escaped.replace("&", "&amp;").replace("<", "&lt;")


@dataclass(frozen=True)
class Grid:
    """A table before it is rendered as HTML or Markdown."""

    caption: str
    columns: list[str]
    rows: list[list[Cell]]

    def markdown(self) -> str:
        """An aligned Markdown table, which also reads well in a terminal."""
        return self._laid_out(plain)

    def text(self) -> str:
        """The same without Markdown's escapes, for a terminal."""
        return self._laid_out(lambda text: " ".join(text.split()))

    def _laid_out(self, put: Callable[[str], str]) -> str:
        cells = [[_one_line(cell, put) for cell in row] for row in [self.columns, *self.rows]]
        widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(self.columns))]
        rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
        lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in cells]
        body = "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])
        return f"{put(self.caption)}\n\n{body}\n"


def suite_table(report: Report) -> Grid:
    """A row per suite with its best known measure, a column per model; * marks what is supported.

    A run's star is that of the tests: Holm's correction over all of them, not these rows alone.
    """
    rows: list[list[Cell]] = []
    for key, suite in report.suites.items():
        metric = headline(suite)
        if metric is None:
            continue
        cells = [_value_cell(report.base, key, metric)]
        cells += [
            _value_cell(run, key, metric, report.finding(run.name, key, metric.key))
            for run in report.runs
        ]
        rows.append([_suite_cell(suite, metric), *cells])
    names = [evaluation.name for evaluation in report.evaluations]
    return Grid("Every suite by its best known measure", ["suite", *names], rows)


def value_tables(report: Report) -> list[Grid]:
    """The before/after tables: one per suite, a row per model, value ± half its interval."""
    grids = []
    for key, suite in report.suites.items():
        # A win rate is no model's own number: it stands among the differences.
        own = [metric for metric in measures(suite) if metric.key in suite["metrics"]]
        rows: list[list[Cell]] = [
            [e.name, *(_value_cell(e, key, metric) for metric in own)] for e in report.evaluations
        ]
        caption = f"{suite_title(suite)}: {_size(suite)}"
        grids.append(Grid(caption, ["model", *map(column, own)], rows))
    return grids


def difference_tables(report: Report) -> list[Grid]:
    """What changed against base: one table per tested suite, a row per run."""
    grids = []
    for key, suite in report.suites.items():
        found = {
            (name, finding.metric.key): finding
            for name, findings in report.findings.items()
            for finding in findings
            if finding.comparison.suite == key
        }
        metrics = [m for m in measures(suite) if any(tested == m.key for _, tested in found)]
        if metrics:
            rows: list[list[Cell]] = [
                [run.name, *(_difference_cell(found.get((run.name, m.key))) for m in metrics)]
                for run in report.runs
            ]
            columns = ["run", *map(column, metrics)]
            grids.append(Grid(f"{suite_title(suite)}: difference from base", columns, rows))
    return grids


def category_table(report: Report, key: str, metric: Metric, categories: Sequence[str]) -> Grid:
    """One measure by category, a row for each, a column per model that has the suite."""
    shown = [e for e in report.evaluations if key in e.suites]
    rows: list[list[Cell]] = [
        [name, *(_value_cell(e, key, metric.of(name)) for e in shown)] for name in categories
    ]
    title = suite_title(report.suites[key], metric)
    return Grid(f"{title} by category", ["category", *(e.name for e in shown)], rows)


def column(metric: Metric) -> str:
    """A measure's name with the arrow of its better way."""
    return metric.label + {"lower": "\u00a0↓", "higher": "\u00a0↑", None: ""}[metric.better]


def _suite_cell(suite: Mapping[str, Any], metric: Metric) -> Cell:
    title, whole = suite_title(suite), suite_title(suite, metric)
    if not whole.startswith(f"{title} "):
        return whole + column(metric).removeprefix(metric.label)
    return Marked(((title, None), (f" {column(metric)}", "quiet")))


def _value_cell(
    evaluation: Evaluation, suite: str, metric: Metric, finding: Finding | None = None
) -> Cell:
    """Value ± half its interval; with a finding, tinted and starred as that says."""
    value = evaluation.value(suite, metric.key)
    if value is None:
        return None
    star = "" if finding is None or finding.verdict == "not significant" else " *"
    kind = _KINDS.get(finding.verdict) if finding else None
    interval = evaluation.interval(suite, metric.key)
    if interval is None:
        return Marked(((metric.show(value), kind), (star, None))) if star else metric.show(value)
    half = metric.show((interval[1] - interval[0]) / 2)
    return Marked(((metric.show(value), kind), (f" ± {half}", "quiet"), (star, None)))


def _difference_cell(finding: Finding | None) -> Marked | None:
    if finding is None:
        return None
    c, metric = finding.comparison, finding.metric
    low, high = (metric.show(bound, sign=True) for bound in c.interval)
    p = f"p = {finding.p_holm:.3f}" if finding.p_holm >= 0.001 else "p < 0.001"
    star = "" if finding.verdict == "not significant" else " *"
    number = (metric.show(c.difference, sign=True) + star, _KINDS.get(finding.verdict))
    return Marked((number, ("\n", None), (f"[{low}, {high}] {p}", "quiet")))


def _size(suite: Mapping[str, Any]) -> str:
    rules = RULES.get(suite["benchmark"])
    return f"{suite['num_items']:,} {rules.items if rules else 'items'}"


def _one_line(cell: Cell, put: Callable[[str], str]) -> str:
    return "–" if cell is None else put(str(cell))
