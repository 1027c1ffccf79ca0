"""`mmalign eval`: run a recipe, score its answers again, merge parts, compare runs, plan a size."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from evals.bridge_cli import add_to
from evals.tables import print_table

app = typer.Typer(
    help="Score a checkpoint on benchmarks, with intervals and paired tests.",
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
)


@app.command()
def run(
    config: Path = typer.Argument(help="An eval recipe, such as configs/eval/pope_coco.yaml."),
    overrides: list[str] = typer.Argument(None, metavar="[KEY=VALUE]...", help="Replace settings."),
    check: bool = typer.Option(
        False, "--check", help="Read the recipe, say how far its output is, and stop."
    ),
    shard: str = typer.Option(
        "", "--shard", metavar="I/N", help="Answer part I of N alone, and score nothing."
    ),
) -> None:
    """Generate the answers that are not there yet, score all of them, print the scores."""
    from evals.config import EvalRecipe
    from evals.run import evaluate
    from mmalign.config import load_config

    recipe = load_config(config, EvalRecipe, overrides or ())
    if check:
        from evals.standing import standing

        typer.echo(standing(recipe).told(recipe.output))
        return
    if shard:
        from evals.shards import answer_shard, parse_shard

        typer.echo(str(answer_shard(recipe, *parse_shard(shard))))
        return
    _print_results(evaluate(recipe))


@app.command(name="image_preference")
def image_preference(
    config: Path = typer.Argument(
        help="A recipe of pictures to draw, such as configs/eval/image_preference.yaml."
    ),
    overrides: list[str] = typer.Argument(None, metavar="[KEY=VALUE]...", help="Replace settings."),
) -> None:
    """Draw the pictures that are not there yet, have judges score them, print the scores.

    Win rates take two models: `mmalign eval compare BASE ALIGNED`, or `mmalign report`.
    """
    from evals.image_preference import ImagePreferenceRecipe, evaluate
    from mmalign.config import load_config

    _print_results(evaluate(load_config(config, ImagePreferenceRecipe, overrides or ())))


@app.command()
def rescore(
    config: Path = typer.Argument(help="The recipe that the answers were generated with."),
    overrides: list[str] = typer.Argument(None, metavar="[KEY=VALUE]...", help="Replace settings."),
) -> None:
    """Score the answers in the recipe's output folder again, without the model."""
    from evals import run as runner
    from evals.config import EvalRecipe
    from mmalign.config import load_config

    recipe = load_config(config, EvalRecipe, overrides or ())
    _print_results(runner.rescore(recipe.output, recipe))


@app.command()
def merge(
    config: Path = typer.Argument(help="The recipe that the parts were generated with."),
    overrides: list[str] = typer.Argument(None, metavar="[KEY=VALUE]...", help="Replace settings."),
    part: list[Path] = typer.Option(help="Output folder of a part; once for each."),
) -> None:
    """Put the answers of several folders into the recipe's output folder, and score them."""
    from evals import run as runner
    from evals.config import EvalRecipe
    from evals.shards import merge as merge_parts
    from mmalign.config import load_config

    recipe = load_config(config, EvalRecipe, overrides or ())
    merge_parts(recipe.output, part)
    _print_results(runner.rescore(recipe.output, recipe))


