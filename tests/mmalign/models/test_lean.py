"""Leaner norms and gated layers compute what transformers' own do."""

import copy

import pytest
import torch
from transformers import GemmaConfig, LlamaConfig, Qwen3Config
from transformers.models.gemma.modeling_gemma import GemmaMLP, GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm

from mmalign.models.lean import make_lean

SIZES = {"hidden_size": 32, "intermediate_size": 48}


def llama() -> torch.nn.Sequential:
    made = torch.nn.Sequential(LlamaRMSNorm(32), LlamaMLP(LlamaConfig(**SIZES)))
    torch.nn.init.uniform_(made[0].weight, 0.5, 2.0)
    return made


def results(model, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(2, 5, 32, generator=generator).to(dtype) for _ in range(2))
    x.requires_grad_()
    model.zero_grad()
    out = model(x)
    out.backward(grad)
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return [out.detach(), x.grad, *grads]


@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)], ids=["float32", "bfloat16"]
)
def test_forward_is_the_same_and_gradients_but_for_rounding(dtype, error):
    model = llama().to(dtype)
    own = results(model, dtype)
    make_lean(model)
    assert all("forward" in vars(module) for module in model)
    lean = results(model, dtype)
    assert torch.equal(own[0], lean[0])
    assert len(own) == len(lean)
    for one, other in zip(own, lean, strict=True):
        assert (one - other).float().norm() <= error * one.float().norm()


def test_a_frozen_weight_gets_no_gradient():
    model = llama()
    model[0].weight.requires_grad_(False)
    make_lean(model)
    results(model)
    assert model[0].weight.grad is None


def test_less_is_kept_for_the_backward_pass():
    def kept(model) -> int:
        sizes: dict[int, int] = {}

        def note(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        x = torch.randn(64, 32, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            out = model(x)
        assert out.requires_grad
        return sum(sizes.values())

    model = llama()
    before = kept(model)
    make_lean(model)
    # One [64, 48] less in the gated layer, one [64, 32] in the norm.
    assert before - kept(model) == pytest.approx(4 * 64 * (48 + 32), rel=0.1)


def test_what_computes_something_else_is_left_alone():
    gemma = torch.nn.Sequential(GemmaRMSNorm(32), GemmaMLP(GemmaConfig(**SIZES)))

    class Shifted(LlamaRMSNorm):
        def forward(self, hidden_states):
            return super().forward(hidden_states) + 1

    model = torch.nn.Sequential(gemma, Shifted(32))
    make_lean(model)
    assert not any("forward" in vars(module) for module in model.modules())
    qwen3 = torch.nn.Sequential(Qwen3RMSNorm(32), Qwen3MLP(Qwen3Config(**SIZES)))
    make_lean(qwen3)
    assert all("forward" in vars(module) for module in qwen3)


def test_a_copy_uses_its_own_weights():
    model = llama()
    make_lean(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    x = torch.randn(1, 3, 32)
    assert not torch.allclose(model(x), other(x))
