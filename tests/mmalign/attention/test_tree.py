"""Attention over a tree is softmax attention under the tree's mask, in output and gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from mmalign.attention.kernels import CpuFlash
from mmalign.attention.tree import make_tree, tree_attention

groups = st.lists(
    st.tuples(st.integers(1, 40), st.lists(st.integers(1, 40), min_size=1, max_size=4)),
    min_size=1,
    max_size=4,
)


def test_the_mask_by_hand():
    """Prompts of 2 and 1; the first has responses of 1 and 2, the second one of 1."""
    tree = make_tree([2, 1], [[1, 2], [1]], two_way=False)
    wanted = """
        x......
        xx.....
        ..x....
        xx.x...
        xx..x..
        xx..xx.
        ..x...x
    """
    rows = [[mark == "x" for mark in row] for row in wanted.split()]
    assert tree.mask().tolist() == rows


def test_a_two_way_prompt_sees_all_of_itself_and_no_response():
    tree = make_tree([3], [[1, 1]], two_way=True)
    assert tree.mask().int().tolist() == [
        [1, 1, 1, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 0, 1],
    ]


@settings(max_examples=40, deadline=None)
@given(groups=groups, two_way=st.booleans(), heads=st.sampled_from([(4, 4), (4, 2), (3, 1)]))
def test_output_and_gradients_are_those_under_the_mask(groups, two_way, heads):
    tree = make_tree([p for p, _ in groups], [r for _, r in groups], two_way=two_way)
    size, width = len(tree.prompt), 16
    generator = torch.Generator().manual_seed(size)
    counts = (heads[0], heads[1], heads[1])
    leaves = [torch.randn(size, n, width, generator=generator).requires_grad_() for n in counts]
    grad = torch.randn(size, heads[0], width, generator=generator)
    out = tree_attention(*leaves, tree, CpuFlash(), width**-0.5)
    found = [out, *torch.autograd.grad(out, leaves, grad)]
    q, k, v = (leaf.transpose(0, 1)[None] for leaf in leaves)
    plain = scaled_dot_product_attention(q, k, v, attn_mask=tree.mask(), enable_gqa=True)
    plain = plain[0].transpose(0, 1)
    wanted = [plain, *torch.autograd.grad(plain, leaves, grad)]
    for one, other in zip(found, wanted, strict=True):
        assert float((one - other).detach().abs().max()) <= 2e-6 * max(
            1.0, float(other.detach().abs().max())
        )


def test_scores_of_a_thousand_nats_stay_finite():
    tree = make_tree([3], [[2, 1]], two_way=False)
    q, k, v = (torch.randn(6, 1, 8) for _ in range(3))
    q, k = (100 * q).requires_grad_(), 10 * k
    out = tree_attention(q, k, v, tree, CpuFlash(), 1.0)
    out.sum().backward()
    assert out.isfinite().all()
    assert q.grad is not None
    assert q.grad.isfinite().all()


@pytest.mark.parametrize("size", [1, 31])
def test_the_kernel_takes_16_bits(size):
    tree = make_tree([size], [[size, 2]], two_way=False)
    q, k, v = (torch.randn(2 * size + 2, 2, 8, dtype=torch.bfloat16) for _ in range(3))
    out = tree_attention(q, k, v, tree, CpuFlash(), 8**-0.5)
    exact = tree_attention(q.float(), k.float(), v.float(), tree, CpuFlash(), 8**-0.5)
    assert out.dtype == torch.bfloat16
    assert (out.float() - exact).abs().max() < 0.05
