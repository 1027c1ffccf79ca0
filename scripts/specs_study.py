"""The lab of SPECS: what a cold start by preference earns, beside one by SFT and beside none.

    python scripts/specs_study.py [--seeds 1 2 3] [--workers 2] [--output runs/specs_study]
    python scripts/specs_study.py --tables

For every seed a model that learns from scratch to add pictured digits, in mixed forms; pairs of its
own answers that differ in form alone; from its weights a cold start by DPO + SFT on them (`specs`),
by SFT on the chosen ones (`sft`), or none; and GRPO from each, with the same prompts and settings.
Every step is a public verb's recipe in configs/lab/sums_*.yaml with overrides; what is complete is
skipped. Measured on 500 questions about handwriting never seen, asked as in training (`test`) and
in words that neither pairs nor rollouts had (`ood`): greedy, and sampled at temperature 1 as
rollouts are.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import lab_study as lab

LAB = Path(__file__).parent.parent / "configs" / "lab"
# Start: what configs/lab/sums_cold_start.yaml is changed to; None for no cold start.
STARTS = {"none": None, "sft": ("loss={name: sft}",), "specs": ()}
NAMES = {"none": "none", "sft": "SFT on chosen", "specs": "DPO + SFT (SPECS)"}


def train(config: str, overrides: Sequence[str]) -> None:
    lab.train_recipe(LAB / config, overrides)


def build(config: str, overrides: Sequence[str]) -> None:
    lab.build_dataset(LAB / config, overrides)


def evaluate(root: Path, model: Path, output: Path) -> None:
    from evals.config import EvalRecipe
    from evals.run import evaluate as run
    from mmalign.config import load_config

    overrides = [f"name={output.name}", f"model.path={model}", f"output={output}"]
    for place, data in enumerate(("test", "test_ood", "test", "test_ood")):
        overrides.append(f"benchmarks.{place}.data={root / data}")
    run(load_config(LAB / "sums_eval.yaml", EvalRecipe, overrides))


def make_data(root: Path) -> None:
    """What all seeds ask: they differ in their models alone."""
    for name in ("prompts", "test", "test_ood"):
        build(f"sums_{name}.yaml", [f"output={root / name}"])


def make_base(root: Path, seed: int) -> None:
    from mmalign.config import load_config
    from mmalign.models.tiny import TinyModel

    folder = root / f"seed{seed}"
    build("sums_train.yaml", [f"output={folder}/train", f"seed={10 + seed}"])
    if not (folder / "init" / "config.json").exists():
        overrides = [f"output={folder}/init", f"seed={seed}"]
        load_config(LAB / "sums_model.yaml", TinyModel, overrides).build()
    train(
        "sums_base.yaml",
        [f"model.path={folder}/init", f"data.path={folder}/train", f"run.seed={seed}",
         f"run.output={folder}/base"],
    )  # fmt: skip
    build(
        "sums_specs.yaml",
        [f"source={root}/prompts", f"output={folder}/pairs", f"seed={seed}",
         f"generator.model.path={folder}/base/model"],
    )  # fmt: skip


def make_start(root: Path, seed: int, start: str) -> None:
    folder = root / f"seed{seed}"
    model, changes = folder / "base" / "model", STARTS[start]
    probe = [f"probe.id.data={root}/test", f"probe.ood.data={root}/test_ood"]
    if changes is not None:
        train(
            "sums_cold_start.yaml",
            [*changes, *probe, f"model.path={model}", f"start_from={model}",
             f"data.path={folder}/pairs",
             f"run.seed={seed}", f"run.output={folder}/cold_{start}"],
        )  # fmt: skip
        model = folder / f"cold_{start}" / "model"
    evaluate(root, model, folder / "eval" / start)
    train(
        "sums_grpo.yaml",
        [*probe, f"model.path={model}", f"data.path={root}/prompts", f"run.seed={seed}",
         f"run.output={folder}/grpo_{start}"],
    )  # fmt: skip
    evaluate(root, folder / f"grpo_{start}" / "model", folder / "eval" / f"{start}_grpo")


# --- tables -------------------------------------------------------------------------------------


class Items:
    """Items of evaluations over the seeds; those of one question are drawn together."""

    def __init__(self, root: Path, seeds: Sequence[int]) -> None:
        self.root, self.seeds = root, seeds

    def rows(self, name: str, suite: str) -> Iterator[tuple[int, dict]]:
        for seed in self.seeds:
            folder = self.root / f"seed{seed}" / "eval" / name / "items"
            text = (folder / f"verifiable-{suite}.jsonl").read_text()
            yield from ((seed, json.loads(line)) for line in text.splitlines())

    def values(self, name: str, suite: str, what: str) -> list[float]:
        return [float(row[what]) for _, row in self.rows(name, suite)]

    def clusters(self, suite: str) -> list[str]:
        return [row["id"] for _, row in self.rows("none", suite)]

    def share(self, name: str, suite: str, what: str) -> float:
        values = self.values(name, suite, what)
        return 100 * sum(values) / len(values)

    def by_seed(self, name: str, suite: str, what: str) -> str:
        shares = [Items(self.root, [seed]).share(name, suite, what) for seed in self.seeds]
        return " / ".join(f"{share:.1f}" for share in shares)

    def change(self, one: str, other: str, suite: str, what: str) -> str:
        """Points from `one` to `other`, 95 % interval, p."""
        from evals.stats import mean, paired_difference

        a, b = (mean(self.values(name, suite, what)) for name in (one, other))
        found = paired_difference(a, b, self.clusters(suite))
        low, high = (100 * edge for edge in found.interval)
        p = "< 0.001" if found.p_value <= 0.001 else f"= {found.p_value:.3f}"
        return f"{100 * found.difference:+.1f} [{low:+.1f}, {high:+.1f}], p {p}"


def tables(root: Path, seeds: Sequence[int]) -> str:
    from mmalign.generalization import generalization_factor

    items = Items(root, seeds)
    out = ["| model | format, test (by seed) | ood | GF, raw | GF, relative | accuracy, test (by "
           "seed) | ood | greedy: format, test | ood | accuracy, test | ood |"]  # fmt: skip
    out.append("|" + "---|" * 11)
    ground = [items.share("none", f"{words}-sampled", "well_formed") for words in ("test", "ood")]
    for name in (*STARTS, *(f"{start}_grpo" for start in STARTS)):
        start, _, stage = name.partition("_")
        label = f"{NAMES[start]}, then GRPO" if stage else NAMES[start]
        cells = ["base, no cold start" if label == "none" else label]
        rates = []
        for what in ("well_formed", "correct"):
            for words in ("test", "ood"):
                suite = f"{words}-sampled"
                text = f"{items.share(name, suite, what):.1f}"
                seeded = f" ({items.by_seed(name, suite, what)})" if words == "test" else ""
                cells.append(text + seeded)
                rates.append(items.share(name, suite, what))
            if what == "well_formed":
                gains = [rate - start for rate, start in zip(rates, ground, strict=True)]
                cells.append(f"{generalization_factor(*rates):.1f}")
                cells.append(f"{generalization_factor(*gains):.1f}" if name != "none" else "")
        for what in ("well_formed", "correct"):
            cells += [f"{items.share(name, words, what):.1f}" for words in ("test", "ood")]
        out.append("| " + " | ".join(cells) + " |")

    out += ["", "| from | to | what | sampled, test | sampled, ood | greedy, test |"]
    out.append("|" + "---|" * 6)
    steps = [
        *((start, f"{start}_grpo", "correct") for start in STARTS),
        *((start, f"{start}_grpo", "well_formed") for start in STARTS),
        ("sft", "specs", "well_formed"), ("sft", "specs", "correct"),
        ("sft_grpo", "specs_grpo", "well_formed"), ("sft_grpo", "specs_grpo", "correct"),
        ("none_grpo", "specs_grpo", "well_formed"), ("none_grpo", "specs_grpo", "correct"),
    ]  # fmt: skip
    for one, other, what in steps:
        suites = ("test-sampled", "ood-sampled", "test")
        found = [items.change(one, other, suite, what) for suite in suites]
        word = "accuracy" if what == "correct" else "format"
        out.append("| " + " | ".join([_said(one), _said(other), word, *found]) + " |")
    return "\n".join(out)


def _said(name: str) -> str:
    start, _, stage = name.partition("_")
    return f"{NAMES[start]}, GRPO" if stage else f"start: {NAMES[start]}"


def figure(root: Path, seeds: Sequence[int]) -> None:
    """curves.png: what the probes saw, the mean over seeds; the cold start, and GRPO after it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = {
        "format, as asked in training": "probe/id/format",
        "format, other words": "probe/ood/format",
        "accuracy, as asked in training": "probe/id/accuracy",
        "GF, raw": "gf/raw",
    }
    chart, rows = plt.subplots(2, len(shown), figsize=(4 * len(shown), 6), layout="constrained")
    for row, stage in zip(rows, ("cold", "grpo"), strict=True):
        for axes, (title, key) in zip(row, shown.items(), strict=True):
            for start in STARTS:
                files = [root / f"seed{s}" / f"{stage}_{start}" / "metrics.jsonl" for s in seeds]
                if not all(file.exists() for file in files):
                    continue
                curves = [_curve(file, key) for file in files]
                points = sorted(curves[0])
                heights = [100 * sum(c[p] for c in curves) / len(curves) for p in points]
                axes.plot(points, heights, label=NAMES[start])
            axes.set_title(f"{title}\n{'cold start' if stage == 'cold' else 'GRPO'}", fontsize=10)
            axes.set_xlabel("step")
        row[0].legend(fontsize=8)
    chart.savefig(root / "curves.png", dpi=70)


def _curve(file: Path, key: str) -> dict[int, float]:
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return {line["step"]: line[key] for line in lines if key in line}


def main() -> None:
    args = lab.study_parser(__doc__, "runs/specs_study").parse_args()
    if args.job:
        logging.getLogger("mmalign").setLevel(logging.WARNING)
        kind, *words = args.job
        if kind == "data":
            make_data(args.output)
        elif kind == "base":
            make_base(args.output, int(words[0]))
        else:
            make_start(args.output, int(words[0]), words[1])
        return
    if not args.tables:
        began = time.time()

        def run(jobs: list[list[str]]) -> None:
            lab.run_jobs(jobs, args.workers, args.output, Path(__file__))

        run([["data"]])
        run([["base", str(seed)] for seed in args.seeds])
        run([["start", str(seed), start] for start in STARTS for seed in args.seeds])
        print(f"all: {(time.time() - began) / 60:.1f} min", flush=True)
    text = tables(args.output, args.seeds)
    (args.output / "tables.md").write_text(text + "\n")
    figure(args.output, args.seeds)
    print(text)


if __name__ == "__main__":
    main()
