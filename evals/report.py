"""The before/after report: evaluation directories in; report.html, report.md, results.json out.

    report = collect(load_config("configs/eval/report_example.yaml", ReportRecipe))
    path = write(report)

Every statement on the page is computed: words follow the numbers, and a difference that the tests
do not support is called not significant. The same directories give the same bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, model_validator

from evals.base import read_jsonl
from evals.compare import Comparison, compare
from mmalign.config import Strict
from mmalign.errors import ConfigError, DataError, MediaError
from mmalign.report.page import Card, Kind, Marked, Page, mark, thumbnail
from mmalign.store import write_atomically

ALPHA = 0.05
_TESTS = {"mcnemar": "McNemar's exact test", "bootstrap": "the paired bootstrap"}
_CURVE_POINTS = 100
_CURVES = {
    "train/loss": "Loss",
    "train/margin": "Reward margin, chosen over rejected",
    "train/chosen_logp_change": "Chosen log-probability, change from reference (nats)",
    "train/rejected_logp_change": "Rejected log-probability, change from reference (nats)",
}


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
        return self


@dataclass(frozen=True)
class Metric:
    """How one number is shown: its key in results.json, its words, and which way is better."""

    key: str
    label: str
    better: Literal["lower", "higher"] | None = None
    percent: bool = True

    def show(self, value: float, *, sign: bool = False) -> str:
        """The number in percent or as it is, to one decimal."""
        rounded = round(100 * value if self.percent else value, 1) + 0.0  # never "-0.0"
        return f"{rounded:{'+' if sign and rounded else ''}.1f}".replace("-", "−")


METRICS: dict[str, tuple[Metric, ...]] = {
    "chair": (
        Metric("chair_i", "CHAIR_i", "lower"),
        Metric("chair_s", "CHAIR_s", "lower"),
        Metric("recall", "recall", "higher"),
        Metric("num_words", "words", percent=False),
    ),
    "pope": (
        Metric("official/accuracy", "accuracy", "higher"),
        Metric("official/f1", "F1", "higher"),
        Metric("yes_ratio", "yes ratio"),
        Metric("unparsed_rate", "unparsed", "lower"),
    ),
}


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
        return _finite(self.suites.get(suite, {}).get("metrics", {}).get(metric))

    def interval(self, suite: str, metric: str) -> tuple[float, float] | None:
        """The 95% interval of one number, where there is one."""
        low, high = self.suites.get(suite, {}).get("intervals", {}).get(metric) or (None, None)
        low, high = _finite(low), _finite(high)
        return None if low is None or high is None else (low, high)

    def items(self, suite: str) -> dict[str, dict[str, Any]]:
        """The answered items of one suite, by id."""
        path = self.folder / self.suites[suite]["items"]
        return {str(row["id"]): row for _, row in read_jsonl(path)}


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


@dataclass(frozen=True)
class Report:
    """Everything the report says, before it is written.

    suites: those shown, by key, as the first evaluation that holds one describes it.
    findings: by run name.
    """

    recipe: ReportRecipe
    base: Evaluation
    runs: list[Evaluation]
    suites: dict[str, dict[str, Any]]
    findings: dict[str, list[Finding]]

    @property
    def evaluations(self) -> list[Evaluation]:
        """Base first, then the runs in the recipe's order."""
        return [self.base, *self.runs]

    def values(self) -> list[Grid]:
        """The before/after tables: one per suite, a row per model, value ± half its interval."""
        return [
            Grid(
                caption=f"{_title(suite)}: {suite['num_items']:,} items",
                columns=["model", *(_column(metric) for metric in _metrics(suite))],
                rows=[
                    [e.name, *(_value_cell(e, key, metric) for metric in _metrics(suite))]
                    for e in self.evaluations
                ],
            )
            for key, suite in self.suites.items()
        ]

    def differences(self) -> list[Grid]:
        """What changed against base: one table per tested suite, a row per run."""
        grids = []
        for key, suite in self.suites.items():
            found = {
                (name, finding.metric.key): finding
                for name, findings in self.findings.items()
                for finding in findings
                if finding.comparison.suite == key
            }
            metrics = [m for m in _metrics(suite) if any(tested == m.key for _, tested in found)]
            if metrics:
                rows = [
                    [run.name, *(_difference_cell(found.get((run.name, m.key))) for m in metrics)]
                    for run in self.runs
                ]
                columns = ["run", *map(_column, metrics)]
                grids.append(Grid(f"{_title(suite)}: difference from base", columns, rows))
        return grids

    def summary(self) -> dict[str, str]:
        """The findings in words, one sentence per run."""
        return {run.name: _sentence(self.findings[run.name]) for run in self.runs}


def build_report(recipe: ReportRecipe) -> Path:
    """Read the evaluations, test them against base, write the report; returns report.html."""
    return write(collect(recipe))


