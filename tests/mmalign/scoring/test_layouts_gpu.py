"""On CUDA: layouts and kernels agree, in float32 and in bfloat16, and generation runs."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mmalign.attention.choose import MASKED, Attention, choose, heads_of, trial
from mmalign.generate.base import Request, Sampling
from mmalign.generate.local import LocalGenerator
from mmalign.media import embed
from mmalign.models.load import ModelConfig, Policy, load_policy
from mmalign.models.tiny import TinyModel, Tower
from mmalign.records import user
from mmalign.scoring.candidates import Candidate, CandidateBatch
from mmalign.scoring.planner import planner_of
from mmalign.scoring.scorer import Scorer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]

# Qwen3-VL's query heads share key heads, two and two; the others have as many of both.
FAMILIES = ("llava15", "qwen25vl", "qwen3vl")
KERNELS = ("flash", "flex", "xformers")
# Against float32 on the same weights: nats of a token, and of the gradient's length.
TOLERANCE = {torch.float32: (1e-3, 1e-3), torch.bfloat16: (0.1, 0.05)}


@pytest.fixture(scope="module", params=FAMILIES)
def path(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / request.param
    # Heads 32 wide, which every kernel takes.
    text = Tower(hidden=128, layers=3, heads=4, mlp=128)
    return TinyModel(output=str(folder), family=request.param, text=text).build()


@pytest.fixture
def policy(path, monkeypatch) -> Policy:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # the tower's first layer
    loaded = load_policy(ModelConfig(path=str(path)))
    loaded.model.to("cuda" if torch.cuda.is_available() else "cpu")
    return loaded


def make_batch(policy: Policy) -> CandidateBatch:
    """Unequal prompts, two of them with a picture; one, two and three unequal responses."""
    conditions, candidates = [], []
    for number, (text, responses) in enumerate(
        [("describe", ["a dog", "a longer one of them"]), ("what is it?", ["x"]), ("hi", ["b"] * 3)]
    ):
        pixels = np.random.RandomState(number).randint(0, 255, (32, 32, 3), dtype=np.uint8)
        media = [embed(Image.fromarray(pixels))] if number < 2 else []
        turn = user(text, images=len(media))
        conditions.append(policy.preparer.condition(turn, media, None, id=str(number)))
        for length, response in enumerate(responses):
            ids = policy.preparer.response(turn, response + " and so on" * length)
            candidates.append(Candidate(condition=number, response_ids=ids))
    return CandidateBatch(conditions=conditions, candidates=candidates)


def scored(
    policy: Policy, layout, attention: Attention = MASKED, *, autocast: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probabilities [N, T], and the gradient of their sum under unequal weights, as one row."""
    device = next(policy.model.parameters()).device.type
    plan = planner_of(policy, layout, attention)(make_batch(policy)).to(device)
    assert (plan.tree is not None) == (attention.packs and layout == "shared_prefix")
    policy.model.zero_grad()
    with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
        scores = Scorer(policy.model, policy.family, attention).train()(plan)
    assert scores.logps.dtype == torch.float32
    weights = torch.arange(1.0, len(scores.logps) + 1, device=device)
    weights[1::2] *= -1
    (scores.sums() * weights).sum().backward()
    gradients = [p.grad.flatten() for p in policy.model.parameters() if p.grad is not None]
    return scores.logps.detach(), torch.cat(gradients).clone()


def check(found: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    nats, share = TOLERANCE[dtype]
    assert float((found[0] - exact[0]).abs().max()) <= nats
    assert float((found[1] - exact[1]).norm()) <= share * float(exact[1].norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_under_masks_agree_with_padded_rows(policy, dtype):
    exact = scored(policy, "padded")
    for layout in ("padded", "shared_prefix"):
        check(scored(policy, layout, autocast=dtype == torch.bfloat16), exact, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_agree_with_padded_rows_in_float32(policy, kernel, dtype):
    """Scores and gradients; what `trial` refuses here is skipped with its reason."""
    config = policy.model.config.get_text_config()
    reason = trial(kernel, "cuda", dtype, heads_of(config))
    if reason is not None:
        pytest.skip(f"{kernel}: {reason}")
    exact = scored(policy, "padded")
    attention = choose(kernel, policy.family, config, "cuda", dtype)
    packed = scored(policy, "shared_prefix", attention, autocast=dtype == torch.bfloat16)
    check(packed, exact, dtype)


def test_auto_takes_a_kernel_that_packs_in_bf16(policy):
    config = policy.model.config.get_text_config()
    chosen = choose("auto", policy.family, config, "cuda", torch.bfloat16)
    refused = {name: trial(name, "cuda", torch.bfloat16, heads_of(config)) for name in KERNELS}
    assert chosen.packs, refused
    assert refused[chosen.name] is None


def test_shared_key_heads_are_among_what_is_tested(policy, path):
    heads = heads_of(policy.model.config.get_text_config())
    assert (heads.keys < heads.queries) == (path.name == "qwen3vl")


def test_generation_runs_on_cuda(path):
    generator = LocalGenerator.from_checkpoint(str(path))
    assert next(generator.policy.model.parameters()).is_cuda
    made = generator.generate([Request(id="x", prompt=user("hi"))], Sampling(max_new_tokens=4))
    assert made[0].num_tokens <= 4
