"""Gemma 3 and PaliGemma write what their scores in training call likeliest."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from mmalign.attention.choose import MASKED, choose, sliding_window
from mmalign.generate.base import Request, Sampling
from mmalign.generate.local import LocalGenerator
from mmalign.media import embed
from mmalign.models.tiny import TinyModel
from mmalign.records import user
from mmalign.scoring.candidates import Candidate, CandidateBatch
from mmalign.scoring.plan import make_plan
from mmalign.scoring.scorer import Scorer


@pytest.fixture(scope="module", params=["gemma3", "paligemma"])
def generator(request, tmp_path_factory) -> LocalGenerator:
    path = tmp_path_factory.mktemp("tiny") / request.param
    TinyModel(output=str(path), family=request.param, seed=1).build()
    return LocalGenerator.from_checkpoint(str(path), batch_size=4)


def requests() -> list[Request]:
    """Prompts of unequal lengths, in one batch with padding on the left."""
    pixels = np.random.RandomState(0).randint(0, 255, (4, 32, 32, 3), dtype=np.uint8)
    images = [embed(Image.fromarray(one)) for one in pixels]
    return [
        Request(id="one", prompt=user("what is it?", images=1), images=(images[0],)),
        Request(
            id="long", prompt=user("and " * 12, images=1), images=(images[1],), prefill="It is"
        ),
        Request(id="two", prompt=user("compare", images=2), images=tuple(images[2:])),
        Request(id="none", prompt=user("no picture")),
    ]


@pytest.mark.parametrize("layout", ["padded", "shared_prefix", "packed"])
def test_greedy_tokens_are_the_likeliest_when_scored(generator, layout, monkeypatch):
    policy = generator.policy
    text_config = policy.model.config.get_text_config()
    attention = choose("auto", policy.family, text_config, "cpu", torch.float32)
    if layout == "packed" and not attention.packs:
        pytest.skip("this family's attention takes masks")
    written: dict[str, list[int]] = {}
    finish = generator._finish
    monkeypatch.setattr(
        generator,
        "_finish",
        lambda r, p, new: (written.update({r.id: p + new}), finish(r, p, new))[1],
    )
    monkeypatch.setattr(generator, "_banned", [policy.preparer.image_token_id])
    generator.generate(requests(), Sampling(max_new_tokens=16))
    prepared = [generator._prepare(request) for request in requests()]
    batch = CandidateBatch(
        conditions=[condition for condition, _ in prepared],
        candidates=[
            Candidate(condition=i, response_ids=written[request.id])
            for i, request in enumerate(requests())
        ],
    )
    plan = make_plan(
        batch,
        policy.family,
        "padded" if layout == "padded" else "shared_prefix",
        packed=layout == "packed",
        window=sliding_window(text_config),
        image_token_id=policy.preparer.image_token_id,
        video_token_id=None,
        pad_token_id=policy.preparer.pad_token_id,
    )
    scorer = Scorer(policy.model, policy.family, attention if layout == "packed" else MASKED)
    with torch.inference_mode():
        scores = scorer(plan, competitor=True)
    assert scores.competitor_logps is not None
    for row, (_, prefill) in enumerate(prepared):
        new = slice(len(prefill), len(batch.candidates[row].response_ids))
        margin = scores.logps[row, new] - scores.competitor_logps[row, new]
        assert len(margin) > 4
        assert margin.min() > -1e-5


def test_positions_start_where_the_model_counts_from(generator):
    """Also behind padding on the left, and in a start that is given."""
    seen: list[torch.Tensor] = []
    model = generator.policy.model.model.language_model
    hook = model.register_forward_pre_hook(
        lambda module, args, given: seen.append(given["position_ids"]), with_kwargs=True
    )
    generator.generate(requests(), Sampling(max_new_tokens=3))
    hook.remove()
    rows = [
        (len(condition.prompt_ids), len(prefill))
        for condition, prefill in map(generator._prepare, requests())
    ]
    first = generator.policy.family.first_position
    for row, (prompt, prefill) in enumerate(sorted(rows)):
        length = prompt + prefill
        assert seen[0][row, -length:].tolist() == list(range(first, first + length))
        assert [step[row, -1].item() for step in seen[1:]] == [first + length, first + length + 1]


def test_a_written_end_of_turn_ends_it(generator):
    end = generator.policy.preparer.end_token_id
    assert end in generator._end
    assert end not in generator._banned
    made = generator._finish(requests()[0], [], [70, end, 71])
    assert made.finished
    assert made.num_tokens == 1
