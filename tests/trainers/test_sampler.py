from __future__ import annotations

import pytest

from mmalign.errors import TrainingError
from trainers.sampler import Sampler, even_share, share_of, total_steps


def stream(sampler: Sampler, steps: int) -> list[int]:
    return [row for step in range(steps) for row in sampler.batch(step)]


def test_every_epoch_visits_every_row_once_though_batches_do_not_divide_it():
    rows = stream(Sampler(num_rows=7, batch_size=3, seed=0), steps=7)
    epochs = [rows[i : i + 7] for i in range(0, 21, 7)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(7))] * 3
    assert epochs[0] != epochs[1] != epochs[2]


def test_order_depends_on_the_seed_alone():
    rows = [stream(Sampler(num_rows=50, batch_size=8, seed=s), steps=6) for s in (1, 1, 2)]
    assert rows[0] == rows[1]
    assert rows[0] != rows[2]


def test_seeds_do_not_share_epochs():
    one, two = (Sampler(num_rows=50, batch_size=50, seed=seed) for seed in (0, 1))
    assert one.batch(1) != two.batch(0)


@pytest.mark.parametrize(("world_size", "micro"), [(1, None), (2, 1), (4, 2), (2, 3)])
def test_shares_and_micro_batches_put_together_are_the_batch(world_size: int, micro: int | None):
    sampler = Sampler(num_rows=20, batch_size=8, seed=0)
    cuts = [
        sampler.micro_batches(
            2,
            rank=rank,
            world_size=world_size,
            micro_batch_size=micro,
            kinds=["text"] * 20,
            tokens=[1] * 20,
        )
        for rank in range(world_size)
    ]
    assert len({len(share) for share in cuts}) == 1
    assert sorted(row for share in cuts for cut in share for row in cut) == sorted(sampler.batch(2))


@pytest.mark.parametrize(("num_rows", "world_size"), [(8, 2), (7, 2), (1, 4), (5, 3)])
def test_even_shares_are_equally_long_and_cover_every_row(num_rows: int, world_size: int):
    shares = [even_share(num_rows, rank=r, world_size=world_size) for r in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    assert {row for share in shares for row in share} == set(range(num_rows))


def test_a_batch_that_cannot_be_shared_is_refused_in_words():
    with pytest.raises(TrainingError, match=r"batch_size=6 .* 4 processes\. Use a multiple of 4"):
        share_of(6, 4)


@pytest.mark.parametrize(
    ("num_rows", "epochs", "steps", "expected"),
    [(100, 1.0, None, 12), (100, 2.5, None, 31), (3, 1.0, None, 1), (100, 1.0, 5, 5)],
)
def test_total_steps(num_rows: int, epochs: float, steps: int | None, expected: int):
    assert total_steps(num_rows=num_rows, batch_size=8, epochs=epochs, steps=steps) == expected
