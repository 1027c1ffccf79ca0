"""A fragment for a model card on the Hugging Face hub: its metadata, and what was measured.

Metadata as the hub's specification of `model-index` has it (huggingface/hub-docs, modelcard.md): of
each result a task type, a dataset's type and name, and metrics with type, value and name. All of it
is what the files of the evaluations and training runs say. A card is public: of absolute paths it
has the last part alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from evals.image_preference import BENCHMARK as DRAWN
from evals.report import Evaluation, Report, ReportRun, measures, suite_title
from evals.report_tables import Cell, plain, suite_table
from evals.report_words import correction, listed, sentences
from mmalign.errors import DataError

# What of a training recipe says how a model was made.
_SECTIONS = ("model", "start_from", "data", "loss", "reference", "rollouts", "optim")
# A hub name at a commit, as evaluations name it; a folder has sixteen digits.
_ON_HUB = re.compile(r"([\w.-]+/[\w.-]+)@[0-9a-f]{40}")

# Between the two of "base@hash+adapter@hash": a folder's name may hold a + itself.
_MODEL_AND_ADAPTER = re.compile(r"(?:(?<=@[0-9a-f]{16})|(?<=@[0-9a-f]{40}))\+|\+(?=[/~])")
# How a path begins that says where on whose machine something lies.
_ABSOLUTE = re.compile(r"[/~]|file:|[A-Za-z]:[\\/]|\\\\")


def model_card(report: Report) -> str:
    """The fragment: YAML between two lines of ---, then Markdown.

    With several runs the metadata has an entry for each: keep that of the model whose card it is.
    Raises DataError for a training recipe that is no YAML.
    """
    on_hub = _ON_HUB.fullmatch(str(report.base.results.get("model", "")))
    metadata = {
        **({"base_model": on_hub[1]} if on_hub else {}),
        "model-index": [_entry(report, run) for run in report.runs],
    }
    parts = [
        f"---\n{as_yaml(metadata)}---",
        f"## {plain(report.recipe.title)}",
        f"{listed([_named(run) for run in report.runs])} against {_named(report.base)}.",
        _table(suite_table(report).columns, suite_table(report).rows),
        f"Percentages, but for words, tokens and scores; ± is half the width of the 95% bootstrap "
        f"interval. {correction(report)}".rstrip(),
        "\n".join(f"- {plain(name)}: {plain(text)}" for name, text in sentences(report).items()),
    ]
    trained = [part for run in report.recipe.runs if (part := _training(run))]
    if trained:
        parts += ["### Training", *trained]
    parts += ["### How it was evaluated", *_evaluated(report)]
    return "\n\n".join(parts) + "\n"


def _entry(report: Report, run: Evaluation) -> dict[str, Any]:
    """What the hub's metadata says of one run."""
    results = []
    for key, suite in report.suites.items():
        metrics = []
        for metric in measures(suite):
            value = run.value(key, metric.key)
            if value is not None:
                metrics.append(
                    {
                        "type": metric.key.rpartition("/")[2],
                        "value": round(100 * value, 2) if metric.percent else round(value, 4),
                        "name": metric.label + (" (%)" if metric.percent else ""),
                    }
                )
        if not metrics:
            continue
        split = {} if suite.get("split") is None else {"split": suite["split"]}
        results.append(
            {
                "task": {"type": _task(suite)},
                "dataset": {"type": suite["benchmark"], "name": suite_title(suite), **split},
                "metrics": metrics,
            }
        )
    return {"name": run.name, "results": results}


def _task(suite: Mapping[str, Any]) -> str:
    """The hub's name of the task."""
    if suite["benchmark"] == DRAWN:
        return "text-to-image"
    return "video-text-to-text" if suite.get("videos") else "image-text-to-text"


def _named(evaluation: Evaluation) -> str:
    """An evaluation with its model and the revision or hash of that."""
    model = str(evaluation.results.get("model", ""))
    parts = [_public(part) for part in _MODEL_AND_ADAPTER.split(model)]
    return plain(f"{evaluation.name} ({' + '.join(parts)})" if model else evaluation.name)


def _table(columns: list[str], rows: list[list[Cell]]) -> str:
    cells = [["–" if cell is None else plain(str(cell)) for cell in row] for row in rows]
    lines = [list(map(plain, columns)), ["---"] * len(columns), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def recipe_text(run: ReportRun) -> str | None:
    """The recipe of a training run, if there is one. Raises DataError where it is no text."""
    path = run.train / "recipe.yaml" if run.train else None
    if path is None or not path.exists():
        return None
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot be read ({error})", where=str(path)) from None


def _training(run: ReportRun) -> str:
    """What the recipe of a training run says of its method; empty where there is none."""
    text, where = recipe_text(run), f"{run.train}/recipe.yaml"
    if text is None:
        return ""
    try:
        recipe = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise DataError(f"cannot be read ({error})", where=where) from None
    if not isinstance(recipe, dict):
        raise DataError("is no recipe", where=where, got=type(recipe).__name__)
    loss = recipe.get("loss")
    name = loss.get("name") if isinstance(loss, dict) else loss
    method = f", trained by {plain(str(name))}" if name else ""
    kept = {key: recipe[key] for key in _SECTIONS if recipe.get(key) is not None}
    return f"{plain(run.name)}{method}:\n\n{_fenced(as_yaml(_public(kept)))}"


def _evaluated(report: Report) -> list[str]:
    """Settings and versions; those that several evaluations share are said once."""
    found: dict[str, list[str]] = {}
    for evaluation in report.evaluations:
        config = evaluation.results.get("config")
        kept = {
            key: value
            for key, value in (config.items() if isinstance(config, dict) else ())
            if key not in ("name", "output", "model")
        }
        read = {key: evaluation.reading(key) for key in report.suites if key in evaluation.suites}
        kept |= {"read": read, "versions": evaluation.results.get("versions", {})}
        text = as_yaml(_public(kept))
        found.setdefault(text, []).append(evaluation.name)
    return [f"{plain(listed(names))}:\n\n{_fenced(text)}" for text, names in found.items()]


def _fenced(text: str) -> str:
    """A block of YAML whose fence no run of backticks in it can close."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}yaml\n{text}{fence}"


def _public(value: Any) -> Any:
    """The value with absolute paths cut to their last part."""
    if isinstance(value, dict):
        return {key: _public(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_public(part) for part in value]
    if isinstance(value, str) and _ABSOLUTE.match(value):
        return re.split(r"[\\/]", value.rstrip("\\/"))[-1]
    return value


def as_yaml(data: object) -> str:
    """YAML in the order given."""
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
