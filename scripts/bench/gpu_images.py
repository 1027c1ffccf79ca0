"""SDXL's own shapes with random weights on CUDA: MaPO beside Diffusion-DPO, until memory ends.

    python scripts/bench/gpu_images.py [--train lora full] [--attention sdpa flash xformers]
                                       [--most 64] [--steps 5] [--side 1024]
    python scripts/bench/gpu_images.py --tiny       # the same at toy size on the CPU, in float32

2.57 billion parameters in the UNet, pairs of 1024 pixels, bfloat16 (LoRA on a bfloat16 base; full
under autocast over float32 weights), gradient checkpointing, AdamW. Batches of 1, 2, 4, … pairs
until one does not fit, each in a process of its own; what ended a row is told. `live` is MaPO with
float32 VAE and bfloat16 text encoders in the step, the others read stored latents and prompts.

s/step is the median over all steps but the first. peak MB is all that was allocated at once,
weights included. Less time, less memory: MaPO against Diffusion-DPO at the same batch; the paper
(arXiv 2406.06424) has 14.5 and 17.5 per cent on four A100, and batches of 16 for 4.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from common import attempt_cell, machine, median_seconds, need_cuda, print_cell, print_table
from images import COMPARED, Setting, measure, prepare

ATTENTIONS = ("sdpa", "flash", "xformers")
RUNS = (*COMPARED["losses"], "live")
ROWS = 16  # Pairs that are stored; a larger batch sees some of them twice.
HEADER = (
    "train", "attention", "batch", "run",
    "s/step", "pairs/s", "peak MB", "less time", "less memory",
)  # fmt: skip


def batches(most: int) -> Iterator[int]:
    """1, 2, 4, … up to `most`."""
    size = 1
    while size <= most:
        yield size
        size *= 2


def until_memory_ends(
    attempt: Callable[[int], dict | str], most: int
) -> tuple[dict[int, dict], str | None]:
    """What each batch gave until one failed, by its size; and why that one did, in a line."""
    found: dict[int, dict] = {}
    for size in batches(most):
        result = attempt(size)
        if isinstance(result, str):
            return found, f"batch {size}: {' '.join(result.split())[-300:]}"
        found[size] = result
    return found, None


def rows_of(train: str, attention: str, found: dict[str, dict[int, dict]]) -> list[list[str]]:
    """Lines of the table. found: by run, what each batch gave; shares are of Diffusion-DPO's."""
    rows = []
    for size in sorted({size for its in found.values() for size in its}):
        base = found[RUNS[0]].get(size)
        for run, its in found.items():
            if size not in its:
                continue
            one = its[size]
            seconds = median_seconds([one])
            time = memory = "-"
            if base is not None and run == RUNS[1]:
                time = f"{1 - seconds / median_seconds([base]):.1%}"
                memory = f"{1 - one['peak_mb'] / base['peak_mb']:.1%}"
            told = [f"{seconds:.3f}", f"{size / seconds:.2f}", f"{one['peak_mb']:.0f}"]
            rows.append([train, attention, str(size), run, *told, time, memory])
    return rows


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="toy sizes, CPU, float32")
    parser.add_argument("--train", nargs="+", choices=("lora", "full"), default=["lora", "full"])
    parser.add_argument("--attention", nargs="+", choices=ATTENTIONS, default=list(ATTENTIONS))
    parser.add_argument("--most", type=int, default=64)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--cell", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args(given)
    with tempfile.TemporaryDirectory() as scratch:
        setting = Setting(
            folder=Path(args.folder or scratch), model="real", side=args.side, precision="bf16",
            steps=args.steps, checkpointing=True, device="cuda",
        )  # fmt: skip
        if args.tiny:
            setting = replace(setting, model="tiny", side=32, precision="float32", device="cpu")
        if args.cell:
            run, train, attention, batch = args.cell
            chosen = replace(setting, train=train, batch=int(batch))
            made = run == "prepare"
            print_cell(prepare(chosen, ROWS) if made else measure(chosen, run, attention=attention))
            return
        need_cuda(setting.device)
        mine = [*(sys.argv[1:] if given is None else given), "--folder", scratch]

        def cell(run: str, train: str, attention: str, batch: int) -> dict | str:
            print(run, train, attention, batch, file=sys.stderr, flush=True)
            if not args.tiny:
                told = [run, train, attention, str(batch)]
                return attempt_cell(__file__, [*mine, "--cell", *told])
            # Starting a process takes longer than what it would measure.
            chosen = replace(setting, train=train, batch=batch)
            if run == "prepare":
                return prepare(chosen, ROWS)
            return measure(chosen, run, attention=attention)

        once = cell("prepare", "lora", args.attention[0], 1)
        if isinstance(once, str):
            sys.exit(f"the model could not be made: {once}")
        rows, ends = [], []
        for train in args.train:
            for attention in args.attention:
                found = {}
                for run in RUNS:
                    found[run], end = until_memory_ends(
                        lambda size, at=(run, train, attention): cell(*at, size), args.most
                    )
                    if end is not None:
                        ends.append(f"{train}, {attention}, {run}: {end}")
                rows += rows_of(train, attention, found)
    print(f"\n{' '.join(sys.argv)}\n{machine(setting.device, 1)}")
    print(f"{once['rows']} pairs stored in {once['seconds']:.1f} s, {once['store_mb']:.0f} MB\n")
    print_table(HEADER, rows)
    for end in ends:
        print(f"ended: {end}")


if __name__ == "__main__":
    main()
