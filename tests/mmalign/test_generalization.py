"""The Generalization Factor: SPECS's published values, its limits, and what holds for all rates."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmalign.generalization import generalization_factor, generalization_factors

rates = st.floats(1e-6, 1.0)
betas = st.floats(0.1, 10.0)


@pytest.mark.parametrize(
    ("inside", "outside", "wanted"),
    [(97, 25, 29.4), (91, 15, 18.0), (98, 69.3, 73.6), (98.7, 89.8, 91.4), (98.5, 94.6, 95.4)],
)
def test_published_values(inside, outside, wanted):
    """Read from the paper's plots, in per cent."""
    assert generalization_factor(inside, outside) == pytest.approx(wanted, abs=0.1)


def test_hand_values():
    # 5 * 0.8 * 0.4 / (4 * 0.8 + 0.4)
    assert generalization_factor(0.8, 0.4) == pytest.approx(1.6 / 3.6)
    # beta 1 is the harmonic mean: 2 * 0.32 / 1.2
    assert generalization_factor(0.8, 0.4, beta=1.0) == pytest.approx(0.64 / 1.2)


@pytest.mark.parametrize("none", [0.0, -0.0, -0.5])
@pytest.mark.parametrize("other", [0.0, 1.0, -1.0])
def test_without_a_gain_on_either_side_it_is_zero(none, other):
    assert generalization_factor(none, other) == 0
    assert generalization_factor(other, none) == 0


@pytest.mark.parametrize("beta", [0.0, -1.0, float("nan")])
def test_beta_must_be_positive(beta):
    with pytest.raises(ValueError, match="wanted a positive number"):
        generalization_factor(0.5, 0.5, beta=beta)


@given(x=rates, y=rates, beta=betas)
def test_it_lies_between_the_two_and_equals_them_where_they_are_one(x, y, beta):
    found = generalization_factor(x, y, beta=beta)
    assert min(x, y) * (1 - 1e-12) <= found <= max(x, y) * (1 + 1e-12)
    assert generalization_factor(x, x, beta=beta) == pytest.approx(x)
    # The other way round is the other beta.
    assert found == pytest.approx(generalization_factor(y, x, beta=1 / beta))
    assert generalization_factor(100 * x, 100 * y, beta=beta) == pytest.approx(100 * found)


@given(x=st.floats(1e-6, 0.999))
def test_what_is_outside_counts_more(x):
    assert generalization_factor(1.0, x) < generalization_factor(x, 1.0)


@given(x=rates, y=rates, more=st.floats(0, 1))
def test_more_on_either_side_is_never_less(x, y, more):
    found = generalization_factor(x, y) * (1 - 1e-12)
    assert found <= generalization_factor(x + more, y)
    assert found <= generalization_factor(x, y + more)


def test_relative_is_of_the_gains_and_raw_of_the_rates():
    found = generalization_factors((0.9, 0.6), (0.1, 0.2))
    assert found["raw"] == pytest.approx(5 * 0.54 / (3.6 + 0.6))
    assert found["relative"] == pytest.approx(5 * 0.8 * 0.4 / (3.2 + 0.4))
    assert generalization_factors((0.9, 0.1), (0.1, 0.2))["relative"] == 0
    assert generalization_factors((0.4, 0.4), (0.4, 0.4)) == {
        "raw": pytest.approx(0.4),
        "relative": 0.0,
    }
