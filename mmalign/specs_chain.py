"""SPECS from its prompts to its numbers: `mmalign recipe specs FILE`.

    prompts     build   verifiable rows that ask for the form
    zero        train   a short GRPO of the base, whose responses become pairs; may be left out
    pairs       build   pairs that differ in form, by zero, or else by the base
    cold_start  train   DPO + SFT on the pairs, from the base
    grpo        train   GRPO on the prompts, from the cold start
    eval        eval    base, zero, cold start and GRPO, each by the same benchmarks

Without cold_start and pairs GRPO begins from the base: the control.
"""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer
from pydantic import model_validator

from mmalign.chain import (
    BUILD,
    EVAL,
    MERGE,
    TRAIN,
    Stage,
    Step,
    TrainStage,
    comparison,
    make_step,
)
from mmalign.config import Strict
from mmalign.errors import ConfigError

SUMMARY = ("accuracy", "format")


class SpecsChain(Strict):
    """The stages' config files. Every output lies under `output`; paths between stages are handed.

    base: the model that all begins from: a folder, or a hub name.
    """

    output: Path
    base: str
    prompts: Stage
    zero: TrainStage | None = None
    pairs: Stage | None = None
    cold_start: TrainStage | None = None
    grpo: TrainStage
    eval: Stage

    @model_validator(mode="after")
    def _pairs_are_trained_on(self) -> SpecsChain:
        if (self.pairs is None) != (self.cold_start is None):
            there, lacks = ("pairs", "cold_start") if self.pairs else ("cold_start", "pairs")
            raise ValueError(f"{there} is there and {lacks} is not: give both, or set both to null")
        if self.zero is not None and self.pairs is None:
            raise ValueError("zero makes responses for pairs, and there are none: set it to null")
        return self

    def steps(self) -> list[Step]:
        """All steps, in order. Raises ConfigError for a config file that is not one."""
        prompts = self.output / "prompts"
        steps = [
            make_step(
                "prompts", BUILD, self.prompts, {"output": prompts},
                output=prompts, reads=_paths(self.prompts.data().get("source")),
            )
        ]  # fmt: skip
        models = {"base": self.base}
        asks = "prompts"
        if self.zero is not None:
            steps += self._trained("zero", self.zero, self.base, prompts, ("prompts",))
            models["zero"] = self._model("zero", self.zero, merged=False)
            asks = "zero"
        start, started = self.base, ()
        if self.pairs is not None and self.cold_start is not None:
            pairs = self.output / "pairs"
            handed = {"source": prompts, "output": pairs}
            handed |= _generators(self.pairs, models.get("zero", self.base), self.base)
            made_from = tuple(dict.fromkeys(("prompts", asks)))
            steps.append(
                make_step("pairs", BUILD, self.pairs, handed, output=pairs, made_from=made_from)
            )
            steps += self._trained("cold_start", self.cold_start, self.base, pairs, ("pairs",))
            started = (steps[-1].name,)
            start = models["cold_start"] = self._model("cold_start", self.cold_start)
        steps += self._trained("grpo", self.grpo, start, prompts, ("prompts", *started))
        models["grpo"] = self._model("grpo", self.grpo, merged=False)
        made_by = {"zero": "zero", "cold_start": started[0] if started else "", "grpo": "grpo"}
        steps += [
            self._evaluated(name, model, tuple(filter(None, [made_by.get(name)])))
            for name, model in models.items()
        ]
        return steps

    def check_base(self) -> None:
        """Raise ModelError where the base is a folder that is not there, or no checkpoint."""
        from mmalign.models.load import ModelConfig, check_folder, resolve_adapter

        check_folder(resolve_adapter(ModelConfig(path=self.base))[0])

    def evaluations(self) -> dict[str, Path]:
        """The folders of the evaluations, by model, in the order of the stages."""
        names = {"base": True, "zero": self.zero, "cold_start": self.cold_start, "grpo": True}
        return {name: self.output / "eval" / name for name, there in names.items() if there}

    def _trained(
        self, name: str, stage: TrainStage, start: str, dataset: Path, made_from: tuple[str, ...]
    ) -> list[Step]:
        """The training step; behind a cold start that trains an adapter, that which merges it."""
        data = stage.data()
        if isinstance(model := data.get("model"), Mapping) and model.get("adapter") is not None:
            raise ConfigError(
                f"{name} begins from {start}, and its config puts an adapter on that",
                where=str(stage.config),
                got=f"model.adapter: {model['adapter']}",
                fix="set it to null, or `mmalign merge` it and name the result as base",
            )
        asked = [one.get("data") for one in _mappings(data.get("probe"))]
        output = self.output / name
        handed = {"model.path": start, "data.path": dataset, "run.output": output}
        if name == "cold_start":
            # Checked by the weights themselves: an output that began elsewhere is refused.
            handed["start_from"] = self.base
        step = make_step(
            name, TRAIN, stage, handed,
            output=output, made_from=made_from, reads=_paths(*asked), accelerate=stage.accelerate,
        )  # fmt: skip
        if name != "cold_start" or not _adapts(stage):
            return [step]
        merged = self.output / "cold_start" / "merged"
        words = (*MERGE, str(output / "model"), str(merged))
        return [step, Step(name="cold_start/merged", words=words, output=merged, made_from=(name,))]

    def _model(self, name: str, stage: TrainStage, *, merged: bool = True) -> str:
        """The folder of a trained model; only whole ones are trained on."""
        folder = "merged" if merged and _adapts(stage) else "model"
        return str(self.output / name / folder)

    def _evaluated(self, name: str, model: str, made_from: tuple[str, ...]) -> Step:
        output = self.evaluations()[name]
        handed = {"name": name, "model.path": model, "output": output}
        datasets = [one.get("data") for one in _mappings(self.eval.data().get("benchmarks"))]
        return make_step(
            f"eval/{name}", EVAL, self.eval, handed,
            output=output, made_from=made_from, reads=_paths(*datasets), again=True,
        )  # fmt: skip


