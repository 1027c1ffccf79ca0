"""A finished evaluation in the files of other harnesses: lmms-eval and VLMEvalKit.

Neither file tells a time, so the same run gives the same bytes.

lmms-eval   <model>/mmalign_samples_<suite>.jsonl, <model>/mmalign_results.json
            As `--log_samples` of 0.7.3 writes them, with `mmalign` in the place of the timestamp.
            Beyond it, a line keeps `doc` (the question's own fields) and `resps`, which lmms-eval
            drops from its files, and `score`, by which its `--baseline` pairs two runs.
VLMEvalKit  <model>/<model>_<suite>.tsv
            A prediction table as with PRED_FORMAT=tsv. Its default .xlsx would hold the time.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evals.base import Row
from evals.compare import read_items, read_results
from evals.known import RULES
from mmalign.errors import ConfigError, DataError
from mmalign.store import write_atomically

# What VLMEvalKit writes for an answer that it did not get; it asks such questions again.
NO_ANSWER = "Failed to obtain answer via API."
# Fields of a row that belong to the question; all others tell of the answer.
_QUESTION = (
    "id", "image", "video", "cluster", "group", "categories", "category", "label", "truth",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What is written of a run. called: its model's name in files. suites, items: by suite."""

    called: str
    model: str
    suites: Mapping[str, Mapping[str, Any]]
    items: Mapping[str, list[Row]]


@dataclass(frozen=True, kw_only=True)
class Exported:
    """written: the files. left_out: suites that have no such file, and why."""

    written: list[Path]
    left_out: dict[str, str]


def export_run(
    run: str | Path,
    format: str,
    output: str | Path,
    *,
    name: str | None = None,
    suites: Sequence[str] = (),
) -> Exported:
    """Write a run's suites as `format` has them, below `output`/<name>.

    name: what the model is called, by default the run's folder. suites: only these.
    Raises ConfigError for an unknown format or suite, DataError where the run is not finished, or
    no suite of it is of questions and answers.
    """
    run, output = Path(run), Path(output)
    if format not in _WRITERS:
        raise ConfigError("unknown format", got=format, wanted=" or ".join(_WRITERS))
    results = read_results(run)
    held = {suite["key"]: suite for suite in results["suites"]}
    if unknown := [key for key in suites if key not in held]:
        raise ConfigError("has no such suite", where=str(run), got=unknown[0], wanted=[*held])
    model = _file_name(name or Path(os.path.abspath(run)).name)
    if model in ("", ".", ".."):
        raise ConfigError("names no folder", where="name", got=model, wanted="a word")
    taken: dict[str, list[Row]] = {}
    left_out: dict[str, str] = {}
    for key in suites or held:
        items = list(read_items(run, held[key]).values())
        if all("prompt" in row and "answer" in row for row in items):
            taken[key] = items
        else:
            left_out[key] = f"items of {held[key]['benchmark']} are no questions with an answer"
    for file, keys in _by_file(taken).items():
        if len(keys) > 1:
            raise ConfigError(
                "suites would be written into one file",
                where=str(run),
                got=f"{', '.join(keys)}, both {file}",
                fix="export them one by one, into different folders: --suite",
            )
    if not taken:
        raise DataError("has nothing to export", where=str(run), got="; ".join(left_out.values()))
    files = _WRITERS[format](
        _Run(
            called=model,
            model=results["model"],
            suites={key: held[key] for key in taken},
            items=taken,
        )
    )
    for file, text in files.items():
        write_atomically(output / model / file, text)
    return Exported(written=[output / model / file for file in files], left_out=left_out)


