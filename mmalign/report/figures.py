"""Drawings for a report page: SVG strings whose colours follow the page, light or dark.

Colours are CSS variables of the page's style sheet, with a fallback for an SVG opened alone. The
same numbers give the same bytes.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Matplotlib wants real colours, so it draws in these, each replaced by its variable afterwards.
_INK = {"#010101": "var(--quiet, #777)", "#020202": "var(--line, #ccc)"}
_SERIES = ("#2b6cb0", "#c05621", "#2f855a", "#8a4fbf", "#a8336a", "#7a6a1f", "#32808c", "#6b7280")
_VARIABLES = _INK | {color: f"var(--series-{i}, {color})" for i, color in enumerate(_SERIES, 1)}
_DASHES = ("solid", (0, (6, 1.5)), (0, (1.5, 1)))
_LEGEND_COLUMNS = 2
_LABEL_LENGTH = 28
# A value and its interval; None where there is no value.
Bar = tuple[float, tuple[float, float] | None] | None
_RC: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "axes.unicode_minus": True,
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.edgecolor": "#020202",
    "axes.labelcolor": "#010101",
    "axes.titlecolor": "#010101",
    "text.color": "#010101",
    "xtick.color": "#020202",
    "ytick.color": "#020202",
    "xtick.labelcolor": "#010101",
    "ytick.labelcolor": "#010101",
    "grid.color": "#020202",
    "grid.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "legend.frameon": False,
}


def curves(
    series: Mapping[str, Sequence[tuple[float, float]]],
    xlabel: str,
    ylabel: str,
    title: str = "",
) -> str:
    """One line per named series of (x, y) points; points that are not finite leave a gap.

    A series without points is not drawn, and its colour stays free: figures that name the same
    series in the same order draw each in one colour.
    """
    drawn = {name: points for name, points in series.items() if points}
    with _axes(5.4, 3.3 + 0.2 * _legend_rows(drawn), title or ylabel) as (figure, axes):
        for index, (name, points) in enumerate(series.items()):
            if not points:
                continue
            axes.plot(
                [x for x, _ in points],
                [y if math.isfinite(y) else math.nan for _, y in points],
                color=_SERIES[index % len(_SERIES)],
                linestyle=_DASHES[index % len(_DASHES)],
                linewidth=1.6,
                marker="o" if len(points) == 1 else None,
                markersize=4,
                label=_plain(name),
            )
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel if title else "")
        axes.locator_params(axis="x", nbins=6, integer=_whole(series))
        axes.grid(axis="y")
        if len(drawn) > 1:
            figure.legend(loc="outside lower left", ncols=_LEGEND_COLUMNS, handlelength=2.2)
        return _svg(figure, f"{title or ylabel} over {xlabel}")


def bars_with_intervals(
    labels: Sequence[str],
    values: Sequence[float],
    intervals: Sequence[tuple[float, float] | None],
    *,
    xlabel: str = "",
    title: str = "",
) -> str:
    """Horizontal bars from zero, top to bottom, each with its interval as a whisker."""
    with _axes(5.4, 0.9 + 0.42 * len(labels), title or xlabel) as (figure, axes):
        rows = range(len(labels))
        axes.barh(rows, values, height=0.6, color=_SERIES[0], alpha=0.75)
        for row, interval in zip(rows, intervals, strict=True):
            if interval is not None:
                axes.plot(interval, (row, row), color="#010101", linewidth=1.4, marker="|")
        ends = [max(v, i[1] if i else v) for v, i in zip(values, intervals, strict=True)]
        for row, value, end in zip(rows, values, ends, strict=True):
            axes.annotate(
                f"{value:.1f}",
                (max(end, 0), row),
                xytext=(6, 0),
                textcoords="offset points",
                verticalalignment="center",
            )
        axes.set_yticks(rows, [_plain(label) for label in labels])
        axes.tick_params(axis="y", length=0)
        axes.invert_yaxis()
        axes.set_xlim(left=min([0.0, *values]), right=1.12 * max([*ends, 1e-9]))
        axes.set_xlabel(xlabel if title else "")
        axes.grid(axis="x")
        axes.spines["left"].set_visible(False)
        return _svg(figure, title or xlabel)


def grouped_bars(
    groups: Sequence[str],
    series: Mapping[str, Sequence[Bar]],
    *,
    title: str,
) -> str:
    """Horizontal bars from zero, a bar of each series in every group, with intervals as whiskers.

    groups: their names, top to bottom. series: of each name a bar per group, None where it has
    none. Colours go by the order of the series.
    """
    height = 0.9 + len(groups) * (0.12 + 0.09 * len(series)) + 0.2 * _legend_rows(series)
    with _axes(5.4, height, title) as (figure, axes):
        thick = 0.8 / len(series)
        reach = [0.0]
        for index, (name, bars) in enumerate(series.items()):
            color = _SERIES[index % len(_SERIES)]
            rows = [row - 0.4 + thick * (index + 0.5) for row in range(len(bars))]
            drawn = [(row, *bar) for row, bar in zip(rows, bars, strict=True) if bar is not None]
            axes.barh(
                [row for row, _, _ in drawn],
                [value for _, value, _ in drawn],
                height=0.9 * thick,
                color=color,
                alpha=0.75,
                label=_plain(name),
            )
            for row, value, interval in drawn:
                reach += [value, *(interval or ())]
                if interval is not None:
                    axes.plot(interval, (row, row), color="#010101", linewidth=0.9)
        axes.set_yticks(range(len(groups)), [_plain(group) for group in groups])
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(groups) - 0.5, -0.5)
        axes.set_xlim(left=min(reach), right=1.03 * max(*reach, 1e-9))
        axes.grid(axis="x")
        axes.spines["left"].set_visible(False)
        if len(series) > 1:
            figure.legend(loc="outside lower left", ncols=_LEGEND_COLUMNS, handlelength=1.2)
        return _svg(figure, title)


def _legend_rows(series: Mapping[str, object]) -> int:
    return math.ceil(len(series) / _LEGEND_COLUMNS) if len(series) > 1 else 0


def _whole(series: Mapping[str, Sequence[tuple[float, float]]]) -> bool:
    return all(float(x).is_integer() for points in series.values() for x, _ in points)


def _plain(name: str) -> str:
    """A label short enough to leave room for the drawing, and shown whatever it begins with."""
    short = name if len(name) <= _LABEL_LENGTH else f"{name[: _LABEL_LENGTH - 1]}…"
    # Matplotlib hides labels that begin with an underscore.
    return f"\u200b{short}" if short.startswith("_") else short


@contextmanager
def _axes(width: float, height: float, title: str) -> Iterator[tuple[Figure, Axes]]:
    """A transparent figure with one set of axes, drawn in the page's own style."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # Salted by title, so that the figures of one page share no element id.
    with matplotlib.rc_context({**_RC, "svg.hashsalt": title}):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        axes.set_title(title, loc="left", fontsize=11)
        yield figure, axes


def _svg(figure: Figure, label: str) -> str:
    """The figure as an <svg> element to stand inside HTML: no prolog, no metadata, own fonts."""
    sink = io.StringIO()
    with warnings.catch_warnings():
        # Text stays text, so the reader's own fonts draw what matplotlib's cannot.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(sink, format="svg", metadata={"Date": None})
    text = sink.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*">', "<g>", text)
    # Inside a page this rule would restyle the whole document.
    text = re.sub(r'<style type="text/css">.*?</style>', "", text, flags=re.DOTALL)
    text = re.sub(r"'DejaVu Sans'(, '[^']*')*(, sans-serif)?", "system-ui, sans-serif", text)
    for color, variable in _VARIABLES.items():
        text = text.replace(color, variable)
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1)
