"""RRPO against the method's hand numbers, its limits, and the KL in the scorer's chunks."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mmalign.losses import DPO, RRPO, DPOWithKL
from mmalign.losses.base import totals_of
from mmalign.scores import PairTable, TokenScores
from mmalign.scoring.logps import token_logps, token_logps_and_kl

# Vocabulary of 3, three response positions, targets 0, 1, 2 on both sides, reference logits 0.
CHOSEN = [[1.0, 0, 0], [0, 2, 0], [0, 0, 1]]
REJECTED = [[1.0, 0, 0], [0, 1, 0], [0, 0, -1]]
MARKED = torch.tensor([[False, True, True], [False, True, False]])
TABLE = PairTable(chosen=torch.tensor([0]), rejected=torch.tensor([1]))
TARGETS = torch.tensor([0, 1, 2, 0, 1, 2])


def scored(logits: torch.Tensor, marked: torch.Tensor = MARKED) -> TokenScores:
    """Scores of [2, 3, 3] logits against a reference whose logits are 0."""
    logps, kl = token_logps_and_kl(
        nn.Identity(),
        logits.reshape(6, 3),
        TARGETS,
        reference_head=nn.Identity(),
        reference_hidden=torch.zeros(6, 3),
        vocab_size=3,
    )
    mask = torch.ones(2, 3, dtype=torch.bool)
    kl = kl.view(2, 3) * torch.tensor([[1.0], [0.0]])
    return TokenScores(logps=logps.view(2, 3), mask=mask, marked=marked, kl=kl)


def policy_logits() -> torch.Tensor:
    return torch.tensor([CHOSEN, REJECTED]).requires_grad_()


REFERENCE = scored(torch.zeros(2, 3, 3))


def loss_of(loss, logits, marked=MARKED):
    return loss(scored(logits, marked), REFERENCE, TABLE, totals_of(REFERENCE, TABLE))


def test_the_methods_numeric_vector():
    out = loss_of(RRPO(beta=0.5, alpha=0.05), policy_logits())
    # u = 0.5 (0.859068 + 0.547168 - 0.547168); -log sigmoid(u) = 0.501268
    assert out.metrics["margin"].item() == pytest.approx(0.429534, abs=1e-6)
    assert out.metrics["kl"].item() == pytest.approx(0.713264, abs=1e-6)
    assert out.loss.item() == pytest.approx(0.536931, abs=1e-6)


def test_gradients_are_the_analytic_ones():
    logits = policy_logits()
    loss_of(RRPO(beta=0.5, alpha=0.05), logits).loss.backward()
    wanted = [
        [
            [0.012139, -0.006070, -0.006070],
            [0.009653, -0.019306, 0.009653],
            [0.035708, 0.035708, -0.071416],
        ],
        [[0, 0, 0], [-0.041778, 0.083555, -0.041778], [0, 0, 0]],
    ]
    assert torch.allclose(logits.grad, torch.tensor(wanted), atol=2e-6)
    # alpha (P - Q) at the unmarked chosen token, exactly nothing at unmarked rejected ones
    p = torch.tensor(CHOSEN[0]).softmax(-1)
    assert torch.allclose(logits.grad[0, 0], 0.05 * (p - 1 / 3), atol=1e-7)
    assert logits.grad[1, 0].abs().max() == 0


def test_the_kl_is_forward():
    kl = scored(policy_logits()).kl[0].tolist()
    assert kl == pytest.approx([0.119499, 0.474266, 0.119499], abs=1e-6)
    # the reverse KL of the same logits sums to 0.679609
    assert sum(kl) != pytest.approx(0.679609, abs=1e-3)


def test_without_kl_and_with_everything_marked_it_is_dpo_bit_for_bit():
    everything = torch.ones(2, 3, dtype=torch.bool)
    results = []
    for loss in (RRPO(beta=0.5, alpha=0.0, sft_weight=0.5), DPO(beta=0.5, sft_weight=0.5)):
        logits = policy_logits()
        out = loss_of(loss, logits, everything)
        out.loss.backward()
        results.append((out.loss.item(), logits.grad.tolist()))
    assert results[0] == results[1]
    # DPO on this data: z = 0.811225
    assert loss_of(DPO(beta=0.5), policy_logits()).metrics["margin"].item() == pytest.approx(
        0.811225, abs=1e-6
    )
    assert loss_of(DPO(beta=0.5), policy_logits()).loss.item() == pytest.approx(0.367634, abs=1e-6)


def test_dpo_with_kl_is_rrpo_with_everything_marked():
    everything = torch.ones(2, 3, dtype=torch.bool)
    one = loss_of(RRPO(beta=0.5, alpha=0.05), policy_logits(), everything)
    other = loss_of(DPOWithKL(beta=0.5, alpha=0.05), policy_logits())
    assert one.loss.item() == pytest.approx(other.loss.item(), abs=1e-7)


def test_at_the_reference_only_marked_tokens_move():
    logits = torch.zeros(2, 3, 3, requires_grad=True)
    out = loss_of(RRPO(beta=0.5, alpha=1.0), logits)
    assert out.loss.item() == pytest.approx(math.log(2), abs=1e-7)
    assert out.metrics["kl"].item() == 0
    out.loss.backward()
    moved = logits.grad.abs().sum(-1) > 0
    assert torch.equal(moved, MARKED)


def test_identical_responses_without_marks_give_log_two_and_no_gradient():
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    logits = torch.tensor([CHOSEN, CHOSEN]).requires_grad_()
    out = loss_of(RRPO(beta=0.5, alpha=0.0), logits, nothing)
    assert out.loss.item() == pytest.approx(math.log(2), abs=1e-7)
    out.loss.backward()
    assert logits.grad.abs().max() == 0


def test_a_mark_on_padding_counts_nothing():
    mask = torch.tensor([[True, True, False], [True, True, True]])
    policy = scored(policy_logits())
    cut = TokenScores(logps=policy.logps, mask=mask, marked=MARKED, kl=policy.kl)
    out = RRPO(beta=0.5, alpha=0.0)(cut, REFERENCE, TABLE, totals_of(cut, TABLE))
    assert out.metrics["margin"].item() == pytest.approx(0.5 * (0.859068 - 0.547168), abs=1e-6)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 10**6),
    st.integers(2, 40),
    st.integers(1, 17),
    st.floats(0, 30),
)
def test_kl_and_logps_equal_log_softmax_in_float64(seed, vocabulary, positions, spread):
    generator = torch.Generator().manual_seed(seed)
    ours, theirs = (torch.randn(positions, vocabulary, generator=generator) for _ in range(2))
    ours = (spread * ours).requires_grad_()
    targets = torch.randint(vocabulary, (positions,), generator=generator)
    logps, kl = token_logps_and_kl(
        nn.Identity(),
        ours,
        targets,
        reference_head=nn.Identity(),
        reference_hidden=theirs,
        vocab_size=vocabulary,
        chunk_elements=3 * vocabulary,
    )
    p, q = ours.detach().double().log_softmax(-1), theirs.double().log_softmax(-1)
    wanted = (q.exp() * (q - p)).sum(-1)
    scale = 1 + spread
    assert torch.allclose(kl.double(), wanted, atol=2e-6 * scale, rtol=1e-5)
    assert torch.allclose(logps.double(), p.gather(-1, targets[:, None])[:, 0], atol=2e-6 * scale)
    kl.sum().backward()
    assert torch.allclose(ours.grad.double(), p.exp() - q.exp(), atol=1e-5)


def test_probabilities_that_underflow_give_no_nan():
    ours = torch.tensor([[0.0, 1e4, -1e4], [0.0, 0.0, 0.0]]).requires_grad_()
    theirs = torch.tensor([[1e4, 0.0, -1e4], [200.0, 0.0, -200.0]])
    _, kl = token_logps_and_kl(
        nn.Identity(),
        ours,
        torch.tensor([0, 0]),
        reference_head=nn.Identity(),
        reference_hidden=theirs,
        vocab_size=3,
    )
    assert kl.tolist() == pytest.approx([1e4, math.log(3)], rel=1e-5)
    kl.sum().backward()
    assert ours.grad.isfinite().all()


@pytest.mark.parametrize("rows", [1, 2, 5, 100])
def test_chunks_change_nothing(rows):
    torch.manual_seed(0)
    head, old_head = nn.Linear(8, 11), nn.Linear(8, 11)
    hidden, old = torch.randn(13, 8), torch.randn(13, 8)
    targets = torch.randint(11, (13,))

    def run(elements):
        states = hidden.clone().requires_grad_()
        head.zero_grad()
        logps, kl = token_logps_and_kl(
            head, states, targets, reference_head=old_head, reference_hidden=old,
            vocab_size=11, chunk_elements=elements,
        )  # fmt: skip
        (logps.sum() + 0.3 * kl.sum()).backward()
        return logps, kl, states.grad, head.weight.grad.clone()

    for one, other in zip(run(2 * 11 * rows), run(10**6), strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    plain, _ = token_logps(head, hidden, targets, vocab_size=11)
    assert torch.allclose(plain, run(10**6)[0], atol=1e-6)
    assert old_head.weight.grad is None