def summary(evaluations: Mapping[str, Path]) -> str:
    """Accuracy and format of every model, and the tests of each stage against the one before.

    Zero is a detour: it is tested against base, and what comes next is so too.
    """
    pairs = list(itertools.pairwise(name for name in evaluations if name != "zero"))
    pairs += [("base", "zero")] if "zero" in evaluations else []
    found = {
        (a, b): {
            (one["suite"], one["metric"]): one
            for one in comparison(evaluations[a], evaluations[b])
            if one["metric"] in SUMMARY
        }
        for a, b in pairs
    }
    columns = [f"{b} - {a}" for a, b in pairs]
    rows = [["suite", "metric", *evaluations, *columns]]
    for key in next(iter(found.values())):
        values: dict[str, float] = {}
        for (a, b), one in found.items():
            values |= {a: one[key]["a"], b: one[key]["b"]}
        tests = [_change(one[key]) for one in found.values()]
        rows.append([*key, *(f"{100 * values[name]:.1f}" for name in evaluations), *tests])
    return _table(rows)


def tell(chain: SpecsChain) -> None:
    """Print the summary, and the command that shows more."""
    folders = chain.evaluations()
    typer.echo(f"\n{summary(folders)}\n")
    typer.echo("Shares in per cent; differences in points, with the p of `mmalign eval compare`.")
    runs = ", ".join(
        f"{{name: {name}, eval: {folder}, train: {chain.output / name}}}"
        for name, folder in folders.items()
        if name != "base"
    )
    words = [f"base={folders['base']}", f"runs=[{runs}]", "suites=null"]
    words += [f"output={chain.output / 'report'}"]
    report = ["mmalign", "report", "configs/eval/report_example.yaml", *words]
    typer.echo(f"Curves and responses: {shlex.join(report)}")


def _change(one: Mapping[str, Any]) -> str:
    p = "<0.001" if one["p_value"] < 0.001 else f"={one['p_value']:.3f}"
    return f"{100 * one['difference']:+.1f} (p{p})"


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns: two of words, then numbers."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        cells[:2] = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _adapts(stage: TrainStage) -> bool:
    model = stage.data().get("model")
    return isinstance(model, Mapping) and model.get("lora") is not None


def _generators(stage: Stage, generator: str, base: str) -> dict[str, str]:
    """Who writes responses, where that is a model in this process; servers are asked by name."""
    data, handed = stage.data(), {}
    for key, model in (("generator", generator), ("base_generator", base)):
        config = data.get(key)
        if isinstance(config, Mapping) and config.get("engine", "local") == "local":
            handed[f"{key}.model.path"] = model
    return handed


def _mappings(values: Any) -> list[Mapping[str, Any]]:
    """The mappings in a list, or among the values of a mapping; of anything else none."""
    inner = values.values() if isinstance(values, Mapping) else values
    return [one for one in inner if isinstance(one, Mapping)] if isinstance(inner, Iterable) else []


def _paths(*values: Any) -> tuple[Path, ...]:
    return tuple(dict.fromkeys(Path(value) for value in values if isinstance(value, str)))
