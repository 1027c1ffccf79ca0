from __future__ import annotations

from collections import Counter
from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from trainers.balance import KINDS, deal
from trainers.sampler import Sampler

row = st.tuples(st.sampled_from(KINDS), st.integers(1, 5000))
sizes = st.lists(st.integers(1, 6), min_size=1, max_size=9)


@st.composite
def steps(draw) -> tuple[list[int], list[str], list[int], list[int]]:
    """A step's rows, kinds and tokens of the whole dataset, and the micro-batches' sizes."""
    cuts = draw(sizes)
    count = sum(cuts)
    dataset = draw(st.lists(row, min_size=count, max_size=count + 5))
    places = draw(st.permutations(range(len(dataset))))[:count]
    return list(places), [kind for kind, _ in dataset], [size for _, size in dataset], cuts


@given(steps())
def test_every_row_is_dealt_once_and_every_micro_batch_is_filled(step):
    rows, kinds, tokens, cuts = step
    cells = deal(rows, kinds, tokens, cuts)
    assert [len(cell) for cell in cells] == cuts
    assert sorted(place for cell in cells for place in cell) == sorted(rows)
    assert deal(rows, kinds, tokens, cuts) == cells


@given(steps())
def test_micro_batches_of_one_size_are_alike_in_kinds_and_tokens(step):
    rows, kinds, tokens, cuts = step
    cells = deal(rows, kinds, tokens, cuts)
    sizes_of = [tokens[place] for place in rows]
    bound = len({kinds[place] for place in rows}) * (max(sizes_of) - min(sizes_of))
    for one, two in combinations(cells, 2):
        if len(one) != len(two):
            continue
        counts = [Counter(kinds[place] for place in cell) for cell in (one, two)]
        assert all(abs(counts[0][kind] - counts[1][kind]) <= 1 for kind in KINDS)
        assert abs(sum(tokens[p] for p in one) - sum(tokens[p] for p in two)) <= bound


@given(steps())
def test_a_single_micro_batch_is_the_step_as_it_is(step):
    rows, kinds, tokens, _ = step
    assert deal(rows, kinds, tokens, [len(rows)]) == [rows]


def test_pictures_clips_and_text_are_spread_and_long_rows_meet_short_ones():
    kinds = ["image", "image", "text", "text", "video", "video", "text", "text"]
    tokens = [900, 700, 10, 40, 3000, 2000, 20, 30]
    cells = deal(range(8), kinds, tokens, [4, 4])
    assert cells == [[1, 2, 4, 7], [0, 3, 5, 6]]


def test_micro_batches_are_a_function_of_rows_seed_and_step_and_hold_the_step():
    sampler = Sampler(num_rows=30, batch_size=12, seed=3)
    kinds = [KINDS[place % 4] for place in range(30)]
    tokens = [10 * place for place in range(30)]
    for world, micro in ((1, 12), (1, 3), (2, 3), (3, 2), (3, None), (2, 4)):
        dealt = [
            sampler.micro_batches(
                5, rank=rank, world_size=world, micro_batch_size=micro, kinds=kinds, tokens=tokens
            )
            for rank in range(world)
        ]
        assert len({tuple(map(len, share)) for share in dealt}) == 1
        together = [place for share in dealt for cell in share for place in cell]
        assert sorted(together) == sorted(sampler.batch(5))
