"""The relatives of DPO by hand, and where one of them becomes another.

By hand: beta 0.1, two pairs, summed log-ratios
  pair 0: chosen +1.0, rejected -2.0, third -0.5 (3 tokens, its summed nll 8.5): margin  3.0
  pair 1: chosen -1.0, rejected +0.5, third +1.0 (2 tokens, its summed nll 5.0): margin -1.5
The third is the chosen response under the contrast picture, or the rationale.
"""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmalign.losses import DPO, IPO, MDPO, MMDPO, RDPO, Hinge, RationaleDPO, Robust, SoftLabels
from mmalign.losses.base import totals_of
from mmalign.scores import LossOutput, PairTable, TokenScores

LENGTHS = (3, 2, 4, 1, 3, 2)
REFERENCE = torch.tensor([-7.0, -2.0, -5.0, -4.0, -8.0, -6.0])
RATIOS = torch.tensor([1.0, -1.0, -2.0, 0.5, -0.5, 1.0])
TABLE = PairTable(
    chosen=torch.tensor([0, 1]),
    rejected=torch.tensor([2, 3]),
    contrast=torch.tensor([4, 5]),
    rationale=torch.tensor([4, 5]),
    score_gap=torch.tensor([1.0, 2.0]),
    p_target=torch.tensor([0.9, 0.3]),
)


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def spread(sums: torch.Tensor) -> TokenScores:
    """Scores whose rows add up to `sums`, evenly over each candidate's tokens."""
    mask = torch.arange(max(LENGTHS))[None] < torch.tensor(LENGTHS)[:, None]
    return TokenScores(logps=mask * (sums / torch.tensor(LENGTHS))[:, None], mask=mask)


def run(loss, ratios=RATIOS, table=TABLE) -> tuple[LossOutput, torch.Tensor]:
    """The loss at these log-ratios, and their gradient."""
    sums = (REFERENCE + ratios).requires_grad_()
    reference = spread(REFERENCE)
    out = loss(spread(sums), reference, table, totals_of(reference, table))
    out.loss.backward()
    assert sums.grad is not None
    return out, sums.grad


def exactly(loss) -> tuple[float, list[float]]:
    out, gradient = run(loss)
    return out.loss.item(), gradient.tolist()


def margins(first: float, second: float) -> torch.Tensor:
    """Log-ratios in which the chosen responses alone make these margins."""
    return torch.tensor([first, second, 0.0, 0.0, 0.0, 0.0])


# --- each by hand ---------------------------------------------------------------------------


def test_ipo_by_hand():
    out, gradient = run(IPO(beta=0.1))
    # target 1 / (2 * 0.1) = 5: (3 - 5)^2, (-1.5 - 5)^2
    assert out.per_item.tolist() == pytest.approx([4.0, 42.25], abs=1e-5)
    assert gradient.tolist() == pytest.approx([-2.0, -6.5, 2.0, 6.5, 0, 0], abs=1e-5)


@pytest.mark.parametrize("beta", [0.05, 0.1, 1.0])
def test_ipo_is_least_at_its_target(beta):
    target = 1 / (2 * beta)
    out, gradient = run(IPO(beta=beta), margins(target, target))
    assert out.loss.item() == pytest.approx(0.0, abs=1e-9)
    assert gradient.abs().max().item() == pytest.approx(0.0, abs=1e-5)
    beyond = run(IPO(beta=beta), margins(target + 1, target - 1))[1]
    assert beyond[0] > 0 > beyond[1]


def test_hinge_by_hand():
    out, gradient = run(Hinge(beta=0.1))
    assert out.per_item.tolist() == pytest.approx([1 - 0.3, 1 + 0.15], abs=1e-6)
    assert gradient.tolist() == pytest.approx([-0.05, -0.05, 0.05, 0.05, 0, 0], abs=1e-8)


def test_hinge_past_its_margin_has_no_gradient():
    out, gradient = run(Hinge(beta=0.1), margins(10.5, 9.5))
    assert out.per_item.tolist() == pytest.approx([0.0, 0.05], abs=1e-6)
    assert gradient[0] == gradient[2] == 0
    assert gradient[1] < 0 < gradient[3]


def test_mdpo_by_hand():
    out, _ = run(MDPO(beta=0.1, anchor=0.5))
    text = [softplus(-0.3), softplus(0.15)]
    visual = [softplus(-0.15), softplus(0.2)]  # 1.0 - (-0.5), -1.0 - 1.0
    anchor = [softplus(-0.1 + 0.5), softplus(0.1 + 0.5)]  # chosen alone
    terms = [sum(parts) for parts in zip(text, visual, anchor, strict=True)]
    assert out.per_item.tolist() == pytest.approx(terms, abs=1e-6)
    half, _ = run(MDPO(beta=0.1, conditional_weight=0.5, anchor_weight=0.25, anchor=0.5))
    weighed = [t + 0.5 * v + 0.25 * a for t, v, a in zip(text, visual, anchor, strict=True)]
    assert half.per_item.tolist() == pytest.approx(weighed, abs=1e-6)


def test_mdpos_anchor_lifts_the_chosen_response_alone():
    plain = run(MDPO(anchor_weight=0.0))[1]
    both = run(MDPO(anchor_weight=1.0))[1]
    assert (both - plain)[:2].max() < 0
    assert (both - plain)[2:].abs().max() == 0


def test_mdpo_without_its_further_terms_is_dpo_bit_for_bit():
    none = MDPO(conditional_weight=0.0, anchor_weight=0.0, sft_weight=0.5)
    assert exactly(none) == exactly(DPO(sft_weight=0.5))


