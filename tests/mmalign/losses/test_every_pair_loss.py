"""What must hold of every pair loss, whatever the numbers."""

import math
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmalign.losses import (
    DPO,
    IPO,
    MDPO,
    MMDPO,
    RDPO,
    RRPO,
    DPOWithKL,
    Hinge,
    MMDPOBatch,
    RationaleDPO,
    RDPOCompetitor,
    Robust,
    SoftLabels,
)
from mmalign.losses.base import totals_of
from mmalign.scores import LossOutput, PairTable, TokenScores

LOG_TWO = math.log(2)
NUM_PAIRS = 5
# Each with its terms' sum at the reference, but for the rationale's likelihood.
LOSSES = {
    DPO(): LOG_TWO,
    IPO(beta=0.25): 4.0,
    Hinge(): 1.0,
    RationaleDPO(rationale_weight=0.5): LOG_TWO,
    RDPO(visual_weight=0.5): 1.5 * LOG_TWO,
    RDPOCompetitor(): 2 * LOG_TWO,
    MDPO(): 3 * LOG_TWO,
    RRPO(alpha=0.3): LOG_TWO,
    DPOWithKL(alpha=0.3): LOG_TWO,
    MMDPO(w=0.7, gap_floor=-2.0): LOG_TWO,
    MMDPOBatch(kept_share=1.0): LOG_TWO,
    SoftLabels(): LOG_TWO,
    SoftLabels(of=IPO(beta=0.25)): 4.0,
    Robust(flip_rate=0.2): LOG_TWO,
    Robust(flip_rate=0.2, of=Hinge()): 1.0,
}
# Takes a statistic of the micro-batch, and draws by place in it.
BATCH = MMDPOBatch(sft_weight=0.5)
SFT_BY_RESPONSE = DPO(sft_weight=0.5, sft_mean="responses")


def name(loss) -> str:
    return f"{loss.name}-{loss.of.name}" if isinstance(loss, SoftLabels | Robust) else loss.name


every_loss = pytest.mark.parametrize("loss", LOSSES, ids=name)
few = settings(max_examples=15, deadline=None)
seeds = st.integers(0, 10**6)


class Batch:
    """Random scores of five pairs of a chosen, a rejected and a third candidate each.

    `scale` is that of the policy's log-ratios per token; 0 puts it at the reference.
    """

    def __init__(self, seed: int, scale: float = 0.5) -> None:
        generator = torch.Generator().manual_seed(seed)
        count, longest = 3 * NUM_PAIRS, 6
        lengths = torch.randint(1, longest + 1, (count,), generator=generator)
        lengths[0] = longest
        mask = torch.arange(longest)[None] < lengths[:, None]
        normal = [torch.randn(count, longest, generator=generator) for _ in range(4)]
        logps = -normal[0].abs() * mask
        marked = (torch.rand(count, longest, generator=generator) < 0.6) & mask
        marked[:, 0] = True
        rivals = -normal[2].abs() * mask
        self.reference = TokenScores(
            logps=logps, mask=mask, competitor_logps=rivals, marked=marked, kl=0.0 * logps
        )
        self.logps = (logps + scale * normal[1] * mask).requires_grad_()
        self.policy = replace(
            self.reference,
            logps=self.logps,
            competitor_logps=rivals + scale * normal[3] * mask,
            kl=scale * normal[3].square() * mask,
        )
        order = torch.randperm(count, generator=generator)
        self.table = PairTable(
            chosen=order[:NUM_PAIRS],
            rejected=order[NUM_PAIRS : 2 * NUM_PAIRS],
            contrast=order[2 * NUM_PAIRS :],
            rationale=order[2 * NUM_PAIRS :],
            score_gap=torch.randn(NUM_PAIRS, generator=generator),
            p_target=torch.rand(NUM_PAIRS, generator=generator),
            weight=torch.rand(NUM_PAIRS, generator=generator) + 0.5,
        )
        self.totals = totals_of(self.policy, self.table)

    def run(self, loss, table=None, policy=None, reference=None) -> tuple[LossOutput, torch.Tensor]:
        self.logps.grad = None
        policy, reference = policy or self.policy, reference or self.reference
        out = loss(policy, reference, table or self.table, self.totals)
        out.loss.backward(retain_graph=True)
        assert self.logps.grad is not None
        return out, self.logps.grad


def rows(table: PairTable, index: torch.Tensor) -> PairTable:
    columns = {f.name: getattr(table, f.name) for f in fields(table)}
    return PairTable(**{name: None if c is None else c[index] for name, c in columns.items()})


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-4, atol=1e-5)


@every_loss
@given(seed=seeds)
@few
def test_at_the_reference_the_value_is_known_and_the_gradient_finite(loss, seed):
    batch = Batch(seed, scale=0.0)
    out, gradient = batch.run(loss)
    wanted = torch.full((NUM_PAIRS,), LOSSES[loss])
    if isinstance(loss, RationaleDPO):
        sums, lengths = batch.reference.sums(), batch.reference.lengths()
        wanted = wanted - 0.5 * (sums / lengths)[batch.table.rationale]
    assert torch.allclose(out.per_item, wanted, atol=1e-5)
    assert gradient.isfinite().all()
    assert gradient[batch.table.chosen].abs().max() > 0


