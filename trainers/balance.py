"""Which of a step's rows go to which process and micro-batch: alike in kinds and in tokens.

The rows of a step are given; dealing them out differently changes its gradient by rounding alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

# Most costly first, so that the cheap kinds even out what the others leave.
KINDS = ("image+video", "video", "image", "text")


def deal(
    rows: Sequence[int], kinds: Sequence[str], tokens: Sequence[int], sizes: Sequence[int]
) -> list[list[int]]:
    """Cut `rows` into micro-batches of `sizes` rows, which add up to theirs.

    kinds, tokens: of row r at place r; a kind is one of KINDS, by what media a row holds.
    Of two micro-batches of one size, neither has more than one row of any kind more than the
    other. Their tokens differ by at most (number of kinds) * (most - fewest tokens of a row).
    Rows keep their order inside a micro-batch, so that a single one is `rows` itself.

    In each round every micro-batch with room gets one row, in order of kind and size; within a
    round, of each kind, those with the fewest of the kind are served, and the one with the fewest
    tokens gets the longest row.
    """
    order = sorted(rows, key=lambda row: (KINDS.index(kinds[row]), -tokens[row]))
    cells: list[list[int]] = [[] for _ in sizes]
    load = [0] * len(sizes)
    for open_cells, dealt in _rounds(order, sizes):
        free = set(open_cells)
        for kind, group in groupby(dealt, key=lambda row: kinds[row]):
            same = list(group)
            held = {cell: sum(kinds[row] == kind for row in cells[cell]) for cell in free}
            served = sorted(free, key=lambda cell: (held[cell], load[cell], cell))[: len(same)]
            served.sort(key=lambda cell: (load[cell], cell))
            free -= set(served)
            for cell, row in zip(served, same, strict=True):
                cells[cell].append(row)
                load[cell] += tokens[row]
    position = {row: number for number, row in enumerate(rows)}
    return [sorted(cell, key=position.__getitem__) for cell in cells]


def _rounds(order: Sequence[int], sizes: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """For each round, the cells that still have room and as many rows, in order."""
    start = 0
    for number in range(max(sizes)):
        cells = [cell for cell, size in enumerate(sizes) if size > number]
        yield cells, list(order[start : start + len(cells)])
        start += len(cells)
