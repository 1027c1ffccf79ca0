"""Frozen weights in 4 bits (bitsandbytes), under adapters that train in float32: QLoRA.

Only linear layers of the language model are quantised: vision tower, projector, embeddings, norms
and the vocabulary projection keep the model's dtype. So does everything that trains.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mmalign.config import Strict, validate
from mmalign.errors import MissingExtra, ModelError
from mmalign.models.families import Family
from mmalign.store import write_atomically

if TYPE_CHECKING:
    from torch import Tensor, nn

# What an adapter's folder says of the base that it was trained on.
ADAPTER_FILE = "quantization.json"
# Weights that share a scale, and scales that share one (bitsandbytes' own sizes).
BLOCK, SCALES_BLOCK = 64, 256


class Quantization(Strict):
    """How the language model's linear layers are kept in 4 bits (arXiv 2305.14314, section 3).

    quant_type: nf4, quantiles of a normal distribution, or fp4, a 4-bit float.
    double_quant: the blocks' scales are themselves kept in 8 bits.
    compute_dtype: what weights become when they are used; None for the model's dtype.
    """

    quant_type: Literal["nf4", "fp4"] = "nf4"
    double_quant: bool = True
    compute_dtype: Literal["float32", "bfloat16", "float16"] | None = None

    @property
    def bytes_per_weight(self) -> float:
        """4 bits, and the share in the scales: 4 bytes for 64 weights, or 1 and 4 / 256."""
        scale = 1 + 4 / SCALES_BLOCK if self.double_quant else 4
        return 0.5 + scale / BLOCK


def loading_options(quantization: Quantization, family: Family, checkpoint: Any, dtype: Any) -> Any:
    """The keywords that make from_pretrained quantise.

    checkpoint: the checkpoint's transformers config. dtype: torch's, of the other weights.
    peft's prepare_model_for_kbit_training is not used: it makes every other weight float32, the
    vocabulary among them, and what computes in float32 in training only is no reference for what
    is evaluated.
    Raises MissingExtra without bitsandbytes, ModelError for weights that are quantised already.
    """
    import torch
    from transformers import BitsAndBytesConfig

    if (stored := getattr(checkpoint, "quantization_config", None)) is not None:
        raise ModelError(
            "model.quantization quantises weights that are quantised already",
            where=checkpoint.name_or_path,
            got=f"quantization_config {stored} in config.json",
            fix="name the checkpoint with the weights in floating point",
        )
    # Without a kernel package of its own it says so, wherever it is imported.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise MissingExtra(
            "model.quantization needs bitsandbytes", fix="pip install 'mmalign[cuda]'"
        ) from None
    if quantization.compute_dtype is not None:
        dtype = getattr(torch, quantization.compute_dtype)
    elif dtype == "auto":
        dtype = checkpoint.dtype or torch.float32
    kept = [f"model.{family.vision}", f"model.{family.projector}", "lm_head"]
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantization.quant_type,
            bnb_4bit_use_double_quant=quantization.double_quant,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=kept,
        )
    }


def use_one_kernel(model: nn.Module) -> None:
    """Make 4-bit layers compute in evaluation what they compute in training.

    On CPUs with bfloat16 instructions they would repack their weights in place at the first call
    in eval mode, and multiply in bfloat16 from then on, in training too.
    """
    for module in _layers(model):
        module.support_avx512bf16_for_cpu = False


def num_weights(parameter: nn.Parameter) -> int:
    """Weights that a parameter stands for: two in each byte where it is quantised."""
    state = _state(parameter)
    return parameter.numel() if state is None else state.shape.numel()


def num_bytes(model: nn.Module) -> int:
    """Bytes of all parameters, scales of quantised ones included (code tables are not)."""
    stored = sum(parameter.nbytes for parameter in model.parameters())
    return stored + sum(scale.nbytes for _, scale in scales(model))


def scales(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The scales of quantised parameters, by name: they are no parameters or buffers themselves."""
    for name, parameter in model.named_parameters():
        if (state := _state(parameter)) is not None:
            yield f"{name}.absmax", state.absmax
            if state.nested:
                yield f"{name}.state2.absmax", state.state2.absmax
                yield f"{name}.offset", state.offset


def is_quantised(model: nn.Module) -> bool:
    """Whether any layer is in 4 bits."""
    return next(_layers(model), None) is not None


def save_adapter_config(base: Any, folder: Path) -> None:
    """Write beside an adapter how the base under it was quantised."""
    used = base.config.quantization_config
    settings = Quantization(
        quant_type=used.bnb_4bit_quant_type,
        double_quant=used.bnb_4bit_use_double_quant,
        compute_dtype=str(used.bnb_4bit_compute_dtype).removeprefix("torch."),  # type: ignore[arg-type]
    )
    write_atomically(folder / ADAPTER_FILE, json.dumps(settings.model_dump(), indent=2) + "\n")


def adapter_config(adapter: str) -> Quantization | None:
    """How the base under an adapter was quantised; None where it was not."""
    file = Path(adapter) / ADAPTER_FILE
    if not file.exists():
        return None
    try:
        stored = json.loads(file.read_text())
    except ValueError as error:
        raise ModelError(f"is not JSON ({error})", where=str(file), fix="copy it again") from None
    return validate(stored, Quantization, str(file))


def try_here() -> str:
    """One 4-bit layer forwards and backwards, for `mmalign doctor`. Raises what does not work."""
    import torch
    from bitsandbytes.nn import Linear4bit

    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight = torch.arange(128 * 64).view(128, 64) % 3 - 1.0  # Both types of 4 bits hold these.
    layer = Linear4bit(64, 128, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    layer.load_state_dict({"weight": weight})
    layer = layer.to(device)
    states = torch.ones(4, 64, device=device, requires_grad=True)
    output = layer(states)
    output.sum().backward()
    assert states.grad is not None
    found = torch.cat([output[0].detach(), states.grad[0]]).cpu()
    wanted = torch.cat([weight.sum(1), weight.sum(0)])
    if layer.weight.dtype != torch.uint8 or not torch.allclose(found, wanted, atol=1e-2):
        raise RuntimeError(f"is off by {(found - wanted).abs().max():.2g}")
    return f"forward and backward on {device}"


def _layers(model: nn.Module) -> Iterator[Any]:
    """The layers in 4 bits, known by their weights, without an import of bitsandbytes."""
    for module in model.modules():
        if any(_state(own) is not None for own in module.parameters(recurse=False)):
            yield module


def _state(parameter: nn.Parameter) -> Any:
    """bitsandbytes' description of a quantised parameter; None for any other."""
    return getattr(parameter, "quant_state", None)
