"""A step as the trainer takes it against the naive one: loss and gradients, 1e-5 relative.

The naive step runs every response in a row of its own through the model's own forward, takes the
log-softmax of whole logits, and hands the loss what it finds there.
"""

import copy

import numpy as np
import pytest
import torch
from PIL import Image

from mmalign.attention.choose import choose
from mmalign.losses import (
    DPO,
    IPO,
    MDPO,
    MMDPO,
    RDPO,
    RRPO,
    SFT,
    DPOWithKL,
    Hinge,
    MMDPOBatch,
    RationaleDPO,
    RDPOCompetitor,
    Robust,
    SoftLabels,
)
from mmalign.losses.base import Need, totals_of
from mmalign.media import embed
from mmalign.models.families import FAMILIES
from mmalign.models.load import ModelConfig, Policy, TrainParts, load_policy
from mmalign.models.tiny import TinyModel
from mmalign.records import user
from mmalign.scores import PairTable, TokenScores
from mmalign.scoring.candidates import Candidate, CandidateBatch, Condition
from mmalign.scoring.plan import joined
from mmalign.scoring.planner import planner_of
from mmalign.scoring.scorer import Scorer

LOSSES = [
    SFT(), DPO(sft_weight=0.5), IPO(beta=0.25), Hinge(), RationaleDPO(), RDPO(), RDPOCompetitor(),
    MDPO(), RRPO(alpha=0.3), DPOWithKL(alpha=0.3), MMDPO(w=0.7), MMDPOBatch(kept_share=1.0),
    SoftLabels(), Robust(flip_rate=0.2),
]  # fmt: skip
TEXTS = (("red", "not red"), ("two", "one"))


def picture(seed: int, width: int, height: int):
    pixels = np.random.RandomState(seed).randint(0, 255, (height, width, 3), dtype=np.uint8)
    return embed(Image.fromarray(pixels))


def policy_of(folder, family: str) -> Policy:
    path = str(TinyModel(output=str(folder / family), family=family).build())
    return load_policy(ModelConfig(path=path, train=TrainParts(vision=True, projector=True)))


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> Policy:
    return policy_of(tmp_path_factory.mktemp("tiny"), "llava15")


def batch_of(policy: Policy) -> tuple[CandidateBatch, PairTable]:
    """Two pairs: chosen and rejected, chosen under another picture, and a rationale."""
    conditions, candidates = [], []
    for number, (chosen, rejected) in enumerate(TEXTS):
        prompt = user("What?" * (number + 1), images=1)
        for place, texts in enumerate(((chosen, rejected), (chosen,), ("so",))):
            shown = picture(2 * number + (place == 1), 32, 32 - 8 * number)
            name = f"row-{number}-{place}"
            conditions.append(policy.preparer.condition(prompt, [shown], None, id=name))
            for text in texts:
                ids = policy.preparer.response(prompt, text)
                marked = [index % 3 > 0 for index in range(len(ids))]
                candidates.append(
                    Candidate(condition=len(conditions) - 1, response_ids=ids, marked=marked)
                )
    first = torch.tensor([0, 4])
    table = PairTable(
        chosen=first,
        rejected=first + 1,
        contrast=first + 2,
        rationale=first + 3,
        score_gap=torch.tensor([0.5, 1.5]),
        p_target=torch.tensor([1.0, 0.8]),
        weight=torch.tensor([1.0, 0.5]),
    )
    return CandidateBatch(conditions=conditions, candidates=candidates), table


def naive_logits(policy: Policy, condition: Condition, response: list[int]) -> torch.Tensor:
    ids = torch.tensor([condition.prompt_ids + response])
    inputs = {
        name: joined(name, [image.inputs[name] for image in condition.images])
        for name in policy.family.image_inputs
    }
    if policy.family.token_types is not None:
        kinds = (ids == policy.preparer.image_token_id).int()
        is_response = torch.arange(ids.shape[1])[None] >= len(condition.prompt_ids)
        inputs |= policy.family.token_types(kinds, is_response)
    logits = policy.model(input_ids=ids, **inputs).logits[0]
    return logits[len(condition.prompt_ids) - 1 : -1].log_softmax(-1)


