import math

import numpy as np
import pytest

from evals.stats import (
    combined,
    intervals,
    matthews,
    mcnemar,
    mean,
    paired_difference,
    paired_differences,
    pooled,
    pooled_difference,
    ratio,
    weighted_sum,
)
from mmalign.errors import DataError


def interval(metric, clusters=None, **kwargs):
    return intervals({"m": metric}, clusters, **kwargs)["m"]


def test_value_is_ratio_of_sums_not_mean_of_ratios():
    assert ratio([1, 1], [1, 3]).value == 0.5
    assert mean([1, 0, 0, 1]).value == 0.5


def test_value_is_zero_where_nothing_is_counted():
    assert ratio([0, 0], [0, 0]).value == 0.0


def test_interval_of_two_items_by_enumeration():
    # Draws of {0, 1} have means 0, 1/2, 1 with chances 1/4, 1/2, 1/4.
    assert interval(mean([0, 1])) == (0.0, 1.0)
    assert interval(mean([0, 1]), level=0.4) == (0.5, 0.5)


def test_interval_of_a_ratio_by_enumeration():
    # Draws give 0/2, (0 + 3) / (1 + 4), 6/8: the outer ones are the quantiles.
    assert interval(ratio([0, 3], [1, 4])) == (0.0, 0.75)
    assert interval(ratio([0, 3], [1, 4]), level=0.4) == (0.6, 0.6)


@pytest.mark.parametrize("clusters", [None, []])
def test_no_items_have_no_interval(clusters):
    with pytest.raises(DataError, match="needs items; got none"):
        interval(mean([]), clusters)
    with pytest.raises(DataError, match="needs items; got none"):
        paired_difference(mean([]), mean([]), clusters)


def test_interval_width_is_the_normal_one_for_many_items():
    values = np.arange(3000) % 5 == 0
    low, high = interval(mean(values), seed=3)
    expected = 2 * 1.959964 * math.sqrt(0.2 * 0.8 / 3000)
    assert high - low == pytest.approx(expected, rel=0.06)
    assert (low + high) / 2 == pytest.approx(0.2, abs=0.002)


def test_items_of_one_cluster_are_drawn_together():
    # Six copies of each picture's result carry no more than one: the interval is of 50 pictures.
    values = np.repeat(np.arange(50) % 2, 6)
    pictures = [f"p{i}" for i in np.repeat(np.arange(50), 6)]
    assert interval(mean(values), pictures) == interval(mean(np.arange(50) % 2))
    low, high = interval(mean(values))
    clustered_low, clustered_high = interval(mean(values), pictures)
    assert clustered_high - clustered_low > 2 * (high - low)


def test_clusters_need_not_be_neighbours():
    assert interval(mean([0, 1, 0, 1]), ["a", "b", "a", "b"]) == (0.0, 1.0)


def test_draws_depend_on_the_seed_alone():
    metric = mean(np.arange(97) % 7)
    assert interval(metric, seed=1) == interval(metric, seed=1)
    assert interval(metric, seed=1) != interval(metric, seed=2)


def test_all_metrics_share_their_draws():
    metric = mean(np.arange(40) % 3)
    both = intervals({"a": metric, "b": metric})
    assert both["a"] == both["b"] == interval(metric)


@pytest.mark.parametrize(
    ("only_a", "only_b", "p"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),
        (4, 4, 1.0),
        (5, 1, 14 / 64),
        (0, 10, 2 / 1024),
        (3, 17, 0.0025768280029296875),  # scipy.stats.binomtest(3, 20)
        (120, 160, 0.019606727290281328),  # scipy.stats.binomtest(120, 280)
    ],
)
def test_mcnemar_is_the_exact_binomial_test(only_a, only_b, p):
    a = [1] * only_a + [0] * only_b + [1] * 7 + [0] * 5
    b = [0] * only_a + [1] * only_b + [1] * 7 + [0] * 5
    assert mcnemar(a, b) == pytest.approx(p, rel=1e-12)
    assert mcnemar(b, a) == pytest.approx(p, rel=1e-12)


def test_mcnemar_at_benchmark_size():
    a, b = np.zeros(9000), np.zeros(9000)
    a[:4400], b[4400:] = 1, 1
    assert mcnemar(a, b) == pytest.approx(0.03593075063730818, rel=1e-12)  # scipy


