"""The lab: does preference training earn its cost, and where? The tables of docs/results.md.

    python scripts/lab_study.py [--seeds 1 2 3] [--workers 2] [--output runs/lab]

For every seed: a base model from scratch; pair pools from the world it was trained on (biased),
from that world with one counterfactual scene in five (mixed), and from the test's (balanced);
Re-Align pairs of each; SFT on the chosen, DPO, DPO + SFT, rDPO, rDPO + SFT, with equal pairs and
steps; in the balanced pool at every learning rate of one grid, and there also DPO on pairs sampled
from the policy, to look for reasons. A method's best learning rate is the one with the lowest
CHAIR_i on validation scenes; shown is the measure on test scenes. Every step is a public verb's
recipe from configs/quickstart with overrides; what is complete is skipped, so the study can be
stopped and started again.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

CONFIGS = Path(__file__).parent.parent / "configs" / "quickstart"
POOLS = {"biased": 0.0, "mixed": 0.2, "balanced": 1.0}
RATES = (5e-5, 2e-4)
# method: recipe, overrides, source of pairs
METHODS = {
    "sft": ("sft_chosen", (), "realign"),
    "dpo": ("dpo", ("loss.sft_weight=0",), "realign"),
    "dpo+sft": ("dpo", (), "realign"),
    "rdpo": ("rdpo", ("loss.sft_weight=0",), "realign"),
    "rdpo+sft": ("rdpo", (), "realign"),
    "on-policy dpo": ("dpo", ("loss.sft_weight=0",), "on_policy"),
    "on-policy dpo+sft": ("dpo", (), "on_policy"),
}
TESTS = {
    "test": ("balanced", 500, 2),
    "validation": ("balanced", 300, 3),
    "home": ("biased", 300, 4),
}


def build_dataset(config: Path, overrides: Sequence[str]) -> Path:
    from data_builders.config import load_builder

    return load_builder(config, overrides).build()


def train_recipe(config: Path, overrides: Sequence[str]) -> None:
    from trainers.loop import train as run
    from trainers.recipes import load_recipe

    for _ in run(load_recipe(config, overrides)):
        pass


def build(config: str, overrides: list[str]) -> Path:
    return build_dataset(CONFIGS / config, overrides)


def train(config: str, overrides: list[str]) -> None:
    train_recipe(CONFIGS / f"{config}.yaml", overrides)


def evaluate(root: Path, name: str, model: Path, output: Path) -> None:
    """POPE and CHAIR on the test scenes; CHAIR alone on the validation and the home scenes."""
    from evals.config import EvalRecipe
    from evals.run import evaluate as run
    from mmalign.config import read_yaml, validate

    for scenes in TESTS:
        folder = root / "scenes" / scenes
        data = read_yaml(CONFIGS / "eval.yaml")
        data |= {"name": name, "model": {"path": str(model)}, "output": str(output / scenes)}
        benchmarks = data["benchmarks"] if scenes == "test" else data["benchmarks"][-1:]
        data["benchmarks"] = [
            {
                key: str(folder / Path(value).relative_to("runs/quickstart/scenes/eval"))
                if str(value).startswith("runs/")
                else value
                for key, value in benchmark.items()
            }
            for benchmark in benchmarks
        ]
        run(validate(data, EvalRecipe, "eval.yaml"))


def make_scenes(root: Path) -> None:
    for name, (world, count, seed) in TESTS.items():
        build(
            "scenes_eval.yaml",
            [
                f"output={root}/scenes/{name}",
                f"world={world}",
                f"num_scenes={count}",
                f"seed={seed}",
            ],
        )


def make_base(root: Path, seed: int) -> None:
    from mmalign.config import load_config
    from mmalign.models.tiny import TinyModel

    folder = root / f"seed{seed}"
    build("scenes_train.yaml", [f"output={folder}/scenes", f"seed={100 + seed}"])
    if not (folder / "base" / "run.json").exists():
        init = [f"output={folder}/init", f"seed={seed}"]
        load_config(CONFIGS / "model.yaml", TinyModel, init).build()
    train(
        "sft_base",
        [f"model.path={folder}/init", f"data.path={folder}/scenes", f"run.output={folder}/base",
         f"run.seed={seed}"],
    )  # fmt: skip
    evaluate(root, "base", folder / "base" / "model", folder / "eval" / "base")


def make_pool(root: Path, seed: int, pool: str) -> None:
    folder = root / f"seed{seed}"
    base, data = folder / "base" / "model", folder / pool
    share = POOLS[pool]
    world = (
        ["world=balanced", "counterfactual_share=0"]
        if share == 1
        else [f"counterfactual_share={share}"]
    )
    build("scenes_pairs.yaml", [f"output={data}/scenes", f"seed={200 + seed}", *world])
    common = [f"source={data}/scenes", f"seed={seed}", f"generator.model.path={base}"]
    build("pairs.yaml", [f"output={data}/realign", *common])
    if pool == "balanced":
        build("pairs_on_policy.yaml", [f"output={data}/on_policy", *common])
    for method in methods_of(pool):
        recipe, overrides, source = METHODS[method]
        for rate in rates_of(pool):
            name = f"{method.replace(' ', '-')}@{rate:g}"
            run = data / "runs" / name
            train(
                recipe,
                [f"model.path={base}", f"data.path={data}/{source}", f"optim.lr={rate}",
                 f"run.output={run}", f"run.seed={seed}", *overrides],
            )  # fmt: skip
            evaluate(root, name, run / "model", folder / "eval" / f"{pool}-{name}")


def methods_of(pool: str) -> list[str]:
    """Pairs from the policy's own answers are compared in one pool only."""
    return [m for m, (_, _, source) in METHODS.items() if source == "realign" or pool == "balanced"]


