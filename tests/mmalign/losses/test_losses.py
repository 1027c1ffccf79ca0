"""Hand numbers, limits and signs of every loss.

Unless said otherwise: beta 0.1, two pairs, summed log-ratios
  pair 0: chosen +1.0, rejected -2.0, contrast -0.5   (3 chosen tokens, summed nll 6.0)
  pair 1: chosen -1.0, rejected +0.5, contrast +1.0   (2 chosen tokens, summed nll 3.0)
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmalign.losses import DPO, RDPO, SFT, RDPOCompetitor
from mmalign.losses.base import totals_of
from mmalign.scores import PairTable, TokenScores, Totals

TABLE = PairTable(
    chosen=torch.tensor([0, 1]), rejected=torch.tensor([2, 3]), contrast=torch.tensor([4, 5])
)
LENGTHS = (3, 2, 4, 1, 3, 2)
REFERENCE_SUMS = (-7.0, -2.0, -5.0, -4.0, -8.0, -6.0)
RATIOS = (1.0, -1.0, -2.0, 0.5, -0.5, 1.0)


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def scores(sums: torch.Tensor, competitor: torch.Tensor | None = None) -> TokenScores:
    """Scores whose rows add up to `sums`, spread evenly over each candidate's tokens."""
    mask = torch.arange(max(LENGTHS))[None] < torch.tensor(LENGTHS)[:, None]
    share = sums / torch.tensor(LENGTHS)
    rows = torch.where(mask, share[:, None], torch.zeros(()))
    rivals = None
    if competitor is not None:
        rivals = torch.where(mask, (competitor / torch.tensor(LENGTHS))[:, None], torch.zeros(()))
    return TokenScores(logps=rows, mask=mask, competitor_logps=rivals)


@pytest.fixture
def reference() -> TokenScores:
    return scores(torch.tensor(REFERENCE_SUMS))


def policy_sums(requires_grad: bool = True) -> torch.Tensor:
    return (torch.tensor(REFERENCE_SUMS) + torch.tensor(RATIOS)).requires_grad_(requires_grad)


def test_dpo_hand_value_and_gradient(reference):
    sums = policy_sums()
    out = DPO(beta=0.1)(scores(sums), reference, TABLE, totals_of(reference, TABLE))
    # margins 3.0 and -1.5: -log sigmoid(0.3) = softplus(-0.3), softplus(0.15)
    assert out.loss.item() == pytest.approx((softplus(-0.3) + softplus(0.15)) / 2, abs=1e-7)
    assert out.metrics["margin"].item() == pytest.approx(0.1 * (3.0 - 1.5))
    assert out.metrics["accuracy"].item() == 1
    assert out.metrics["chosen_logp_change"].item() == pytest.approx(0.0)
    assert out.metrics["rejected_logp_change"].item() == pytest.approx(-1.5)
    out.loss.backward()
    # dL/dc = -beta sigmoid(-beta h) / P
    first, second = 0.1 / (1 + math.exp(0.3)) / 2, 0.1 / (1 + math.exp(-0.15)) / 2
    wanted = [-first, -second, first, second, 0.0, 0.0]
    assert sums.grad.tolist() == pytest.approx(wanted, abs=1e-8)


def test_dpo_sft_term_is_the_token_mean(reference):
    plain = DPO()(scores(policy_sums()), reference, TABLE, totals_of(reference, TABLE))
    both = DPO(sft_weight=0.5)(scores(policy_sums()), reference, TABLE, totals_of(reference, TABLE))
    # nll of chosen: 6.0 over 3 tokens, 3.0 over 2: token mean 9 / 5
    assert (both.loss - plain.loss).item() == pytest.approx(0.5 * 9.0 / 5.0, abs=1e-6)


def test_the_sft_term_may_be_a_mean_over_responses(reference):
    """SPECS's: at the reference ln 2 + mean of NLL / length, all responses alike."""
    at_reference = scores(torch.tensor(REFERENCE_SUMS))
    loss = DPO(sft_weight=1.0, sft_mean="responses")
    out = loss(at_reference, reference, TABLE, totals_of(reference, TABLE))
    # nll of chosen: 7.0 over 3 tokens, 2.0 over 2
    assert out.loss.item() == pytest.approx(math.log(2) + (7 / 3 + 2 / 2) / 2, abs=1e-6)
    plain = DPO()(at_reference, reference, TABLE, totals_of(reference, TABLE))
    none = DPO(sft_mean="responses")(at_reference, reference, TABLE, totals_of(reference, TABLE))
    assert none.loss.item() == plain.loss.item()


