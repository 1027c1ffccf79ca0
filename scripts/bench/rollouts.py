"""One GRPO step, ours against TRL's GRPOTrainer: same small LLaVA, prompts, rollouts and rewards.

    python scripts/bench/rollouts.py update|whole [--rounds 3] [--steps 5] [--batch 2]
                                     [--group 8] [--response 24 104]

A prompt has 256 picture tokens and about 32 others; each gets a group of rollouts.

update: the rollouts are given, the same to all, so what is measured is the making of the batch, the
    rewards, forward, backward and AdamW. The losses must be equal (DAPO's, whose value on policy is
    not zero), and so must the gradients' norms.
whole: every trainer samples by itself too, with the longest response's number of new tokens.

trl: GRPOTrainer, as it comes. padded: our loop with one row for each rollout. shared: our loop
as it comes, where the rollouts of a prompt lie behind it once. Every cell is a process of its own;
rounds are interleaved, medians of the step time (but each process's first) are printed. float32.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

from common import (
    VOCAB,
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

MODES = ("trl", "padded", "shared")
SIDE = 224


@dataclass(frozen=True)
class Work:
    """Sizes of one comparison. given: the rollouts are; else each trainer samples."""

    given: bool
    steps: int
    batch: int
    group: int
    shortest: int
    longest: int

    @property
    def num_prompts(self) -> int:
        return self.batch * self.steps


def make_rows(work: Work) -> list[dict]:
    """Prompts, and for each the text of its picture and its rollouts' tokens, without the end."""
    rng = random.Random(0)
    shown = pictures(work.num_prompts, SIDE)
    return [
        {
            "id": f"{number:04d}",
            "image": shown[number],
            "prompt": words(rng, 28, VOCAB),
            "rollouts": [
                [rng.randrange(100, VOCAB - 200)
                 for _ in range(rng.randint(work.shortest, work.longest) - 1)]
                for _ in range(work.group)
            ],
        }
        for number in range(work.num_prompts)
    ]  # fmt: skip


def worth(num_tokens: int, work: Work) -> float:
    """DAPO's overlong penalty over the whole range: shorter is better."""
    over = num_tokens - work.shortest
    return -min(max(over / (work.longest - work.shortest), 0.0), 1.0)


