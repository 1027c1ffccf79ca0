"""Qwen3-VL's DeepStack: features of early tower layers enter early layers of the language model."""

import numpy as np
import pytest
import torch
from PIL import Image

from mmalign.attention.choose import MASKED, choose
from mmalign.media import embed
from mmalign.models.load import ModelConfig, Policy, TrainParts, load_policy
from mmalign.models.tiny import TinyModel
from mmalign.records import user
from mmalign.scoring.candidates import Candidate, CandidateBatch
from mmalign.scoring.planner import planner_of
from mmalign.scoring.scorer import Scorer

NOISE = np.random.RandomState(0)
PICTURES = [
    embed(Image.fromarray(NOISE.randint(0, 255, (height, width, 3), dtype=np.uint8)))
    for height, width in ((32, 32), (16, 40))
]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "qwen3vl"
    return TinyModel(output=str(folder), family="qwen3vl").build()


@pytest.fixture
def policy(path) -> Policy:
    return load_policy(ModelConfig(path=str(path), train=TrainParts(vision=True)))


def sums_and_gradients(policy: Policy, layout: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Summed log-probabilities, and the gradients of the DeepStack mergers.

    The second prompt shows the pictures the other way round, so their features are put in order.
    """
    conditions = [
        policy.preparer.condition(user(text, images=2), pictures, None)
        for text, pictures in (("which?", PICTURES), ("and now, which?", PICTURES[::-1]))
    ]
    candidates = [
        Candidate(condition=number, response_ids=policy.preparer.response(user("?"), text))
        for number in (0, 1)
        for text in ("this", "that one")
    ]
    attention = MASKED
    if layout == "packed":
        config = policy.model.config.get_text_config()
        attention = choose("auto", policy.family, config, "cpu", torch.float32)
        assert attention.packs
    planner = planner_of(policy, "padded" if layout == "padded" else "shared_prefix", attention)
    plan = planner(CandidateBatch(conditions=conditions, candidates=candidates))
    policy.model.zero_grad()
    sums = Scorer(policy.model, policy.family, attention)(plan).sums()
    (sums * torch.arange(1.0, 5.0)).sum().backward()
    mergers = policy.model.model.visual.deepstack_merger_list
    return sums.detach(), [parameter.grad.clone() for parameter in mergers.parameters()]


@pytest.mark.parametrize("layout", ["shared_prefix", "packed"])
def test_deepstack_reaches_the_language_model_in_every_layout(policy, layout):
    padded, gradients = sums_and_gradients(policy, "padded")
    shared, shared_gradients = sums_and_gradients(policy, layout)
    assert torch.allclose(shared, padded, atol=1e-5)
    assert len(policy.model.model.visual.deepstack_merger_list) == 2
    for gradient, other in zip(gradients, shared_gradients, strict=True):
        assert gradient.norm() > 0
        assert (gradient - other).norm() <= 1e-5 * gradient.norm()

    for merger in policy.model.model.visual.deepstack_merger_list:
        merger.linear_fc2.weight.data.zero_()
        merger.linear_fc2.bias.data.zero_()
    without, _ = sums_and_gradients(policy, "padded")
    assert ((without - padded).abs() > 1e-4).all()
    assert torch.allclose(sums_and_gradients(policy, layout)[0], without, atol=1e-5)
