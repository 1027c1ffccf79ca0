"""The before/after report as report.html, report.md and results.json.

Every statement on the page is computed: words follow the numbers. The same directories give the
same bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from evals.known import RULES
from evals.report import (
    ALPHA,
    Evaluation,
    Finding,
    Report,
    finite,
    measures,
    suite_title,
)
from evals.report_answers import add_answers
from evals.report_pictures import add_pictures, add_samples
from evals.report_probes import add_probes
from evals.report_scenes import add_scenes
from evals.rules import Metric
from mmalign.report.page import Kind, Marked, Page
from mmalign.store import write_atomically

_TESTS = {"mcnemar": "McNemar's exact test", "bootstrap": "the paired bootstrap"}
_CURVE_POINTS = 100
_CURVES = {
    "train/loss": ("Loss", "Each run's own loss: heights of different losses do not compare."),
    "train/margin": (
        "Margin",
        "Of chosen over rejected, as each loss measures it; against the reference, if it has one.",
    ),
    "train/reward/format": (
        "Reward: format",
        "Share of rollouts in form, before the reward's weight.",
    ),
    "train/reward/accuracy": (
        "Reward: accuracy",
        "Share of rollouts with a right answer, before the reward's weight.",
    ),
    "train/response_tokens": ("Length of rollouts in tokens", "Their end included."),
    "train/chosen_error": (
        "Denoising error of the chosen picture",
        "A diffusion model's own measure: the smaller, the likelier it finds the picture.",
    ),
    "train/rejected_error": (
        "Denoising error of the rejected picture",
        "Above its start, training has made the rejected picture less likely.",
    ),
    "train/chosen_logp_change": (
        "Chosen log-probability, change from reference (nats)",
        "Below zero, training has made the chosen response less likely.",
    ),
    "train/rejected_logp_change": (
        "Rejected log-probability, change from reference (nats)",
        "Below zero, training has made the rejected response less likely.",
    ),
}


@dataclass(frozen=True)
class Grid:
    """A table before it is rendered as HTML or Markdown."""

    caption: str
    columns: list[str]
    rows: list[list[str | Marked | None]]

    def markdown(self) -> str:
        """An aligned Markdown table, which also reads well in a terminal."""
        cells = [[_one_line(cell) for cell in row] for row in [self.columns, *self.rows]]
        widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(self.columns))]
        rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
        lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in cells]
        body = "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])
        return f"{self.caption}\n\n{body}\n"


def write(report: Report) -> Path:
    """Write report.html, report.md and results.json into the recipe's output folder."""
    output, page = report.recipe.output, _page(report)
    write_atomically(output / "results.json", json.dumps(_results(report), indent=2) + "\n")
    write_atomically(output / "report.md", _markdown(report))
    page.write(output / "report.html")
    return output / "report.html"


def value_tables(report: Report) -> list[Grid]:
    """The before/after tables: one per suite, a row per model, value ± half its interval."""
    grids = []
    for key, suite in report.suites.items():
        # A win rate is no model's own number: it stands among the differences.
        own = [metric for metric in measures(suite) if metric.key in suite["metrics"]]
        rows = [
            [e.name, *(_value_cell(e, key, metric) for metric in own)] for e in report.evaluations
        ]
        caption = f"{suite_title(suite)}: {_size(suite)}"
        grids.append(Grid(caption, ["model", *map(_column, own)], rows))
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
            rows = [
                [run.name, *(_difference_cell(found.get((run.name, m.key))) for m in metrics)]
                for run in report.runs
            ]
            columns = ["run", *map(_column, metrics)]
            grids.append(Grid(f"{suite_title(suite)}: difference from base", columns, rows))
    return grids


def sentences(report: Report) -> dict[str, str]:
    """The findings in words, one sentence per run."""
    return {run.name: _sentence(report.findings[run.name]) for run in report.runs}


