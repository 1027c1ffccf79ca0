"""scikit-learn's handwritten digits: real handwriting for small models to learn."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@cache
def handwriting() -> tuple[Any, dict[str, list[list[int]]]]:
    """Handwritten digits [1797, 8, 8] in [0, 1], and per split the rows of each digit."""
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    order = np.random.RandomState(0).permutation(len(digits.target))
    cut = int(0.7 * len(order))
    rows = {
        split: [[int(row) for row in part if digits.target[row] == digit] for digit in range(10)]
        for split, part in (("train", order[:cut]), ("test", order[cut:]))
    }
    return (digits.images / 16).astype(np.float32), rows
