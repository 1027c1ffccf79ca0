"""One DPO step, ours against TRL's DPOTrainer: same small LLaVA, pictures, text and steps.

    python scripts/bench/pairs.py [--work short|long|rdpo|lora|ranking] [--rounds 3] [--steps 6]

Every cell is a process of its own; rounds are interleaved (a, b, c, a, b, c, …) and medians of the
step time are printed with ratios to the first mode.

trl-compact: TRL's DPOTrainer with the position selection that it uses on CUDA switched on, the
    fairer peer on a CPU. trl: the stock trainer, which projects every position off CUDA.
padded: our loop, a row for each response, response positions alone projected.
shared: our loop as it comes (layout and attention `auto`), reference in the step.
shared-cached: the same with the reference's scores stored; that pass is not in the step time.

short: 256 picture tokens, 16 to 40 words of prompt, 24 to 104 of response. long: 576 picture
tokens, 50 words, responses of 100. rdpo: `short` with a contrast picture, no TRL (it has no such
loss; `padded` is the concatenated step). lora: `short` with LoRA, the reference by adapter-off.
ranking: `short` with four responses to a prompt, which are six pairs for TRL and one row for us.
TRL's times leave its collation out; ours hold the making of the batch. float32, AdamW.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from common import (
    Memory,
    interleaved,
    machine,
    make_model,
    median_of,
    median_seconds,
    pictures,
    print_cell,
    print_table,
    spread,
    words,
)

MODES = ("trl-compact", "trl", "padded", "shared", "shared-cached")


@dataclass(frozen=True)
class Work:
    """Sizes of one comparison, in words and pixels."""

    side: int
    prompt: tuple[int, int]
    response: tuple[int, int]
    loss: str = "dpo"
    lora: bool = False
    responses: int = 2


WORKS = {
    "short": Work(224, (16, 40), (24, 104)),
    "long": Work(336, (50, 50), (100, 100)),
    "rdpo": Work(224, (16, 40), (24, 104), loss="rdpo"),
    "lora": Work(224, (16, 40), (24, 104), lora=True),
    "ranking": Work(224, (16, 40), (24, 104), responses=4),
}
LORA = {"rank": 16, "alpha": 32}
TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def make_rows(work: Work, count: int) -> list[dict]:
    rng = random.Random(0)
    shown = pictures(2 * count, work.side)
    return [
        {
            "image": shown[2 * number],
            "contrast": shown[2 * number + 1],
            "prompt": words(rng, rng.randint(*work.prompt)),
            "responses": [words(rng, rng.randint(*work.response)) for _ in range(work.responses)],
        }
        for number in range(count)
    ]


def run_trl(work: Work, folder: Path, steps: int, batch: int, device: str, compact: bool) -> dict:
    import torch
    import trl.trainer.utils
    from datasets import Dataset
    from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    if compact and device == "cpu":
        trl.trainer.utils._use_triton = lambda device: True
    # Our template as plain text; TRL adds no token at the start by itself.
    dataset = Dataset.from_list(
        [
            {
                "images": [row["image"]],
                "prompt": f"<s>USER: <image>\n{row['prompt']} ASSISTANT:",
                "chosen": f" {chosen}</s>",
                "rejected": f" {rejected}</s>",
            }
            for row in make_rows(work, batch * steps)
            for chosen, rejected in combinations(row["responses"], 2)
        ]
    )
    pairs = len(dataset) // steps
    count = 1 if work.lora else 2
    model, *reference = (AutoModelForImageTextToText.from_pretrained(folder) for _ in range(count))
    model.model.vision_tower.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(False)
    adapter = {}
    if work.lora:
        from peft import LoraConfig

        adapter["peft_config"] = LoraConfig(
            r=LORA["rank"], lora_alpha=LORA["alpha"], target_modules=TARGETS
        )
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
            ref_model=reference[0] if reference else None,
            args=DPOConfig(
                output_dir=out, per_device_train_batch_size=pairs, max_steps=steps,
                learning_rate=1e-5, lr_scheduler_type="constant", warmup_steps=0,
                logging_steps=1, report_to=[], use_cpu=device == "cpu", bf16=False,
                gradient_checkpointing=False, max_length=None, beta=0.1, max_grad_norm=1.0,
                weight_decay=0.0, save_strategy="no", disable_tqdm=True,
            ),
            train_dataset=dataset,
            processing_class=AutoProcessor.from_pretrained(folder),
            callbacks=[Clock()],
            **adapter,
        )  # fmt: skip
        trainer.train()
    return {"seconds": seconds[1:], "losses": losses, "peak_mb": memory.growth()}


def make_record(work: Work, number: int, row: dict) -> Any:
    from mmalign.media import embed
    from mmalign.records import Preference, RankedResponse, Ranking, user

    known = {
        "id": f"{number:04d}",
        "prompt": user(row["prompt"], images=1),
        "images": (embed(row["image"]),),
    }
    if work.responses > 2:
        responses = [RankedResponse(text=text, rank=n) for n, text in enumerate(row["responses"])]
        return Ranking(**known, responses=tuple(responses))
    chosen, rejected = row["responses"]
    contrast = (embed(row["contrast"]),) if work.loss == "rdpo" else ()
    return Preference(**known, chosen=chosen, rejected=rejected, contrast_images=contrast)


def run_ours(work: Work, folder: Path, steps: int, batch: int, mode: str) -> dict:
    from mmalign.config import validate
    from mmalign.records import Preference, Ranking
    from mmalign.store import write_dataset
    from trainers import sampler
    from trainers.config import Recipe
    from trainers.loop import Stepped, train

    # TRL's rows in TRL's order, so that the losses can be compared.
    sampler.Sampler.batch = lambda self, step: list(  # type: ignore[method-assign]
        range(step * self.batch_size, (step + 1) * self.batch_size)
    )
    device = "cpu"
    with tempfile.TemporaryDirectory() as out:
        kind: Any = Preference if work.responses == 2 else Ranking
        rows = [make_record(work, n, row) for n, row in enumerate(make_rows(work, batch * steps))]
        write_dataset(Path(out) / "pairs", kind, rows)
        reference = "adapter_off" if work.lora else "frozen_copy"
        recipe = validate(
            {
                "model": {"path": str(folder), "lora": LORA if work.lora else None},
                "data": {"path": f"{out}/pairs"},
                "loss": {"name": work.loss},
                "reference": "cached" if mode == "shared-cached" else reference,
                "scorer": {"layout": "padded" if mode == "padded" else "auto"},
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
                unit = "pairs" if kind is Preference else "rankings"
                seconds.append(batch / event.metrics[f"train/{unit}_per_second"])
                losses.append(event.metrics["train/loss"])
                if event.step == 1:
                    memory.reset()
                if event.step == steps:
                    peak = memory.growth()
    return {"seconds": seconds[1:], "losses": losses, "peak_mb": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", choices=WORKS, default="short")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--modes", nargs="+", choices=MODES)
    parser.add_argument("--cell", choices=MODES, help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    args = parser.parse_args()
    work = WORKS[args.work]
    if args.cell:
        import torch

        torch.set_num_threads(args.threads)
        sizes = (Path(args.model), args.steps, args.batch)
        if args.cell.startswith("trl"):
            print_cell(run_trl(work, *sizes, "cpu", compact=args.cell == "trl-compact"))
        else:
            print_cell(run_ours(work, *sizes, args.cell))
        return

    # TRL has no rDPO, and the stock trainer differs from the compact one only off CUDA.
    possible = [m for m in MODES if work.loss == "dpo" or not m.startswith("trl")]
    modes = [m for m in args.modes or possible if m in possible]
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder) / "model", work.side)
        common = ["--work", args.work, "--model", str(model), "--steps", str(args.steps)]
        common += ["--batch", str(args.batch), "--threads", str(args.threads)]
        found = interleaved(
            str(Path(__file__)), {m: [*common, "--cell", m] for m in modes}, args.rounds
        )
    base = modes[0]
    print(f"\n{' '.join(sys.argv)}\n{machine('cpu', args.threads)}")
    print(
        f"{args.work}: {args.batch} rows a step, median of {args.rounds} interleaved rounds of "
        f"{args.steps - 1} steps; baseline {base}\n"
    )
    ground, room = median_seconds(found[base]), median_of(found[base], "peak_mb")
    print_table(
        ["run", "s/step", "all steps", f"throughput / {base}", "peak MB", f"{base} / peak"],
        [
            [
                mode,
                f"{median_seconds(cells):.2f}",
                spread(cells),
                f"{ground / median_seconds(cells):.2f}x",
                f"{median_of(cells, 'peak_mb'):.0f}",
                f"{room / median_of(cells, 'peak_mb'):.2f}",
            ]
            for mode, cells in found.items()
        ],
    )
    print("\nlosses of the first round:")
    for mode, cells in found.items():
        print(f"  {mode:22s}", " ".join(f"{loss:.5f}" for loss in cells[0]["losses"]))
    worst = max(
        abs(a - b)
        for cells in found.values()
        for a, b in zip(cells[0]["losses"], found[base][0]["losses"], strict=True)
    )
    print(f"  largest difference from {base}: {worst:.1e}")


if __name__ == "__main__":
    main()