def _sentence(findings: Sequence[Finding]) -> str:
    """One run in words: what got better, worse, what changed, and what cannot be told."""
    if not findings:
        return "no measure could be tested against base."
    parts = [
        f"{verdict} in {_listed(changes)}"
        for verdict in ("better", "worse", "changed")
        if (changes := [_change(finding) for finding in findings if finding.verdict == verdict])
    ]
    if not parts:
        return f"no significant difference from base in any of {len(findings)} measures."
    if unsure := [finding.label for finding in findings if finding.verdict == "not significant"]:
        which = _listed(unsure) if len(unsure) <= 2 else f"the other {len(unsure)} measures"
        parts.append(f"no significant difference in {which}")
    return f"{'; '.join(parts)}."


def _change(finding: Finding) -> str:
    c, metric = finding.comparison, finding.metric
    unit = " %" if metric.percent else ""
    return f"{finding.label} ({metric.show(c.a)} → {metric.show(c.b)}{unit})"


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _page(report: Report) -> Page:
    recipe = report.recipe
    page = Page(recipe.title, f"{_listed([r.name for r in report.runs])} against {_of(report)}")
    for name, sentence in sentences(report).items():
        page.paragraph(Marked(((name, "strong"), (f": {sentence}", None))))
    if recipe.note:
        page.paragraph(recipe.note)
    page.heading("Before and after")
    benchmarks = {suite["benchmark"] for suite in report.suites.values()}
    for meaning in [rules.meaning for name, rules in RULES.items() if name in benchmarks]:
        if meaning:
            page.paragraph(meaning)
    page.paragraph(
        "Numbers are percentages, except words, tokens and judges' scores; ± is half the width of "
        "the 95% bootstrap interval. An arrow says which way is better."
    )
    if unanswered := _unanswered(report):
        page.paragraph(unanswered)
    for grid in value_tables(report):
        page.table(grid.columns, grid.rows, grid.caption)
    _add_bars(page, report)
    if grids := difference_tables(report):
        page.heading("Differences from base")
        page.paragraph(_explanation(report))
        for grid in grids:
            page.table(grid.columns, grid.rows, grid.caption)
    _add_curves(page, report)
    add_probes(page, report)
    add_scenes(page, report)
    add_answers(page, report)
    add_pictures(page, report)
    add_samples(page, report)
    page.heading("How it was run")
    for evaluation in report.evaluations:
        kept = {key: value for key, value in evaluation.results.items() if key != "suites"}
        page.code(_yaml(kept), f"Evaluation of {evaluation.name}")
    for run in recipe.runs:
        if run.train and (run.train / "recipe.yaml").exists():
            page.code((run.train / "recipe.yaml").read_text(), f"Training recipe of {run.name}")
    return page


def _explanation(report: Report) -> str:
    tests: dict[str, list[str]] = {}
    for finding in (f for findings in report.findings.values() for f in findings):
        labels = tests.setdefault(finding.comparison.test, [])
        if finding.metric.label not in labels:
            labels.append(finding.metric.label)
    used = "; ".join(f"{_TESTS[test]} for {_listed(labels)}" for test, labels in tests.items())
    sizes = sorted({len(findings) for findings in report.findings.values()} - {0})
    return (
        f"Each run is tested against base on the same items: {used}. Brackets hold the 95% "
        "interval of the difference. p-values are corrected by Holm's method over the "
        f"{_listed([str(size) for size in sizes])} tests of a run; * marks p < {ALPHA}."
    )


def _unanswered(report: Report) -> str:
    """How many pictures no answer could be had for, by suite and model; empty if there are none."""
    counts = [
        f"{e.suites[key]['num_missing']:,} of {suite_title(suite)} by {e.name}"
        for key, suite in report.suites.items()
        for e in report.evaluations
        if e.suites.get(key, {}).get("num_missing")
    ]
    if not counts:
        return ""
    return (
        f"Unanswered, for the picture could not be read: {_listed(counts)}. POPE counts these "
        "as wrong, CHAIR leaves them out."
    )


def _add_bars(page: Page, report: Report) -> None:
    from mmalign.report.figures import bars_with_intervals

    for key, suite in report.suites.items():
        shown = [e for e in report.evaluations if e.value(key, "chair_i") is not None]
        if suite["benchmark"] == "chair" and shown:
            intervals = [e.interval(key, "chair_i") for e in shown]
            page.figure(
                bars_with_intervals(
                    [e.name for e in shown],
                    [100 * (e.value(key, "chair_i") or 0) for e in shown],
                    [(100 * i[0], 100 * i[1]) if i else None for i in intervals],
                    title=f"{suite_title(suite, RULES['chair'].shown[0])}, %",
                ),
                "Share of mentioned objects that are not in the picture, with its 95% interval. "
                "Lower is better.",
            )


