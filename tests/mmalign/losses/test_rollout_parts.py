"""What losses over rollouts are made of: advantages, rewards, estimates of the KL."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmalign.errors import ConfigError, TrainingError
from mmalign.losses.rollout import DAPO, GRPO, GSPO, DrGRPO, informative, k3, overlong_penalty
from mmalign.scores import RolloutTable, RolloutTotals, TokenScores

KINDS = [GRPO, DrGRPO, DAPO, GSPO]
every_loss = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


# Advantages and rewards


def test_advantages_have_the_unbiased_standard_deviation():
    # {1, 0}: mean 1/2, std sqrt(1/4 + 1/4) = 0.7071. {1, 0, 0, 0}: mean 1/4, std 1/2.
    assert GRPO().advantages(torch.tensor([[1.0, 0.0]])).tolist() == [
        pytest.approx([0.70711, -0.70711], abs=1e-5)
    ]
    found = GRPO().advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 2.0, 0.0]]))
    assert found[0].tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=1e-5)
    assert found[1].tolist() == pytest.approx([-0.5, -0.5, 1.5, -0.5], abs=1e-5)
    assert found.dtype == torch.float32


def test_dr_grpo_divides_by_no_standard_deviation():
    found = DrGRPO().advantages(torch.tensor([[1, 0, 0, 0]]))
    assert found.tolist() == [[0.75, -0.25, -0.25, -0.25]]


@pytest.mark.parametrize("kind", [DAPO, GSPO])
def test_dapo_and_gspo_have_the_advantages_of_grpo(kind):
    rewards = torch.tensor([[1.5, 0.0, 0.5], [0.0, 0.5, 0.5]])
    assert kind().advantages(rewards).equal(GRPO().advantages(rewards))


REWARDS = st.lists(st.floats(-10, 10, width=32), min_size=2, max_size=9)


@given(REWARDS, st.randoms(use_true_random=False))
def test_advantages_add_up_to_nothing_and_follow_their_rollouts(rewards, random):
    order = list(range(len(rewards)))
    random.shuffle(order)
    for loss in (GRPO(), DrGRPO()):
        found = loss.advantages(torch.tensor([rewards]))
        assert found.sum().item() == pytest.approx(0, abs=1e-4)
        turned = loss.advantages(torch.tensor([rewards])[:, order])
        assert torch.allclose(turned, found[:, order], atol=1e-4)


@given(st.floats(-1e6, 1e6, width=32), st.integers(2, 9))
def test_equal_rewards_have_no_advantage_at_all(reward, num):
    rewards = torch.full((2, num), reward)
    for kind in KINDS:
        assert kind().advantages(rewards).eq(0).all()
    assert informative(rewards).tolist() == [False, False]


@given(st.floats(0.1, 10), st.floats(-5, 5))
def test_a_change_of_scale_leaves_grpo_alone_but_not_dr_grpo(scale, shift):
    rewards = torch.tensor([[1.5, 0.0, 0.5, 0.5]])
    changed = scale * rewards + shift
    for kind in (GRPO, DAPO, GSPO):
        assert torch.allclose(kind().advantages(changed), kind().advantages(rewards), atol=1e-4)
    assert torch.allclose(
        DrGRPO().advantages(changed), scale * DrGRPO().advantages(rewards), atol=1e-4
    )


@every_loss
def test_a_group_of_one_is_an_error(kind):
    with pytest.raises(TrainingError, match="a group of one rollout has no advantage; got 1"):
        kind().advantages(torch.tensor([[1.0], [0.0]]))


@every_loss
@pytest.mark.parametrize("reward", [math.nan, math.inf])
def test_a_reward_that_is_not_finite_is_an_error_that_names_it(kind, reward):
    rewards = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, reward]])
    with pytest.raises(TrainingError, match=r"group 1, rollout 2 of the step: a reward is not fin"):
        kind().advantages(rewards)


def test_informative_groups_are_those_whose_rewards_differ():
    rewards = torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0, 1.0], [0.5, 1.5, 0.5]])
    assert informative(rewards).tolist() == [False, False, True, True]


def test_the_overlong_penalty_is_linear_within_its_buffer():
    lengths = torch.tensor([1, 80, 85, 90, 100, 101, 500])
    found = overlong_penalty(lengths, max_tokens=100, buffer=20)
    assert found.tolist() == pytest.approx([0, 0, -0.25, -0.5, -1, -1, -1])
    for buffer in (0, -1, 101):
        with pytest.raises(ConfigError, match="no room to rise in"):
            overlong_penalty(lengths, max_tokens=100, buffer=buffer)


# Estimates of the KL


@given(st.floats(-100, 0, width=32), st.floats(-100, 0, width=32))
def test_k3_is_never_negative(one, other):
    assert k3(torch.tensor(one), torch.tensor(other)).item() >= 0


def test_k3_keeps_its_digits_near_zero():
    size = torch.logspace(-20, -1, 100_000, dtype=torch.float64)
    wide = torch.cat([size, -size]).float().double()
    found = k3(torch.zeros(()), wide.float()).double()
    assert (found >= 0).all()
    exact = torch.where(wide.abs() < 1e-3, wide**2 / 2 + wide**3 / 6, wide.expm1() - wide)
    assert ((found - exact).abs() <= 1e-7 * wide.abs() + 1e-30).all()


@given(st.floats(-100, 0, width=32))
def test_k3_is_zero_without_gradient_at_equality(logp):
    policy = torch.tensor(logp, requires_grad=True)
    found = k3(policy, torch.tensor(logp))
    found.backward()
    assert found.item() == policy.grad.item() == 0


def test_k3_pulls_as_its_derivative_says_far_beyond_a_value_of_10():
    """d/d logp = 1 - e^u: 1 - e^5 at u = 5, where the value is e^5 - 6 = 142."""
    policy = torch.tensor([-6.0, -1.0], requires_grad=True)
    found = k3(policy, torch.tensor([-1.0, -6.0]))
    found.sum().backward()
    assert found.tolist() == pytest.approx([math.exp(5) - 6, math.exp(-5) + 4])
    assert policy.grad.tolist() == pytest.approx([1 - math.exp(5), 1 - math.exp(-5)])


def test_kl_and_old_kl_are_exact_in_expectation_over_their_samples():
    """Each token of a vocabulary as a rollout, weighted by the probability of being sampled."""
    torch.manual_seed(1)
    policy, other = torch.randn(2, 6, dtype=torch.float64).log_softmax(-1)
    kl = (policy.exp() * (policy - other)).sum().item()
    assert (policy.exp() * k3(policy, other)).sum().item() == pytest.approx(kl)
    # Sampled by `other`, scored by `policy`: KL(other || policy).
    kl = (other.exp() * (other - policy)).sum().item()
    found, totals = 0.0, RolloutTotals(num_rollouts=1, num_tokens=1, max_tokens=1)
    for logp, old in zip(policy, other, strict=True):
        table = RolloutTable(
            advantages=torch.zeros(1), old_logps=old.reshape(1, 1), group=torch.tensor([0])
        )
        scores = TokenScores(logps=logp.reshape(1, 1), mask=torch.ones(1, 1, dtype=torch.bool))
        found += (old.exp() * GRPO()(scores, None, table, totals).metrics["old_kl"]).item()
    assert found == pytest.approx(kl)
