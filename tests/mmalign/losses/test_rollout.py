"""Losses over rollouts: values by hand, REINFORCE, clips, and what must change nothing."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from mmalign.losses.base import Need
from mmalign.losses.rollout import (
    DAPO,
    GRPO,
    GSPO,
    DrGRPO,
    RolloutLoss,
    clipped_surrogate,
    group_advantages,
)
from mmalign.scores import RolloutTable, RolloutTotals, TokenScores

KINDS = [GRPO, DrGRPO, DAPO, GSPO]
every_loss = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
LENGTHS = (3, 1, 2, 4)
TOTALS = RolloutTotals(num_rollouts=4, num_tokens=10, max_tokens=8)


def mask_of(lengths) -> torch.Tensor:
    return torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]


def rows(mask, values) -> torch.Tensor:
    return torch.where(mask, values, torch.zeros((), dtype=values.dtype))


def sampled(seed: int = 0, spread: float = 0.3, dtype=torch.float32):
    """Policy, reference and table of two groups of two rollouts, as far apart as `spread`."""
    generator = torch.Generator().manual_seed(seed)

    def noise():
        return torch.randn(4, 4, generator=generator, dtype=dtype)

    mask = mask_of(LENGTHS)
    old = rows(mask, -1 - noise().abs())
    policy = TokenScores(logps=rows(mask, old + spread * noise()).requires_grad_(), mask=mask)
    reference = TokenScores(logps=rows(mask, old + spread * noise()), mask=mask)
    advantages = group_advantages(torch.randn(2, 2, generator=generator, dtype=dtype)).flatten()
    table = RolloutTable(advantages=advantages, old_logps=old, group=torch.tensor([0, 0, 1, 1]))
    return policy, reference, table


def gradient(loss, policy, reference, table, totals=TOTALS):
    out = loss(policy, reference, table, totals)
    (found,) = torch.autograd.grad(out.loss, policy.logps)
    return out, found


# Values by hand


def by_hand():
    """Two rollouts: A = +1 with token ratios 1.1 and 1.5, A = -1 with the one ratio 0.5."""
    mask = mask_of((2, 1))
    old = rows(mask, torch.tensor([[-1.0, -2.0], [-0.5, 0.0]]))
    ratio = torch.tensor([[1.1, 1.5], [0.5, 1.0]])
    table = RolloutTable(
        advantages=torch.tensor([1.0, -1.0]), old_logps=old, group=torch.tensor([0, 0])
    )
    policy = TokenScores(logps=rows(mask, old + ratio.log()).requires_grad_(), mask=mask)
    return policy, table, RolloutTotals(num_rollouts=2, num_tokens=3, max_tokens=10)


@pytest.mark.parametrize(
    ("loss", "value"),
    [
        # Clips at 0.8 and 1.2: -(1.1 + 1.2) and -min(-0.5, -0.8) = 0.8.
        (GRPO(), (-(1.1 + 1.2) / 2 + 0.8) / 2),
        (DrGRPO(), (-(1.1 + 1.2) / 10 + 0.8 / 10) / 2),
        # Clips at 0.8 and 1.28; three tokens.
        (DAPO(), (-(1.1 + 1.28) + 0.8) / 3),
        # s = sqrt(1.1 * 1.5) = 1.2845 and 0.5.
        (GSPO(), (-1.0004 + 0.9997) / 2),
        (GSPO(clip_low=0.6, clip_high=0.5), (-math.sqrt(1.65) + 0.5) / 2),
    ],
    ids=["grpo", "dr_grpo", "dapo", "gspo", "gspo with wide clips"],
)
def test_values_by_hand(loss, value):
    policy, table, totals = by_hand()
    out = loss(policy, None, table, totals)
    assert out.loss.item() == pytest.approx(value, abs=1e-6)
    assert out.per_item.mean().item() == pytest.approx(value, abs=1e-6)
    assert not out.per_item.requires_grad


def test_metrics_by_hand():
    policy, table, totals = by_hand()
    metrics = GRPO()(policy, None, table, totals).metrics
    assert {name: value.item() for name, value in metrics.items()} == {
        "ratio": pytest.approx((1.1 + 1.5) / 2 + 0.5),
        "clipped_low": 1.0,
        "clipped_high": 0.5,
        "old_kl": pytest.approx((0.6 - math.log(1.1 * 1.5)) / 2 + (-0.5 + math.log(2)), abs=1e-6),
    }
    of_sequence = GSPO()(policy, None, table, totals).metrics
    assert of_sequence["ratio"].item() == pytest.approx(math.sqrt(1.65) + 0.5)
    assert of_sequence["clipped_high"].item() == of_sequence["clipped_low"].item() == 1.0
    assert of_sequence["old_kl"].equal(metrics["old_kl"])


@every_loss
def test_the_kl_is_added_with_its_weight(kind):
    policy, reference, table = sampled()
    plain = kind()(policy, None, table, TOTALS)
    out = kind(kl_weight=0.25)(policy, reference, table, TOTALS)
    u = (reference.logps - policy.logps).detach()
    sums = (u.exp() - u - 1).sum(-1)
    share = {
        GRPO: (sums / torch.tensor(LENGTHS)).mean(),
        DrGRPO: sums.sum() / (4 * 8),
        DAPO: sums.sum() / 10,
        GSPO: (sums / torch.tensor(LENGTHS)).mean(),
    }[kind]
    assert (out.loss - plain.loss).item() == pytest.approx(0.25 * share.item(), rel=1e-4)
    assert out.metrics["kl"].item() == pytest.approx((sums / torch.tensor(LENGTHS)).sum().item())
    assert "kl" not in plain.metrics


def test_twice_the_tokens_weigh_twice_only_where_they_should():
    def of(loss, length):
        mask = torch.ones(1, length, dtype=torch.bool)
        zeros = torch.zeros(1, length)
        table = RolloutTable(
            advantages=torch.tensor([-1.0]), old_logps=zeros, group=torch.tensor([0])
        )
        totals = RolloutTotals(num_rollouts=2, num_tokens=12, max_tokens=16)
        return loss(TokenScores(logps=zeros, mask=mask), None, table, totals).loss.item()

    assert (of(GRPO(), 4), of(GRPO(), 8)) == (0.5, 0.5)
    assert (of(GSPO(), 4), of(GSPO(), 8)) == (0.5, 0.5)
    assert (of(DrGRPO(), 4), of(DrGRPO(), 8)) == (4 / 32, 8 / 32)
    assert (of(DAPO(), 4), of(DAPO(), 8)) == (pytest.approx(4 / 12), pytest.approx(8 / 12))


# Gradients


@every_loss
def test_on_policy_the_gradient_is_that_of_reinforce(kind):
    """Through a policy of one softmax, whose rollouts are scored by itself."""
    mask = mask_of(LENGTHS)
    weights = {
        GRPO: [1 / 4 / n for n in LENGTHS],
        DrGRPO: [1 / 4 / 8] * 4,
        DAPO: [1 / 10] * 4,
        GSPO: [1 / 4 / n for n in LENGTHS],
    }[kind]
    torch.manual_seed(0)
    logits = torch.randn(5, requires_grad=True)
    tokens = torch.randint(5, (4, 4))
    logps = rows(mask, logits.log_softmax(-1)[tokens])
    loss = kind(dual_clip=3.0)
    advantages = loss.advantages(torch.tensor([[1.5, 0.5], [0.0, 1.0]])).flatten()
    table = RolloutTable(
        advantages=advantages, old_logps=logps.detach(), group=torch.tensor([0, 0, 1, 1])
    )
    out = loss(TokenScores(logps=logps, mask=mask), None, table, TOTALS)
    reinforce = -(torch.tensor(weights) * advantages * logps.sum(-1)).sum()
    (found,) = torch.autograd.grad(out.loss, logits, retain_graph=True)
    (wanted,) = torch.autograd.grad(reinforce, logits)
    assert torch.allclose(found, wanted, atol=1e-7)
    assert found.abs().max() > 0.01
    value = -sum(w * n * a for w, n, a in zip(weights, LENGTHS, advantages.tolist(), strict=True))
    assert out.loss.item() == pytest.approx(value, abs=1e-6)
    if kind in (GRPO, GSPO):
        assert out.loss.item() == pytest.approx(0, abs=1e-6)
    assert out.metrics["ratio"].item() == 4
    assert out.metrics["old_kl"].item() == 0


@every_loss
@pytest.mark.parametrize("spread", [0.0, 0.3])
def test_equal_rewards_have_no_loss_and_no_gradient(kind, spread):
    policy, _, table = sampled(spread=spread)
    equal = kind().advantages(torch.full((2, 2), 0.1)).flatten()
    out, found = gradient(kind(), policy, None, replace(table, advantages=equal))
    assert out.loss.item() == 0
    assert found.eq(0).all()
    assert out.metrics["clipped_low"].item() == out.metrics["clipped_high"].item() == 0


@every_loss
@pytest.mark.parametrize(
    ("advantage", "side", "clipped"),
    [(1.0, "above", True), (-1.0, "below", True), (1.0, "below", False), (-1.0, "above", False)],
)
def test_a_clipped_rollout_has_no_gradient(kind, advantage, side, clipped):
    """Just beyond a clip; on the other side of it the pull back is there, whatever the ratio."""
    loss = kind()
    for inside in (True, False):
        off = -1e-5 if inside else 1e-5
        ratio = 1 + loss.clip_high + off if side == "above" else 1 - loss.clip_low - off
        policy = TokenScores(
            logps=torch.full((1, 3), -1.0 + math.log(ratio), requires_grad=True),
            mask=torch.ones(1, 3, dtype=torch.bool),
        )
        table = RolloutTable(
            advantages=torch.tensor([advantage]),
            old_logps=torch.full((1, 3), -1.0),
            group=torch.tensor([0]),
        )
        out, found = gradient(loss, policy, None, table)
        beyond = clipped and not inside
        assert found.eq(0).all() == beyond
        assert (found * -advantage >= 0).all()
        shares = out.metrics["clipped_low"].item(), out.metrics["clipped_high"].item()
        assert shares == (float(beyond and side == "below"), float(beyond and side == "above"))


def test_the_dual_clip_bounds_the_loss_of_a_bad_token_alone():
    log_ratio = torch.tensor([1.5, 2.9, 3.1, 50.0]).log().requires_grad_()

    def of(advantage, dual_clip):
        advantages = torch.full((4,), advantage)
        loss = clipped_surrogate(log_ratio, advantages, low=0.2, high=0.2, dual_clip=dual_clip)
        (found,) = torch.autograd.grad(loss.sum(), log_ratio)
        return loss.tolist(), found.tolist()

    assert of(-2.0, 3.0)[0] == pytest.approx([3.0, 5.8, 6.0, 6.0])
    assert of(-2.0, 3.0)[1] == pytest.approx([3.0, 5.8, 0.0, 0.0])
    assert of(-2.0, None)[1] == pytest.approx([3.0, 5.8, 6.2, 100.0])
    assert of(2.0, 3.0) == of(2.0, None)


def test_the_share_of_dual_clipped_tokens_is_there_where_there_is_a_dual_clip():
    mask = torch.ones(1, 4, dtype=torch.bool)
    policy = TokenScores(logps=torch.tensor([[2.9, 3.1, 1.0, 0.1]]).log(), mask=mask)
    table = RolloutTable(
        advantages=torch.tensor([-1.0]), old_logps=torch.zeros(1, 4), group=torch.tensor([0])
    )
    assert GRPO(dual_clip=3.0)(policy, None, table, TOTALS).metrics["clipped_dual"].item() == 0.25
    assert "clipped_dual" not in GRPO()(policy, None, table, TOTALS).metrics


@every_loss
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_gradients_are_those_of_finite_differences(kind, seed):
    policy, reference, table = sampled(seed, spread=0.5, dtype=torch.float64)
    loss = kind(kl_weight=0.3, dual_clip=1.6, clip_low=0.2, clip_high=0.25)

    def of(logps):
        return loss(replace(policy, logps=logps), reference, table, TOTALS).loss

    assert torch.autograd.gradcheck(of, (policy.logps,))
    assert gradient(loss, policy, reference, table)[1].abs().max() > 1e-3


@every_loss
@pytest.mark.parametrize("nats", [50.0, -50.0, 1e4, -1e4])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_the_widest_log_ratios_stay_finite(kind, nats, advantage):
    mask = mask_of((3, 2))
    old = rows(mask, torch.full((2, 3), -60.0))
    policy = TokenScores(logps=rows(mask, old + nats).requires_grad_(), mask=mask)
    table = RolloutTable(
        advantages=torch.full((2,), advantage), old_logps=old, group=torch.tensor([0, 0])
    )
    reference = TokenScores(logps=old, mask=mask)
    for loss in (kind(kl_weight=1.0), kind(kl_weight=1.0, dual_clip=3.0)):
        out, found = gradient(loss, policy, reference, table)
        assert out.loss.isfinite()
        assert found.isfinite().all()
        assert all(value.isfinite() for value in out.metrics.values())


# Invariances


def whole(kind):
    return kind(kl_weight=0.1, dual_clip=2.0), *sampled(3)


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-5, atol=1e-7)


def taken(policy, reference, table, order, columns=slice(None)):
    """The rollouts of `order` alone, as another micro-batch has them."""

    def cut(scores):
        return TokenScores(
            logps=scores.logps[order][:, columns], mask=scores.mask[order][:, columns]
        )

    return (
        cut(policy),
        cut(reference),
        RolloutTable(
            advantages=table.advantages[order],
            old_logps=table.old_logps[order][:, columns],
            group=table.group[order],
        ),
    )


@every_loss
def test_padding_changes_nothing(kind):
    loss, policy, reference, table = whole(kind)
    out, found = gradient(loss, policy, reference, table)

    def padded(scores, filling):
        wide = torch.full((4, 3), filling)
        return TokenScores(
            logps=torch.cat([scores.logps.detach(), wide], 1).requires_grad_(),
            mask=torch.cat([scores.mask, torch.zeros(4, 3, dtype=torch.bool)], 1),
        )

    # Not even what lies in the padding, though it should be zero.
    for filling in (0.0, -7.0, -math.inf):
        old = torch.cat([table.old_logps, torch.full((4, 3), filling / 2)], 1)
        wide = replace(table, old_logps=old)
        other, slope = gradient(loss, padded(policy, filling), padded(reference, 1.0), wide)
        assert close(other.loss, out.loss)
        assert close(slope[:, :4], found)
        assert slope[:, 4:].eq(0).all()
        assert all(close(other.metrics[name], value) for name, value in out.metrics.items())


@every_loss
@pytest.mark.parametrize("parts", [[[0], [1], [2], [3]], [[0, 1], [2, 3]], [[0, 2, 3], [1]]])
def test_cutting_the_step_into_micro_batches_changes_nothing(kind, parts):
    loss, policy, reference, table = whole(kind)
    out, found = gradient(loss, policy, reference, table)
    value, slope, metrics = torch.zeros(()), torch.zeros_like(found), dict.fromkeys(out.metrics, 0)
    for part in parts:
        longest = max(LENGTHS[row] for row in part)
        cut = taken(policy, reference, table, part, slice(longest))
        share = loss(*cut, TOTALS)
        (of_all,) = torch.autograd.grad(share.loss, policy.logps)
        value, slope = value + share.loss, slope + of_all
        metrics = {name: metrics[name] + share.metrics[name] for name in metrics}
    assert close(value, out.loss)
    assert close(slope, found)
    assert all(close(metrics[name], value) for name, value in out.metrics.items())


@every_loss
def test_the_order_of_rollouts_and_groups_changes_nothing(kind):
    loss, policy, reference, table = whole(kind)
    out, found = gradient(loss, policy, reference, table)
    order = [2, 1, 3, 0]
    turned = taken(policy, reference, table, order)
    other = loss(*turned, TOTALS)
    (slope,) = torch.autograd.grad(other.loss, policy.logps)
    assert close(other.loss, out.loss)
    assert close(slope, found)
    assert close(other.per_item, out.per_item[order])


@every_loss
def test_a_rollout_without_tokens_adds_nothing(kind):
    loss, policy, reference, table = whole(kind)
    mask = policy.mask.clone()
    mask[1] = False
    out, found = gradient(loss, replace(policy, mask=mask), reference, table)
    assert out.per_item[1].item() == 0
    assert found[1].eq(0).all()
    rest = loss(*taken(policy, reference, table, [0, 2, 3]), TOTALS)
    assert close(out.loss, rest.loss)
    assert all(close(out.metrics[name], value) for name, value in rest.metrics.items())


@every_loss
def test_a_score_that_is_not_finite_shows_in_its_rollout(kind):
    policy, _, table = sampled()
    logps = policy.logps.detach().clone()
    logps[2, 1] = math.nan
    out = kind()(replace(policy, logps=logps), None, table, TOTALS)
    assert out.per_item.isfinite().tolist() == [True, True, False, True]


# Configs


def test_a_reference_is_needed_only_for_a_kl():
    for kind in KINDS:
        assert kind().needs == {Need.ROLLOUTS}
        assert kind(kl_weight=0.01).needs == {Need.ROLLOUTS, Need.REFERENCE}


def test_the_name_finds_the_loss():
    read = TypeAdapter(RolloutLoss).validate_python
    found = [read({"name": name}) for name in ("grpo", "dr_grpo", "dapo", "gspo")]
    assert found == [kind() for kind in KINDS]
    assert [(it.clip_low, it.clip_high) for it in found] == [
        (0.2, 0.2), (0.2, 0.2), (0.2, 0.28), (3e-4, 4e-4),
    ]  # fmt: skip


@every_loss
@pytest.mark.parametrize(
    "wrong", [{"clip_low": 0}, {"clip_low": 1.5}, {"clip_high": 0}, {"dual_clip": 1}, {"beta": 1}]
)
def test_a_setting_that_makes_no_sense_is_refused(kind, wrong):
    with pytest.raises(ValidationError):
        kind(**wrong)


def test_without_old_logps_the_policy_is_the_one_that_sampled():
    """Values and gradients are those of a table that holds the policy's own log-probabilities."""
    mask = torch.tensor([[True, True], [True, False]])
    results = []
    for given in (True, False):
        logps = torch.tensor([[-0.5, -1.0], [-2.0, 0.0]], requires_grad=True)
        policy = TokenScores(logps=logps, mask=mask)
        table = RolloutTable(
            advantages=torch.tensor([1.0, -1.0]),
            old_logps=logps.detach().clone() if given else None,
            group=torch.tensor([0, 0]),
        )
        totals = RolloutTotals(num_rollouts=2, num_tokens=3.0, max_tokens=4)
        for kind in KINDS:
            out = kind()(policy, None, table, totals)
            (grad,) = torch.autograd.grad(out.loss, logps)
            results.append((given, out.loss.item(), grad.tolist()))
    half = len(results) // 2
    assert [one[1:] for one in results[:half]] == [one[1:] for one in results[half:]]
