"""The policy as it was before training, and its scores of a batch."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping

import torch
from accelerate import Accelerator
from torch import nn

from mmalign.attention.choose import Attention
from mmalign.errors import TrainingError
from mmalign.models.load import Policy, trained_outside_adapter
from mmalign.models.quantization import scales
from mmalign.scores import TokenScores
from mmalign.scoring.scorer import Scorer
from trainers.config import Precision
from trainers.feature_key import same_tower
from trainers.precision import in_precision
from trainers.rows import Batch
from trainers.shards import in_pieces

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
    for name, scale in scales(model):
        digest.update(f"{name} {tuple(scale.shape)} {scale.dtype}".encode())
        digest.update(scale.detach().float().cpu().numpy().tobytes())
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

    flags = {name: (p, p.requires_grad) for name, p in policy.model.named_parameters()}

    def score(batch: Batch) -> TokenScores:
        with torch.no_grad(), policy.model.disable_adapter():  # type: ignore[operator]
            scores = scorer(batch.plan, **asked)
        # peft freezes the adapter meanwhile and then lets all of it train. What shall stay frozen
        # is frozen again; and under FSDP its shares, which stood aside while peft did that.
        for name, parameter in policy.model.named_parameters():
            share, trains = flags[name]
            parameter.requires_grad_(trains)
            share.requires_grad_(trains)
        return scores

    return score


def frozen_copy(
    policy: Policy,
    accelerator: Accelerator,
    attention: Attention,
    precision: Precision,
    *,
    asked: Mapping[str, bool],
) -> Reference:
    """A second copy of the policy, taken before the first step or before a resumed state is read.

    Raises TrainingError under FSDP and ZeRO-3, where the policy's weights are no longer whole.
    """
    if in_pieces(accelerator):
        raise TrainingError(
            "reference=frozen_copy would put a whole copy on every GPU, against the point of FSDP "
            "and ZeRO-3",
            fix="use reference=cached, or train a LoRA adapter",
        )
    model = copy.deepcopy(policy.model).requires_grad_(False).eval()
    # Stored features are handed to both, and a reference with another tower would score with
    # features that are not its own, unseen.
    assert same_tower(policy.model, model)
    scorer = Scorer(model, policy.family, attention)
    in_precision(scorer, precision, accelerator.device)

    def score(batch: Batch) -> TokenScores:
        with torch.no_grad():
            return scorer(batch.plan, **asked)

    return score