def collect(recipe: ReportRecipe) -> Report:
    """Read every directory of the recipe and run the paired tests.

    Raises DataError for a directory without results, ConfigError for a suite nobody has.
    """
    base = _read_evaluation(recipe.base_name, recipe.base)
    runs = [_read_evaluation(run.name, run.eval) for run in recipe.runs]
    suites = _suites([base, *runs], recipe.suites)
    findings = {
        run.name: _findings(suites, compare(base.folder, run.folder, seed=0)) for run in runs
    }
    return Report(recipe, base, runs, suites, findings)


def write(report: Report) -> Path:
    """Write report.html, report.md and results.json into the recipe's output folder."""
    output = report.recipe.output
    path = output / "report.html"
    write_atomically(output / "results.json", json.dumps(_results(report), indent=2) + "\n")
    write_atomically(output / "report.md", _markdown(report))
    _page(report).write(path)
    return path


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
        (key, metric.key): (metric, _title(suite, metric))
        for key, suite in suites.items()
        for metric in _metrics(suite)
    }
    family = [c for c in comparisons if (c.suite, c.metric) in shown]
    adjusted = holm([c.p_value for c in family])
    return [Finding(c, *shown[c.suite, c.metric], p) for c, p in zip(family, adjusted, strict=True)]


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
    for name, sentence in report.summary().items():
        page.paragraph(Marked(((name, "strong"), (f": {sentence}", None))))
    if recipe.note:
        page.paragraph(recipe.note)
    page.heading("Before and after")
    page.paragraph(
        "Numbers are percentages, except words, the mean length of a caption; ± is half the "
        "width of the 95% bootstrap interval. An arrow says which way is better."
    )
    for grid in report.values():
        page.table(grid.columns, grid.rows, grid.caption)
    _add_bars(page, report)
    if grids := report.differences():
        page.heading("Differences from base")
        page.paragraph(_explanation(report))
        for grid in grids:
            page.table(grid.columns, grid.rows, grid.caption)
    _add_curves(page, recipe)
    _add_gallery(page, report)
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
                    title=f"{_title(suite, METRICS['chair'][0])}, %",
                ),
                "Share of mentioned objects that are not in the picture, with its 95% interval. "
                "Lower is better.",
            )


def _add_curves(page: Page, recipe: ReportRecipe) -> None:
    from mmalign.report.figures import curves

    histories = {run.name: _read_history(run.train) for run in recipe.runs if run.train}
    drawn = []
    for key, title in _CURVES.items():
        series = {
            name: _binned([(step, row[key]) for step, row in history.items() if key in row])
            for name, history in histories.items()
        }
        series = {name: points for name, points in series.items() if points}
        if series:
            drawn.append(curves(series, "step", title))
    if drawn:
        page.heading("Training")
        most = max(len(history) for history in histories.values())
        if most > _CURVE_POINTS:
            page.paragraph(f"A run's steps are averaged into {_CURVE_POINTS} points at most.")
        for svg in drawn:
            page.figure(svg)


def _add_gallery(page: Page, report: Report) -> None:
    """Where answers changed most: half of the cards got better, half got worse."""
    key = _gallery_suite(report)
    half = report.recipe.gallery // 2
    if key is None or half == 0:
        return
    evaluations = [e for e in report.evaluations if key in e.suites]
    items = {e.name: e.items(key) for e in evaluations}
    answered = ({id for id, row in rows.items() if row["answer"]} for rows in items.values())
    shared = sorted(set.intersection(*answered))
    before = items[report.base.name]
    change = {
        id: sum(_errors(rows[id]) for rows in items.values()) - len(items) * _errors(before[id])
        for id in shared
    }
    fixed = sorted((id for id in shared if change[id] < 0), key=lambda id: (change[id], id))
    broken = sorted((id for id in shared if change[id] > 0), key=lambda id: (-change[id], id))
    if not fixed and not broken:
        return
    page.heading("Scenes")
    page.paragraph(
        f"{_title(report.suites[key])}: over all runs, {len(fixed):,} of {len(shared):,} answered "
        f"items have fewer errors than under base, {len(broken):,} have more, and "
        f"{len(shared) - len(fixed) - len(broken):,} as many. Below are the largest changes "
        "each way, not a random sample; what is not in the picture, or is wrong, is highlighted."
    )
    root = Path(report.base.suites[key]["images"])
    for verdict, ids in (("Fixed", fixed[:half]), ("Broken", broken[:half])):
        if ids:
            page.gallery([_card(verdict, id, items, root) for id in ids])


def _gallery_suite(report: Report) -> str | None:
    """The first caption suite that base and a run share, else the first suite they share."""
    shared = [
        key
        for key in report.suites
        if key in report.base.suites and any(key in run.suites for run in report.runs)
    ]
    captions = [key for key in shared if report.suites[key]["benchmark"] == "chair"]
    return next(iter(captions or shared), None)