@pytest.mark.parametrize("mean", ["tokens", "responses"])
def test_a_response_twice_as_long_weighs_twice_in_a_mean_over_tokens_alone(mean):
    """One chosen response said twice, beside another pair: its margin doubles either way."""

    def parts(repeat: int) -> tuple[float, float]:
        lengths = torch.tensor([2 * repeat, 4, 1, 1])
        mask = torch.arange(4)[None] < lengths[:, None]
        each = torch.tensor([-0.5, -1.5, -1.0, -1.0])[:, None]
        policy = TokenScores(logps=torch.where(mask, each, 0.0), mask=mask)
        ref = TokenScores(logps=torch.where(mask, each - 0.25, 0.0), mask=mask)
        table = PairTable(chosen=torch.tensor([0, 1]), rejected=torch.tensor([2, 3]))
        totals = totals_of(policy, table)
        plain = DPO()(policy, ref, table, totals)
        both = DPO(sft_weight=1.0, sft_mean=mean)(policy, ref, table, totals)
        return both.metrics["chosen_logp_change"].item(), (both.loss - plain.loss).item()

    (once, short), (twice, long) = parts(1), parts(2)
    assert (once, twice) == pytest.approx((0.5 + 1.0, 1.0 + 1.0))
    assert short == pytest.approx(1.0 if mean == "responses" else 7 / 6, abs=1e-6)
    assert long == pytest.approx(1.0, abs=1e-6)


def test_rdpo_hand_value_and_gradient(reference):
    sums = policy_sums()
    loss = RDPO(beta=0.1, visual_weight=0.5)
    out = loss(scores(sums), reference, TABLE, totals_of(reference, TABLE))
    # visual margins: 1.0 - (-0.5) = 1.5 and -1.0 - 1.0 = -2.0
    text = softplus(-0.3) + softplus(0.15)
    visual = softplus(-0.15) + softplus(0.2)
    assert out.loss.item() == pytest.approx((text + 0.5 * visual) / 2, abs=1e-7)
    out.loss.backward()
    assert sums.grad[0] < 0
    assert (sums.grad[2:] > 0).all()
    # Only differences matter: chosen, rejected and contrast gradients of a pair add to zero.
    assert sums.grad[[0, 2, 4]].sum().item() == pytest.approx(0.0, abs=1e-8)


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_rdpo_at_the_reference_is_log_two_for_each_term(reference, weight):
    sums = torch.tensor(REFERENCE_SUMS).requires_grad_()
    out = RDPO(visual_weight=weight)(scores(sums), reference, TABLE, totals_of(reference, TABLE))
    assert out.loss.item() == pytest.approx((1 + weight) * math.log(2), abs=1e-6)
    out.loss.backward()
    # |dL/dc| = beta (1 + w) / 2 for each pair, halved by the mean over two pairs
    assert sums.grad[0].item() == pytest.approx(-0.1 * (1 + weight) / 2 / 2, abs=1e-8)
    assert sums.grad[2].item() == pytest.approx(0.05 / 2, abs=1e-8)
    assert sums.grad[4].item() == pytest.approx(weight * 0.05 / 2, abs=1e-8)


def test_rdpo_without_visual_weight_is_dpo_bit_for_bit(reference):
    results = []
    for loss in (DPO(sft_weight=1.0), RDPO(visual_weight=0.0, sft_weight=1.0)):
        sums = policy_sums()
        out = loss(scores(sums), reference, TABLE, totals_of(reference, TABLE))
        out.loss.backward()
        results.append((out.loss.item(), sums.grad.tolist()))
    assert results[0] == results[1]


def test_same_image_gives_the_visual_term_no_gradient(reference):
    same = PairTable(chosen=TABLE.chosen, rejected=TABLE.rejected, contrast=TABLE.chosen)
    gradients = []
    for loss in (RDPO(), DPO()):
        sums = policy_sums()
        loss(scores(sums), reference, same, totals_of(reference, same)).loss.backward()
        gradients.append(sums.grad)
    assert torch.allclose(*gradients, atol=1e-8)


