"""Attention in a packed row: prompts that several responses continue, without masks or padding.

    [prompt 1 | prompt 2 | … | responses of 1 | responses of 2 | …]

A response token sees its prompt and what precedes it in its own response. That splits into blocks
that every flash kernel knows: each segment with itself (causal), and all responses of a prompt with
that prompt (everything visible). Two partial results over disjoint keys merge exactly through their
log-sum-exps:

    lse = log(exp(lse_a) + exp(lse_b)),   out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b

and the backward kernel of each block, given the merged out and lse, returns that block's share of
the gradients, since softmax weights are exp(score - lse) whatever the block (the identity behind
FlashAttention's own tiling, arXiv 2205.14135, appendix B). No key or value is copied for a second
response, and no mask exists.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One pass of a kernel: query segments, each against its own key segment.

    queries, keys: (start, stop) in the packed row. query_bounds, key_bounds: segment boundaries
    relative to that start, with as many segments in both; as numbers, and as int32 tensors
    [segments + 1] on the device. causal: a query sees keys up to its own place; else all.
    """

    queries: tuple[int, int]
    keys: tuple[int, int]
    query_bounds: tuple[int, ...]
    key_bounds: tuple[int, ...]
    query_bounds_tensor: Tensor
    key_bounds_tensor: Tensor
    causal: bool

    @property
    def longest_query(self) -> int:
        """Tokens of the longest query segment."""
        return max(b - a for a, b in pairwise(self.query_bounds))

    @property
    def longest_key(self) -> int:
        """Tokens of the longest key segment."""
        return max(b - a for a, b in pairwise(self.key_bounds))

    def to(self, device: torch.device | str) -> Block:
        """The same block with its tensors on `device`."""
        return replace(
            self,
            query_bounds_tensor=self.query_bounds_tensor.to(device, non_blocking=True),
            key_bounds_tensor=self.key_bounds_tensor.to(device, non_blocking=True),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    """What sees what in a packed row of S tokens. Blocks of one query lie over disjoint keys.

    prompt: [S] int32, the prompt that a token is or continues. branch: [S] int32, 0 in prompts,
    else the number of the response; both tell the same as the blocks, token by token, for kernels
    that ask so. two_way: prompt tokens see all of their prompt.
    """

    blocks: tuple[Block, ...]
    prompt: Tensor
    branch: Tensor
    two_way: bool

    def to(self, device: torch.device | str) -> Tree:
        """The same tree with its tensors on `device`."""
        return replace(
            self,
            blocks=tuple(block.to(device) for block in self.blocks),
            prompt=self.prompt.to(device, non_blocking=True),
            branch=self.branch.to(device, non_blocking=True),
        )

    def mask(self) -> Tensor:
        """[S, S] bool, True where the query (row) sees the key (column): the plain definition."""
        places = torch.arange(len(self.prompt), device=self.prompt.device)
        return self.sees(places[:, None], places[None, :])

    def sees(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether tokens at places `query` see those at places `key`; broadcasts."""
        same_prompt = self.prompt[query] == self.prompt[key]
        in_prompt = self.branch[key] == 0
        same_branch = self.branch[query] == self.branch[key]
        before = key <= query
        if self.two_way:
            before = before | (in_prompt & (self.branch[query] == 0))
        return same_prompt & (in_prompt | same_branch) & before


def make_tree(prompts: Sequence[int], responses: Sequence[Sequence[int]], *, two_way: bool) -> Tree:
    """The tree of prompts of these lengths and, for each, of its responses' lengths."""
    branches = [length for lengths in responses for length in lengths]
    start = sum(prompts)
    whole = (0, start + sum(branches))
    if two_way:
        own = [
            _block((0, start), (0, start), prompts, prompts, causal=False),
            _block((start, whole[1]), (start, whole[1]), branches, branches, causal=True),
        ]
    else:
        segments = [*prompts, *branches]
        own = [_block(whole, whole, segments, segments, causal=True)]
    together = [sum(lengths) for lengths in responses]
    cross = _block((start, whole[1]), (0, start), together, prompts, causal=False)
    owners = [number for number, lengths in enumerate(responses) for _ in lengths]
    return Tree(
        blocks=(*own, cross),
        prompt=_repeated([*range(len(prompts)), *owners], [*prompts, *branches]),
        branch=_repeated(
            [0] * len(prompts) + list(range(1, len(branches) + 1)), [*prompts, *branches]
        ),
        two_way=two_way,
    )


class Kernel(Protocol):
    """Computes one block. q: [Sq, H, D]; k, v: [Sk, Hk, D]; Hk divides H. lse: [H, Sq] float32."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, block: Block, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Output [Sq, H, D], and log-sum-exp over the block's keys, of scale * q k, in nats."""
        ...

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        block: Block,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The block's share of the gradients of q, k, v; out and lse are the merged ones."""
        ...


def tree_attention(
    q: Tensor, k: Tensor, v: Tensor, tree: Tree, kernel: Kernel, scale: float
) -> Tensor:
    """softmax(scale q k + what the tree hides) v. q: [S, H, D]; k, v: [S, Hk, D]. [S, H, D]."""
    return _TreeAttention.apply(q, k, v, tree, kernel, scale)  # type: ignore[return-value]


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, tree: Tree, kernel: Kernel, scale: float
    ) -> Tensor:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)
        *own, cross = tree.blocks
        for block in own:
            here, there = slice(*block.queries), slice(*block.keys)
            out[here], lse[:, here] = kernel.forward(q[here], k[there], v[there], block, scale)
        here, there = slice(*cross.queries), slice(*cross.keys)
        other, other_lse = kernel.forward(q[here], k[there], v[there], cross, scale)
        _merge(out[here], lse[:, here], other, other_lse)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.tree, ctx.kernel, ctx.scale = tree, kernel, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        grad = grads[0].contiguous()
        results = [torch.empty_like(leaf) for leaf in (q, k, v)]
        for number, block in enumerate(ctx.tree.blocks):
            here, there = slice(*block.queries), slice(*block.keys)
            shares = ctx.kernel.backward(
                grad[here], q[here], k[there], v[there], out[here], lse[:, here], block, ctx.scale
            )
            for whole, place, share in zip(results, (here, there, there), shares, strict=True):
                # All blocks but the last lie apart and fill the row; the last one adds to them.
                if number < len(ctx.tree.blocks) - 1:
                    whole[place] = share
                else:
                    whole[place] += share
        return (*results, None, None, None)


def _merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
    """Fold a second partial result into the first, in place."""
    both = torch.logaddexp(lse, other_lse)
    mine, theirs = ((part - both).exp().T[..., None] for part in (lse, other_lse))
    out.copy_(torch.addcmul(other.float() * theirs, out.float(), mine))
    lse.copy_(both)


def _block(
    queries: tuple[int, int],
    keys: tuple[int, int],
    query_lengths: Sequence[int],
    key_lengths: Sequence[int],
    *,
    causal: bool,
) -> Block:
    query_bounds, key_bounds = (
        (0, *accumulate(lengths)) for lengths in (query_lengths, key_lengths)
    )
    return Block(
        queries=queries,
        keys=keys,
        query_bounds=query_bounds,
        key_bounds=key_bounds,
        query_bounds_tensor=torch.tensor(query_bounds, dtype=torch.int32),
        key_bounds_tensor=torch.tensor(key_bounds, dtype=torch.int32),
        causal=causal,
    )


def _repeated(values: Sequence[int], lengths: Sequence[int]) -> Tensor:
    numbers = torch.tensor(values, dtype=torch.int32)
    return numbers.repeat_interleave(torch.tensor(lengths))
