"""What is asked for runs or is refused with its reason; only `auto` may choose."""

import sys
from types import SimpleNamespace

import pytest
import torch

from mmalign.attention import choose as module
from mmalign.attention.choose import (
    Heads,
    choose,
    needs_masks,
    refusal,
    sliding_window,
    trial,
)
from mmalign.attention.flex import flex_call
from mmalign.attention.kernels import Xformers
from mmalign.attention.tree import make_tree
from mmalign.errors import ModelError
from mmalign.models.families import FAMILIES

LLAVA = next(family for family in FAMILIES if family.name == "llava15")


def text_config(**changes):
    values = {"num_attention_heads": 4, "hidden_size": 32, "num_key_value_heads": 2}
    return SimpleNamespace(**values, **changes)


def test_auto_packs_on_the_cpu():
    chosen = choose("auto", LLAVA, text_config(), "cpu", torch.float32)
    assert (chosen.name, chosen.packs) == ("flash", True)


@pytest.mark.parametrize(
    ("name", "reason"), [("xformers", "need CUDA"), ("flex", "no backward pass on the CPU")]
)
def test_what_cannot_run_is_refused_with_the_reason(name, reason):
    with pytest.raises(ModelError, match=f"{name}.*{reason}"):
        choose(name, LLAVA, text_config(), "cpu", torch.float32)


def test_masks_are_never_left_out_silently():
    sliding = text_config(layer_types=["sliding_attention", "full_attention"], sliding_window=8)
    assert sliding_window(sliding) == 8
    assert choose("auto", LLAVA, sliding, "cpu", torch.float32).name == "sdpa"
    with pytest.raises(ModelError, match="sliding window"):
        choose("flash", LLAVA, sliding, "cpu", torch.float32)
    capped = text_config(attn_logit_softcapping=50.0)
    assert "caps" in (needs_masks(LLAVA, capped) or "")


def test_a_kernel_with_wrong_numbers_is_refused(monkeypatch):
    def wrong(device):
        return lambda tree: lambda q, k, v, scale: 1.01 * v + 0 * q + 0 * k

    monkeypatch.setitem(module._PACKED, "flash", wrong)
    trial.cache_clear()
    try:
        assert "wrong" in (trial("flash", "cpu", torch.float32, Heads(2, 2, 8)) or "")
        assert choose("auto", LLAVA, text_config(), "cpu", torch.float32).name == "sdpa"
    finally:
        trial.cache_clear()


def test_xformers_kernel_that_pads_segments_is_refused_in_words(monkeypatch):
    """Its log-sum-exps are [segments, H, longest]; those that can be merged are [1, H, S]."""
    lengths = SimpleNamespace(from_seqlens=lambda *_, device: None)
    masks = SimpleNamespace(BlockDiagonalMask=lengths, BlockDiagonalCausalMask=lengths)

    def padded(q, k, v, attn_bias, scale):
        return q, torch.zeros(7, q.shape[2], 96)

    fmha = SimpleNamespace(attn_bias=masks, memory_efficient_attention_forward_requires_grad=padded)
    monkeypatch.setitem(sys.modules, "xformers.ops", SimpleNamespace(fmha=fmha))
    monkeypatch.setitem(sys.modules, "xformers.ops.fmha", fmha)
    q, k, v = (torch.randn(6, heads, 8) for heads in (4, 2, 2))
    block = make_tree([2], [[2, 2]], two_way=False).blocks[0]
    with pytest.raises(NotImplementedError, match="log-sum-exps by segment"):
        Xformers().forward(q, k, v, block, 1.0)


def test_of_many_objections_the_first_kernels_are_told():
    listed = NotImplementedError(
        "No operator found\n`fa2F` is not supported because:\n    device=cpu (not cuda)\n"
        "`cutlassF` is not supported because:\n    device=cpu"
    )
    assert refusal(listed) == "its kernels refuse: device=cpu (not cuda)"
    assert refusal(ValueError()) == "ValueError"


@pytest.mark.slow
def test_flex_sees_what_the_tree_says():
    """Its forward pass runs on the CPU, compiled."""
    tree = make_tree([5, 3], [[2, 4], [3]], two_way=False)
    q, k, v = (torch.randn(17, heads, 16) for heads in (4, 2, 2))
    with torch.no_grad():
        out = flex_call(tree)(q, k, v, 0.25)
    q4, k4, v4 = (x.transpose(0, 1)[None] for x in (q, k, v))
    wanted = torch.nn.functional.scaled_dot_product_attention(
        q4, k4, v4, attn_mask=tree.mask(), enable_gqa=True
    )
    assert torch.allclose(out, wanted[0].transpose(0, 1), atol=1e-5)