def test_mdpo_with_the_same_picture_has_log_two_and_no_gradient_from_it():
    same = replace(TABLE, contrast=TABLE.chosen)
    out, gradient = run(MDPO(anchor_weight=0.0), table=same)
    assert out.metrics["visual_loss"].item() == pytest.approx(2 * math.log(2), abs=1e-6)
    plain, wanted = run(DPO())
    assert out.loss.item() == pytest.approx(plain.loss.item() + math.log(2), abs=1e-6)
    assert torch.allclose(gradient, wanted, atol=1e-8)


def test_mdpo_without_anchor_is_rdpo():
    assert exactly(MDPO(anchor_weight=0.0)) == exactly(RDPO())


def test_rationale_dpo_by_hand():
    out, gradient = run(RationaleDPO(beta=0.1, rationale_weight=2.0))
    nll = [8.5 / 3, 5.0 / 2]
    terms = [softplus(-0.3) + 2 * nll[0], softplus(0.15) + 2 * nll[1]]
    assert out.per_item.tolist() == pytest.approx(terms, abs=1e-5)
    assert out.metrics["rationale_nll"].item() == pytest.approx(sum(nll), abs=1e-5)
    assert gradient[4:].tolist() == pytest.approx([-2 / 3 / 2, -2 / 2 / 2], abs=1e-6)
    assert exactly(RationaleDPO(rationale_weight=0.0)) == exactly(DPO())


# --- uncertain and noisy labels -------------------------------------------------------------


def test_soft_labels_by_hand():
    out, _ = run(SoftLabels(of=DPO(beta=0.1)))
    terms = [
        0.9 * softplus(-0.3) + 0.1 * softplus(0.3),
        0.3 * softplus(0.15) + 0.7 * softplus(-0.15),
    ]
    assert out.per_item.tolist() == pytest.approx(terms, abs=1e-6)
    # which is DPO + (1 - p) beta z
    known = [softplus(-0.3) + 0.1 * 0.3, softplus(0.15) + 0.7 * -0.15]
    assert terms == pytest.approx(known)


def test_the_other_label_has_the_other_gap():
    """MM-DPO's beta on the other side is that of the negative gap: beta(1) and beta(-1)."""
    out, _ = run(SoftLabels(of=MMDPO(beta=0.1, w=0.5, k=0.5, gap_floor=-2.0)))
    right, wrong = 0.1 * (1.5 - 0.5 * math.exp(-0.5)), 0.1 * (1.5 - 0.5 * math.exp(0.5))
    wanted = 0.9 * softplus(-right * 3) + 0.1 * softplus(wrong * 3)
    assert out.per_item[0].item() == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("of", [DPO(sft_weight=0.3), IPO(), Hinge(), RDPO(), MDPO()])
def test_soft_labels_of_certainty_are_the_loss_itself(of):
    plain = run(of)
    # A micro-batch in which every pair is certain has no column.
    for target in (torch.ones(2), None):
        soft = run(SoftLabels(of=of), table=replace(TABLE, p_target=target))
        assert soft[0].loss.item() == plain[0].loss.item()
        assert torch.equal(soft[1], plain[1])


def test_a_tie_pulls_the_margin_to_nothing():
    tie = replace(TABLE, p_target=torch.tensor([0.5, 0.5]))
    _, gradient = run(SoftLabels(of=DPO()), margins(2.0, -2.0), tie)
    assert gradient[0] > 0 > gradient[1]
    assert gradient[0].item() == pytest.approx(-gradient[1].item(), abs=1e-8)
    still = run(SoftLabels(of=DPO()), margins(0.0, 0.0), tie)[1]
    assert still.abs().max().item() == pytest.approx(0.0, abs=1e-9)


def test_robust_by_hand():
    out, _ = run(Robust(flip_rate=0.1, of=DPO(beta=0.1)))
    terms = [
        (0.9 * softplus(-0.3) - 0.1 * softplus(0.3)) / 0.8,
        (0.9 * softplus(0.15) - 0.1 * softplus(-0.15)) / 0.8,
    ]
    assert out.per_item.tolist() == pytest.approx(terms, abs=1e-6)
    # which is DPO - e / (1 - 2 e) beta z, with 0.1 / 0.8 = 0.125
    known = [softplus(-0.3) - 0.125 * 0.3, softplus(0.15) + 0.125 * 0.15]
    assert terms == pytest.approx(known)


@pytest.mark.parametrize("of", [DPO(sft_weight=0.3), IPO(), RDPO(), MMDPO()])
def test_robust_without_flips_is_the_loss_itself(of):
    assert exactly(Robust(flip_rate=0.0, of=of)) == exactly(of)


@given(rate=st.floats(0, 0.45), z=st.floats(-30, 30), gap=st.floats(0, 5))
@settings(deadline=None)
@pytest.mark.parametrize("of", [DPO(), IPO(), Hinge(), MMDPO(gap_floor=-5.0)])
def test_robust_is_unbiased_over_flips(of, rate, z, gap):
    """Labels right with 1 - e and flipped with e: the expectation is the loss on right ones."""
    table = replace(TABLE, score_gap=torch.tensor([gap, gap]))
    robust = Robust(flip_rate=rate, of=of)
    right = run(robust, margins(z, z), table)[0].per_item
    flipped = run(robust, margins(z, z), table.swapped())[0].per_item
    clean = run(of, margins(z, z), table)[0].per_item
    mean = (1 - rate) * right + rate * flipped
    assert torch.allclose(mean, clean, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Robust(flip_rate=0.5), "less than 0.5"),
        (lambda: SoftLabels(of=Robust()), "valid"),
        (lambda: Hinge(beta=0.0), "greater than 0"),
        (lambda: MDPO(anchor_weight=-1.0), "greater than or equal to 0"),
    ],
)
def test_what_means_nothing_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