def _card(verdict: str, id: str, items: Mapping[str, dict[str, Any]], root: Path) -> Card:
    from mmalign.media import open_image
    from mmalign.records import Media

    first = next(iter(items.values()))[id]
    texts: list[tuple[str, str | Marked]] = []
    if "label" in first:
        texts.append(("question", f"{first['prompt']} (right answer: {first['label']})"))
    for name, rows in items.items():
        row = rows[id]
        if "hallucinated" in row:
            words = sorted(set(row["hallucinated"]))
            # The answer may name an object in other words than its category's.
            listed = f"\nNot in the picture: {', '.join(words) or 'nothing'}."
            answer = mark(row["answer"], words).parts
            texts.append((name, Marked((*answer, (listed, "quiet")))))
        else:
            wrong = Marked(((row["answer"], "bad" if _errors(row) else None),))
            texts.append((f"{name} · {'wrong' if _errors(row) else 'right'}", wrong))
    note = f"In the picture: {', '.join(first['truth'])}." if first.get("truth") else ""
    try:
        pictures = [thumbnail(open_image(Media(path=first["image"]), root), max_side=320)]
    except MediaError as error:
        # The scene is still worth reading without its picture, and the card says what is missing.
        pictures, note = [], f"{note} The picture is not shown: {error}".strip()
    return Card(f"{verdict}: {id}", pictures, texts, note)


def _errors(row: Mapping[str, Any]) -> int:
    if "hallucinated" in row:
        return len(set(row["hallucinated"]))
    return 0 if row["correct_official"] else 1


def _results(report: Report) -> dict[str, Any]:
    return {
        "title": report.recipe.title,
        "base": report.base.name,
        "runs": {
            e.name: {
                key: {name: _finite(value) for name, value in e.suites[key]["metrics"].items()}
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
    tables = "\n".join(grid.markdown() for grid in [*report.values(), *report.differences()])
    summary = "\n".join(f"- {name}: {sentence}" for name, sentence in report.summary().items())
    note = f"{report.recipe.note}\n\n" if report.recipe.note else ""
    return f"# {report.recipe.title}\n\n{summary}\n\n{note}{tables}"


def _read_evaluation(name: str, folder: Path) -> Evaluation:
    path = folder / "results.json"
    try:
        results = json.loads(path.read_text())
    except FileNotFoundError:
        fix = "run `mmalign eval` for it first" if folder.is_dir() else "correct the path"
        raise DataError("holds no finished evaluation", where=str(folder), fix=fix) from None
    except ValueError as error:
        raise DataError(f"is not valid JSON ({error})", where=str(path)) from None
    if not isinstance(results, dict) or "suites" not in results:
        raise DataError("is not the result of an evaluation", where=str(path), wanted="suites")
    return Evaluation(name, folder, results)


def _read_history(folder: Path) -> dict[int, dict[str, Any]]:
    """Metrics by step; a step that a resumed run repeated counts once, as it went last."""
    history: dict[int, dict[str, Any]] = {}
    for _, row in read_jsonl(folder / "metrics.jsonl"):
        history[row["step"]] = history.get(row["step"], {}) | row
    return dict(sorted(history.items()))


def _binned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most _CURVE_POINTS points: neighbours averaged, in both coordinates."""
    size = max(1, math.ceil(len(points) / _CURVE_POINTS))
    bins = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in b) / len(b), sum(y for _, y in b) / len(b)) for b in bins]


def _metrics(suite: Mapping[str, Any]) -> tuple[Metric, ...]:
    """The measures of a benchmark; one this file does not know shows all of its numbers."""
    known = METRICS.get(suite["benchmark"])
    return known or tuple(Metric(key, key, percent=False) for key in suite["metrics"])


def _title(suite: Mapping[str, Any], metric: Metric | None = None) -> str:
    """The suite in words, such as "POPE adversarial", or one of its measures: "CHAIR recall"."""
    name, label = str(suite["benchmark"]).upper(), metric.label if metric else ""
    # "CHAIR CHAIR_i" says one thing twice.
    parts = ["" if label.startswith(name) else name, suite.get("split"), label]
    return " ".join(part for part in parts if part)


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


def _of(report: Report) -> str:
    model = report.base.results.get("model")
    return f"{report.base.name} ({model})" if isinstance(model, str) else report.base.name


def _one_line(cell: str | Marked | None) -> str:
    return "–" if cell is None else " ".join(str(cell).split()).replace("|", r"\|")


def _finite(value: object) -> float | None:
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def _jsonable(value: object) -> object:
    if isinstance(value, tuple | list):
        return [_jsonable(part) for part in value]
    return _finite(value) if isinstance(value, float) else value


def _yaml(data: object) -> str:
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
