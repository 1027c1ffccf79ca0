"""The before/after report as report.html, report.md and results.json.

Every statement on the page is computed: words follow the numbers. The same directories give the
same bytes.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from evals.known import RULES
from evals.report import Report, finite, headline, suite_title
from evals.report_answers import add_answers
from evals.report_card import as_yaml, model_card, recipe_text
from evals.report_changes import Changes, add_changes
from evals.report_figures import add_categories, add_chair, add_curves
from evals.report_pictures import add_pictures, add_samples
from evals.report_probes import add_probes
from evals.report_scenes import add_scenes
from evals.report_tables import Grid, difference_tables, plain, suite_table, value_tables
from evals.report_words import asked_apart, correction, explanation, listed, sentences, unanswered
from mmalign.errors import ConfigError
from mmalign.report.page import Marked, Page
from mmalign.store import write_atomically

_NUMBERS = (
    "Numbers are percentages, except words, tokens and judges' scores; ± is half the width of the "
    "95% bootstrap interval. An arrow says which way is better."
)
_BESIDE = (
    "Read a number beside how often a model says yes and how much it says: one that says no more "
    "often, or says less, is wrong less often."
)


def write(report: Report) -> Path:
    """Write report.html, report.md, model_card.md and results.json into the recipe's output.

    Raises ConfigError for a name that cannot be drawn, DataError for a training recipe that cannot
    be read; nothing is written then.
    """
    output = report.recipe.output
    for evaluation in report.evaluations:
        # Half a surrogate pair has no glyph and no UTF-8, a control character no width.
        if any(unicodedata.category(character) in ("Cc", "Cs") for character in evaluation.name):
            raise ConfigError("holds no text", where="name", got=ascii(evaluation.name))
    (page, changed), card = _page(report), model_card(report)
    results = json.dumps(_results(report, changed), indent=2) + "\n"
    write_atomically(output / "results.json", results)
    # A model can emit half a surrogate pair, which UTF-8 cannot hold.
    for name, text in (("report.md", _markdown(report, changed)), ("model_card.md", card)):
        write_atomically(output / name, text.encode("utf-8", "replace"))
    page.write(output / "report.html")
    return output / "report.html"


def _page(report: Report) -> tuple[Page, dict[str, dict[str, Changes]]]:
    """The page, and what each run fixed and broke, by suite."""
    recipe = report.recipe
    page = Page(recipe.title, f"{listed([r.name for r in report.runs])} against {_of(report)}")
    for name, sentence in sentences(report).items():
        page.paragraph(Marked(((name, "strong"), (f": {sentence}", None))))
    if recipe.note:
        page.paragraph(recipe.note)
    if len(report.suites) > 1:
        page.heading("All suites")
        page.paragraph(f"{_NUMBERS} {correction(report)}")
        _add(page, suite_table(report))
        page.paragraph(_BESIDE)
    page.heading("Before and after")
    benchmarks = {suite["benchmark"] for suite in report.suites.values()}
    for meaning in [rules.meaning for name, rules in RULES.items() if name in benchmarks]:
        if meaning:
            page.paragraph(meaning)
    if len(report.suites) == 1:
        page.paragraph(f"{_NUMBERS} {_BESIDE}")
    for told in filter(None, (unanswered(report), asked_apart(report))):
        page.paragraph(told)
    for grid in value_tables(report):
        _add(page, grid)
    add_chair(page, report)
    add_categories(page, report)
    if grids := difference_tables(report):
        page.heading("Differences from base")
        page.paragraph(explanation(report))
        for grid in grids:
            _add(page, grid)
    add_curves(page, report)
    add_probes(page, report)
    add_scenes(page, report)
    changed = add_changes(page, report)
    add_answers(page, report)
    add_pictures(page, report)
    add_samples(page, report)
    page.heading("How it was run")
    for evaluation in report.evaluations:
        read = {key: evaluation.reading(key) for key in report.suites if key in evaluation.suites}
        page.code(
            as_yaml(evaluation.results | {"suites": read}), f"Evaluation of {evaluation.name}"
        )
    for run in recipe.runs:
        if (text := recipe_text(run)) is not None:
            page.code(text, f"Training recipe of {run.name}")
    return page, changed


def _add(page: Page, grid: Grid) -> None:
    page.table(grid.columns, grid.rows, grid.caption)


def _results(report: Report, changed: Mapping[str, Mapping[str, Changes]]) -> dict[str, Any]:
    best = {key: headline(suite) for key, suite in report.suites.items()}
    return {
        "title": report.recipe.title,
        "base": report.base.name,
        "suites": {
            key: {
                "title": suite_title(suite),
                "benchmark": suite["benchmark"],
                "num_items": suite["num_items"],
                "measure": None if (metric := best[key]) is None else metric.key,
            }
            for key, suite in report.suites.items()
        },
        "runs": {
            e.name: {
                key: {name: finite(value) for name, value in e.suites[key]["metrics"].items()}
                for key in report.suites
                if key in e.suites
            }
            for e in report.evaluations
        },
        "intervals": {
            e.name: {
                key: {name: e.interval(key, name) for name in e.suites[key]["metrics"]}
                for key in report.suites
                if key in e.suites
            }
            for e in report.evaluations
        },
        "changes": {
            run: {key: _counted(one) for key, one in of_run.items()}
            for run, of_run in changed.items()
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


def _counted(changes: Changes) -> dict[str, int]:
    counts = {"fixed": len(changes.fixed), "broke": len(changes.broke)}
    if changes.num_same is not None:
        return counts | {"same": changes.num_same}
    return counts | {"right": changes.num_right, "wrong": changes.num_wrong}


def _markdown(report: Report, changed: Mapping[str, Mapping[str, Changes]]) -> str:
    whole = [suite_table(report)] if len(report.suites) > 1 else []
    grids = [*whole, *value_tables(report), *difference_tables(report)]
    tables = "\n".join(grid.markdown() for grid in grids)
    said = sentences(report).items()
    summary = "\n".join(f"- {plain(name)}: {plain(sentence)}" for name, sentence in said)
    note = f"{plain(report.recipe.note)}\n\n" if report.recipe.note else ""
    lines = "".join(
        f"- {plain(suite_title(report.suites[key]))}, {plain(run)}: {one.counts}\n"
        for run, of_run in changed.items()
        for key, one in of_run.items()
    )
    lines = f"\nFixed and broken answers\n\n{lines}" if lines else ""
    return f"# {plain(report.recipe.title)}\n\n{summary}\n\n{note}{tables}{lines}"


def _of(report: Report) -> str:
    """Base and its model; the model's revision or hash stands under "How it was run"."""
    model = str(report.base.results.get("model", "")).partition("@")[0]
    return f"{report.base.name} ({model})" if model else report.base.name


def _jsonable(value: object) -> object:
    if isinstance(value, tuple | list):
        return [_jsonable(part) for part in value]
    return finite(value) if isinstance(value, float) else value
