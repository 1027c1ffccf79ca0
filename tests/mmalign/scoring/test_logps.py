"""Chunked log-probabilities against the plain ones."""

import pytest
import torch

from mmalign.scoring.logps import token_logps


@pytest.mark.parametrize("chunk_elements", [1, 7 * 50, 10**9])
def test_chunks_give_the_plain_log_softmax_and_its_gradient(chunk_elements):
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 50)
    targets = torch.randint(50, (23,))
    results = []
    for chunked in (False, True):
        hidden = torch.randn(23, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
        head.zero_grad()
        if chunked:
            logps, rivals = token_logps(
                head, hidden, targets, vocab_size=50, competitor=True,
                chunk_elements=chunk_elements,
            )  # fmt: skip
        else:
            full = head(hidden).log_softmax(-1)
            logps = full.gather(-1, targets[:, None]).squeeze(-1)
            others = full.clone().scatter(-1, targets[:, None], float("-inf"))
            rivals = others.max(-1).values
        (logps.sum() + 0.3 * rivals.sum()).backward()
        results.append((logps.detach(), rivals.detach(), hidden.grad, head.weight.grad.clone()))
    for plain, chunked in zip(*results, strict=True):
        assert torch.allclose(plain, chunked, atol=1e-5)


def test_low_precision_states_give_float32_logps():
    head = torch.nn.Linear(8, 11).to(torch.bfloat16)
    hidden = torch.randn(3, 8, dtype=torch.bfloat16)
    logps, none = token_logps(head, hidden, torch.tensor([1, 2, 3]), vocab_size=11)
    assert logps.dtype == torch.float32
    assert none is None


def test_competitor_of_the_top_token_is_at_most_log_half():
    """Where the label is the likeliest token, the runner-up cannot pass -log 2."""
    logits = torch.randn(40, 9, generator=torch.Generator().manual_seed(0))
    top = logits.argmax(-1)
    _, rivals = token_logps(lambda x: x, logits, top, vocab_size=9, competitor=True)
    assert (rivals <= -torch.log(torch.tensor(2.0)) + 1e-6).all()
    # For another label than the top one, the competitor is the top one, whichever the label.
    others = (top + 1) % 9, (top + 2) % 9
    values = [token_logps(lambda x: x, logits, t, vocab_size=9, competitor=True)[1] for t in others]
    assert torch.equal(*values)


@pytest.mark.parametrize("chunk_elements", [7 * 50, 10**9])
def test_gradients_written_over_the_logits_are_the_plain_ones(chunk_elements):
    head = torch.nn.Linear(16, 50)
    hidden = torch.randn(23, 16).requires_grad_()
    targets = torch.randint(50, (23,))
    weights = torch.randn(23)
    plain = head(hidden).log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    leaves = (hidden, head.weight, head.bias)
    wanted = torch.autograd.grad((plain * weights).sum(), leaves)
    logps, _ = token_logps(head, hidden, targets, vocab_size=50, chunk_elements=chunk_elements)
    assert torch.allclose(logps, plain, atol=1e-6)
    found = torch.autograd.grad((logps * weights).sum(), leaves)
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_a_second_backward_pass_over_spent_logits_is_refused():
    hidden = torch.randn(3, 4).requires_grad_()
    targets = torch.tensor([0, 1, 2])
    logps, _ = token_logps(torch.nn.Linear(4, 5), hidden, targets, vocab_size=5)
    logps.sum().backward(retain_graph=True)
    with pytest.raises(AssertionError, match="overwritten"):
        logps.sum().backward()
