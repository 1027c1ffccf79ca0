"""On CUDA: both layouts agree, in float32 and under bfloat16 autocast, and generation runs."""

import pytest
import torch

from mmalign.generate.base import Request, Sampling
from mmalign.generate.local import LocalGenerator
from mmalign.models.load import ModelConfig, load_policy
from mmalign.models.tiny import TinyModel
from mmalign.records import user
from mmalign.scoring.candidates import Candidate, CandidateBatch
from mmalign.scoring.plan import make_plan
from mmalign.scoring.scorer import Scorer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]


@pytest.fixture(scope="module", params=["llava15", "qwen25vl"])
def path(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / request.param
    return TinyModel(output=str(folder), family=request.param).build()


@pytest.mark.parametrize(("autocast", "tolerance"), [(False, 1e-4), (True, 0.1)])
def test_layouts_agree_on_cuda(path, autocast, tolerance):
    policy = load_policy(ModelConfig(path=str(path)))
    policy.model.to("cuda")
    conditions = [policy.preparer.condition(user(text), (), None) for text in ("a", "longer one")]
    candidates = [
        Candidate(condition=place, response_ids=policy.preparer.response(user("a"), text))
        for place, text in ((0, "yes"), (0, "a dog"), (1, "no"))
    ]
    batch = CandidateBatch(conditions=conditions, candidates=candidates)
    sums = []
    for layout in ("padded", "shared_prefix"):
        plan = make_plan(
            batch,
            policy.family,
            layout,
            image_token_id=policy.preparer.image_token_id,
            video_token_id=policy.preparer.video_token_id,
            pad_token_id=policy.preparer.tokenizer.pad_token_id,
        ).to("cuda")
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
            scores = Scorer(policy.model, policy.family)(plan)
        assert scores.logps.dtype == torch.float32
        sums.append(scores.sums())
    assert torch.allclose(*sums, atol=tolerance)


def test_generation_runs_on_cuda(path):
    generator = LocalGenerator.from_checkpoint(str(path))
    assert next(generator.policy.model.parameters()).is_cuda
    made = generator.generate([Request(id="x", prompt=user("hi"))], Sampling(max_new_tokens=4))
    assert made[0].num_tokens <= 4