def test_competitor_variant_ignores_the_rejected_tokens_own_likelihood(reference):
    rivals = torch.tensor([-3.0, -4.0, -5.0, -6.0, -7.0, -8.0])
    ref = scores(torch.tensor(REFERENCE_SUMS), rivals)
    sums, moved = policy_sums(), rivals + torch.tensor([0.0, 0.0, 0.3, -0.2, 0.1, 0.4])
    loss = RDPOCompetitor(beta=0.1)
    out = loss(scores(sums, moved), ref, TABLE, totals_of(ref, TABLE))
    # text margins 1.0 - 0.3, -1.0 + 0.2; visual margins 1.0 - 0.1, -1.0 - 0.4
    wanted = softplus(-0.07) + softplus(0.08) + softplus(-0.09) + softplus(0.14)
    assert out.loss.item() == pytest.approx(wanted / 2, abs=1e-6)
    out.loss.backward()
    assert sums.grad[2:].abs().max() == 0
    # At the reference the value is the published loss's, 2 log 2.
    still = loss(ref, ref, TABLE, totals_of(ref, TABLE)).loss
    assert still.item() == pytest.approx(2 * math.log(2), abs=1e-6)


def test_sft_is_the_mean_over_tokens_not_over_rows():
    sums = policy_sums(requires_grad=False)
    out = SFT()(scores(sums), None, TABLE, totals_of(scores(sums), TABLE))
    assert out.loss.item() == pytest.approx(9.0 / 5.0, abs=1e-6)
    assert out.per_item.tolist() == pytest.approx([2.0, 1.5])


@given(
    shift=st.floats(-50, 50),
    beta=st.floats(0.01, 1.0),
    ratios=st.lists(st.floats(-5, 5), min_size=6, max_size=6),
)
def test_only_differences_of_log_ratios_matter(shift, beta, ratios):
    ref = torch.tensor(REFERENCE_SUMS)
    sums = ref + torch.tensor(ratios)
    loss = RDPO(beta=beta)
    totals = totals_of(scores(ref), TABLE)
    here = loss(scores(sums), scores(ref), TABLE, totals).loss
    moved = loss(scores(sums), scores(ref + shift), TABLE, totals).loss
    assert moved.item() == pytest.approx(here.item(), abs=2e-4)


@pytest.mark.parametrize(
    "loss",
    [DPO(sft_weight=0.7), DPO(sft_weight=0.7, sft_mean="responses"), RDPO(sft_weight=0.3), SFT()],
)
def test_shares_of_a_step_add_up(reference, loss):
    """A batch cut into micro-batches gives the whole batch's loss, token mean included."""
    policy = scores(policy_sums(requires_grad=False))
    totals = totals_of(policy, TABLE)
    whole = loss(policy, reference, TABLE, totals).loss
    parts = [
        loss(
            policy,
            reference,
            PairTable(
                chosen=TABLE.chosen[i : i + 1],
                rejected=TABLE.rejected[i : i + 1],
                contrast=TABLE.contrast[i : i + 1],
            ),
            totals,
        ).loss
        for i in range(2)
    ]
    assert sum(parts).item() == pytest.approx(whole.item(), abs=1e-6)


def test_totals_are_the_denominators(reference):
    policy = scores(policy_sums(requires_grad=False))
    double = Totals(num_pairs=4, num_chosen_tokens=10)
    whole = DPO(sft_weight=1.0)(policy, reference, TABLE, totals_of(policy, TABLE)).loss
    half = DPO(sft_weight=1.0)(policy, reference, TABLE, double).loss
    assert half.item() == pytest.approx(whole.item() / 2, abs=1e-6)


def test_log_ratios_are_sums_not_means():
    """Twice the tokens at the same per-token change is twice the margin."""
    mask = torch.tensor([[True, False], [True, True], [True, False]])
    policy = TokenScores(logps=torch.tensor([[-1.0, 0], [-1.0, -1.0], [-2.0, 0]]), mask=mask)
    ref = TokenScores(logps=torch.tensor([[-2.0, 0], [-2.0, -2.0], [-2.0, 0]]), mask=mask)
    short = PairTable(chosen=torch.tensor([0]), rejected=torch.tensor([2]))
    long = PairTable(chosen=torch.tensor([1]), rejected=torch.tensor([2]))
    one = DPO()(policy, ref, short, totals_of(policy, short)).metrics["margin"]
    two = DPO()(policy, ref, long, totals_of(policy, long)).metrics["margin"]
    assert two.item() == pytest.approx(2 * one.item())


def test_configs_are_frozen_and_strict():
    with pytest.raises(ValueError, match="frozen"):
        DPO().beta = 0.2  # type: ignore[misc]
    with pytest.raises(ValueError, match="Extra inputs"):
        DPO(bata=0.2)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="greater than 0"):
        DPO(beta=0.0)
