"""Generation continues where training would score, for every family, whatever stands beside it."""

import numpy as np
import pytest
import torch
from PIL import Image

from mmalign.generate.base import Request, Sampling
from mmalign.generate.local import LocalGenerator
from mmalign.media import embed
from mmalign.models.families import FAMILIES
from mmalign.models.load import ModelConfig, load_policy
from mmalign.models.tiny import TinyModel
from mmalign.records import Media, user
from mmalign.scoring.candidates import Candidate, CandidateBatch
from mmalign.scoring.planner import planner_of
from mmalign.scoring.scorer import Scorer

WORDS = ("what", "is", "this", "?", "and", "that", *(f"w{number}" for number in range(40)))


def picture(seed: int, width: int, height: int) -> Media:
    pixels = np.random.RandomState(seed).randint(0, 255, (height, width, 3), dtype=np.uint8)
    return embed(Image.fromarray(pixels))


@pytest.mark.parametrize("family", [family.name for family in FAMILIES])
def test_greedy_answers_are_the_likeliest_under_the_scorer(tmp_path, family):
    """Prompts of other lengths and pictures side by side, so all but one are padded on the left."""
    folder = TinyModel(output=str(tmp_path / family), family=family, words=WORDS).build()
    policy = load_policy(ModelConfig(path=str(folder)))
    tokenizer = policy.preparer.tokenizer
    banned = set(LocalGenerator(policy)._banned)
    odd = (banned | set(tokenizer.all_special_ids)) - {tokenizer.eos_token_id}
    # No odd token is ever the likeliest, so that a reply's text gives back its tokens.
    policy.model.get_output_embeddings().weight.data[sorted(odd)] = 0
    requests = [
        Request(id="long", prompt=user("what is this ? " * 9), images=()),
        Request(id="square", prompt=user("what is this ?", images=1), images=(picture(0, 32, 32),)),
        Request(id="wide", prompt=user("and that ?", images=1), images=(picture(1, 60, 20),)),
    ]
    replies = LocalGenerator(policy).generate(requests, Sampling(max_new_tokens=6))
    answers = [tokenizer(reply.text, add_special_tokens=False)["input_ids"] for reply in replies]
    assert [len(answer) for answer in answers] == [reply.num_tokens for reply in replies]
    assert all(answers)
    conditions = [policy.preparer.condition(r.prompt, r.images, None) for r in requests]
    assert len({len(condition.prompt_ids) for condition in conditions}) == 3
    candidates = [Candidate(condition=n, response_ids=ids) for n, ids in enumerate(answers)]
    batch = CandidateBatch(conditions=conditions, candidates=candidates)
    plan = planner_of(policy, "shared_prefix")(batch)
    with torch.no_grad():
        scores = Scorer(policy.model, policy.family)(plan, competitor=True)
    assert (scores.logps >= scores.competitor_logps - 1e-5)[scores.mask].all()