@every_loss
@given(seed=seeds)
@few
def test_the_other_label_is_the_negative_margin(loss, seed):
    batch = Batch(seed)
    here, there = batch.run(loss)[0], batch.run(loss, batch.table.swapped())[0]
    if isinstance(loss, RDPOCompetitor):  # Its margin in the log is the plain one.
        assert not same(here.loss, there.loss)
    assert same(here.metrics["margin"], -there.metrics["margin"])
    again = batch.run(loss, batch.table.swapped().swapped())[0]
    assert again.loss.item() == here.loss.item()


@pytest.mark.parametrize("loss", [*LOSSES, SFT_BY_RESPONSE], ids=name)
@given(seed=seeds, num_columns=st.integers(1, 5))
@few
def test_padding_changes_nothing(loss, seed, num_columns):
    """Whatever stands behind a response, marks and KL included, counts nothing."""
    batch = Batch(seed)
    out, gradient = batch.run(loss)

    def padded(scores: TokenScores, sign: float) -> TokenScores:
        def wider(values: torch.Tensor | None, fill: float) -> torch.Tensor:
            assert values is not None
            filled = torch.where(scores.mask, values, torch.full_like(values, fill))
            return torch.cat([filled, filled.new_full((len(values), num_columns), fill)], dim=1)

        return TokenScores(
            logps=wider(scores.logps, 7.0 * sign),
            mask=wider(scores.mask, False),
            competitor_logps=wider(scores.competitor_logps, 3.0 * sign),
            marked=wider(scores.marked, True),
            kl=wider(scores.kl, 5.0),
        )

    wide = batch.run(
        loss, policy=padded(batch.policy, 1.0), reference=padded(batch.reference, -1.0)
    )
    assert same(wide[0].loss, out.loss)
    assert same(wide[1], gradient)


@every_loss
@given(seed=seeds)
@few
def test_the_order_of_pairs_changes_nothing(loss, seed):
    batch = Batch(seed)
    order = torch.randperm(NUM_PAIRS, generator=torch.Generator().manual_seed(seed))
    out, gradient = batch.run(loss)
    moved, again = batch.run(loss, rows(batch.table, order))
    assert same(moved.per_item, out.per_item[order])
    assert same(moved.loss, out.loss)
    assert same(again, gradient)


@pytest.mark.parametrize(
    "loss",
    [loss for loss in LOSSES if not isinstance(loss, MMDPOBatch)]
    + [DPO(sft_weight=0.5), SFT_BY_RESPONSE, MDPO(sft_weight=0.5)]
    + [SoftLabels(of=MMDPO(sft_weight=0.5))],
    ids=name,
)
@given(seed=seeds, cut=st.integers(1, NUM_PAIRS - 1))
@few
def test_micro_batches_add_up(loss, seed, cut):
    batch = Batch(seed)
    whole, gradient = batch.run(loss)
    cuts = torch.arange(NUM_PAIRS).split([cut, NUM_PAIRS - cut])
    (one, first), (other, second) = (batch.run(loss, rows(batch.table, part)) for part in cuts)
    assert same(one.loss + other.loss, whole.loss)
    assert same(first + second, gradient)
    assert same(torch.cat([one.per_item, other.per_item]), whole.per_item)
    for metric, value in whole.metrics.items():
        assert same(one.metrics[metric] + other.metrics[metric], value), metric


@given(seed=seeds)
@few
def test_only_the_batch_statistic_depends_on_the_cut(seed):
    batch = Batch(seed, scale=3.0)
    whole = batch.run(BATCH)[0]
    parts = [batch.run(BATCH, rows(batch.table, part))[0] for part in torch.arange(5).split([2, 3])]
    assert not torch.equal(torch.cat([part.per_item for part in parts]), whole.per_item)


@every_loss
@given(seed=seeds, factor=st.floats(0, 8))
@few
def test_weights_multiply(loss, seed, factor):
    batch = Batch(seed)
    out, gradient = batch.run(loss)
    assert batch.table.weight is not None
    scaled, again = batch.run(loss, replace(batch.table, weight=factor * batch.table.weight))
    assert same(scaled.loss, factor * out.loss)
    assert same(again, factor * gradient)
    assert same(scaled.per_item, out.per_item)
    assert same(scaled.metrics["margin"], factor * out.metrics["margin"])
    # And pair by pair: the loss is the weighted sum of the terms over the pairs of the step.
    assert same(out.loss, (batch.table.weight * out.per_item).sum() / NUM_PAIRS)


@pytest.mark.parametrize("loss", [*LOSSES, BATCH], ids=name)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_margin_of_ten_thousand_stays_finite(loss, sign):
    batch = Batch(0)
    far = torch.zeros_like(batch.logps)
    far[batch.table.chosen, 0] = sign * 1.1e5  # beta is at least 0.1
    policy = replace(batch.policy, logps=batch.logps + far)
    out, gradient = batch.run(loss, policy=policy)
    assert abs(out.metrics["margin"].item()) > 1e4
    assert out.loss.isfinite()
    assert out.per_item.isfinite().all()
    assert gradient.isfinite().all()
