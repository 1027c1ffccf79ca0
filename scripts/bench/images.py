"""Steps over image pairs on a small SDXL: with stored latents against none, MaPO against DPO.

    python scripts/bench/images.py cached|losses [--train full|lora] [--precision float32|bf16]
                                   [--checkpointing] [--batch 4] [--steps 4] [--rounds 3]
    python scripts/bench/images.py costs

SDXL's own config with every width divided by 4 and all layers kept (sdxl.py), random weights,
pairs of 256 pixels, AdamW. Every step is one of `mmalign train`, in a process for each run; rounds
are interleaved (a, b, a, b, …), times are medians over all steps but each process's first.

cached: `encoded` reads latents and prompts from disk. `live` has VAE and text encoders in memory
and in the step, as the released script: 2B pictures opened and encoded by eights, B prompts. The
VAE is float32, and so are the text encoders unless --precision bf16 (there they are bfloat16, as
the script has them; the UNet's forward runs under autocast, and a LoRA's base is bfloat16).
losses: MaPO and Diffusion-DPO, both from stored latents; the reference of a full run is a frozen
copy, of a LoRA the UNet with its adapter off.
costs: parameters and operations of each part, of SDXL at 1024 pixels and of the small one.

Memory is what the process has grown by since before it loaded anything: `static MB` when the first
step begins (weights, a reference), `peak MB` the most during the steps, gradients and moments
included. What loading itself takes for a moment is not in it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from common import (
    Memory,
    interleaved,
    machine,
    median_of,
    median_seconds,
    pictures,
    print_cell,
    print_table,
    run_cell,
    spread,
    words,
)
from sdxl import REAL, SMALL, TINY, costs

MODELS = {"small": SMALL, "tiny": TINY, "real": REAL}
# What is compared with what: the run that the ratios are to comes first.
COMPARED = {"cached": ("live", "encoded"), "losses": ("diffusion_dpo", "mapo_released")}
HEADER = (
    "run", "s/step", "all steps", "throughput / {base}", "static MB", "peak MB", "peak / {base}",
)  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """What all runs of a comparison share. train: "lora" or "full". batch: pairs in a step."""

    folder: Path
    model: str = "small"
    side: int = 256
    train: str = "full"
    precision: str = "float32"
    batch: int = 4
    steps: int = 4
    checkpointing: bool = False
    device: str = "cpu"

    def recipe(self, loss: str, output: str | Path, **model: Any) -> Any:
        """The recipe of a run. model: more of what is told of the model."""
        from mmalign.config import validate
        from trainers.images.config import ImageRecipe

        short = self.precision == "bf16"
        values = {
            "model": {
                "path": str(self.folder / "model"),
                "lora": {"rank": 8} if self.train == "lora" else None,
                "dtype": "bfloat16" if short and self.train == "lora" else "float32",
                "encoder_dtype": "bfloat16" if short else "float32",
                "gradient_checkpointing": self.checkpointing,
                **model,
            },
            # Without flips each picture has one frame, and is encoded once.
            "data": {"path": str(self.folder / "pairs"), "resolution": self.side, "flip": False},
            "loss": {"name": loss},
            "optim": {"lr": 1e-5, "batch_size": self.batch, "steps": self.steps,
                      "schedule": "constant", "warmup_fraction": 0.0},
            "run": {"output": str(output), "precision": self.precision, "log_every_steps": 1},
        }  # fmt: skip
        return validate(values, ImageRecipe, "bench")


def prepare(setting: Setting, rows: int) -> dict:
    """Write the model and pairs, and encode them: what `encode` says of that."""
    import random

    from mmalign.media import embed
    from mmalign.records import ImagePreference
    from mmalign.store import write_dataset

    MODELS[setting.model].build(setting.folder / "model", setting.device)
    rng, shown = random.Random(0), pictures(2 * rows, setting.side)
    records = [
        ImagePreference(
            id=f"{number:04d}",
            prompt=words(rng, 20, 200),
            chosen=embed(shown[2 * number]),
            rejected=embed(shown[2 * number + 1]),
        )
        for number in range(rows)
    ]
    write_dataset(setting.folder / "pairs", ImagePreference, records)
    return encode(setting) | {"rows": rows}


def toy(setting: Setting) -> Setting:
    """A step of a toy model. Taken first in a process, it loads what modules and kernels take."""
    folder = setting.folder / "toy"
    return replace(setting, folder=folder, model="tiny", side=32, batch=1, steps=1)


def encode(setting: Setting) -> dict:
    """Make latents and prompts as a run does before its first step, its UNet in memory."""
    from mmalign.store import open_dataset
    from trainers.directory import RunDirectory
    from trainers.images import setup

    recipe = setting.recipe("mapo_released", setting.folder / "first")
    make, found = setup.make_encoded, {}

    def timed(recipe: Any, backbone: Any, store: Any, *given: Any) -> None:
        started = time.perf_counter()
        make(recipe, backbone, store, *given)
        found.update(seconds=time.perf_counter() - started, store_mb=store.num_bytes / 2**20)

    memory = Memory(setting.device)
    memory.reset()
    with patch.object(setup, "make_encoded", timed):
        setup.set_up_images(recipe, open_dataset(recipe.data.path), RunDirectory(recipe))
    return {**found, "peak_mb": memory.growth()}


def measure(setting: Setting, run: str, **model: Any) -> dict:
    """Seconds and losses of each step; static_mb, what stands before the first, and peak_mb."""
    from trainers import loop
    from trainers.loop import Stepped, train

    loss = "mapo_released" if run in COMPARED["cached"] else run
    memory, clock, losses = Memory(setting.device), _Clock(setting.device), []
    static = peak = 0.0
    with ExitStack() as stack:
        output = stack.enter_context(tempfile.TemporaryDirectory())
        recipe = setting.recipe(loss, output, **model)
        if run == "live":
            stack.enter_context(encoders_in_step())
        set_up = loop.set_up_images

        def watched(*given: Any) -> Any:
            nonlocal static
            parts = set_up(*given)
            static = memory.forget_peak()
            clock.start()
            return parts

        stack.enter_context(patch.object(loop, "set_up_images", watched))
        memory.reset()
        for event in stack.enter_context(closing(train(recipe))):
            if isinstance(event, Stepped):
                clock.stop()
                losses.append(event.metrics["train/loss"])
                peak = memory.growth()
                if event.step == setting.steps:
                    break  # Nobody reads the trained model.
                clock.start()
    return {"seconds": clock.seconds[1:], "losses": losses, "peak_mb": peak, "static_mb": static}


class _Clock:
    """Seconds of each step, on a device that has done what it was given."""

    def __init__(self, device: str) -> None:
        self.device, self.seconds = device, []

    def start(self) -> None:
        self._started = self._now()

    def stop(self) -> None:
        self.seconds.append(self._now() - self._started)

    def _now(self) -> float:
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()
        return time.perf_counter()


@contextmanager
def encoders_in_step() -> Iterator[None]:
    """Runs started inside keep VAE and text encoders, and encode each micro-batch as it is made."""
    from mmalign.diffusion.load import load_encoders
    from trainers.images import setup
    from trainers.images.rows import ImageRows

    live: dict[str, _Live] = {}
    batch = ImageRows.batch

    def load(recipe: Any, backbone: Any, store: Any, wanted: Any, prompts: Any, root: Any,
             accelerator: Any) -> None:  # fmt: skip
        pipeline = load_encoders(recipe.model).to(accelerator.device)
        live["store"] = _Live(recipe, pipeline, backbone, wanted, prompts, root)

    def encoded(rows: ImageRows, survey: Any, step: int, places: list[int]) -> Any:
        used = [rows._rows[survey.rows[place]] for place in places]
        rows.store = live["store"]  # type: ignore[assignment]
        live["store"].encode([row.frames[0] for row in used], [row.prompt for row in used])
        return batch(rows, survey, step, places)

    with patch.object(setup, "make_encoded", load), patch.object(ImageRows, "batch", encoded):
        yield


@dataclass
class _Live:
    """What a store is asked for, of one micro-batch alone, made for it."""

    recipe: Any
    pipeline: Any
    backbone: Any
    wanted: dict[str, Any]
    prompts: dict[str, str]
    root: Path | None
    held: dict[str, dict[str, Any]] = field(default_factory=dict)

    def encode(self, frames: Sequence[tuple[str, ...]], prompts: Sequence[str]) -> None:
        """Both pictures of each pair, all chosen ones first, and each pair's prompt."""
        from trainers.images import encode
        from trainers.images.store import prompt_digest

        digests = [pair[side] for side in (0, 1) for pair in frames]
        made: list[dict[str, Any]] = []
        for start in range(0, len(digests), encode.AT_ONCE):
            items = [self.wanted[digest] for digest in digests[start : start + encode.AT_ONCE]]
            made += encode._pictures(self.pipeline, self.recipe, items, self.root)
        told = [prompt_digest(prompt) for prompt in prompts]
        made += encode._prompts(self.pipeline, self.backbone, list(prompts))
        # The batch is put together on the CPU, as it is from a store.
        values = [{name: tensor.cpu() for name, tensor in one.items()} for one in made]
        self.held = dict(zip([*digests, *told], values, strict=True))

    def read(self, digest: str) -> dict[str, Any]:
        """As a store's."""
        return self.held[digest]


