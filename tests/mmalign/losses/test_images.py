"""Losses over images: the dossier's values, gradients in float64, and what must hold exactly."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmalign.losses.base import Need
from mmalign.losses.images import DiffusionDPO, DiffusionSFT, MaPO, MaPOReleased, log_link
from mmalign.scores import DenoiseScores, PairTable, Totals

ERRORS = st.floats(1e-8, 20.0)
TABLE = PairTable(chosen=torch.tensor([0]), rejected=torch.tensor([1]))
ONE = Totals(num_pairs=1, num_chosen_tokens=1)


def scores(*errors: float, dtype=torch.float32) -> DenoiseScores:
    return DenoiseScores(errors=torch.tensor(errors, dtype=dtype, requires_grad=True))


def value(loss, chosen: float, rejected: float, reference=None, dtype=torch.float32) -> float:
    return loss(scores(chosen, rejected, dtype=dtype), reference, TABLE, ONE).loss.item()


def margin(loss, chosen: float, rejected: float, dtype=torch.float32) -> float:
    return loss.margins(scores(chosen, rejected, dtype=dtype), None, TABLE).item()


# l_w, l_l, z and the loss at the released defaults, by hand.
TABLE_OF_VALUES = [
    (0.10, 0.10, 0.0, 0.169315),
    (0.10, 0.11, 2.4563, 0.108228),
    (0.10, 0.12, 4.9083, 0.100736),
    (0.12, 0.10, -4.9083, 0.611570),
    (0.05, 0.20, 36.72, 0.050000),
    (0.30, 0.30, 0.0, 0.369315),
]


@pytest.mark.parametrize(("chosen", "rejected", "z", "loss"), TABLE_OF_VALUES)
def test_the_released_parametrisation_has_the_known_values(chosen, rejected, z, loss):
    assert margin(MaPOReleased(), chosen, rejected) == pytest.approx(z, abs=1e-3, rel=1e-3)
    assert value(MaPOReleased(), chosen, rejected) == pytest.approx(loss, abs=1e-5)


@pytest.mark.parametrize("beta", [128.0, 512.0, 1024.0])
@pytest.mark.parametrize(("chosen", "rejected"), [(0.1, 0.1), (0.01, 0.012), (0.3, 0.05)])
def test_the_papers_parametrisation_is_its_formula(beta, chosen, rejected):
    def phi(error):
        return (error / (math.exp(error) - 1)) ** beta

    z = phi(chosen) - phi(rejected)
    wanted = chosen + math.log(1 + math.exp(-z)) / beta
    assert value(MaPO(beta=beta), chosen, rejected, dtype=torch.float64) == pytest.approx(wanted)
    assert value(MaPO(beta=beta), chosen, rejected) == pytest.approx(wanted, rel=1e-5)


def test_both_parametrisations_have_one_slope_near_zero():
    paper, released = MaPO(beta=500.0), MaPOReleased(link_scale=0.5, scale=1000.0)
    near = 1e-7, 3e-7
    assert margin(paper, *near) == pytest.approx(margin(released, *near), rel=1e-3)


def test_diffusion_dpo_is_ln_2_at_its_reference_and_the_formula_elsewhere():
    loss = DiffusionDPO()
    same = DenoiseScores(errors=torch.tensor([0.1, 0.2]))
    assert value(loss, 0.1, 0.2, same) == pytest.approx(math.log(2), rel=1e-6)
    z = -2500 * ((0.099 - 0.1) - (0.2005 - 0.2))
    assert value(loss, 0.099, 0.2005, same) == pytest.approx(math.log1p(math.exp(-z)), rel=1e-3)


@given(ERRORS, ERRORS)
def test_exchanging_the_images_negates_the_margin(one, other):
    for loss in (MaPO(), MaPOReleased()):
        assert margin(loss, one, other) == -margin(loss, other, one)
    # -log sigmoid(z) + log sigmoid(-z) = -z.
    there, back = (value(MaPOReleased(), *pair) for pair in ((one, other), (other, one)))
    z = margin(MaPOReleased(), one, other)
    assert (there - one) - (back - other) == pytest.approx(-0.1 * z, rel=1e-3, abs=1e-3)


@given(ERRORS, ERRORS)
def test_gradients_always_lower_chosen_and_raise_rejected_within_a_bound(chosen, rejected):
    for loss, most in ((MaPOReleased(), 0.1 * 1000 * 0.25 * 2), (MaPO(), 0.5)):
        made = scores(chosen, rejected, dtype=torch.float64)
        loss(made, None, TABLE, ONE).loss.backward()
        of_chosen, of_rejected = made.errors.grad.tolist()
        assert of_chosen >= 1
        assert -most - 1e-9 <= of_rejected <= 0


@pytest.mark.parametrize("loss", [MaPO(), MaPOReleased(), DiffusionDPO()])
def test_gradients_are_those_of_finite_differences(loss):
    reference = DenoiseScores(errors=torch.tensor([0.11, 0.19], dtype=torch.float64))

    def of(errors):
        return loss(DenoiseScores(errors=errors), reference, TABLE, ONE).loss

    for pair in ((0.1, 0.2), (0.49, 0.51), (1e-6, 1e-3), (2.0, 0.7)):
        errors = torch.tensor(pair, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(of, (errors,), eps=1e-8, atol=1e-3, rtol=1e-4)


def test_the_links_slope_is_the_derivative_and_not_the_papers_formula():
    x = torch.tensor([0.1, 0.5, 1.0, 2.0], dtype=torch.float64, requires_grad=True)
    torch.exp(log_link(0.5 * x)).sum().backward()
    assert x.grad.tolist() == pytest.approx([-0.24583, -0.22921, -0.20868, -0.16935], abs=1e-5)
    one = torch.ones(1, dtype=torch.float64, requires_grad=True)
    torch.exp(log_link(one)).backward()
    assert float(one.grad) == pytest.approx(-0.3387, abs=1e-4)  # Equation 14 has 0.2433.


def test_the_link_keeps_its_digits_in_float32():
    wide = torch.logspace(-8, 1.7, 200, dtype=torch.float64)
    exact = torch.where(
        wide < 1e-3,
        -wide / 2 - wide**2 / 24 + wide**4 / 2880,
        torch.log(wide) - wide - torch.log(-torch.expm1(-wide)),
    )
    found = log_link(wide.float())
    assert found.dtype == torch.float32
    assert ((found.double() - exact) / exact).abs().max() < 1e-6
    narrow = wide.float().requires_grad_()
    log_link(narrow).sum().backward()
    assert narrow.grad.isfinite().all()
    slope = 1 / wide - 1 - 1 / torch.expm1(wide)
    far = wide > 1e-2  # Below, this formula loses digits even in float64.
    assert ((narrow.grad.double() - slope) / slope)[far].abs().max() < 1e-5


@pytest.mark.parametrize("loss", [MaPO(), MaPOReleased()])
@pytest.mark.parametrize("pair", [(0.0, 0.0), (0.0, 1e3), (1e3, 0.0), (1e-30, 1e-30)])
def test_no_error_is_too_small_or_too_large(loss, pair):
    made = scores(*pair)
    out = loss(made, None, TABLE, ONE)
    out.loss.backward()
    assert out.loss.isfinite()
    assert made.errors.grad.isfinite().all()


def test_half_precision_scores_are_widened_before_the_link():
    made = DenoiseScores(errors=torch.tensor([0.1, 0.11], dtype=torch.bfloat16))
    assert MaPOReleased().margins(made, None, TABLE).dtype == torch.float32


def test_beta_0_is_sft_to_the_bit_and_reads_no_rejected_image():
    loss = MaPOReleased(beta=0.0)
    assert loss.needs == DiffusionSFT().needs == frozenset()
    chosen_only = PairTable(chosen=torch.tensor([0, 1]))
    two = Totals(num_pairs=2, num_chosen_tokens=2)
    found = []
    for one in (loss, DiffusionSFT()):
        made = scores(0.1234, 0.777)
        out = one(made, None, chosen_only, two)
        out.loss.backward()
        found.append((out.loss.item(), made.errors.grad.tolist()))
    assert found[0] == found[1]
    assert found[0][1] == [0.5, 0.5]


def test_shares_add_up_and_weights_multiply():
    errors = [0.1, 0.2, 0.3, 0.15]
    both = PairTable(
        chosen=torch.tensor([0, 2]), rejected=torch.tensor([1, 3]), weight=torch.tensor([1.0, 3.0])
    )
    two = Totals(num_pairs=2, num_chosen_tokens=2)
    whole = MaPO()(scores(*errors), None, both, two)
    first = MaPO()(scores(*errors[:2]), None, TABLE, two)
    second = MaPO()(scores(*errors[2:]), None, TABLE, two)
    assert whole.loss.item() == pytest.approx((first.loss + 3 * second.loss).item())
    assert whole.metrics["accuracy"].item() == 1.0 + 3.0 * 0.0
    assert whole.metrics["chosen_error"].item() == pytest.approx(0.1 + 3 * 0.3)


def test_only_diffusion_dpo_needs_a_reference():
    assert Need.REFERENCE in DiffusionDPO().needs
    assert not any(Need.REFERENCE in loss.needs for loss in (MaPO(), MaPOReleased()))
