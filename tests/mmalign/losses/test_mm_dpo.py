"""MM-DPO: beta(delta) by hand, its limits, k from the gaps, and the released code's statistic."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmalign.errors import SchemaMismatch, TrainingError
from mmalign.losses import DPO, MMDPO, MMDPOBatch, Robust, SoftLabels
from mmalign.losses.base import totals_of
from mmalign.scores import LossOutput, PairTable, TokenScores


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def run(loss, margins: list[float], gaps=None, **columns) -> tuple[LossOutput, torch.Tensor]:
    """The loss of pairs with these log-ratio margins, and the chosen responses' [P] sums.

    One token a response, reference 0; a margin is the chosen response's alone.
    """
    count = len(margins)
    chosen = torch.tensor(margins, requires_grad=True)
    mask = torch.ones(2 * count, 1, dtype=torch.bool)
    policy = TokenScores(logps=torch.cat([chosen, torch.zeros(count)])[:, None], mask=mask)
    reference = TokenScores(logps=torch.zeros(2 * count, 1), mask=mask)
    table = PairTable(
        chosen=torch.arange(count),
        rejected=torch.arange(count, 2 * count),
        score_gap=gaps if gaps is None or torch.is_tensor(gaps) else torch.tensor(gaps),
        **columns,
    )
    return loss(policy, reference, table, totals_of(policy, table)), chosen


def beta_of(gap: float, **settings) -> float:
    return MMDPO(**({"beta": 0.1} | settings)).betas(torch.tensor([gap])).item()


# --- beta(delta) ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gap", "settings", "wanted"),
    [
        (1.0, {"w": 0.5, "k": 0.5}, 0.119673),
        (3.0, {"w": 0.5, "k": 0.5}, 0.138843),
        (-1.0, {"w": 0.5, "k": 0.5, "gap_floor": -2.0}, 0.067564),
        (1.0, {"w": 0.1, "k": 1.0}, 0.106321),
    ],
)
def test_the_methods_values(gap, settings, wanted):
    assert beta_of(gap, **settings) == pytest.approx(wanted, abs=1e-6)


def test_beta_runs_from_beta_to_one_plus_w_times_beta():
    assert beta_of(0.0, w=0.5) == pytest.approx(0.1, abs=1e-8)
    assert beta_of(1e6, w=0.5) == pytest.approx(0.15, abs=1e-8)
    assert beta_of(3.0, w=0.5, k=1e-9) == pytest.approx(0.1, abs=1e-7)


def test_a_gap_below_the_floor_counts_as_the_floor():
    assert beta_of(-1.0) == beta_of(-5.0) == beta_of(0.0)
    assert beta_of(-5.0, gap_floor=-1.0) == beta_of(-1.0, gap_floor=-1.0) < 0.1


def test_beta_never_turns_negative():
    # 0.1 (1 + 0.5 (1 - e^5)) = -7.27
    assert 0.1 * (1 + 0.5 * (1 - math.exp(5))) == pytest.approx(-7.27, abs=5e-3)
    assert beta_of(-5.0, k=1.0, gap_floor=-10.0) == pytest.approx(1e-3)
    assert beta_of(-5.0, k=1.0, gap_floor=-10.0, min_beta=0.02) == pytest.approx(0.02)


@settings(deadline=None)
@given(
    gap=st.floats(-3, 5),
    step=st.floats(0.05, 3),
    w=st.floats(0.05, 1),
    k=st.floats(0.1, 1),
)
def test_beta_rises_with_the_gap(gap, step, w, k):
    betas = MMDPO(w=w, k=k, gap_floor=-3, min_beta=1e-12).betas(torch.tensor([gap, gap + step]))
    low, high = betas.tolist()
    assert low < high or low == high == pytest.approx(1e-12)


# --- the loss -------------------------------------------------------------------------------


def test_hand_value_and_gradient():
    gaps = [1.0, -4.0]
    out, chosen = run(MMDPO(beta=0.1, w=0.5, k=0.5), [3.0, -1.5], gaps)
    first, second = 0.1 * (1 + 0.5 * (1 - math.exp(-0.5))), 0.1
    terms = [softplus(-first * 3.0), softplus(second * 1.5)]
    assert out.per_item.tolist() == pytest.approx(terms, abs=1e-6)
    assert out.loss.item() == pytest.approx(sum(terms) / 2, abs=1e-6)
    assert out.metrics["pair_beta"].item() == pytest.approx(first + second, abs=1e-6)
    # Rewards are logged at beta itself.
    assert out.metrics["margin"].item() == pytest.approx(0.1 * (3.0 - 1.5), abs=1e-6)
    out.loss.backward()
    # dL/dz = -beta(delta) sigmoid(-beta(delta) z) / P
    wanted = [-first / (1 + math.exp(first * 3.0)) / 2, -second / (1 + math.exp(-0.15)) / 2]
    assert chosen.grad.tolist() == pytest.approx(wanted, abs=1e-7)


def test_without_w_it_is_dpo_bit_for_bit():
    gaps, margins = [5.0, -2.0, 0.3, 0.0], [3.0, -1.5, 0.2, -40.0]
    results = []
    for loss in (MMDPO(w=0.0, sft_weight=0.25), DPO(sft_weight=0.25)):
        out, chosen = run(loss, margins, gaps)
        out.loss.backward()
        results.append((out.loss.item(), chosen.grad.tolist()))
    assert results[0] == results[1]


def test_at_the_reference_the_gap_changes_the_gradient_only():
    gaps = [0.0, 1.0, 3.0]
    out, chosen = run(MMDPO(beta=0.1, w=0.5, k=0.5), [0.0, 0.0, 0.0], gaps)
    assert out.per_item.tolist() == pytest.approx([math.log(2)] * 3, abs=1e-6)
    out.loss.backward()
    wanted = [-beta / 2 / 3 for beta in (0.1, 0.119673, 0.138843)]
    assert chosen.grad.tolist() == pytest.approx(wanted, abs=1e-6)


def test_the_gap_is_data():
    gaps = torch.tensor([1.0, 2.0], requires_grad=True)
    out, chosen = run(MMDPO(), [1.0, -1.0], gaps)
    assert not out.metrics["pair_beta"].requires_grad
    out.loss.backward()
    assert gaps.grad is None
    assert chosen.grad.abs().min() > 0


def test_the_sft_term_adds_the_token_mean_of_the_chosen():
    plain, _ = run(MMDPO(), [-3.0, -1.0], [1.0, 2.0])
    both, _ = run(MMDPO(sft_weight=0.25), [-3.0, -1.0], [1.0, 2.0])
    assert (both.loss - plain.loss).item() == pytest.approx(0.25 * (3.0 + 1.0) / 2, abs=1e-6)


# --- k from the gaps ------------------------------------------------------------------------


@pytest.mark.parametrize("gaps", [[2.0], [1.0, 2.0, 40.0], [1.0, 3.0], [-9.0, 0.0, 2.0, -1.0]])
def test_fit_gives_the_median_positive_pair_half_the_rise(gaps):
    loss = MMDPO(beta=0.1, w=0.5, k="fit").fitted(gaps)
    assert loss.k == pytest.approx(math.log(2) / 2.0)
    assert loss.betas(torch.tensor([2.0])).item() == pytest.approx(0.1 * (1 + 0.5 / 2), abs=1e-7)


def test_fit_does_not_depend_on_the_scale_of_the_rewards():
    gaps = [0.2, 1.5, 3.0, -2.0]
    betas = [
        MMDPO(k="fit").fitted([c * g for g in gaps]).betas(c * torch.tensor(gaps))
        for c in (1.0, 1000.0)
    ]
    assert torch.allclose(*betas, atol=1e-7)


def test_a_given_k_is_kept():
    loss = MMDPO(k=0.7)
    assert loss.fitted([1.0, 2.0]) == loss
    assert loss.fitted([]) == loss


@pytest.mark.parametrize("gaps", [[], [0.0, -1.0]])
def test_fit_without_a_positive_gap_is_told(gaps):
    with pytest.raises(SchemaMismatch, match="fit needs pairs with a positive score_gap") as caught:
        MMDPO(k="fit").fitted(gaps)
    assert "set loss.k" in str(caught.value)


@pytest.mark.parametrize("wrapper", [SoftLabels, Robust])
def test_a_wrapper_fits_what_it_wraps(wrapper):
    assert wrapper(of=MMDPO(k="fit")).fitted([2.0]).of.k == pytest.approx(math.log(2) / 2)


# --- the released code's statistic ----------------------------------------------------------

Z = torch.tensor([0.4, -1.0, 2.5, 0.3, 8.0, -0.2, 0.1, 1.1, -3.0, 0.6])


def transcribed(z, beta, w, seed):
    """The released trainer's lines, on one process."""
    mean, std = z.mean(), z.std()
    weight = torch.exp(-0.5 * ((z - mean) / (std + 1e-7)).pow(2))
    drawn = torch.multinomial(
        weight, int(len(z) * 0.8), replacement=False, generator=torch.Generator().manual_seed(seed)
    )
    return (beta * (1 + w * (z[drawn].mean() - mean))).clamp(min=1e-3)


