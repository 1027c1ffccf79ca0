"""Weights spread over processes (FSDP2, DeepSpeed ZeRO): what the engine is told, whole tensors.

DDP keeps a whole policy on every process. FSDP2 and ZeRO-3 keep a share of each weight there and
gather a layer when it runs, so that every process must run the same layers equally often; ZeRO-2
spreads gradients and moments alone.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.modeling_layers import GradientCheckpointingLayer

from mmalign.errors import TrainingError
from mmalign.models.load import Policy, part_table
from mmalign.scoring.blank import Blank, blank_inputs
from mmalign.scoring.plan import Layout


def zero_stage(accelerator: Accelerator) -> int:
    """DeepSpeed's ZeRO stage, 0 without DeepSpeed."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return 0
    return accelerator.deepspeed_plugin.zero_stage  # type: ignore[union-attr]


def in_pieces(accelerator: Accelerator) -> bool:
    """Whether each process holds only a share of every weight."""
    return accelerator.distributed_type == DistributedType.FSDP or zero_stage(accelerator) == 3


def load_whole(accelerator: Accelerator) -> None:
    """Make from_pretrained load all of the weights on every process, before they are spread.

    With ZeRO-3, accelerate tells transformers to load them in pieces: then fresh adapters are
    drawn otherwise than on one process, a fingerprint sees nothing, and names are not mapped back
    on saving.
    """
    if zero_stage(accelerator) == 3:
        unset_hf_deepspeed_config()


def tell_engine(
    accelerator: Accelerator, model: nn.Module, *, micro_size: int, clip_norm: float
) -> None:
    """Hand the engine what it needs to know before `accelerator.prepare`.

    DeepSpeed clips and counts by itself, and so gets the recipe's numbers. FSDP gets the layers to
    gather one at a time, unless the accelerate config names them.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        config = accelerator.deepspeed_plugin.deepspeed_config  # type: ignore[union-attr]
        config["train_micro_batch_size_per_gpu"] = micro_size
        config["gradient_accumulation_steps"] = accelerator.gradient_accumulation_steps
        config["gradient_clipping"] = clip_norm
    named = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP")
    if accelerator.distributed_type == DistributedType.FSDP and not named:
        # accelerate would ask the outermost module, which is no transformers model.
        plugin: Any = accelerator.state.fsdp_plugin
        plugin.transformer_cls_names_to_wrap = layer_classes(model)


def layout_under(
    accelerator: Accelerator, layout: Literal["auto"] | Layout
) -> Literal["auto"] | Layout:
    """The recipe's layout; `auto` is shared_prefix where weights are in pieces.

    Processes must then run the model's modules in one order, which ZeRO-3 gathers by. Rows of the
    two layouts enter the tower from different sides, and padded ones with pictures and without in
    different orders too. Raises TrainingError for ZeRO-3 with `padded`.
    """
    if layout == "auto" and in_pieces(accelerator):
        return "shared_prefix"
    if zero_stage(accelerator) == 3 and layout == "padded":
        raise TrainingError(
            "under ZeRO-3 every process must lay its batches out alike",
            got=f"scorer.layout={layout}",
            fix="set scorer.layout=shared_prefix, or use FSDP",
        )
    return layout


def blank_for(
    accelerator: Accelerator, policy: Policy, kinds: Collection[str], *, stored: bool
) -> Blank:
    """The blank picture and clip that rows without any need, in a run over rows of these kinds.

    stored: whether pictures have stored features, so that the tower runs on none.

    Needed where processes wait for each other in the tower: where its weights are spread, or,
    with ZeRO-1 and 2, its gradients. DDP is told of weights without a gradient instead.
    """
    waits = in_pieces(accelerator) or (
        zero_stage(accelerator) > 0
        and any(p.num_trainable for p in part_table(policy) if p.name != "language_model")
    )
    needed = {
        media: waits and 0 < sum(media in kind for kind in kinds) < len(kinds)
        for media in ("image", "video")
    }
    return blank_inputs(
        policy.preparer,
        images=needed["image"] and not stored,
        videos=needed["video"],
        device=accelerator.device,
    )


def layer_classes(model: nn.Module) -> list[str]:
    """Class names of the layers that repeat, in the language model and in the tower.

    transformers marks them for gradient checkpointing, in every family; its `_no_split_modules`
    names them in some families, and attentions or embeddings in others.
    """
    return sorted({type(m).__name__ for m in model.modules() if _is_layer(m)})


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, GradientCheckpointingLayer)


def whole(tensor: Tensor, *, keep: bool = True) -> Tensor:
    """A copy on the CPU, gathered from all processes where it is spread by FSDP.

    keep: False on a process that only takes part in the gathering; it gets an empty tensor.
    """
    gathered = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return gathered.detach().cpu().clone().contiguous() if keep else torch.empty(0)


def like(value: Tensor, target: Tensor) -> Tensor:
    """`value` where `target` is, and spread like it. Scalars stay where they are."""
    if value.dim() == 0 and target.dim() > 0:
        return value
    if isinstance(target, DTensor):
        return distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
    return value.to(target.device)


def saved_weights(accelerator: Accelerator, model: nn.Module) -> dict[str, Tensor]:
    """What a model's folder holds, whole and on the CPU of the main process: all of the weights,
    or with an adapter the adapter's alone, so that the base is not gathered for nothing.

    Every process must call it. One tensor is gathered at a time.
    """
    tensors = {
        **dict(model.named_buffers(remove_duplicate=False)),
        **dict(model.named_parameters(remove_duplicate=False)),
    }
    names = list(model.state_dict())
    if hasattr(model, "peft_config"):
        adapted = _adapted_words(model)
        names = [
            name
            for name in names
            if "lora_" in name or "modules_to_save" in name or id(tensors[name]) in adapted
        ]
    found: dict[int, Tensor] = {}  # Tied weights are one tensor, and stay one.
    for tensor in _gathered(accelerator, {id(tensors[n]): tensors[n] for n in names}.values()):
        found[id(tensor)] = whole(tensor, keep=accelerator.is_main_process)
    return {name: found[id(tensors[name])] for name in names}


def _adapted_words(model: Any) -> set[int]:
    """Ids of the parameters of an embedding or head that LoRA adapts: peft saves it whole."""
    found: set[int] = set()
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        if isinstance(layer, BaseTunerLayer):
            found |= {id(parameter) for parameter in layer.parameters()}  # type: ignore[attr-defined]
    return found


def _gathered(accelerator: Accelerator, tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """The tensors one by one, each whole under ZeRO-3 while it is looked at."""
    if zero_stage(accelerator) < 3:
        yield from tensors
        return
    import deepspeed

    for tensor in tensors:
        with deepspeed.zero.GatheredParameters(
            [tensor] if isinstance(tensor, nn.Parameter) else []
        ):
            yield tensor
