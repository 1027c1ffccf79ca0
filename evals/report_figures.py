"""The report's drawings: bars of CHAIR, bars by category, and curves of training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from evals.known import RULES
from evals.report import Evaluation, Report, categories, finite, suite_title
from evals.report_tables import category_table
from evals.rules import Metric
from mmalign.report.page import Page

if TYPE_CHECKING:
    from mmalign.report.figures import Bar

# More categories than this are a table: bars would be too thin to tell apart.
MOST_CATEGORIES = 24
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


def add_chair(page: Page, report: Report) -> None:
    """For each suite of captions, the share of what is made up, by model."""
    from mmalign.report.figures import bars_with_intervals

    metric = RULES["chair"].shown[0]
    for key, suite in report.suites.items():
        shown = [e for e in report.evaluations if e.value(key, metric.key) is not None]
        if suite["benchmark"] == "chair" and shown:
            bars = [_bar(e, key, metric) or (0.0, None) for e in shown]
            page.figure(
                bars_with_intervals(
                    [e.name for e in shown],
                    [value for value, _ in bars],
                    [interval for _, interval in bars],
                    title=f"{suite_title(suite, metric)}, %",
                ),
                "Share of mentioned objects that are not in the picture, with its 95% interval. "
                "Lower is better.",
            )


def add_categories(page: Page, report: Report) -> None:
    """Bars of every measure that a suite has by category, and their numbers, folded away."""
    from mmalign.report.figures import grouped_bars

    found = [
        (key, metric, names)
        for key, suite in report.suites.items()
        for metric, names in categories(suite).items()
    ]
    if not found:
        return
    page.heading("By category")
    page.paragraph(
        "Lines over bars are 95% intervals. They are of each model by itself, and not corrected "
        f"for their number. More than {MOST_CATEGORIES} categories are a table alone."
    )
    for key, metric, names in found:
        if len(names) > MOST_CATEGORIES:
            continue
        # Every model, so that each keeps its colour in figures that not all are in.
        series = {
            e.name: [_bar(e, key, metric.of(name)) for name in names] for e in report.evaluations
        }
        unit = ", %" if metric.percent else ""
        title = f"{suite_title(report.suites[key], metric)}{unit}"
        better = "" if metric.better is None else f"{metric.better.capitalize()} is better."
        page.figure(grouped_bars(names, series, title=title), better)
    for key, metric, names in found:
        grid = category_table(report, key, metric, names)
        page.table(grid.columns, grid.rows, grid.caption, folded=len(names) <= MOST_CATEGORIES)


def _bar(evaluation: Evaluation, key: str, metric: Metric) -> Bar:
    value, interval = evaluation.value(key, metric.key), evaluation.interval(key, metric.key)
    if value is None:
        return None
    by = 100 if metric.percent else 1
    return by * value, None if interval is None else (by * interval[0], by * interval[1])


def add_curves(page: Page, report: Report) -> None:
    """What each run measured of itself as it trained, one figure for each measure."""
    from mmalign.report.figures import curves

    drawn: list[tuple[str, str]] = []
    for key, (title, caption) in _CURVES.items():
        series = {
            name: _binned(_points(history, key)) for name, history in report.histories.items()
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


def _points(history: Mapping[int, dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """A measure by step; a step where it is null or not finite is left out."""
    found = ((step, finite(row.get(key))) for step, row in history.items())
    return [(step, value) for step, value in found if value is not None]


def _binned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most _CURVE_POINTS points: neighbours averaged, in both coordinates."""
    size = max(1, math.ceil(len(points) / _CURVE_POINTS))
    bins = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in b) / len(b), sum(y for _, y in b) / len(b)) for b in bins]
