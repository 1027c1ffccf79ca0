"""What a run says of itself: metrics.jsonl, the console, TensorBoard and wandb."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmalign.errors import MissingExtra
from mmalign.log import get_logger
from mmalign.models.load import Part
from trainers.checkpoint import Position
from trainers.config import Recipe
from trainers.images.config import ImageRecipe

if TYPE_CHECKING:
    from PIL.Image import Image

logger = get_logger("trainers")

# Shown on the console, in this order and under these names; everything else is in the files.
SHORT = {"loss": "loss", "margin": "margin", "accuracy": "acc", "nll": "nll", "reward": "reward"}
PROBED = ("/format", "/accuracy")


@dataclass(slots=True)
class Window:
    """Sums over the steps since the last log line; saved with a checkpoint, as they are floats."""

    sums: dict[str, float] = field(default_factory=dict)

    def add(self, **values: float) -> None:
        """Add one step's values."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def means(self, *, unit: str, lr: float) -> dict[str, float]:
        """The log line's metrics: `loss` and `grad_norm` per step, all else per row.

        Skipped steps are counted; the norm is the mean of those that were taken.
        """
        sums = dict(self.sums)
        steps, rows = sums.pop("steps"), sums.pop("rows")
        seconds = sums.pop("seconds")
        # Those that were sampled during training are none of the dataset's.
        tokens = sums.pop("tokens") + sums.pop("sampled_tokens", 0.0)
        metrics = {"loss": sums.pop("loss") / steps, "lr": lr}
        skipped = {name: sums.pop(name) for name in ("skipped_steps",) if name in sums}
        taken = steps - sum(skipped.values())
        metrics["grad_norm"] = sums.pop("grad_norm") / max(1, taken)
        metrics |= skipped | {name: value / rows for name, value in sums.items()}
        metrics |= {"tokens_per_second": tokens / seconds, f"{unit}_per_second": rows / seconds}
        self.sums = {}
        return {f"train/{name}": value for name, value in metrics.items()}


class Tracker:
    """Writes every log line to metrics.jsonl, the console and the trackers asked for.

    metrics.jsonl is first cut to where `position` stands, so that a resumed run repeats no line.
    """

    def __init__(
        self, recipe: Recipe | ImageRecipe, *, total_steps: int, position: Position
    ) -> None:
        self.total_steps = total_steps
        self._file = open(recipe.run.output / "metrics.jsonl", "ab")  # noqa: SIM115
        self._file.truncate(position.metrics_bytes)
        self._board: Any = None
        self._wandb: Any = None
        folder = recipe.run.output
        if "tensorboard" in recipe.run.trackers:
            from torch.utils.tensorboard.writer import SummaryWriter

            # Pictures of step 0 are shown again where a run starts anew.
            first = position.step + 1 if position.step else 0
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first)
        if "wandb" in recipe.run.trackers:
            import wandb

            self._wandb = wandb.init(
                project="mmalign",
                name=folder.name,
                dir=str(folder),
                id=_run_id(folder),
                resume="allow",
                config=recipe.model_dump(mode="json"),
            )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line for step `step`, counted from 1."""
        line = json.dumps({"step": step, **metrics})
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        logger.info("%s", console_line(step, self.total_steps, metrics))
        if self._board is not None:
            for name, value in metrics.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(metrics), step=step)

    def show(self, step: int, prompts: Sequence[str], pictures: Sequence[Image]) -> None:
        """The pictures of these prompts, of one size, after step `step`."""
        if self._board is not None:
            stacked = np.stack([np.asarray(picture) for picture in pictures])
            self._board.add_images("validation", stacked, step, dataformats="NHWC")
        if self._wandb is not None:
            from wandb import Image as Shown

            shown = [Shown(p, caption=text) for text, p in zip(prompts, pictures, strict=True)]
            self._wandb.log({"validation": shown}, step=step)

    def num_bytes(self) -> int:
        """The length of metrics.jsonl, all of it on the disk."""
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        """Finish every tracker."""
        self._file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def console_line(step: int, total_steps: int, metrics: Mapping[str, float]) -> str:
    """`step 120/5000  loss 0.6420  margin 0.1100  acc 0.5800  31.0 pairs/s`."""
    shown = [f"step {step}/{total_steps}"]
    shown += [
        f"{short} {metrics[f'train/{name}']:.4f}"
        for name, short in SHORT.items()
        if f"train/{name}" in metrics
    ]
    shown += [
        f"{name.removeprefix('probe/')} {metrics[name]:.4f}"
        for name in metrics
        if name.startswith("gf/") or (name.startswith("probe/") and name.endswith(PROBED))
    ]
    for unit in ("pairs", "examples", "rollouts"):
        if (rate := metrics.get(f"train/{unit}_per_second")) is not None:
            shown.append(f"{rate:.3g} {unit}/s")
    return "  ".join(shown)


def part_lines(parts: Sequence[Part]) -> list[str]:
    """The table of what trains, one line for each part of the model."""
    lines = [f"{'part':<16}{'parameters':>16}{'trainable':>16}"]
    return lines + [f"{p.name:<16}{p.num_parameters:>16,}{p.num_trainable:>16,}" for p in parts]


def check_trackers(names: Sequence[str]) -> None:
    """Raise MissingExtra for a tracker that is not installed, before anything is loaded."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise MissingExtra(
                f"run.trackers asks for {name}, which is not installed",
                fix="pip install 'mmalign[track]'",
            )


def _run_id(folder: Path) -> str:
    """One wandb run for one folder, so that a resumed run continues its curves."""
    file = folder / "wandb_id"
    if not file.exists():
        file.write_text(os.urandom(8).hex())
    return file.read_text()