@pytest.mark.parametrize("seed", range(5))
def test_batch_beta_is_the_released_formula(seed):
    loss = MMDPOBatch(beta=0.1, w=0.1, seed=seed)
    wanted = transcribed(Z, 0.1, 0.1, seed)
    assert loss.batch_beta(Z).item() == pytest.approx(wanted.item(), abs=1e-8)
    out, chosen = run(loss, Z.tolist())
    terms = [softplus(-wanted.item() * z) for z in Z.tolist()]
    assert out.per_item.tolist() == pytest.approx(terms, abs=1e-6)
    out.loss.backward()
    # b is not differentiated: every pair's gradient is its own alone.
    b = wanted.item()
    gradient = [-b / (1 + math.exp(b * z)) / len(Z) for z in Z.tolist()]
    assert chosen.grad.tolist() == pytest.approx(gradient, abs=1e-7)


@settings(deadline=None)
@given(st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=6), st.integers(0, 99))
def test_batch_beta_is_that_of_some_eight_in_ten(values, seed):
    """No drawing of ours in this oracle: the subset must be one of all there are."""
    z = torch.tensor(values)
    got = MMDPOBatch(beta=0.1, w=0.1, seed=seed).batch_beta(z).item()
    count = max(1, math.floor(0.8 * len(values)))
    possible = [
        max(1e-3, 0.1 * (1 + 0.1 * (sum(some) / count - sum(values) / len(values))))
        for some in itertools.combinations(values, count)
    ]
    assert min(abs(got - one) for one in possible) < 1e-5


