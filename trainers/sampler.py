"""Which rows make up which optimizer step: a pure function of the seed and the step."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from mmalign.errors import TrainingError
from trainers.balance import deal


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampler:
    """An endless stream of row numbers: one seeded permutation of all rows after the other.

    Step s takes stream[s * batch_size : (s + 1) * batch_size], so that no batch is ever ragged,
    every epoch visits every row once, and a resumed run needs to know its step only.
    """

    num_rows: int
    batch_size: int
    seed: int

    def batch(self, step: int) -> list[int]:
        """The rows of one optimizer step, over all processes."""
        start = step * self.batch_size
        places = range(start, start + self.batch_size)
        return [
            _permutation(self.num_rows, self.seed, p // self.num_rows)[p % self.num_rows]
            for p in places
        ]

    def micro_batches(
        self,
        step: int,
        *,
        rank: int,
        world_size: int,
        micro_batch_size: int | None,
        kinds: Sequence[str],
        tokens: Sequence[int],
    ) -> list[list[int]]:
        """One process's share of a step, cut into micro-batches.

        kinds, tokens: of each row; what is evened out over processes and micro-batches (`deal`).
        """
        share = share_of(self.batch_size, world_size)
        size = micro_batch_size or share
        own = [min(size, share - start) for start in range(0, share, size)]
        cells = deal(self.batch(step), kinds, tokens, own * world_size)
        return cells[rank * len(own) : (rank + 1) * len(own)]


def share_of(batch_size: int, world_size: int) -> int:
    """Rows of one process in a step. Raises TrainingError where the batch does not divide."""
    if batch_size % world_size:
        raise TrainingError(
            f"optim.batch_size={batch_size} cannot be shared evenly by {world_size} processes",
            fix=f"use a multiple of {world_size}",
        )
    return batch_size // world_size


def even_share(num_rows: int, *, rank: int, world_size: int) -> list[int]:
    """One process's rows of a pass over all, as many as every other's.

    Together they cover each row at least once; what is left over is filled up with rows from the
    start, for processes must make equally many forward passes: each one may wait for all.
    """
    count = -(-num_rows // world_size)
    return [(turn * world_size + rank) % num_rows for turn in range(count)]


def total_steps(*, num_rows: int, batch_size: int, epochs: float, steps: int | None) -> int:
    """Optimizer steps of a run: `steps` where given, else whole batches in `epochs`, at least 1."""
    return steps or max(1, int(epochs * num_rows / batch_size))


@lru_cache(maxsize=2)
def _permutation(num_rows: int, seed: int, epoch: int) -> list[int]:
    # Hashed, not added: runs with neighbouring seeds must share no epoch.
    digest = hashlib.sha256(f"{seed}/{epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randperm(num_rows, generator=generator).tolist()