def _by_file(keys: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for key in keys:
        found.setdefault(_file_name(key), []).append(key)
    return found


def _lmms_eval(run: _Run) -> dict[str, str]:
    files: dict[str, str] = {}
    for key, items in run.items.items():
        lines = [json.dumps(_sample(number, row)) for number, row in enumerate(items)]
        files[f"mmalign_samples_{_file_name(key)}.jsonl"] = "\n".join(lines) + "\n"
    counts = {key: len(items) for key, items in run.items.items()}
    told = {
        "results": {
            key: {"alias": key}
            | {f"{metric},none": value for metric, value in suite["metrics"].items()}
            | {f"{metric}_stderr,none": "N/A" for metric in suite["metrics"]}
            for key, suite in run.suites.items()
        },
        "configs": {key: {"task": key} for key in run.suites},
        "versions": dict.fromkeys(run.suites, "mmalign"),
        "n-shot": dict.fromkeys(run.suites, 0),
        "higher_is_better": {key: _better(suite) for key, suite in run.suites.items()},
        "n-samples": {key: {"original": n, "effective": n} for key, n in counts.items()},
        "config": {"model": "mmalign", "model_args": f"pretrained={run.model}"},
        "model_source": "mmalign",
        "model_name": run.model,
        "model_name_sanitized": run.called,
    }
    files["mmalign_results.json"] = json.dumps(told, indent=2, ensure_ascii=False) + "\n"
    return files


def _sample(number: int, row: Row) -> dict[str, Any]:
    """A line of lmms-eval. `filtered_resps` is null where the model gave no answer."""
    doc = {field: row[field] for field in _QUESTION if field in row}
    score = row.get("score", row.get("correct_official", row.get("correct")))
    line = {
        "doc_id": number,
        "doc": doc,
        "target": _text(_target(row)),
        "resps": None if row["answer"] is None else [row["answer"]],
        "filtered_resps": row["answer"],
        "token_counts": [{"output_tokens": row.get("num_tokens", 0)}],
        "doc_hash": hashlib.sha256(json.dumps(doc, indent=2).encode()).hexdigest(),
        "input_media": [row[field] for field in ("image", "video") if field in row],
        **({} if score is None else {"score": float(score)}),
        "input": row["prompt"],
    }
    apart = {"prompt", "answer", "num_tokens", *doc, *line}
    return line | {field: value for field, value in row.items() if field not in apart}


def _better(suite: Mapping[str, Any]) -> dict[str, bool]:
    rules = RULES.get(suite["benchmark"])
    shown = () if rules is None else rules.shown
    return {metric.key: metric.better == "higher" for metric in shown if metric.better is not None}


def _vlmevalkit(run: _Run) -> dict[str, str]:
    files: dict[str, str] = {}
    for key, items in run.items.items():
        file = io.StringIO(newline="")
        writer = csv.writer(file, delimiter="\t", quoting=csv.QUOTE_ALL, lineterminator="\n")
        rows = _predictions(items)
        writer.writerow(rows[0])
        writer.writerows(row.values() for row in rows)
        files[f"{run.called}_{_file_name(key)}.tsv"] = file.getvalue()
    return files


def _predictions(items: Sequence[Row]) -> list[dict[str, str]]:
    """Rows of a prediction table. Its scorers of yes and no compare with a capital letter."""
    labels = [_target(row) for row in items]
    if {label for label in labels if isinstance(label, str)} <= {"yes", "no"}:
        labels = [one.capitalize() if isinstance(one, str) else one for one in labels]
    rows: list[dict[str, str]] = []
    for row, label in zip(items, labels, strict=True):
        categories = [*row.get("categories", [row.get("category") or ""]), "", ""]
        rows.append(
            {
                "index": row["id"],
                "image_path": row.get("image", row.get("video", "")),
                "question": row["prompt"],
                "answer": _text(label),
                "category": categories[0],
                "l2-category": categories[1],
                "prediction": NO_ANSWER if row["answer"] is None else row["answer"],
            }
        )
    return rows


def _target(row: Row) -> Any:
    """The right answer or answers; what is there to see, where a description was asked for."""
    label = row.get("label")
    return row.get("truth", "") if label is None else label


def _text(value: object) -> str:
    """A right answer as text; several as a list that both JSON and Python read."""
    return value if isinstance(value, str) else json.dumps(value)


def _file_name(text: str) -> str:
    """As lmms-eval mends the names of models: what a file name cannot hold becomes two
    underscores."""
    return re.sub(r'["<>:/|\\?*\[\]]+', "__", text)


_WRITERS: dict[str, Callable[[_Run], dict[str, str]]] = {
    "lmms-eval": _lmms_eval,
    "vlmevalkit": _vlmevalkit,
}
