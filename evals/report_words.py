"""The report's sentences: what got better or worse, and how that was tested. All of it computed."""

from __future__ import annotations

from collections.abc import Sequence

from evals.compare import asked_otherwise
from evals.report import ALPHA, Finding, Report, suite_title

_TESTS = {"mcnemar": "McNemar's exact test", "bootstrap": "the paired bootstrap"}


def sentences(report: Report) -> dict[str, str]:
    """The findings in words, one sentence per run."""
    return {run.name: _sentence(report.findings[run.name]) for run in report.runs}


def explanation(report: Report) -> str:
    """Which tests were made, and what brackets and stars mean."""
    tests: dict[str, list[str]] = {}
    for finding in (f for findings in report.findings.values() for f in findings):
        labels = tests.setdefault(finding.comparison.test, [])
        if finding.metric.label not in labels:
            labels.append(finding.metric.label)
    used = "; ".join(f"{_TESTS[test]} for {listed(labels)}" for test, labels in tests.items())
    return (
        f"Each run is tested against base on the same items: {used}. Brackets hold the 95% "
        f"interval of the difference. {correction(report)}"
    )


def correction(report: Report) -> str:
    """Over how many tests p-values are corrected, and what a star says."""
    sizes = sorted({len(findings) for findings in report.findings.values()} - {0})
    if not sizes:
        return ""
    return (
        "p-values are corrected by Holm's method over the "
        f"{listed([str(size) for size in sizes])} tests of a run; * marks p < {ALPHA}."
    )


def unanswered(report: Report) -> str:
    """How many items no answer could be had for, by suite and model; empty if there are none."""
    counts = [
        f"{e.suites[key]['num_missing']:,} of {suite_title(suite)} by {e.name}"
        for key, suite in report.suites.items()
        for e in report.evaluations
        if e.suites.get(key, {}).get("num_missing")
    ]
    if not counts:
        return ""
    return (
        f"Unanswered, for a picture could not be read or a server was silent: {listed(counts)}. "
        "A question without an "
        "answer counts as wrong; descriptions that are missing are left out."
    )


def asked_apart(report: Report) -> str:
    """Which suites asked a run in other words than base; empty if none did."""
    apart = [
        f"{suite_title(suite)} by {run.name}"
        for key, suite in report.suites.items()
        for run in report.runs
        if key in run.suites
        and key in report.base.suites
        and asked_otherwise(report.base.items(key), run.items(key))
    ]
    if not apart:
        return ""
    return f"Asked in other words than by base, which may make a difference: {listed(apart)}."


def listed(words: Sequence[str]) -> str:
    """a, b and c."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _sentence(findings: Sequence[Finding]) -> str:
    """One run in words: what got better, worse, what changed, and what cannot be told."""
    if not findings:
        return "no measure could be tested against base."
    parts = [
        f"{verdict} in {listed(changes)}"
        for verdict in ("better", "worse", "changed")
        if (changes := [_change(finding) for finding in findings if finding.verdict == verdict])
    ]
    if not parts:
        return f"no significant difference from base in any of {len(findings)} measures."
    if unsure := [finding.label for finding in findings if finding.verdict == "not significant"]:
        which = listed(unsure) if len(unsure) <= 2 else f"the other {len(unsure)} measures"
        parts.append(f"no significant difference in {which}")
    return f"{'; '.join(parts)}."


def _change(finding: Finding) -> str:
    c, metric = finding.comparison, finding.metric
    unit = " %" if metric.percent else ""
    return f"{finding.label} ({metric.show(c.a)} → {metric.show(c.b)}{unit})"
