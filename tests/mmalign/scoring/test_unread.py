"""The last layer runs on the rows that are read, and nobody can tell from scores or gradients.

That packed rows equal padded ones, family by family, is in test_layouts.py and test_naive_step.py.
"""

from __future__ import annotations

import copy

import pytest
import torch

from mmalign.attention.choose import choose
from mmalign.config import validate
from mmalign.models.load import ModelConfig, Policy, base_model, load_policy
from mmalign.models.tiny import TinyModel
from mmalign.models.unread import skip_unread
from mmalign.records import user
from mmalign.scoring.candidates import Candidate, CandidateBatch
from mmalign.scoring.planner import planner_of
from mmalign.scoring.scorer import Scorer

PROMPT = "is it one of the things that were shown?"


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("tiny") / "model"
    TinyModel(output=str(path), family="qwen25vl").build()
    return str(path)


def load(path: str, **settings) -> Policy:
    return load_policy(validate({"path": path, **settings}, ModelConfig, "test"))


def scorer_of(policy: Policy) -> Scorer:
    config = policy.model.config.get_text_config()
    attention = choose("auto", policy.family, config, "cpu", torch.float32)
    return Scorer(policy.model, policy.family, attention)


def plan_of(policy: Policy, scorer: Scorer, *responses: str):
    prompt = user(PROMPT)
    condition = policy.preparer.condition(prompt, (), None)
    candidates = [
        Candidate(condition=0, response_ids=policy.preparer.response(prompt, text))
        for text in responses
    ]
    batch = CandidateBatch(conditions=[condition], candidates=candidates)
    return planner_of(policy, "shared_prefix", scorer.attention)(batch)


def gradients(policy: Policy) -> dict[str, torch.Tensor]:
    named = policy.model.named_parameters()
    return {name: p.grad.clone() for name, p in named if p.grad is not None}


def rows_of_the_last_mlp(policy: Policy) -> list[int]:
    """Fills with the number of rows that each call multiplies."""
    seen: list[int] = []
    layer = base_model(policy.model).get_decoder().layers[-1]
    layer.mlp.down_proj.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].shape[:-1].numel())
    )
    return seen


def test_what_nothing_reads_is_not_computed(path):
    policy = load(path)
    scorer, seen = scorer_of(policy), rows_of_the_last_mlp(policy)
    plan = plan_of(policy, scorer, "yes", "not at all, no")
    scorer(plan)
    prompt, responses = len(plan.input_ids[0]) - int(plan.mask.sum()), int(plan.mask.sum())
    # The prompt's last token predicts, and each response's last one may be rewarded.
    assert prompt > 5
    assert seen == [1 + responses]


def test_other_layouts_compute_every_row_even_after_a_packed_one(path):
    policy = load(path)
    scorer, seen = scorer_of(policy), rows_of_the_last_mlp(policy)
    scorer(plan_of(policy, scorer, "yes", "no"))
    ids = torch.tensor([policy.preparer.response(user(PROMPT), PROMPT)])
    policy.model(input_ids=ids)
    assert seen[1] == ids.shape[1]


def test_rewards_are_read_too(path):
    policy = load(path, reward_head={})
    scorer = scorer_of(policy)
    packed = plan_of(policy, scorer, "yes", "not at all, no")
    assert packed.tree is not None
    padded = planner_of(policy, "padded")(
        CandidateBatch(
            conditions=[policy.preparer.condition(user(PROMPT), (), None)],
            candidates=[
                Candidate(condition=0, response_ids=policy.preparer.response(user(PROMPT), text))
                for text in ("yes", "not at all, no")
            ],
        )
    )
    found, wanted = scorer(packed, rewards=True).rewards, scorer(padded, rewards=True).rewards
    assert torch.allclose(found, wanted, atol=1e-5)


def test_a_checkpointed_layer_runs_again_on_its_own_rows(path):
    plain = load(path)
    scorer = scorer_of(plain)
    scorer(plan_of(plain, scorer, "yes", "not at all, no")).sums().sum().backward()

    policy = load(path, gradient_checkpointing=True)
    scorer = scorer_of(policy).train()
    scores = scorer(plan_of(policy, scorer, "yes", "not at all, no"))
    # Another batch, of which other rows are read, is scored before the first one's backward pass.
    scorer(plan_of(policy, scorer, "yes"))
    scores.sums().sum().backward()
    wanted, found = gradients(plain), gradients(policy)
    assert wanted.keys() == found.keys()
    for name, gradient in wanted.items():
        assert torch.allclose(found[name], gradient, atol=1e-6), name


def test_a_copy_calls_its_own_weights(path):
    policy = load(path)
    scorer = scorer_of(policy)
    plan = plan_of(policy, scorer, "yes", "no")
    before = scorer(plan).sums()
    copied = copy.deepcopy(policy.model)
    skip_unread(base_model(copied).get_decoder())  # Twice does it once.
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "layers.1.mlp" in name or "o_proj" in name:
                parameter.mul_(3)
    assert not torch.allclose(scorer(plan).sums(), before)
    assert torch.equal(Scorer(copied, policy.family, scorer.attention)(plan).sums(), before)


def test_a_layer_of_other_parts_is_left_alone():
    decoder = torch.nn.Module()
    decoder.layers = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    skip_unread(decoder)
    assert "forward" not in vars(decoder.layers[0])
