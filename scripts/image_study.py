"""The lab of image methods: what MaPO earns over its base, and beside Diffusion-DPO and SFT.

    python scripts/image_study.py [--seeds 1 2 3] [--workers 2] [--output runs/image_study]
    python scripts/image_study.py --tables

For every seed three small SDXLs from scratch on real digits (configs/lab/images_*.yaml), which
differ in how often a digit was inverted without being asked for: `near` 30 % of the time, `middle`
only when asked for, `far` never. Cells:

own                bold over plain, both drawn by the middle base, where its bold digit can be read
bold               bold over plain, real digits, the middle base
near, middle, far  inverted over plain, real digits, the same for the three bases

In each cell MaPO in both parametrisations, Diffusion-DPO and SFT on the chosen, with equal pairs
and steps, from one noise each. A method's learning rate is the one of three with the most legible
wins on seed 0, which no table shows: pictures that have more of the style than base's and whose
digit can be read. Every step is a public verb's recipe with overrides; what is complete is skipped.
"""

from __future__ import annotations

import json
import logging
import statistics
from pathlib import Path

import lab_study as lab

LAB = Path(__file__).parent.parent / "configs" / "lab"
# Base: what configs/lab/images_digits.yaml is changed to.
BASES = {
    "near": ("unasked=inverted", "unasked_share=0.3"),
    "middle": (),
    "far": ("styles=[plain, plain, bold, slanted]",),
}
# Cell: its base, its style, whether the base draws the pairs itself.
CELLS = {
    "own": ("middle", "bold", True),
    "bold": ("middle", "bold", False),
    "near": ("near", "inverted", False),
    "middle": ("middle", "inverted", False),
    "far": ("far", "inverted", False),
}
TUNED_ON = ("bold", "far")
METHODS = {
    "mapo_released": (1e-5, 3e-5, 1e-4),
    "mapo": (3e-5, 1e-4, 3e-4),
    "diffusion_dpo": (3e-6, 1e-5, 3e-5),
    "diffusion_sft": (3e-5, 1e-4, 3e-4),
}
NAMES = {
    "mapo_released": "MaPO, released",
    "mapo": "MaPO, paper",
    "diffusion_dpo": "Diffusion-DPO",
    "diffusion_sft": "SFT",
}
TUNING_SEED = 0
PAIRS = 500


def train(config: str, overrides: list[str]) -> None:
    lab.train_recipe(LAB / config, overrides)


def build(config: str, overrides: list[str]) -> None:
    lab.build_dataset(LAB / config, overrides)


def evaluate(model: Path, style: str, output: Path, name: str) -> None:
    from evals.image_preference import ImagePreferenceRecipe
    from evals.image_preference import evaluate as run
    from mmalign.config import load_config

    judges = f"judges=[{{name: digit_style, style: {style}}}, {{name: digit_reader}}]"
    prompts = f"prompts={LAB / 'images_prompts.txt'}"
    overrides = [f"name={name}", f"model.path={model}", f"output={output}", prompts, judges]
    run(load_config(LAB / "images_eval.yaml", ImagePreferenceRecipe, overrides))


def make_init(root: Path, seed: int) -> None:
    from mmalign.config import load_config
    from mmalign.diffusion.tiny import TinyPipeline

    folder = root / f"seed{seed}"
    build("images_digits.yaml", [f"output={folder}/digits", f"seed={seed}"])
    if not (folder / "init" / "model_index.json").exists():
        overrides = [f"output={folder}/init", f"seed={seed}", f"vae.data={folder}/digits"]
        load_config(LAB / "images_model.yaml", TinyPipeline, overrides).build()


def make_base(root: Path, seed: int, base: str) -> None:
    folder = root / f"seed{seed}"
    data = folder / base / "digits"
    build("images_digits.yaml", [f"output={data}", f"seed={100 + seed}", *BASES[base]])
    train(
        "images_base.yaml",
        [f"model.path={folder}/init", f"data.path={data}", f"run.seed={seed}",
         f"run.output={folder}/{base}/base"],
    )  # fmt: skip


def make_cell(root: Path, seed: int, cell: str) -> None:
    base, style, own = CELLS[cell]
    folder = root / f"seed{seed}"
    model, data = folder / base / "base" / "model", folder / "pairs" / cell
    if own:
        build(
            "images_pairs.yaml",
            [f"output={data}", f"seed={seed}", f"source={LAB / 'images_prompts.txt'}",
             f"pairs.chosen={style}", f"pipeline.path={model}", "per_prompt=55",
             "pairs.judge={name: digit_reader}", "pairs.min_score=1"],
        )  # fmt: skip
    else:
        build(
            "images_digits.yaml",
            [f"output={data}", f"seed={200 + seed}", f"num_rows={PAIRS}", f"prefer={style}"],
        )
    evaluate(model, style, folder / "eval" / cell / "base", "base")
    for method in METHODS:
        for rate in rates(root, seed, method):
            name = f"{method}@{rate:g}"
            run = folder / "runs" / cell / name
            train(
                "images_mapo.yaml",
                [f"model.path={model}", f"data.path={data}", f"loss.name={method}",
                 f"optim.lr={rate}", f"run.output={run}", f"run.seed={seed}"],
            )  # fmt: skip
            evaluate(run / "model", style, folder / "eval" / cell / name, method)


def rates(root: Path, seed: int, method: str) -> tuple[float, ...]:
    """The whole grid on the tuning seed, elsewhere the rate that it chose."""
    return METHODS[method] if seed == TUNING_SEED else (best_rate(root, method),)