def test_paired_difference_by_hand():
    # b halves the rate on every item, so each draw says so exactly.
    a, b = ratio([2, 4, 6], [10, 10, 10]), ratio([1, 2, 3], [10, 10, 10])
    found = paired_difference(a, b, samples=999)
    assert found.difference == pytest.approx(-0.2)
    assert found.relative == pytest.approx(-0.5)
    assert found.relative_interval == pytest.approx((-0.5, -0.5))
    assert found.p_value == 2 / 1000  # no draw is >= 0: 2 (0 + 1) / (999 + 1)


def test_pairing_is_what_makes_a_difference_sharp():
    rng = np.random.default_rng(0)
    a = rng.integers(0, 50, 200).astype(float)
    sharp = paired_difference(mean(a), mean(a + 1))
    blurred = paired_difference(mean(a), mean(rng.permutation(a) + 1))
    assert sharp.interval == pytest.approx((1.0, 1.0))
    assert blurred.interval[0] < 0 < blurred.interval[1]
    assert sharp.p_value < 0.001 < 0.05 < blurred.p_value


def test_equal_models_differ_by_nothing():
    found = paired_difference(mean([1, 0, 1]), mean([1, 0, 1]))
    assert (found.difference, found.interval, found.p_value) == (0.0, (0.0, 0.0), 1.0)


def test_p_value_is_right_under_chance():
    # One item in ten differs: draws miss it with chance 0.9^10 = 0.349, the only d* = 0.
    a, b = np.zeros(10), np.zeros(10)
    b[0] = 1
    found = paired_difference(mean(a), mean(b), samples=20_000)
    assert found.p_value == pytest.approx(2 * 0.9**10, abs=0.02)


def test_relative_figures_are_withheld_without_a_base():
    none = paired_difference(mean([0, 0]), mean([0, 1]))
    assert none.relative is None
    assert none.relative_interval is None
    rare = paired_difference(mean([0, 1]), mean([1, 1]))
    assert rare.relative == pytest.approx(1.0)
    assert rare.relative_interval is None


def test_a_weighted_sum_by_hand():
    # 1 - 2 * (1 + 0) / (1 + 3) + 3 * (1 + 1) / (2 + 2)
    total = weighted_sum([(-2, ratio([1, 0], [1, 3])), (3, ratio([1, 1], [2, 2]))], 1)
    assert total.value == 1 - 2 * 0.25 + 3 * 0.5
    # Of a sum: 0.5 * total + 1 * mean.
    nested = weighted_sum([(0.5, total), (1, mean([0, 1]))], 0.25)
    assert nested.value == 0.25 + 0.5 * 2.0 + 0.5
    # A part that counts nothing is 0.
    assert weighted_sum([(1, ratio([0, 0], [0, 0]))], 0.5).value == 0.5


def test_interval_of_a_weighted_sum_by_enumeration():
    # Draws of items {0, 0}, {0, 1}, {1, 1}: the first ratio is 0/2, 3/5, 6/8, the second 1, 1/2, 0;
    # half their sum is 0.5, 0.55, 0.375.
    total = weighted_sum([(0.5, ratio([0, 3], [1, 4])), (0.5, mean([1, 0]))])
    assert total.value == pytest.approx(0.55)
    assert interval(total) == pytest.approx((0.375, 0.55))
    assert interval(total, level=0.2) == pytest.approx((0.5, 0.55))


def test_differences_of_weighted_sums_are_those_of_their_parts():
    rng = np.random.default_rng(0)
    parts = [ratio(rng.integers(3, size=50), 1 + rng.integers(5, size=50)) for _ in range(4)]
    a = weighted_sum([(2, parts[0]), (0, parts[1])], 5)
    b = weighted_sum([(2, parts[2]), (0, parts[3])], 5)
    ours, plain = paired_difference(a, b), paired_difference(parts[0], parts[2])
    assert ours.difference == pytest.approx(2 * plain.difference)
    assert ours.interval == pytest.approx([2 * end for end in plain.interval])
    assert ours.p_value == plain.p_value
    assert pooled([a, b]).value == pytest.approx(5 + 2 * pooled([parts[0], parts[2]]).value)
    ours = pooled_difference([a, a], [b])
    plain = pooled_difference([parts[0], parts[0]], [parts[2]])
    assert ours.interval == pytest.approx([2 * end for end in plain.interval])