def run_trl(work: Work, folder: Path) -> dict:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    rows = make_rows(work)
    processor = AutoProcessor.from_pretrained(folder)
    end = processor.tokenizer.eos_token_id
    dataset = Dataset.from_list(
        [
            {"prompt": [{"role": "user", "content": row["prompt"]}], "image": row["image"]}
            for row in rows
        ]
    )
    model = AutoModelForImageTextToText.from_pretrained(folder)
    model.model.vision_tower.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(False)
    memory, seconds, losses, norms, lengths = Memory("cpu"), [], [], [], []
    by_prompt = {row["prompt"]: row["rollouts"] for row in rows}

    class Clock(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                memory.reset()

        def on_log(self, args, state, control, logs=None, **kwargs):
            if logs and "loss" in logs:
                losses.append(float(logs["loss"]))
                norms.append(float(logs["grad_norm"]))

    class Given(GRPOTrainer):
        """Takes its time from the batch on: `training_step` samples, too."""

        def training_step(self, *args, **kwargs):
            self.started = time.perf_counter()
            return super().training_step(*args, **kwargs)

        def _generate(self, prompts):
            self.asked = [prompt[-1]["content"][-1]["text"] for prompt in prompts]
            return super()._generate(prompts)

        def _generate_single_turn(self, prompt_ids, *args, **kwargs):
            if not work.given:
                return super()._generate_single_turn(prompt_ids, *args, **kwargs)
            lengths.extend(len(ids) for ids in prompt_ids)
            # The prompts of a group follow one another.
            made = [by_prompt[text][n % work.group] for n, text in enumerate(self.asked)]
            return [[*ids, end] for ids in made], None

    class Step(torch.optim.AdamW):
        def step(self, *args, **kwargs):
            result = super().step(*args, **kwargs)
            seconds.append(time.perf_counter() - trainer.started)
            return result

    def shorter(completion_ids, **kwargs):
        return [worth(len(ids), work) for ids in completion_ids]

    with tempfile.TemporaryDirectory() as out:
        trainer = Given(
            model=model,
            reward_funcs=shorter,
            args=GRPOConfig(
                output_dir=out, per_device_train_batch_size=work.batch * work.group,
                num_generations=work.group, max_steps=work.steps, learning_rate=1e-5,
                lr_scheduler_type="constant", warmup_steps=0, logging_steps=1, report_to=[],
                use_cpu=True, bf16=False, gradient_checkpointing=False, beta=0.0,
                loss_type="dapo", epsilon=0.2, epsilon_high=0.28, max_grad_norm=1.0,
                weight_decay=0.0, max_completion_length=work.longest, save_strategy="no",
                disable_tqdm=True, shuffle_dataset=False, temperature=1.0, top_k=0, top_p=1.0,
            ),
            train_dataset=dataset,
            processing_class=processor,
            callbacks=[Clock()],
            optimizers=(
                Step([p for p in model.parameters() if p.requires_grad], lr=1e-5, weight_decay=0),
                None,
            ),
        )  # fmt: skip
        trainer.train()
    found = {"seconds": seconds[1:], "losses": losses, "norms": norms, "prefix": lengths[:1]}
    return found | {"peak_mb": memory.growth()}


def run_ours(work: Work, folder: Path, mode: str) -> dict:
    from mmalign.config import validate
    from mmalign.generate.base import Generation
    from mmalign.generate.local import LocalGenerator
    from mmalign.media import embed
    from mmalign.records import Verifiable, user
    from mmalign.store import write_dataset
    from trainers import sampler
    from trainers.config import Recipe
    from trainers.loop import Stepped, train

    rows = make_rows(work)
    by_id = {row["id"]: row["rollouts"] for row in rows}

    def in_order(self: sampler.Sampler, step: int) -> list[int]:
        """TRL's rows in TRL's order, so that the losses can be compared."""
        return list(range(step * self.batch_size, (step + 1) * self.batch_size))

    sample = LocalGenerator.generate

    def generate(self, requests, sampling):
        if not work.given:
            return sample(self, requests, sampling)
        end = self.policy.processor.tokenizer.eos_token_id
        made = [by_id[one.id.split("/")[-2]][n % work.group] for n, one in enumerate(requests)]
        return [
            Generation(id=one.id, text="", num_tokens=len(ids), finished=True,
                       token_ids=(*ids, end))
            for one, ids in zip(requests, made, strict=True)
        ]  # fmt: skip

    length = {"name": "length", "max_tokens": work.longest,
              "buffer_tokens": work.longest - work.shortest}  # fmt: skip
    with (
        tempfile.TemporaryDirectory() as out,
        patch.object(LocalGenerator, "generate", generate),
        patch.object(sampler.Sampler, "batch", in_order),
    ):
        records = [
            Verifiable(id=row["id"], prompt=user(row["prompt"], images=1),
                       images=(embed(row["image"]),), answer="1", verifier="exact")
            for row in rows
        ]  # fmt: skip
        write_dataset(Path(out) / "prompts", Verifiable, records)
        recipe = validate(
            {
                "model": {"path": str(folder)},
                "data": {"path": f"{out}/prompts"},
                "loss": {"name": "dapo"},
                "rollouts": {
                    "group_size": work.group,
                    "decoding": {"max_new_tokens": work.longest,
                                 "batch_size": work.batch * work.group},
                    "rewards": {"functions": [length]},
                },
                "scorer": {"layout": "padded" if mode == "padded" else "auto"},
                "optim": {"lr": 1e-5, "batch_size": work.batch, "steps": work.steps,
                          "schedule": "constant", "warmup_fraction": 0.0, "weight_decay": 0.0},
                "run": {"output": f"{out}/run", "log_every_steps": 1},
            },
            Recipe,
            "bench",
        )  # fmt: skip
        memory, seconds, losses, norms = Memory("cpu"), [], [], []
        for event in train(recipe):
            if isinstance(event, Stepped):
                rate = next(v for k, v in event.metrics.items() if k.endswith("s_per_second")
                            and "token" not in k)  # fmt: skip
                seconds.append(work.batch * work.group / rate)
                losses.append(event.metrics["train/loss"])
                norms.append(event.metrics["train/grad_norm"])
                if event.step == 1:
                    memory.reset()
                if event.step == work.steps:
                    peak = memory.growth()
    return {"seconds": seconds[1:], "losses": losses, "norms": norms, "peak_mb": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", choices=("update", "whole"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch", type=int, default=2, help="prompts of a step")
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--response", type=int, nargs=2, default=(24, 104))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--cell", choices=MODES, help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    args = parser.parse_args()
    work = Work(args.work == "update", args.steps, args.batch, args.group, *args.response)
    if args.cell:
        import torch

        torch.set_num_threads(args.threads)
        folder = Path(args.model)
        print_cell(
            run_trl(work, folder) if args.cell == "trl" else run_ours(work, folder, args.cell)
        )
        return

    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder) / "model", SIDE)
        common = [args.work, "--model", str(model)]
        for name in ("steps", "batch", "group", "threads"):
            common += [f"--{name}", str(getattr(args, name))]
        common += ["--response", *map(str, args.response)]
        found = interleaved(
            str(Path(__file__)), {m: [*common, "--cell", m] for m in args.modes}, args.rounds
        )
    print(f"\n{' '.join(sys.argv)}\n{machine('cpu', args.threads)}")
    print(
        f"{args.work}: {work.batch} prompts of {work.group} rollouts a step, of {work.shortest} to "
        f"{work.longest} tokens; median of {args.rounds} interleaved rounds of {args.steps - 1} "
        "steps\n"
    )
    grounds = [mode for mode in ("trl", "padded") if mode in found]
    print_table(
        ["run", "s/step", "all steps", *(f"throughput / {g}" for g in grounds), "peak MB"],
        [
            [
                mode,
                f"{median_seconds(cells):.2f}",
                spread(cells),
                *(f"{median_seconds(found[g]) / median_seconds(cells):.2f}x" for g in grounds),
                f"{median_of(cells, 'peak_mb'):.0f}",
            ]
            for mode, cells in found.items()
        ],
    )
    if work.given:
        for what in ("losses", "norms"):
            print(f"\n{what} of the first round:")
            for mode, cells in found.items():
                print(f"  {mode:8s}", " ".join(f"{value:.6f}" for value in cells[0][what]))


if __name__ == "__main__":
    main()
