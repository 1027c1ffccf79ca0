"""A checkpoint of ours in lmms-eval: which of its model classes, its process, its results.

lmms-eval runs as a process of its own, `python -m lmms_eval`, in this environment or in another.
Written for, and tried with, lmms-eval 0.7.3. Three of its habits shape this file: it ends with exit
code 0 when an evaluation failed, so that only a results file tells of success; it splits arguments
at commas; and a class may log an error of one answer and go on with an empty text.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evals.lmms_classes import Choice, arguments, plain
from mmalign.errors import ConfigError, MissingExtra, MmalignError
from mmalign.store import write_atomically

if TYPE_CHECKING:
    from evals.config import EvalModel

# In the output folder. The summary is written last: without it, nothing is complete.
SUMMARY, LOG, MERGED, RAW = "lmms.json", "lmms.log", "merged", "lmms_eval"
_FOUND = "mmalign found lmms-eval: "
_PROBE = f"""
import importlib.metadata, importlib.util, sys
if importlib.util.find_spec("lmms_eval") is None:
    sys.exit(3)
try:
    version = importlib.metadata.version("lmms-eval")
except importlib.metadata.PackageNotFoundError:
    version = "unknown"
print({_FOUND!r} + version)
"""
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_INSTALL = (
    "make an environment for it, since it asks for older packages: "
    "`python3.11 -m venv .venv-lmms && .venv-lmms/bin/pip install -e '.[lmms]'`, and give "
    "--python .venv-lmms/bin/python"
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """How lmms-eval is run.

    tasks: its names. choice: what is said of its model class. python: the interpreter that has it.
    include: a folder with tasks of your own.
    limit: only the first so many questions of each task.
    """

    tasks: tuple[str, ...]
    choice: Choice = field(default_factory=Choice)
    python: str = sys.executable
    include: Path | None = None
    limit: int | None = None
    batch_size: int = 1


@dataclass(frozen=True, kw_only=True)
class TaskMetric:
    """One number of lmms-eval. value, stderr: None where it gave no finite number."""

    task: str
    metric: str
    filter: str
    value: float | None
    stderr: float | None
    higher_is_better: bool | None
    num_items: int | None


def evaluate(model: EvalModel, output: Path, options: Options) -> dict[str, Any]:
    """Run lmms-eval on a checkpoint; returns what it wrote into `output`/lmms.json.

    An adapter is first merged into its base, into `output`/merged, once. Raises MissingExtra where
    the interpreter has no lmms-eval, ConfigError on what it cannot be given, and MmalignError where
    it ended without results.
    """
    if not options.tasks or not all(options.tasks):
        raise ConfigError("names no task", where="--tasks", wanted="names such as pope,mme")
    output = output.absolute()
    version = installed(options.python)
    (output / SUMMARY).unlink(missing_ok=True)
    checkpoint = _checkpoint(model, output, options)
    chosen, model_args, left_out = arguments(model, checkpoint, options.choice)
    command = _command(chosen, model_args, output, options)
    before = _results_files(output)
    said = _run(command, output)
    written = sorted(_results_files(output) - before)
    if said.code or not written:
        how = f"failed with exit code {said.code}" if said.code else "wrote no results"
        raise MmalignError(
            f"lmms-eval {how}" + (f": {said.error}" if said.error else ""),
            where=str(output),
            fix=f"mend what {output / LOG} says",
        )
    results = json.loads(written[-1].read_text(encoding="utf-8"))
    summary = {
        "model": model.model_dump(mode="json"),
        "checkpoint": checkpoint,
        "lmms_eval": {
            "version": version,
            "model": chosen,
            "model_args": model_args,
            "tasks": list(options.tasks),
            "limit": options.limit,
            "results": str(written[-1].relative_to(output)),
        },
        "not_handed_on": left_out,
        "num_failed": said.num_failed,
        "metrics": [vars(metric) for metric in metrics_of(results)],
    }
    text = json.dumps(summary, indent=2, ensure_ascii=False)
    write_atomically(output / SUMMARY, text + "\n")
    return summary


def installed(python: str) -> str:
    """The version of lmms-eval that an interpreter has. Raises MissingExtra where it has none."""
    try:
        done = subprocess.run(
            [python, "-c", _PROBE], capture_output=True, text=True, errors="replace", check=False
        )
    except OSError as error:
        raise ConfigError(
            f"cannot be run ({error.strerror})",
            where=f"--python {python}",
            wanted="the interpreter of an environment that has lmms-eval",
        ) from None
    for line in done.stdout.splitlines():
        if line.startswith(_FOUND):
            return line.removeprefix(_FOUND)
    if done.returncode != 3:
        raise ConfigError(
            "is no Python that works", where=f"--python {python}", got=done.stderr.strip()[-200:]
        )
    raise MissingExtra("lmms-eval is not installed", where=python, fix=_INSTALL)


def metrics_of(results: Mapping[str, Any]) -> list[TaskMetric]:
    """Every number of a results file, in its order; standard errors are with their metrics."""
    found: list[TaskMetric] = []
    for task, told in results["results"].items():
        better = results.get("higher_is_better", {}).get(task, {})
        counts = results.get("n-samples", {}).get(task, {})
        for key, value in told.items():
            metric, comma, name = key.partition(",")
            if not comma or re.search(r"_stderr(_clt|_clustered)?$", metric):
                continue
            found.append(
                TaskMetric(
                    task=task,
                    metric=metric,
                    filter=name,
                    value=_number(value),
                    stderr=_number(told.get(f"{metric}_stderr,{name}")),
                    higher_is_better=better.get(metric),
                    num_items=counts.get("effective"),
                )
            )
    return found


@dataclass(frozen=True, kw_only=True)
class _Said:
    """How a process ended: its last error, and how many answers it could not generate."""

    code: int
    error: str | None
    num_failed: int


def _checkpoint(model: EvalModel, output: Path, options: Options) -> str:
    """What lmms-eval is to load: a folder without an adapter, or a hub name."""
    from mmalign.models.load import ModelConfig, check_folder, resolve_adapter
    from mmalign.models.merge import merged

    path, adapter = resolve_adapter(ModelConfig(path=model.path, adapter=model.adapter))
    check_folder(path)
    if adapter is None:
        return str(Path(path).absolute()) if Path(path).is_dir() else path
    plain(str(output), "the output folder")
    # What it cannot be given is told before merging, which takes minutes and uses the revision up.
    arguments(model.model_copy(update={"revision": None}), path, options.choice)
    config = ModelConfig(
        path=path,
        adapter=adapter,
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
    )
    return str(merged(config, output / MERGED))


def _command(chosen: str, model_args: str, output: Path, options: Options) -> list[str]:
    words = [options.python, "-m", "lmms_eval", "--model", chosen, "--model_args", model_args]
    words += ["--tasks", ",".join(options.tasks), "--batch_size", str(options.batch_size)]
    words += ["--output_path", plain(str(output / RAW), "the output folder"), "--log_samples"]
    if options.include is not None:
        words += ["--include_path", str(options.include.absolute())]
    if options.limit is not None:
        words += ["--limit", str(options.limit)]
    return words


def _results_files(output: Path) -> set[Path]:
    return set((output / RAW).rglob("*_results.json"))


def _run(command: Sequence[str], output: Path) -> _Said:
    """Run it, show what it says as it comes, and keep that in the log."""
    error, num_failed = None, 0
    output.mkdir(parents=True, exist_ok=True)
    print(f"$ {shlex.join(command)}", flush=True)
    env = os.environ | {"PYTHONUNBUFFERED": "1"}
    with (
        open(output / LOG, "w", encoding="utf-8") as log,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env
        ) as process,
    ):
        assert process.stdout is not None
        try:
            # A progress bar ends with a return, is shown as it is, and stays out of the log.
            for line in io.TextIOWrapper(process.stdout, "utf-8", errors="replace", newline=""):
                print(line, end="", flush=True)
                plain = _COLOURS.sub("", line)
                if not plain.endswith("\r"):
                    log.write(plain)
                # The words of its log, in __main__.py and in its model classes.
                if "Error during evaluation: " in plain:
                    error = plain.partition("Error during evaluation: ")[2].strip()
                    error = error.partition(" Please set `--verbosity=DEBUG`")[0].rstrip(".")
                elif plain.rstrip().endswith(" in generating"):  # Its message may have many lines.
                    num_failed += 1
        except KeyboardInterrupt:
            process.wait()  # The terminal told it too.
            raise
    return _Said(code=process.returncode, error=error, num_failed=num_failed)


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None