def test_matthews_correlation_by_hand():
    # tp 2, fp 1, fn 1, tn 2 of six items: (4 - 1) / sqrt(3 * 3 * 3 * 3) = 1/3.
    truth, said = np.array([1, 1, 1, 0, 0, 0]), np.array([1, 1, 0, 1, 0, 0])
    assert of_truth(truth, said).value == pytest.approx(1 / 3)
    assert of_truth(truth, truth).value == pytest.approx(1)
    assert of_truth(truth, 1 - truth).value == pytest.approx(-1)
    # Either is the same for all items.
    assert of_truth(truth, 0 * said).value == 0
    assert of_truth(0 * truth, said).value == 0


def of_truth(truth, said):
    parts = (truth * said, (1 - truth) * said, truth * (1 - said), (1 - truth) * (1 - said))
    return matthews(*map(mean, parts))


def test_interval_of_a_function_of_ratios_by_enumeration():
    # Draws of {0, 0}, {0, 1}, {1, 1} have means 0, 1/2, 1 and 4, 3, 2: squares times them 0, .75, 2
    product = combined(lambda a, b: a**2 * b, [mean([0, 1]), mean([4, 2])])
    assert product.value == 0.75
    assert interval(product) == (0.0, 2.0)
    assert interval(product, level=0.4) == (0.75, 0.75)
    # Of a function, and beside other metrics: the same draws.
    nested = weighted_sum([(2, product), (1, mean([0, 1]))], 1)
    assert nested.value == 1 + 2 * 0.75 + 0.5
    assert intervals({"x": mean([0, 1]), "n": nested})["n"] == (1.0, 6.0)


def test_interval_of_matthews_correlation_is_its_known_error():
    # Where both halves are equal, the delta method gives a standard error of sqrt((1 - r^2) / n).
    truth = np.arange(2000) % 2
    said = np.where(np.arange(2000) % 10 < 8, truth, 1 - truth)
    metric = of_truth(truth, said)
    assert metric.value == pytest.approx(0.6)
    low, high = interval(metric)
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt((1 - 0.36) / 2000), rel=0.06)


def test_differences_of_functions_are_paired():
    truth = np.arange(60) % 2
    right, wrong = of_truth(truth, truth), of_truth(truth, 1 - truth)
    found = paired_difference(wrong, right)
    assert found.difference == pytest.approx(2)
    assert found.interval == pytest.approx((2, 2))
    assert pooled([right, right]).value == pytest.approx(1)


def test_pairs_tested_together_meet_the_draws_that_each_meets_alone():
    rng = np.random.default_rng(3)
    clusters = list(range(20)) * 3
    pairs = [(mean(rng.random(60)), mean(rng.random(60))) for _ in range(3)]
    together = paired_differences(pairs, clusters, samples=200, seed=5)
    alone = [paired_difference(a, b, clusters, samples=200, seed=5) for a, b in pairs]
    for one, other in zip(together, alone, strict=True):
        assert one.interval == pytest.approx(other.interval)
        assert (one.difference, one.p_value) == (other.difference, other.p_value)
    assert paired_differences([], clusters) == []


def rare_of(number: int):
    return mean(np.ones(number))


def test_draws_that_hold_nothing_to_count_say_nothing():
    """Two of 200 items are of a category, both right: every draw that has one of them says 1."""
    inside = np.arange(200) < 2
    rare = ratio(inside, inside)
    assert intervals({"rare": rare}, samples=500)["rare"] == (1, 1)
    wrong = ratio(np.arange(200) < 0, inside)
    found = paired_difference(wrong, rare, samples=500)
    assert found.interval == (1, 1)
    assert found.p_value < 0.01
    none = ratio(np.zeros(9), np.zeros(9))
    assert np.isnan(intervals({"none": none})["none"]).all()
    assert np.isnan(paired_difference(none, rare_of(9)).interval).all()
    assert paired_difference(none, none).p_value == 1