@app.command()
def compare(
    a: Path = typer.Argument(help="Output folder of the run to compare with."),
    b: Path = typer.Argument(help="Output folder of the run to judge."),
    also_a: list[Path] = typer.Option([], help="Another run of A's side, such as another seed."),
    also_b: list[Path] = typer.Option([], help="Another run of B's side."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON instead of a table."),
) -> None:
    """Test whether run B differs from run A on the same questions; unanswered ones are wrong."""
    from evals.compare import compare as compare_runs
    from evals.seeds import PooledComparison, compare_pooled

    pool = bool(also_a or also_b)
    found = compare_pooled([a, *also_a], [b, *also_b]) if pool else compare_runs(a, b)
    if as_json:
        told = [dataclasses.asdict(one) for one in found]
        typer.echo(json.dumps(_without_nan(told), indent=2))
        return
    rows: list[tuple[str, ...]] = []
    for one in found:
        runs: tuple[str, ...] = ()
        if isinstance(one, PooledComparison):
            runs = tuple(
                " ".join(_shown(one.metric, value) for value in side)
                for side in (one.a_runs, one.b_runs)
            )
        rows.append(
            (
                one.suite,
                one.metric,
                _shown(one.metric, one.a),
                _shown(one.metric, one.b),
                _shown(one.metric, one.difference, sign="+"),
                _range(one.metric, one.interval, sign="+"),
                "" if one.relative is None else f"{100 * one.relative:+.1f}%",
                _p_value(one.p_value) if one.testable else "",
                one.test,
                *runs,
            )
        )
    heads = ("suite", "metric", "a", "b", "b - a", "95% interval", "relative", "p", "test")
    print_table(heads + (("runs of a", "runs of b") if pool else ()), rows, num_left=2)


@app.command()
def power(
    a: Path = typer.Argument(None, help="Output folder of a run like those to be compared."),
    b: Path = typer.Argument(None, help="Output folder of another."),
    points: float = typer.Option(2.0, help="The difference to find, in points of percent."),
    discordance: float = typer.Option(
        None, help="Without runs: the share of questions that only one of two models has right."
    ),
    chance: float = typer.Option(0.8, min=0.01, max=0.99, help="With which it is to be found."),
) -> None:
    """How many questions a difference needs before a paired test (p < 0.05) is likely to find it.

    By how often runs A and B disagree, or by an assumed --discordance.
    """
    from evals.power import num_needed, power_of
    from mmalign.errors import ConfigError

    where = "mmalign eval power"
    if [a is None, b is None] != [discordance is not None] * 2:
        raise ConfigError("give either two runs or --discordance", where=where)
    if not 0 < points < 100:
        raise ConfigError(
            "is no difference of two shares",
            where=f"{where} --points",
            got=f"{points:g}",
            wanted="points of percent, above 0 and below 100",
        )
    if discordance is not None:
        needed = num_needed(points / 100, discordance, power=chance)
        typer.echo(f"{needed} questions, if each is on a picture of its own")
        return
    rows = [
        (
            one.suite,
            one.metric,
            str(one.num_items),
            f"{100 * one.discordance:.2f}",
            f"{one.design:.2f}",
            str(one.needed),
            f"{100 * one.detectable:.2f}",
        )
        for one in power_of(a, b, points / 100, power=chance)
    ]
    if not rows:
        typer.echo(
            "none of the runs' metrics is a share of right answers on which they disagree, "
            "so there is nothing to plan by"
        )
        return
    found = f"needed for {points:g}"
    heads = ("suite", "metric", "items", "disagree on %", "design effect", found, "these find")
    print_table(heads, rows, num_left=2)


def _print_results(folder: Path) -> None:
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    rows = [
        (
            suite["key"],
            metric,
            _shown(metric, value),
            _range(metric, suite["intervals"][metric]),
            str(suite["num_items"]),
        )
        for suite in results["suites"]
        for metric, value in suite["metrics"].items()
    ]
    typer.echo(f"{results['name']}: {results['model']}")
    print_table(("suite", "metric", "value", "95% interval", "items"), rows, num_left=2)
    for suite in results["suites"]:
        if suite["num_missing"]:
            typer.echo(
                f"{suite['key']}: {suite['num_missing']} questions stay unanswered: "
                "a picture cannot be read, or a server was silent",
                err=True,
            )
    typer.echo(str(folder / "results.json"))


def _p_value(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def _shown(metric: str, value: float, *, sign: str = "") -> str:
    from evals.known import is_number

    return f"{value if is_number(metric) else 100 * value:{sign}.2f}"


def _range(metric: str, interval: Sequence[float | None], *, sign: str = "") -> str:
    """Both ends; "undefined" where the metric counts nothing that is there."""
    low, high = interval
    if low is None or high is None or math.isnan(low) or math.isnan(high):
        return "undefined"
    return f"{_shown(metric, low, sign=sign)} to {_shown(metric, high, sign=sign)}"


add_to(app)


def _without_nan(value: Any) -> Any:
    """The same with None for NaN, which JSON has not."""
    if isinstance(value, dict):
        return {name: _without_nan(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(one) for one in value]
    return None if isinstance(value, float) and math.isnan(value) else value