def test_the_spread_is_bessels():
    """Over many draws, the biased spread of few pairs would give others."""
    for seed in range(200):
        got = MMDPOBatch(beta=0.1, w=0.1, seed=seed).batch_beta(Z[:3]).item()
        assert got == pytest.approx(transcribed(Z[:3], 0.1, 0.1, seed).item(), abs=1e-8)


def test_an_outlier_is_left_out_more_often_than_not():
    def kept(seed):
        # Without the 8.0 the mean of the others is lower, and so is b.
        return MMDPOBatch(beta=0.1, w=0.1, seed=seed).batch_beta(Z).item() > 0.1

    assert sum(kept(seed) for seed in range(200)) < 100


def test_with_all_of_the_batch_it_is_dpo():
    whole, _ = run(MMDPOBatch(kept_share=1.0), Z.tolist())
    plain, _ = run(DPO(), Z.tolist())
    assert whole.loss.item() == pytest.approx(plain.loss.item(), abs=1e-7)


def test_equal_margins_and_a_low_statistic_stay_finite():
    assert MMDPOBatch().batch_beta(torch.full((5,), 2.0)).item() == pytest.approx(0.1)
    # Most draws leave out the 8.0, and a large w then turns the formula negative.
    assert MMDPOBatch(w=1e6, min_beta=0.02).batch_beta(Z).item() == pytest.approx(0.02)


def test_one_pair_has_no_statistic():
    with pytest.raises(TrainingError, match="one pair has none") as caught:
        run(MMDPOBatch(), [1.0])
    assert "micro_batch_size" in str(caught.value)
