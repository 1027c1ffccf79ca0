"""4-bit weights: which layers have them, what they cost, and that an adapter over them is kept."""

from __future__ import annotations

import sys

import pytest
import torch
from safetensors.torch import load_file

from mmalign import cli
from mmalign.doctor import attempt
from mmalign.errors import MissingExtra, ModelError
from mmalign.models.families import FAMILIES
from mmalign.models.load import Lora, ModelConfig, base_model, load_policy, part_of, part_table
from mmalign.models.quantization import Quantization, num_bytes, num_weights
from mmalign.models.tiny import TinyModel

LORA = Lora(rank=4, alpha=8)


def tiny(family: str, folder):
    return TinyModel(**{"output": str(folder / family), "family": family}).build()


@pytest.fixture(scope="module", params=["llava15", "qwen25vl"])
def path(request, tmp_path_factory):
    return tiny(request.param, tmp_path_factory.mktemp("tiny"))


def logits(policy) -> torch.Tensor:
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        return policy.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def changed(policy):
    """The policy with an adapter that does something."""
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.linspace(-0.1, 0.1, parameter.numel()).view_as(parameter))
    return policy


@pytest.mark.parametrize("family", [family.name for family in FAMILIES])
def test_the_language_models_linear_layers_are_quantised_and_nothing_else(family, tmp_path):
    from bitsandbytes.nn import Linear4bit

    path, quant_type = tiny(family, tmp_path), "fp4" if family == "llava15" else "nf4"
    bits = Quantization(quant_type=quant_type)
    policy = load_policy(ModelConfig(path=str(path), quantization=bits, lora=LORA))
    linear = {
        name: type(module)
        for name, module in base_model(policy.model).named_modules()
        if isinstance(module, torch.nn.Linear) and "lora_" not in name
    }
    inside = {n for n in linear if part_of(f"{n}.weight", policy.family) == "language_model"}
    assert {n for n, kind in linear.items() if issubclass(kind, Linear4bit)} == inside - {"lm_head"}
    assert len(inside) > 8
    narrow = [p for p in policy.model.parameters() if p.dtype == torch.uint8]
    assert {p.quant_state.quant_type for p in narrow} == {quant_type}  # type: ignore[attr-defined]
    assert not any(p.requires_grad for p in narrow)
    trained = [p for p in policy.model.parameters() if p.requires_grad]
    assert trained
    assert all(p.dtype == torch.float32 for p in trained)


@pytest.mark.parametrize("double", [True, False])
def test_weights_take_the_bytes_that_the_config_says(path, double):
    bits = Quantization(double_quant=double)
    whole = load_policy(ModelConfig(path=str(path), lora=LORA))
    small = load_policy(ModelConfig(path=str(path), quantization=bits, lora=LORA))
    assert part_table(small) == part_table(whole)
    count = sum(num_weights(p) for p in small.model.parameters() if p.dtype == torch.uint8)
    saved = num_bytes(whole.model) - num_bytes(small.model)
    # A layer's scales of scales are a whole number, which small layers do not fill.
    assert saved == pytest.approx(count * (4 - bits.bytes_per_weight), rel=2e-3)
    assert Quantization().bytes_per_weight == pytest.approx(0.5159, abs=1e-4)
    assert Quantization(double_quant=False).bytes_per_weight == 0.5625


def test_evaluation_computes_what_training_computes(path):
    """On some CPUs bitsandbytes has another kernel in eval mode, which repacks the weights."""
    policy = changed(
        load_policy(ModelConfig(path=str(path), quantization=Quantization(), lora=LORA))
    )
    before = {n: p.clone() for n, p in policy.model.named_parameters() if p.dtype == torch.uint8}
    policy.model.train()
    training = logits(policy)
    policy.model.eval()
    assert torch.equal(logits(policy), training)
    packed = dict(policy.model.named_parameters())
    assert before
    assert all(torch.equal(packed[name], then) for name, then in before.items())


def test_an_adapter_is_evaluated_on_the_base_it_was_trained_on(path, tmp_path):
    config = ModelConfig(path=str(path), quantization=Quantization(quant_type="fp4"), lora=LORA)
    policy = changed(load_policy(config))
    policy.save(tmp_path / "adapter")
    names = {file.name for file in (tmp_path / "adapter").iterdir()}
    assert {"adapter_model.safetensors", "quantization.json"} <= names
    assert all("lora_" in n for n in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    again = load_policy(ModelConfig(path=str(tmp_path / "adapter")), merge=False)
    assert torch.equal(logits(again), logits(policy))
    assert num_bytes(again.model) == num_bytes(policy.model)


def test_merging_puts_the_adapter_onto_the_floating_point_base(path, tmp_path):
    config = ModelConfig(path=str(path), quantization=Quantization(), lora=LORA)
    policy = changed(load_policy(config))
    policy.save(tmp_path / "adapter")
    assert cli.run(["merge", str(tmp_path / "adapter"), str(tmp_path / "whole")]) == 0
    merged = load_policy(ModelConfig(path=str(tmp_path / "whole")))
    wanted = changed(load_policy(config.model_copy(update={"quantization": None})))
    assert torch.allclose(logits(merged), logits(wanted), atol=1e-5)
    # The scores of training move by what quantising had changed.
    assert not torch.allclose(logits(merged), logits(policy), atol=1e-3)
    again = ModelConfig(path=str(tmp_path / "adapter"), quantization=Quantization())
    with pytest.raises(ModelError, match="mmalign merge"):
        load_policy(again)


def test_a_quantised_model_without_adapter_is_for_evaluation(path):
    policy = load_policy(ModelConfig(path=str(path), quantization=Quantization()))
    assert logits(policy).isfinite().all()


def test_without_bitsandbytes_the_error_names_the_extra(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingExtra, match=r"mmalign\[cuda\]"):
        load_policy(ModelConfig(path=str(path), quantization=Quantization(), lora=LORA))


def test_the_doctor_tries_a_layer():
    check = attempt("4-bit weights")
    assert check.works, check.detail
    assert "forward and backward on" in check.detail
