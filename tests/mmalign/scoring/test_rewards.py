"""Rewards: where they are read, alike in both layouts, whatever stands beside them in a batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from mmalign.attention.choose import sliding_window
from mmalign.config import validate
from mmalign.media import embed
from mmalign.models.families import FAMILIES
from mmalign.models.load import ModelConfig, Policy, load_policy
from mmalign.models.tiny import TinyModel
from mmalign.records import user
from mmalign.scoring.candidates import Candidate, CandidateBatch
from mmalign.scoring.plan import Plan, make_plan
from mmalign.scoring.scorer import Scorer


@pytest.fixture(scope="module", params=[family.name for family in FAMILIES])
def policy(request, tmp_path_factory) -> Policy:
    path = tmp_path_factory.mktemp("tiny") / request.param
    TinyModel(output=str(path), family=request.param).build()
    return load_policy(validate({"path": str(path), "reward_head": {}}, ModelConfig, "test"))


ROWS = [("is it good?", ["yes", "not at all, no"]), ("a longer question, is it?", ["x"])]


@pytest.fixture(scope="module")
def batch(policy) -> CandidateBatch:
    """One condition with two critiques and one with another, each with a picture."""
    conditions, candidates = [], []
    for place, (text, critiques) in enumerate(ROWS):
        pixels = np.random.RandomState(place).randint(0, 255, (32, 32, 3), dtype=np.uint8)
        prompt = user(text, images=1)
        media = (embed(Image.fromarray(pixels)),)
        conditions.append(policy.preparer.condition(prompt, media, None))
        for critique in critiques:
            ids = policy.preparer.response(prompt, critique)
            candidates.append(Candidate(condition=place, response_ids=ids))
    return CandidateBatch(conditions=conditions, candidates=candidates)


def plan_of(policy: Policy, batch: CandidateBatch, layout) -> Plan:
    return make_plan(
        batch,
        policy.family,
        layout,
        window=sliding_window(policy.model.config.get_text_config()),
        image_token_id=policy.preparer.image_token_id,
        video_token_id=policy.preparer.video_token_id,
        pad_token_id=policy.preparer.pad_token_id,
    )


@pytest.mark.parametrize("layout", ["padded", "shared_prefix"])
def test_last_is_each_candidates_end_of_turn(policy, batch, layout):
    # Candidates of one condition stand in another order than in its row.
    order = [2, 1, 0]
    moved = CandidateBatch(
        conditions=batch.conditions, candidates=[batch.candidates[i] for i in order]
    )
    for one in (batch, moved):
        plan = plan_of(policy, one, layout)
        assert len(set(plan.last.tolist())) == 3
        ends = plan.input_ids.flatten()[plan.last]
        assert ends.tolist() == [policy.preparer.end_token_id] * 3


def test_layouts_agree_in_rewards_loss_and_gradients(policy, batch):
    found = []
    for layout in ("padded", "shared_prefix"):
        policy.model.zero_grad()
        scores = Scorer(policy.model, policy.family)(plan_of(policy, batch, layout), rewards=True)
        assert scores.rewards.dtype == torch.float32
        loss = (scores.rewards * torch.tensor([1.0, -2.0, 0.5])).sum() + 0.1 * scores.sums().sum()
        loss.backward()
        named = policy.model.named_parameters()
        gradients = {name: p.grad.clone() for name, p in named if p.grad is not None}
        found.append((scores.rewards.detach(), loss.item(), gradients))
    (padded, loss, gradients), (shared, shared_loss, shared_gradients) = found
    assert torch.allclose(padded, shared, atol=1e-5)
    assert shared_loss == pytest.approx(loss, rel=1e-5, abs=1e-5)
    assert "reward_head.score.bias" in gradients
    assert gradients.keys() == shared_gradients.keys()
    for name, gradient in gradients.items():
        difference = (gradient - shared_gradients[name]).norm()
        assert difference <= 1e-4 * max(1.0, float(gradient.norm())), name


@pytest.mark.parametrize("layout", ["padded", "shared_prefix"])
def test_padding_and_neighbours_change_nothing(policy, batch, layout):
    scorer = Scorer(policy.model, policy.family)
    together = scorer(plan_of(policy, batch, layout), rewards=True).rewards
    for place, candidate in enumerate(batch.candidates):
        alone = CandidateBatch(conditions=batch.conditions, candidates=[candidate])
        plan = plan_of(policy, alone, layout)
        # The longest candidate alone has no padding at all, the shortest of the batch has most.
        single = scorer(plan, rewards=True).rewards
        assert single.item() == pytest.approx(together[place].item(), abs=1e-5)


def test_rewards_alone_are_those_of_the_whole_forward(policy, batch):
    scorer, plan = Scorer(policy.model, policy.family), plan_of(policy, batch, "padded")
    assert torch.equal(scorer.rewards(plan), scorer(plan, rewards=True).rewards)
    assert scorer(plan).rewards is None


def test_the_reward_is_the_head_on_the_final_state(policy, batch):
    """From the model's own hidden states, by hand: w tanh(W h + b) + c."""
    candidate = batch.candidates[2]
    condition = batch.conditions[candidate.condition]
    ids = torch.tensor([condition.prompt_ids + candidate.response_ids])
    inputs = {name: condition.images[0].inputs[name] for name in policy.family.image_inputs}
    if policy.family.token_types is not None:
        kinds = (ids == policy.preparer.image_token_id).int()
        is_response = torch.arange(ids.shape[1])[None] >= len(condition.prompt_ids)
        inputs |= policy.family.token_types(kinds, is_response)
    with torch.no_grad():
        state = policy.model.model(input_ids=ids, **inputs).last_hidden_state[0, -1]
        head = policy.model.reward_head
        wanted = head.score.weight @ torch.tanh(head.dense.weight @ state + head.dense.bias)
        scores = Scorer(policy.model, policy.family)(plan_of(policy, batch, "padded"), rewards=True)
    assert scores.rewards[2].item() == pytest.approx(wanted.item(), abs=1e-5)


def test_rewards_stay_float32_under_autocast(policy, batch):
    scorer, plan = Scorer(policy.model, policy.family), plan_of(policy, batch, "padded")
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        narrow = scorer(plan, rewards=True).rewards
    assert narrow.dtype == torch.float32
    # Not a number that bfloat16 could hold: the head itself ran in 32 bits.
    assert not torch.equal(narrow, narrow.bfloat16().float())