def naive_scores(policy: Policy, batch: CandidateBatch, mask, against=None, kl_of=()):
    """TokenScores from whole logits, and the logits; with `against`, the KL to those."""
    columns = {"logps": [], "competitor_logps": [], "marked": [], "kl": []}
    kept = []
    for number, candidate in enumerate(batch.candidates):
        logits = naive_logits(policy, batch.conditions[candidate.condition], candidate.response_ids)
        target = torch.tensor(candidate.response_ids)[:, None]
        kl = torch.zeros(len(target))
        if against is not None and number in kl_of:
            theirs = against[number].detach()
            kl = (theirs.exp() * (theirs - logits)).sum(-1)
        kept.append(logits)
        others = logits.scatter(-1, target, float("-inf")).max(-1).values
        marked = torch.tensor(candidate.marked)
        for name, value in zip(
            columns, (logits.gather(-1, target)[:, 0], others, marked, kl), strict=True
        ):
            missing = value.new_zeros(mask.shape[1] - len(value))
            columns[name].append(torch.cat([value, missing]))
    return TokenScores(mask=mask, **{n: torch.stack(v) for n, v in columns.items()}), kept


def moved(policy: Policy) -> Policy:
    """Another policy near by, for a reference that differs."""
    model = copy.deepcopy(policy.model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.02 * parameter.std(correction=0) * noise)
    return Policy(model=model, preparer=policy.preparer, family=policy.family)


def step_of(policy: Policy, reference: Policy, loss) -> tuple[float, torch.Tensor]:
    """Loss and gradients by scorer, planner and attention as training chooses them."""
    config = policy.model.config.get_text_config()
    attention = choose("auto", policy.family, config, "cpu", torch.float32)
    batch, table = batch_of(policy)
    plan = planner_of(policy, "shared_prefix", attention)(batch)
    asked = {"competitor": Need.COMPETITOR in loss.needs}
    kl = Need.KL in loss.needs
    policy.model.zero_grad()
    with torch.no_grad():
        frozen = Scorer(reference.model, policy.family, attention)(plan, **asked, distributions=kl)
    scores = Scorer(policy.model, policy.family, attention)(
        plan, **asked, against=frozen.distributions, kl_of=table.chosen if kl else None
    )
    output = loss(scores, frozen, table, totals_of(scores, table))
    output.loss.backward()
    return output.loss.item(), gradient(policy)


def naive_step(policy: Policy, reference: Policy, loss) -> tuple[float, torch.Tensor]:
    batch, table = batch_of(policy)
    lengths = [len(c.response_ids) for c in batch.candidates]
    mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    policy.model.zero_grad()
    with torch.no_grad():
        frozen, against = naive_scores(reference, batch, mask)
    scores, _ = naive_scores(policy, batch, mask, against, table.chosen.tolist())
    output = loss(scores, frozen, table, totals_of(scores, table))
    output.loss.backward()
    return output.loss.item(), gradient(policy)


def gradient(policy: Policy) -> torch.Tensor:
    parameters = policy.model.parameters()
    return torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]).clone()


def check(policy: Policy, loss) -> None:
    reference = moved(policy)
    wanted, wanted_gradient = naive_step(policy, reference, loss)
    found, found_gradient = step_of(policy, reference, loss)
    assert found == pytest.approx(wanted, rel=1e-5)
    error = (found_gradient - wanted_gradient).norm() / wanted_gradient.norm()
    assert error <= 1e-5
    assert wanted_gradient.norm() > 0


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_every_loss(llava, loss):
    check(llava, loss)


@pytest.mark.parametrize("family", [family.name for family in FAMILIES])
def test_every_family(tmp_path, family):
    policy = policy_of(tmp_path, family)
    for loss in (RDPO(), RRPO(alpha=0.3)):
        check(policy, loss)