def rates_of(pool: str) -> tuple[float, ...]:
    """The whole grid in the balanced pool, its best rate in the others."""
    return RATES if pool == "balanced" else RATES[-1:]


def run_jobs(
    jobs: list[list[str]], workers: int, output: Path, script: Path = Path(__file__)
) -> None:
    """Run `--job` processes of a study, `workers` at a time, one thread each."""
    waiting, running = list(jobs), []
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    while waiting or running:
        while waiting and len(running) < workers:
            job = waiting.pop(0)
            command = [sys.executable, str(script), "--output", str(output), "--job", *job]
            running.append((job, time.time(), subprocess.Popen(command, env=environment)))
        for entry in list(running):
            job, started, process = entry
            if process.poll() is not None:
                running.remove(entry)
                if process.returncode:
                    sys.exit(f"{' '.join(job)} failed")
                print(f"{' '.join(job)}: {time.time() - started:.0f} s", flush=True)
        time.sleep(0.5)


# --- tables -------------------------------------------------------------------------------------


class Runs:
    """Items of evaluations, by seed; ratios pool the seeds and keep scenes together."""

    def __init__(self, root: Path, seeds: list[int]) -> None:
        self.root, self.seeds = root, seeds
        self.exact_answers = {}
        from mmalign.store import open_dataset

        for scenes in TESTS:
            self.exact_answers[scenes] = {
                record.images[0].path: record.answer
                for record in open_dataset(root / "scenes" / scenes)
            }

    def rows(self, name: str, scenes: str, suite: str, seed: int) -> list[dict]:
        file = self.root / f"seed{seed}" / "eval" / name / scenes / "items" / f"{suite}.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()]

    def metrics(self, name: str, scenes: str, suite: str, seeds: list[int] | None = None):
        """(ratios, clusters) over the given seeds."""
        from evals.benchmarks import chair, pope
        from evals.stats import mean

        rows = [row for seed in seeds or self.seeds for row in self.rows(name, scenes, suite, seed)]
        made = chair.metrics(rows) if suite == "chair" else pope.metrics(rows)
        if suite == "chair":
            truth = self.exact_answers[scenes]
            made["exact"] = mean([row["answer"] == truth[row["image"]] for row in rows])
        return made, [row["image"] for row in rows]

    def value(self, name: str, scenes: str, metric: str, suite: str = "chair", seed=None) -> float:
        return 100 * self.metrics(name, scenes, suite, seed and [seed])[0][metric].value

    def best_rate(self, pool: str, method: str) -> str:
        """The rate with the lowest mean CHAIR_i on the validation scenes."""
        names = [f"{pool}-{method.replace(' ', '-')}@{rate:g}" for rate in RATES]
        return min(names, key=lambda name: self.value(name, "validation", "chair_i"))

    def line(self, label: str, name: str) -> str:
        from evals.stats import paired_difference

        chair, clusters = self.metrics(name, "test", "chair")
        base, _ = self.metrics("base", "test", "chair")
        per_seed = " / ".join(
            f"{self.value(name, 'test', 'chair_i', seed=s):.1f}" for s in self.seeds
        )
        cells = [label, f"{100 * chair['chair_i'].value:.1f} ({per_seed})"]
        if name == "base":
            cells += ["", ""]
        else:
            change = paired_difference(base["chair_i"], chair["chair_i"], clusters)
            low, high = change.relative_interval or (float("nan"),) * 2
            relative = change.relative if change.relative is not None else float("nan")
            cells.append(f"{100 * relative:+.0f} % [{100 * low:+.0f}, {100 * high:+.0f}]")
            cells.append(f"{change.p_value:.4f}")
        cells += [f"{100 * chair[m].value:.1f}" for m in ("chair_s", "recall", "exact")]
        for split in ("random", "popular", "adversarial"):
            pope, _ = self.metrics(name, "test", f"pope-{split}")
            cells.append(f"{100 * pope['official/accuracy'].value:.1f}")
        cells.append(f"{self.value(name, 'home', 'chair_i'):.1f}")
        cells.append(f"{self.value(name, 'home', 'exact'):.1f}")
        return "| " + " | ".join(cells) + " |"

    def against_control(self, pool: str, method: str, rate: float) -> str:
        """CHAIR_i and recall of a method against SFT on the chosen, same pool and rate."""
        from evals.stats import paired_difference

        control, clusters = self.metrics(f"{pool}-sft@{rate:g}", "test", "chair")
        other, _ = self.metrics(f"{pool}-{method}@{rate:g}", "test", "chair")
        cells = [pool, method]
        for metric in ("chair_i", "recall"):
            change = paired_difference(control[metric], other[metric], clusters)
            low, high = change.relative_interval or (float("nan"),) * 2
            relative = change.relative if change.relative is not None else float("nan")
            cells.append(f"{100 * relative:+.0f} % [{100 * low:+.0f}, {100 * high:+.0f}]")
            cells.append(f"{change.p_value:.4f}")
        exact = [100 * self.metrics(n, "home", "chair")[0]["exact"].value
                 for n in (f"{pool}-sft@{rate:g}", f"{pool}-{method}@{rate:g}")]  # fmt: skip
        return "| " + " | ".join([*cells, f"{exact[1] - exact[0]:+.1f}"]) + " |"