def print_costs() -> None:
    """How the small model's parts stand to each other, and SDXL's own."""
    sizes = (("SDXL", REAL, 1024), ("small", SMALL, 256))
    found = {name: costs(model, side) for name, model, side in sizes}
    rows = []
    for name, _, side in sizes:
        of_unet = found[name]["unet"]
        for part, (parameters, operations) in found[name].items():
            rows.append(
                [
                    f"{name}, {side} px",
                    part,
                    f"{parameters / 1e6:.1f}",
                    f"{parameters / of_unet[0]:.1%}",
                    f"{operations / 1e9:.1f}",
                    f"{operations / of_unet[1]:.1%}",
                ]
            )
    print_table(
        ("model", "part", "M parameters", "/ UNet", "GFLOP, forward of one", "/ UNet"), rows
    )


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", choices=(*COMPARED, "costs"))
    parser.add_argument("--model", choices=MODELS, default="small")
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--train", choices=("lora", "full"), default="full")
    parser.add_argument("--precision", choices=("float32", "bf16"), default="float32")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args(given)
    if args.work == "costs":
        print_costs()
        return
    with tempfile.TemporaryDirectory() as scratch:
        setting = Setting(
            folder=Path(args.folder or scratch), model=args.model, side=args.side,
            train=args.train, precision=args.precision, batch=args.batch, steps=args.steps,
            checkpointing=args.checkpointing,
        )  # fmt: skip
        if args.cell:
            import torch

            torch.set_num_threads(args.threads)
            if args.cell == "prepare":
                prepare(toy(setting), 1)
                print_cell(prepare(setting, args.batch * args.steps))
            else:
                measure(toy(setting), args.cell)
                print_cell(measure(setting, args.cell))
            return
        mine = [*(sys.argv[1:] if given is None else given), "--folder", scratch]
        once = run_cell(__file__, [*mine, "--cell", "prepare"])
        runs = {run: [*mine, "--cell", run] for run in COMPARED[args.work]}
        found = interleaved(__file__, runs, args.rounds)
    print(f"\n{' '.join(sys.argv)}\n{machine('cpu', args.threads, args.precision)}")
    print(
        f"{args.batch} pairs a step, {args.train}, {'' if args.checkpointing else 'no '}"
        f"gradient checkpointing, median of {args.rounds} "
        f"interleaved rounds of {args.steps - 1} steps; stored once: {once['rows']} pairs in "
        f"{once['seconds']:.1f} s, {once['store_mb']:.1f} MB, peak {once['peak_mb']:.0f} MB\n"
    )
    print_table(*table(COMPARED[args.work], found))
    print("\nlosses of the first round:")
    for run, cells in found.items():
        print(f"  {run:14s}", " ".join(f"{loss:.6f}" for loss in cells[0]["losses"]))


def table(runs: Sequence[str], found: dict[str, list[dict]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows; ratios are to the first of `runs`."""
    base = runs[0]
    ground, room = median_seconds(found[base]), median_of(found[base], "peak_mb")
    rows = [
        [
            run,
            f"{(seconds := median_seconds(found[run])):.2f}",
            spread(found[run]),
            f"{ground / seconds:.2f}x",
            f"{median_of(found[run], 'static_mb'):.0f}",
            f"{(peak := median_of(found[run], 'peak_mb')):.0f}",
            f"{peak / room:.2f}",
        ]
        for run in runs
    ]
    return [head.format(base=base) for head in HEADER], rows


if __name__ == "__main__":
    main()
