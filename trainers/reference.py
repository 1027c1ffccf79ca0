"""The policy as it was before training, and its scores of a batch."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from mmalign.attention.choose import Attention
from mmalign.errors import TrainingError
from mmalign.log import get_logger, progress
from mmalign.models.load import Policy, trained_outside_adapter
from mmalign.scores import TokenScores
from mmalign.scoring.scorer import Scorer
from mmalign.store import write_atomically
from trainers.rows import Batch, memory_told

logger = get_logger("trainers.reference")

# Scores a batch that is already on the device. `asked` below: which further fields of TokenScores
# the scorer is asked for, by its own keywords.
Reference = Callable[[Batch], TokenScores]


def fingerprint(model: nn.Module, samples: int = 4096) -> str:
    """A hash of every parameter's name, shape and up to `samples` evenly spaced values.

    Tells whether two loads gave the same policy, without reading all of its bytes.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        values = parameter.detach().flatten()[:: max(1, parameter.numel() // samples)]
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(values.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def adapter_off(policy: Policy, scorer: nn.Module, *, asked: Mapping[str, bool]) -> Reference:
    """The policy with its adapter switched off: exactly the initial policy, at no cost in memory.

    Raises TrainingError where weights outside the adapter train.
    """
    if moving := trained_outside_adapter(policy.model):
        raise TrainingError(
            "with its adapter off, this model is not the initial policy: weights outside the "
            "adapter train",
            got=f"{len(moving)} of them, such as {moving[0]}",
            fix="use reference=frozen_copy or reference=cached, or freeze them",
        )

    def score(batch: Batch) -> TokenScores:
        with torch.no_grad(), policy.model.disable_adapter():  # type: ignore[operator]
            return scorer(batch.plan, **asked)

    return score


def frozen_copy(
    policy: Policy,
    accelerator: Accelerator,
    attention: Attention,
    *,
    asked: Mapping[str, bool],
) -> Reference:
    """A second copy of the policy, taken before the first step or before a resumed state is read.

    Raises TrainingError under FSDP, where the policy's weights are no longer whole.
    """
    if accelerator.distributed_type == DistributedType.FSDP:
        raise TrainingError(
            "reference=frozen_copy would put a whole copy on every GPU, which FSDP avoids",
            fix="use reference=cached, or train a LoRA adapter",
        )
    model = copy.deepcopy(policy.model).requires_grad_(False).eval()
    scorer = Scorer(model, policy.family, attention)

    def score(batch: Batch) -> TokenScores:
        with torch.no_grad(), accelerator.autocast():
            return scorer(batch.plan, **asked)

    return score


class Cached:
    """The initial policy's token scores of every row, in memory as float32.

    logps, competitor_logps: one tensor for each place, its candidates' tokens end to end.
    """

    def __init__(self, logps: list[Tensor], competitor_logps: list[Tensor] | None) -> None:
        self.logps, self.competitor_logps = logps, competitor_logps

    def __call__(self, batch: Batch) -> TokenScores:
        """The stored scores, laid out as the scorer would."""
        competitor = self.competitor_logps
        return TokenScores(
            logps=_spread(self.logps, batch),
            mask=batch.plan.mask,
            marked=batch.plan.marked,
            competitor_logps=None if competitor is None else _spread(competitor, batch),
        )


def cached(
    path: Path,
    key: str,
    batches: Iterable[Batch],
    scorer: nn.Module,
    accelerator: Accelerator,
    *,
    competitor: bool,
) -> Cached:
    """Score this process's `batches` with the initial policy, or read what an earlier start wrote.

    key: names policy, rows and recipe; a file with another key is written anew.
    `batches` of all processes together must cover every place, and be equally many on each; they
    are not made on a read.
    """
    if (stored := _read(path, key)) is not None:
        return stored
    mine: list[tuple[int, Tensor, Tensor | None]] = []
    for batch in progress(batches, label="reference"):
        moved = batch.to(accelerator.device)
        with torch.no_grad(), memory_told(moved):
            scores = scorer(moved.plan, competitor=competitor)
        lengths = scores.mask.view(len(batch.places), -1).sum(-1).tolist()
        own = scores.logps[scores.mask].cpu().split(lengths)
        other = scores.competitor_logps
        rivals = [None] * len(own) if other is None else other[scores.mask].cpu().split(lengths)
        mine += zip(batch.places, own, rivals, strict=True)
    # Places that several processes scored, to be equally many, count once.
    by_place = {place: (own, rival) for place, own, rival in gather_object(mine)}
    found = [by_place[place] for place in sorted(by_place)]
    logps = [own for own, _ in found]
    rivals = [rival for _, rival in found] if competitor else None
    if accelerator.is_main_process:
        tensors = {"logps": torch.cat(logps), "lengths": torch.tensor([len(x) for x in logps])}
        if rivals is not None:
            tensors["competitor_logps"] = torch.cat(rivals)
        write_atomically(path, save(tensors, metadata={"key": key}))
    accelerator.wait_for_everyone()
    return Cached(logps, rivals)


def _read(path: Path, key: str) -> Cached | None:
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("key") != key:
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        logger.warning("%s is damaged (%s): its scores are made again", path, error)
        return None
    lengths = tensors.pop("lengths").tolist()
    logger.info("reference scores read from %s", path)
    split = {name: list(values.split(lengths)) for name, values in tensors.items()}
    return Cached(split["logps"], split.get("competitor_logps"))


def _spread(values: list[Tensor], batch: Batch) -> Tensor:
    """The places' tokens, end to end, into the true cells of the mask: [N, T]."""
    mask = batch.plan.mask
    result = torch.zeros(mask.shape, device=mask.device)
    result[mask] = torch.cat([values[place] for place in batch.places]).to(mask.device)
    return result