def _add_curves(page: Page, report: Report) -> None:
    from mmalign.report.figures import curves

    drawn: list[tuple[str, str]] = []
    for key, (title, caption) in _CURVES.items():
        series = {
            name: _binned([(step, row[key]) for step, row in history.items() if key in row])
            for name, history in report.histories.items()
        }
        if any(series.values()):
            drawn.append((curves(series, "step", title), caption))
    if drawn:
        page.heading("Training")
        most = max(len(history) for history in report.histories.values())
        if most > _CURVE_POINTS:
            page.paragraph(f"A run's steps are averaged into {_CURVE_POINTS} points at most.")
        for svg, caption in drawn:
            page.figure(svg, caption)


def _results(report: Report) -> dict[str, Any]:
    return {
        "title": report.recipe.title,
        "base": report.base.name,
        "runs": {
            e.name: {
                key: {name: finite(value) for name, value in e.suites[key]["metrics"].items()}
                for key in report.suites
                if key in e.suites
            }
            for e in report.evaluations
        },
        "comparisons": {
            name: [
                {k: _jsonable(v) for k, v in asdict(finding.comparison).items()}
                | {"p_holm": finding.p_holm, "verdict": finding.verdict}
                for finding in findings
            ]
            for name, findings in report.findings.items()
        },
    }


def _markdown(report: Report) -> str:
    tables = "\n".join(
        grid.markdown() for grid in [*value_tables(report), *difference_tables(report)]
    )
    summary = "\n".join(f"- {name}: {sentence}" for name, sentence in sentences(report).items())
    note = f"{report.recipe.note}\n\n" if report.recipe.note else ""
    return f"# {report.recipe.title}\n\n{summary}\n\n{note}{tables}"


def _binned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most _CURVE_POINTS points: neighbours averaged, in both coordinates."""
    size = max(1, math.ceil(len(points) / _CURVE_POINTS))
    bins = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in b) / len(b), sum(y for _, y in b) / len(b)) for b in bins]


def _column(metric: Metric) -> str:
    return metric.label + {"lower": "\u00a0↓", "higher": "\u00a0↑", None: ""}[metric.better]


def _value_cell(evaluation: Evaluation, suite: str, metric: Metric) -> str | Marked | None:
    value = evaluation.value(suite, metric.key)
    if value is None:
        return None
    interval = evaluation.interval(suite, metric.key)
    if interval is None:
        return metric.show(value)
    half = metric.show((interval[1] - interval[0]) / 2)
    return Marked(((metric.show(value), None), (f" ± {half}", "quiet")))


def _difference_cell(finding: Finding | None) -> Marked | None:
    if finding is None:
        return None
    c, metric = finding.comparison, finding.metric
    low, high = (metric.show(bound, sign=True) for bound in c.interval)
    p = f"p = {finding.p_holm:.3f}" if finding.p_holm >= 0.001 else "p < 0.001"
    star = "" if finding.verdict == "not significant" else " *"
    kinds: dict[str, Kind] = {"better": "good", "worse": "bad"}
    number = (metric.show(c.difference, sign=True) + star, kinds.get(finding.verdict))
    return Marked((number, ("\n", None), (f"[{low}, {high}] {p}", "quiet")))


def _size(suite: Mapping[str, Any]) -> str:
    rules = RULES.get(suite["benchmark"])
    return f"{suite['num_items']:,} {rules.items if rules else 'items'}"


def _of(report: Report) -> str:
    """Base and its model; the model's revision or hash stands under "How it was run"."""
    model = str(report.base.results.get("model", "")).partition("@")[0]
    return f"{report.base.name} ({model})" if model else report.base.name


def _one_line(cell: str | Marked | None) -> str:
    return "–" if cell is None else " ".join(str(cell).split()).replace("|", r"\|")


def _jsonable(value: object) -> object:
    if isinstance(value, tuple | list):
        return [_jsonable(part) for part in value]
    return finite(value) if isinstance(value, float) else value


def _yaml(data: object) -> str:
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