HEAD = (
    "| run | CHAIR_i (by seed) | change | p | CHAIR_s | recall | exact | POPE r | p | a "
    "| home CHAIR_i | home exact |\n|" + "---|" * 12
)


def tables(root: Path, seeds: list[int]) -> str:
    runs = Runs(root, seeds)
    out = []
    for pool in reversed(POOLS):
        if len(rates_of(pool)) == 1:
            continue
        out += [f"\n### Pair pool: {pool}, best learning rate of each method\n", HEAD]
        out.append(runs.line("base", "base"))
        for method in methods_of(pool):
            best = runs.best_rate(pool, method)
            out.append(runs.line(f"{method} @{best.split('@')[1]}", best))
    for pool in reversed(POOLS):
        for rate in rates_of(pool):
            out += [f"\n### Pair pool: {pool}, everything at {rate:g}\n", HEAD]
            out.append(runs.line("base", "base"))
            for method in methods_of(pool):
                out.append(runs.line(method, f"{pool}-{method.replace(' ', '-')}@{rate:g}"))
    out.append(f"\n### Against the control, SFT on the chosen, at {RATES[-1]:g}\n")
    out.append("| pool | method | CHAIR_i | p | recall | p | home exact, points |")
    out.append("|" + "---|" * 7)
    for pool in POOLS:
        for method in ("dpo", "dpo+sft", "rdpo", "rdpo+sft"):
            out.append(runs.against_control(pool, method, RATES[-1]))
    return "\n".join(out)


def study_parser(about: str, output: str) -> argparse.ArgumentParser:
    """What every study can be told; about: its docstring."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path(output))
    parser.add_argument("--tables", action="store_true", help="only print the tables")
    parser.add_argument("--job", nargs="+", help=argparse.SUPPRESS)
    return parser


def main() -> None:
    args = study_parser(__doc__, "runs/lab").parse_args()
    if args.job:
        logging.getLogger("mmalign").setLevel(logging.WARNING)
        kind, *words = args.job
        if kind == "scenes":
            make_scenes(args.output)
        elif kind == "base":
            make_base(args.output, int(words[0]))
        else:
            make_pool(args.output, int(words[0]), words[1])
        return
    if not args.tables:
        run_jobs([["scenes"]], 1, args.output)
        run_jobs([["base", str(seed)] for seed in args.seeds], args.workers, args.output)
        pools = [["pool", str(s), p] for p in ("balanced", "mixed", "biased") for s in args.seeds]
        run_jobs(pools, args.workers, args.output)
    text = tables(args.output, args.seeds)
    (args.output / "tables.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
