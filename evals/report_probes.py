"""What runs found when they were asked during training: the form, and how far it carries over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evals.report import Report, finite
from mmalign.report.page import Page

# One colour each in every run's figure.
_FORM = {
    "Generalization Factor": "gf/raw",
    "of the gains": "gf/relative",
    "in distribution": "probe/id/format",
    "out of distribution": "probe/ood/format",
}
_ACCURACY = {
    "in distribution": "probe/id/accuracy",
    "out of distribution": "probe/ood/accuracy",
}


def add_probes(page: Page, report: Report) -> None:
    """For each run that has probes: its form rates with their Generalization Factor, and its
    accuracies."""
    from mmalign.report.figures import curves

    probed = {
        name: history
        for name, history in report.histories.items()
        if any("probe/id/format" in row for row in history.values())
    }
    if not probed:
        return
    page.heading("Form and accuracy during training")
    page.paragraph(
        "Each run answered the same questions as it went on, asked as in training and in other "
        "words. The Generalization Factor is F₂ of the two shares of answers that are in form, so "
        "that the share out of distribution weighs more; of the gains: the same of what was gained "
        "since the run's first probe."
    )
    for name, history in probed.items():
        for title, caption, keys in (
            (f"Answers in form, %: {name}", "Share of answers in the form asked for.", _FORM),
            (f"Right answers, %: {name}", "Share of answers that are right.", _ACCURACY),
        ):
            series = {label: _points(history, key) for label, key in keys.items()}
            if any(series.values()):
                page.figure(curves(series, "step", title), caption)


def _points(history: Mapping[int, dict[str, Any]], key: str) -> list[tuple[float, float]]:
    found = ((step, finite(row.get(key))) for step, row in history.items())
    return [(step, 100 * value) for step, value in found if value is not None]
