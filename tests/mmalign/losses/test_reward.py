"""Reward losses: the method's hand numbers, limits, and micro-batches."""

import math

import pytest
import torch

from mmalign.losses import CritiqueReward, Reward
from mmalign.losses.base import totals_of
from mmalign.scores import PairTable, TokenScores, Totals

TABLE = PairTable(chosen=torch.tensor([0]), rejected=torch.tensor([1]))


def scored(rewards, logps=None, mask=None) -> TokenScores:
    rewards = torch.as_tensor(rewards)
    n = len(rewards)
    logps = torch.zeros(n, 2) if logps is None else logps
    mask = torch.ones(n, 2, dtype=torch.bool) if mask is None else mask
    return TokenScores(logps=logps, mask=mask, rewards=rewards)


def value(loss, rewards, table=TABLE, **scores) -> float:
    made = scored(rewards, **scores)
    return loss(made, None, table, totals_of(made, table)).loss.item()


@pytest.mark.parametrize(
    ("rewards", "wanted"),
    [
        ([0.0, 0.0], 0.693147),
        ([2.0, 1.0], 0.313262 + 0.01 * 9),
        ([-1.0, 3.0], 4.018150 + 0.01 * 4),
        ([5.0, -5.0], 0.0000454 + 0.0),
    ],
)
def test_bradley_terry_with_centring(rewards, wanted):
    assert value(Reward(), rewards) == pytest.approx(wanted, abs=1e-6)


def test_a_constant_on_both_rewards_changes_the_centring_alone():
    plain = Reward(center=0.0)
    assert value(plain, [2.0, 1.0]) == pytest.approx(value(plain, [7.0, 6.0]), abs=1e-6)
    assert value(Reward(), [7.0, 6.0]) > value(Reward(), [2.0, 1.0])


def test_a_tie_is_the_squared_difference():
    tie = PairTable(
        chosen=torch.tensor([0]), rejected=torch.tensor([1]), p_target=torch.tensor([0.5])
    )
    found = value(Reward(center=0.0, tie_weight=2.0), [1.0, -0.5], tie)
    assert found == pytest.approx(2.0 * 1.5**2)


def test_labels_may_be_probabilities_and_reversed():
    def labelled(target: float) -> PairTable:
        return PairTable(
            chosen=torch.tensor([0]), rejected=torch.tensor([1]), p_target=torch.tensor([target])
        )

    certain, reversed_ = (value(Reward(), [2.0, 1.0], labelled(p)) for p in (1.0, 0.0))
    assert certain == value(Reward(), [2.0, 1.0])
    assert reversed_ == pytest.approx(value(Reward(), [1.0, 2.0]))
    soft = value(Reward(), [2.0, 1.0], labelled(0.8))
    assert soft == pytest.approx(0.8 * certain + 0.2 * reversed_)


def test_accuracy_counts_the_labels_side_and_a_tie_as_half():
    table = PairTable(
        chosen=torch.tensor([0, 2, 4, 6]),
        rejected=torch.tensor([1, 3, 5, 7]),
        p_target=torch.tensor([1.0, 1.0, 0.5, 0.0]),
    )
    made = scored([1.0, 0.0, 0.5, 0.5, 3.0, 1.0, -1.0, 2.0])
    out = Reward()(made, None, table, totals_of(made, table))
    # right; equal rewards, which is wrong; a tie; reversed and right
    assert out.metrics["accuracy"].item() == 1 + 0 + 0.5 + 1
    assert out.metrics["reward_margin"].item() == 1 + 0 + 2 - 3
    assert out.per_item.shape == (4,)


def test_critiques_add_their_token_means():
    logps = torch.tensor([[-1.0, -3.0], [-2.0, 0.0]])
    mask = torch.tensor([[True, True], [True, False]])
    both = value(CritiqueReward(critique_weight=0.5), [0.0, 0.0], logps=logps, mask=mask)
    # CE: (1 + 3) / 2 and 2 / 1
    assert both == pytest.approx(math.log(2) + 0.5 * (2.0 + 2.0), abs=1e-6)
    assert value(Reward(), [0.0, 0.0], logps=logps, mask=mask) == pytest.approx(math.log(2))


def test_gradients_have_the_right_signs():
    rewards = torch.tensor([0.3, 0.7], requires_grad=True)
    made = scored(rewards)
    Reward(center=0.0)(made, None, TABLE, totals_of(made, TABLE)).loss.backward()
    # d/dr_c = -sigmoid(r_r - r_c)
    wanted = 1 / (1 + math.exp(-0.4))
    assert rewards.grad.tolist() == pytest.approx([-wanted, wanted])


def test_micro_batches_add_up():
    rewards = torch.tensor([1.0, 0.2, -0.3, 0.9, 0.0, 0.0])
    logps = -torch.rand(6, 2, generator=torch.Generator().manual_seed(0))
    table = PairTable(
        chosen=torch.tensor([0, 2, 4]),
        rejected=torch.tensor([1, 3, 5]),
        p_target=torch.tensor([1.0, 1.0, 0.5]),
        weight=torch.tensor([1.0, 0.5, 2.0]),
    )
    loss = CritiqueReward()
    whole = scored(rewards, logps)
    totals = Totals(num_pairs=3, num_chosen_tokens=6)
    parts = [
        loss(
            whole,
            None,
            PairTable(
                chosen=table.chosen[i : i + 1],
                rejected=table.rejected[i : i + 1],
                p_target=table.p_target[i : i + 1],
                weight=table.weight[i : i + 1],
            ),
            totals,
        ).loss.item()
        for i in range(3)
    ]
    assert sum(parts) == pytest.approx(loss(whole, None, table, totals).loss.item(), abs=1e-6)
