"""One DPO step, ours against TRL's DPOTrainer: same small LLaVA, pictures, text and steps.

    python scripts/bench.py [--rounds 3] [--steps 6] [--device cpu|cuda]

Every cell is a process of its own; rounds are interleaved (a, b, c, a, b, c, …) and medians of the
step time are printed with ratios to `trl-compact`.

trl: the stock trainer; off CUDA it projects every position onto the vocabulary.
trl-compact: the same trainer with the position selection that it uses on CUDA switched on, the
    fairer peer here.
padded, shared_prefix: our loop with the reference in the step; shared_prefix-cached: the
    reference's scores computed once before the first step (that pass is not in the step time).
TRL's times leave its collation out; ours hold the making of the batch. Both run float32, AdamW.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

VOCAB = 32_000
MODES = ("trl", "trl-compact", "padded", "shared_prefix", "shared_prefix-cached")


def words(rng: random.Random, count: int) -> str:
    return " ".join(f"w{rng.randrange(VOCAB - 100)}" for _ in range(count))


def make_rows(count: int, seed: int = 0) -> list[dict]:
    """Pairs with 16 to 40 prompt words and 24 to 104 response words, one picture each."""
    import numpy as np
    from PIL import Image

    rng, pixels = random.Random(seed), np.random.RandomState(seed)
    return [
        {
            "image": Image.fromarray(pixels.randint(0, 255, (256, 256, 3), dtype=np.uint8)),
            "prompt": words(rng, rng.randint(16, 40)),
            "chosen": words(rng, rng.randint(24, 104)),
            "rejected": words(rng, rng.randint(24, 104)),
        }
        for _ in range(count)
    ]


def make_model(folder: Path) -> Path:
    from mmalign.models.tiny import TinyModel, Tower

    return TinyModel(
        output=str(folder),
        words=tuple(f"w{i}" for i in range(VOCAB - 8)),
        image_size=224,
        patch_size=14,
        vision=Tower(hidden=256, layers=6, heads=4, mlp=1024),
        text=Tower(hidden=384, layers=8, heads=6, mlp=1024),
    ).build()


class Memory:
    """Growth of the peak resident memory since `reset`, in MB (CUDA: peak allocated)."""

    def __init__(self, device: str) -> None:
        self.device = device

    def reset(self) -> None:
        gc.collect()
        if self.device == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")
            self.start = self._read("VmRSS")

    def growth(self) -> float:
        if self.device == "cuda":
            import torch

            return (torch.cuda.max_memory_allocated() - self.start) / 2**20
        return (self._read("VmHWM") - self.start) / 1024

    @staticmethod
    def _read(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(name)).split()[1])


def run_trl(folder: Path, steps: int, batch: int, device: str, compact: bool) -> dict:
    import torch
    import trl.trainer.utils
    from datasets import Dataset
    from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    if compact and device == "cpu":
        trl.trainer.utils._use_triton = lambda device: True
    rows = make_rows(batch * steps)
    # TRL tokenises conversational and plain rows differently; typed blocks give our template.
    dataset = Dataset.from_list(
        [
            {
                "images": [row["image"]],
                "prompt": f"USER: <image>\n{row['prompt']} ASSISTANT:",
                "chosen": f" {row['chosen']}</s>",
                "rejected": f" {row['rejected']}</s>",
            }
            for row in rows
        ]
    )
    model, reference = (AutoModelForImageTextToText.from_pretrained(folder) for _ in range(2))
    model.model.vision_tower.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(False)
    memory, seconds, losses = Memory(device), [], []

    class Clock(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                memory.reset()
            self.started = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            seconds.append(time.perf_counter() - self.started)

        def on_log(self, args, state, control, logs=None, **kwargs):
            if logs and "loss" in logs:
                losses.append(float(logs["loss"]))

    class InOrder(DPOTrainer):
        def _get_train_sampler(self, *args, **kwargs):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    with tempfile.TemporaryDirectory() as out:
        trainer = InOrder(
            model=model,
            ref_model=reference,
            args=DPOConfig(
                output_dir=out, per_device_train_batch_size=batch, max_steps=steps,
                learning_rate=1e-5, lr_scheduler_type="constant", warmup_steps=0,
                logging_steps=1, report_to=[], use_cpu=device == "cpu", bf16=False,
                gradient_checkpointing=False, max_length=None, beta=0.1, max_grad_norm=1.0,
                weight_decay=0.0, save_strategy="no", disable_tqdm=True,
            ),
            train_dataset=dataset,
            processing_class=AutoProcessor.from_pretrained(folder),
            callbacks=[Clock()],
        )  # fmt: skip
        trainer.train()
    return {"seconds": seconds[1:], "losses": losses, "peak_mb": memory.growth()}


def run_ours(folder: Path, steps: int, batch: int, device: str, layout: str, cached: bool) -> dict:
    from mmalign.config import validate
    from mmalign.media import embed
    from mmalign.records import Preference, user
    from mmalign.store import write_dataset
    from trainers import sampler
    from trainers.config import Recipe
    from trainers.loop import Stepped, train

    # TRL's rows in TRL's order, so that the losses can be compared.
    sampler.Sampler.batch = lambda self, step: list(  # type: ignore[method-assign]
        range(step * self.batch_size, (step + 1) * self.batch_size)
    )
    with tempfile.TemporaryDirectory() as out:
        write_dataset(
            Path(out) / "pairs",
            Preference,
            [
                Preference(
                    id=f"{number:04d}",
                    prompt=user(row["prompt"], images=1),
                    images=(embed(row["image"]),),
                    chosen=row["chosen"],
                    rejected=row["rejected"],
                )
                for number, row in enumerate(make_rows(batch * steps))
            ],
        )
        recipe = validate(
            {
                "model": {"path": str(folder)},
                "data": {"path": f"{out}/pairs"},
                "loss": {"name": "dpo"},
                "reference": "cached" if cached else "frozen_copy",
                "scorer": {"layout": layout},
                "optim": {"lr": 1e-5, "batch_size": batch, "steps": steps, "schedule": "constant",
                          "warmup_fraction": 0.0},
                "run": {"output": f"{out}/run", "log_every_steps": 1},
            },
            Recipe,
            "bench",
        )  # fmt: skip
        memory, seconds, losses = Memory(device), [], []
        for event in train(recipe):
            if isinstance(event, Stepped):
                seconds.append(batch / event.metrics["train/pairs_per_second"])
                losses.append(event.metrics["train/loss"])
                if event.step == 1:
                    memory.reset()
                if event.step == steps:
                    peak = memory.growth()
    return {"seconds": seconds[1:], "losses": losses, "peak_mb": peak}


def run_cell(mode: str, folder: Path, steps: int, batch: int, device: str, threads: int) -> dict:
    import torch

    torch.set_num_threads(threads)
    if mode.startswith("trl"):
        return run_trl(folder, steps, batch, device, compact=mode == "trl-compact")
    layout, _, cached = mode.partition("-")
    return run_ours(folder, steps, batch, device, layout, bool(cached))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--cell", choices=MODES, help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cell:
        made = run_cell(
            args.cell, Path(args.model), args.steps, args.batch, args.device, args.threads
        )
        print("CELL " + json.dumps(made))
        return

    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder) / "model")
        cells: dict[str, list[dict]] = {mode: [] for mode in args.modes}
        for _ in range(args.rounds):
            for mode in args.modes:
                command = [
                    sys.executable, __file__, "--cell", mode, "--model", str(model),
                    "--steps", str(args.steps), "--batch", str(args.batch),
                    "--device", args.device, "--threads", str(args.threads),
                ]  # fmt: skip
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                lines = [x for x in done.stdout.splitlines() if x.startswith("CELL ")]
                if not lines:
                    sys.exit(f"{mode} failed:\n{done.stderr[-3000:]}")
                cells[mode].append(json.loads(lines[-1][5:]))
    medians = {m: statistics.median(s for c in rs for s in c["seconds"]) for m, rs in cells.items()}
    peaks = {mode: statistics.median(c["peak_mb"] for c in rs) for mode, rs in cells.items()}
    base = "trl-compact" if "trl-compact" in cells else args.modes[0]
    print(
        f"\n{args.batch} pairs a step, 256 image tokens, {args.threads} threads, {args.device}; "
        f"median of {args.rounds} interleaved rounds of {args.steps - 1} steps"
    )
    print(f"| run | s/step | throughput / {base} | peak MB over static | memory / {base} |")
    print("|---|---|---|---|---|")
    for mode in args.modes:
        print(
            f"| {mode} | {medians[mode]:.2f} | {medians[base] / medians[mode]:.2f}x "
            f"| {peaks[mode]:.0f} | {peaks[mode] / peaks[base]:.2f} |"
        )
    print("\nlosses of the first round:")
    for mode in args.modes:
        print(f"  {mode:22s}", " ".join(f"{loss:.5f}" for loss in cells[mode][0]["losses"]))


if __name__ == "__main__":
    main()
