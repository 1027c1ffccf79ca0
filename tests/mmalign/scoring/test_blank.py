"""The no-op visual input: the tower runs for every batch, and nothing else changes."""

import numpy as np
import pytest
import torch
from PIL import Image

from mmalign.clips import Clip
from mmalign.media import embed
from mmalign.models.families import FAMILIES
from mmalign.models.load import ModelConfig, Policy, TrainParts, load_policy
from mmalign.models.tiny import TinyModel
from mmalign.records import user
from mmalign.scoring.blank import NO_BLANK, blank_inputs
from mmalign.scoring.candidates import Candidate, CandidateBatch
from mmalign.scoring.planner import planner_of
from mmalign.scoring.scorer import Scorer

PICTURE = embed(Image.fromarray(np.random.RandomState(0).randint(0, 255, (32, 32, 3), np.uint8)))
CLIP = Clip(
    frames=np.random.RandomState(1).randint(0, 255, (4, 32, 32, 3), dtype=np.uint8),
    indices=(0, 1, 2, 3),
    timestamps=(0.0, 0.5, 1.0, 1.5),
    source_fps=2.0,
    num_source_frames=4,
    duration_seconds=2.0,
    key="clip",
)


@pytest.fixture(scope="module", params=[family.name for family in FAMILIES])
def policy(request, tmp_path_factory) -> Policy:
    path = tmp_path_factory.mktemp("tiny") / request.param
    TinyModel(output=str(path), family=request.param).build()
    train = TrainParts(vision=True, projector=True)
    return load_policy(ModelConfig(path=str(path), train=train))


def plan_of(policy: Policy, *kinds: str, layout="shared_prefix"):
    """One row of each kind: "text", "image" or "video"."""
    conditions, candidates = [], []
    for number, kind in enumerate(kinds):
        prompt = user("What is it?", images=kind == "image", videos=kind == "video")
        media = ([PICTURE] if kind == "image" else [], None)
        clips = [CLIP] if kind == "video" else []
        conditions.append(policy.preparer.condition(prompt, *media, videos=clips, id=kind))
        for response in ("A cat.", "Two dogs."):
            ids = policy.preparer.response(prompt, response)
            candidates.append(Candidate(condition=number, response_ids=ids))
    batch = CandidateBatch(conditions=conditions, candidates=candidates)
    return planner_of(policy, layout)(batch)


def scored(policy: Policy, plan, blank):
    policy.model.zero_grad()
    scores = Scorer(policy.model, policy.family, blank=blank)(plan)
    scores.sums().sum().backward()
    return scores.logps, {n: p.grad for n, p in policy.model.named_parameters()}


@pytest.mark.parametrize("layout", ["shared_prefix", "padded"])
def test_a_blank_changes_no_score_and_no_gradient_and_reaches_all_that_a_picture_does(
    policy: Policy, layout: str
):
    plan = plan_of(policy, "text", layout=layout)
    blank = blank_inputs(policy.preparer, images=True, videos=bool(policy.family.video_inputs))
    logps, grads = scored(policy, plan, NO_BLANK)
    same, filled = scored(policy, plan, blank)
    assert torch.equal(logps, same)
    for name, grad in grads.items():
        if grad is not None:
            assert torch.equal(grad, filled[name])
        elif filled[name] is not None:
            assert not filled[name].any()
    _, seen = scored(policy, plan_of(policy, "image", layout=layout), NO_BLANK)
    assert [n for n in seen if seen[n] is not None and filled[n] is None] == []


@pytest.mark.parametrize("layout", ["shared_prefix", "padded"])
def test_the_tower_runs_equally_often_whatever_a_batch_holds(policy: Policy, layout: str):
    clips = bool(policy.family.video_inputs)
    kinds = ["text", "image", *["video"] * clips]
    batches = [[kind] for kind in kinds] + [kinds]
    scorer = Scorer(
        policy.model,
        policy.family,
        blank=blank_inputs(policy.preparer, images=True, videos=clips),
    )
    tower = policy.model.get_submodule(f"model.{policy.family.vision}")
    calls = []
    handle = tower.register_forward_hook(lambda *_: calls.append(1))
    counts = []
    for batch in batches:
        scorer(plan_of(policy, *batch, layout=layout))
        counts.append(len(calls))
        calls.clear()
    handle.remove()
    assert counts == [1 + clips] * len(batches)
