"""DPO steps of a model of 1.4 billion parameters on CUDA: TRL, and each of our kernels.

    python scripts/bench/gpu.py [--train lora|full] [--works 576 1k 3k] [--cells trl flash …]
                                [--rounds 3] [--steps 8] [--batch 4]
    python scripts/bench/gpu.py --tiny      # the same at toy size on the CPU, in float32

A LLaVA with random weights, made on the device: CLIP 24 layers x 1024 (frozen), Llama 16 layers x
2048 with 8 key heads, vocabulary 32,000. Pairs of 576, 1152 (1k) and 2880 (3k) picture tokens: one,
two and five pictures a prompt; responses of 80 to 120 tokens. bfloat16: LoRA on 16-bit weights,
or with --train full autocast over float32 weights. No gradient checkpointing.

trl: TRL's DPOTrainer as it comes, which scores response positions alone on CUDA; the baseline.
padded: our loop, a row for each response, SDPA. sdpa: shared_prefix in rows under masks. flex,
flash, xformers: shared_prefix packed, by that kernel. Each with the reference in the step and
cached; filling the cache is not in the step time.

Every cell is a process of its own; rounds are interleaved (a, b, c, a, b, c, …), medians over all
steps but each run's first. TRL's times leave its collation out; ours hold the making of the batch.
tokens/s counts prompts once and both responses, for every cell alike. MFU is the floor of an exact
step (floor.py, also for TRL: work that is needed, not work that is done) over the time, against the
rate of a large bfloat16 matrix product measured here and against the card's stated peak.
peak MB is growth over what stands after the first step: activations, logits and gradients.
Losses are printed; with LoRA, TRL draws other first weights for the adapter than we do.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from common import (
    attempt_cell,
    machine,
    median_of,
    median_seconds,
    need_cuda,
    print_cell,
    print_table,
    spread,
)
from gpu_cells import CELLS, LARGE, REFERENCES, TINY, Setting, facts, measure

# Dense bfloat16 operations a second that the maker states, by a part of the card's name.
PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
}
HEADER = (
    "run", "reference", "s/step", "all steps", "tokens/s", "peak MB",
    "MFU of GEMM", "MFU of peak", "throughput / {base}", "{base} / peak",
)  # fmt: skip


def stated_peak(name: str) -> float | None:
    """Of a card by its name; None where the table does not know it."""
    return next((rate for part, rate in PEAKS.items() if part in name), None)


def table(
    work: str, found: dict[str, list[dict]], known: dict, peak: float | None
) -> tuple[list[str], list[list[str]], list[str]]:
    """Header, rows and notes of one work.

    found: by cell, each round's runs by "work reference". known: what `facts` gave.
    Ratios are to trl, or where it did not run to the first run that did.
    """
    runs = {
        (cell, reference): [one.get(f"{work} {reference}") for one in rounds]
        for cell, rounds in found.items()
        for reference in REFERENCES
    }
    asked = {key: [run for run in its if run is not None] for key, its in runs.items()}
    done = {
        key: its for key, its in asked.items() if its and not any("refused" in run for run in its)
    }
    notes = [
        f"{cell}, reference {reference}: " + next(run["refused"] for run in its if "refused" in run)
        for (cell, reference), its in asked.items()
        if its and (cell, reference) not in done
    ]
    if not done:
        return [], [], notes
    base = next(iter(done))
    name = base[0] if base[1] == "step" else " ".join(base)
    ground, room = median_seconds(done[base]), median_of(done[base], "peak_mb")
    rows = []
    for (cell, reference), its in done.items():
        seconds, memory = median_seconds(its), median_of(its, "peak_mb")
        rate = known["floors"][work][reference] / seconds
        rows.append(
            [
                cell,
                reference,
                f"{seconds:.3f}",
                spread(its),
                f"{known['tokens'][work] / seconds:.0f}",
                f"{memory:.0f}",
                f"{rate / known['gemm']:.0%}",
                "unknown" if peak is None else f"{rate / peak:.0%}",
                f"{ground / seconds:.2f}x",
                f"{room / memory:.2f}" if memory > 0 else "-",
            ]
        )
    return [head.format(base=name) for head in HEADER], rows, notes


def losses(work: str, found: dict[str, list[dict]]) -> list[str]:
    """The first round's losses, a line for each run: they tell whether the same work was done."""
    return [
        f"  {cell + ' ' + reference:16s} " + " ".join(f"{loss:.5f}" for loss in run["losses"])
        for cell, rounds in found.items()
        for reference in REFERENCES
        if "losses" in (run := rounds[0].get(f"{work} {reference}", {}))
    ]


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="toy sizes, CPU, float32")
    parser.add_argument("--train", choices=("lora", "full"), default="lora")
    parser.add_argument("--works", nargs="+", choices=LARGE.works)
    parser.add_argument("--cells", nargs="+", choices=CELLS)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--cell", choices=(*CELLS, "facts"), help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    args = parser.parse_args(given)
    sizes = TINY if args.tiny else LARGE
    works = {work: sizes.works[work] for work in args.works or sizes.works}
    rounds = args.rounds or (1 if args.tiny else 3)
    with tempfile.TemporaryDirectory() as scratch:
        setting = Setting(
            sizes=replace(sizes, works=works),
            folder=Path(args.model or f"{scratch}/model"),
            device="cpu" if args.tiny else "cuda",
            train=args.train,
            steps=args.steps or (3 if args.tiny else 8),
            batch=args.batch,
        )
        if args.cell:
            print_cell(facts(setting) if args.cell == "facts" else measure(setting, args.cell))
            return
        need_cuda(setting.device)

        def run(cell: str) -> dict:
            print(cell, file=sys.stderr, flush=True)
            if args.tiny:  # Starting a process takes longer than what it would measure.
                return facts(setting) if cell == "facts" else measure(setting, cell)
            mine = sys.argv[1:] if given is None else list(given)
            result = attempt_cell(
                str(Path(__file__)), [*mine, "--cell", cell, "--model", str(setting.folder)]
            )
            if isinstance(result, dict):
                return result
            last = " ".join(result.split())[-300:]
            if cell == "facts":
                sys.exit(f"the model could not be made: {result}")
            return {f"{w} {r}": {"refused": f"crashed: {last}"} for w in works for r in REFERENCES}

        known = run("facts")
        cells = [cell for cell in args.cells or CELLS if cell not in known["refused"]]
        found: dict[str, list[dict]] = {cell: [] for cell in cells}
        for number in range(rounds):
            print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
            for cell in cells:
                found[cell].append(run(cell))
    told = machine(setting.device, 1)
    peak = stated_peak(told)
    print(f"\n{' '.join(sys.argv)}\n{told}")
    print(
        f"{known['parameters'] / 1e9:.3g} billion parameters, {args.train}; "
        f"{args.batch} pairs a step, median of {rounds} interleaved rounds of "
        f"{setting.steps - 1} steps; matrix product at {known['gemm'] / 1e12:.1f} TFLOP/s, "
        f"stated peak {'unknown' if peak is None else f'{peak / 1e12:.0f}'}"
    )
    for work, shown in works.items():
        tokens = shown * (sizes.side // sizes.patch) ** 2
        floors = known["floors"][work]
        print(
            f"\n{work}: {tokens} picture tokens a pair; floor {floors['step'] / 1e12:.3g} TFLOP, "
            f"{floors['cached'] / 1e12:.3g} cached\n"
        )
        header, rows, notes = table(work, found, known, peak)
        print_table(header, rows)
        for note in notes:
            print(f"refused: {note}")
        print("losses of the first round:", *losses(work, found), sep="\n")
    print()
    for name, reason in known["refused"].items():
        print(f"refused: {name}: {reason}")


if __name__ == "__main__":
    main()