def best_rate(root: Path, method: str) -> float:
    """The rate with the most legible wins over the tuning seed's cells."""

    def legible(rate: float) -> float:
        name = f"{method}@{rate:g}"
        cells = [Compared(root, TUNING_SEED, cell, name) for cell in TUNED_ON]
        return statistics.mean(cell.legible_wins for cell in cells)

    return max(METHODS[method], key=legible)


class Compared:
    """A run's pictures beside base's."""

    def __init__(self, root: Path, seed: int, cell: str, name: str) -> None:
        folder = root / f"seed{seed}" / "eval" / cell
        self.base, self.run = (_items(folder / which) for which in ("base", name))

    @property
    def wins(self) -> float:
        from evals.image_preference import win_rates

        return win_rates(self.base, self.run)["win/digit_style"][1].value

    @property
    def legible_wins(self) -> float:
        """Wins by style whose digit can be read."""
        pairs = zip(self.base, self.run, strict=True)
        return statistics.mean(
            b["scores"]["digit_style"] > a["scores"]["digit_style"] and b["scores"]["digit_reader"]
            for a, b in pairs
        )

    def read(self, which: str) -> float:
        return statistics.mean(row["scores"]["digit_reader"] for row in getattr(self, which))

    def style(self, which: str) -> float:
        return statistics.mean(row["scores"]["digit_style"] for row in getattr(self, which))


def _items(folder: Path) -> list[dict]:
    text = (folder / "items" / "image_preference.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def interval(per_item: list[float], clusters: list[str]) -> tuple[float, float]:
    from evals.stats import intervals, mean

    return intervals({"value": mean(per_item)}, clusters)["value"]


def tables(root: Path, seeds: list[int]) -> str:
    out = [
        "| cell | method | lr | win rate [95 %] (by seed) | style, base | style | read, base "
        "| read | change, points |"
    ]
    out.append("|" + "---|" * 9)
    for cell in CELLS:
        for method in METHODS:
            rate = best_rate(root, method)
            runs = [Compared(root, seed, cell, f"{method}@{rate:g}") for seed in seeds]
            won, clusters = [], []
            for seed, run in zip(seeds, runs, strict=True):
                for a, b in zip(run.base, run.run, strict=True):
                    ours, theirs = (row["scores"]["digit_style"] for row in (b, a))
                    won.append(float(ours > theirs) + 0.5 * (ours == theirs))
                    clusters.append(f"{seed}/{a['cluster']}")
            low, high = interval(won, clusters)
            by_seed = " / ".join(f"{run.wins:.2f}" for run in runs)
            before, after = (statistics.mean(r.read(w) for r in runs) for w in ("base", "run"))
            style = [statistics.mean(r.style(w) for r in runs) for w in ("base", "run")]
            cells = [cell, NAMES[method], f"{rate:g}"]
            cells.append(f"{statistics.mean(won):.3f} [{low:.3f}, {high:.3f}] ({by_seed})")
            cells += [f"{value:.3f}" for value in style]
            cells += [f"{100 * before:.1f}", f"{100 * after:.1f}"]
            cells.append(f"{100 * (after - before):+.1f}")
            out.append("| " + " | ".join(cells) + " |")
    return "\n".join(out)


def sheet(root: Path, seed: int) -> None:
    """samples.png: for each cell a row of base's pictures and one of each method's."""
    from PIL import Image, ImageDraw

    rows = []
    for cell in CELLS:
        names = ["base", *(f"{m}@{best_rate(root, m):g}" for m in METHODS)]
        for name in names:
            folder = root / f"seed{seed}" / "eval" / cell / name
            pictures = {row["id"]: row["image"] for row in _items(folder)}
            shown = [Image.open(folder / "pictures" / file) for id, file in pictures.items()
                     if int(id.split("/")[1]) < 2]  # fmt: skip
            label = NAMES.get(name.split("@")[0], name)
            rows.append((f"{cell}: {label}", shown))
    width, side, left = max(len(shown) for _, shown in rows), 32, 150
    page = Image.new("RGB", (left + side * width, (side + 2) * len(rows)), "white")
    pen = ImageDraw.Draw(page)
    for place, (label, shown) in enumerate(rows):
        pen.text((4, place * (side + 2) + 10), label, fill="black")
        for column, picture in enumerate(shown):
            page.paste(picture, (left + column * side, place * (side + 2)))
    page.save(root / "samples.png", optimize=True)


def main() -> None:
    args = lab.study_parser(__doc__, "runs/image_study").parse_args()
    if args.job:
        logging.getLogger("mmalign").setLevel(logging.WARNING)
        kind, seed, *words = args.job
        {"init": make_init, "base": make_base, "cell": make_cell}[kind](
            args.output, int(seed), *words
        )
        return
    if not args.tables:
        seeds = [TUNING_SEED, *args.seeds]

        def run(jobs: list[list[str]]) -> None:
            lab.run_jobs(jobs, args.workers, args.output, Path(__file__))

        run([["init", str(seed)] for seed in seeds])
        run([["base", str(seed), base] for seed in seeds for base in BASES])
        run([["cell", str(TUNING_SEED), cell] for cell in TUNED_ON])
        run([["cell", str(seed), cell] for seed in args.seeds for cell in CELLS])
    text = tables(args.output, args.seeds)
    (args.output / "tables.md").write_text(text + "\n")
    sheet(args.output, args.seeds[0])
    print(text)


if __name__ == "__main__":
    main()
