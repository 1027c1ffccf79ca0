"""Clips in prompts: tokens, positions and both layouts, for every family that takes them."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.video_utils import VideoMetadata

from mmalign.clips import Clip
from mmalign.errors import DataError
from mmalign.generate.base import Request, Sampling
from mmalign.generate.local import LocalGenerator
from mmalign.media import embed
from mmalign.models.families import FAMILIES
from mmalign.models.load import ModelConfig, Policy, TrainParts, load_policy
from mmalign.models.tiny import TinyModel
from mmalign.prepare import RowDropped
from mmalign.records import Block, Message, user
from mmalign.scoring.candidates import Candidate, CandidateBatch
from mmalign.scoring.plan import make_plan
from mmalign.scoring.scorer import Scorer

WITH_CLIPS = [family.name for family in FAMILIES if family.video_inputs]


def clip(seed: int, frames: int = 4, fps: float = 2.0) -> Clip:
    pixels = np.random.RandomState(seed).randint(0, 255, (frames, 32, 32, 3), dtype=np.uint8)
    return Clip(
        frames=pixels,
        indices=tuple(range(0, 3 * frames, 3)),
        timestamps=tuple(i / fps for i in range(frames)),
        source_fps=3 * fps,
        num_source_frames=3 * frames,
        duration_seconds=frames / fps,
        key=f"clip-{seed}-{frames}-{fps}",
    )


IMAGE = embed(Image.fromarray(np.random.RandomState(9).randint(0, 255, (32, 32, 3), np.uint8)))


WORDS = ("What", "happens?", *(f"w{number}" for number in range(40)))


def tiny(path, family: str, words: tuple[str, ...] | None = None) -> Policy:
    TinyModel(output=str(path), family=family, words=words).build()
    train = TrainParts(vision=True, projector=True)
    return load_policy(ModelConfig(path=str(path), train=train))


@pytest.fixture(scope="module", params=WITH_CLIPS)
def policy(request, tmp_path_factory) -> Policy:
    return tiny(tmp_path_factory.mktemp("tiny") / request.param, request.param)


def plan_of(policy: Policy, batch: CandidateBatch, layout):
    return make_plan(
        batch,
        policy.family,
        layout,
        image_token_id=policy.preparer.image_token_id,
        video_token_id=policy.preparer.video_token_id,
        pad_token_id=policy.preparer.pad_token_id,
    )


def scored(policy: Policy, batch: CandidateBatch, layout: str):
    plan = plan_of(policy, batch, layout)
    policy.model.zero_grad()
    scores = Scorer(policy.model, policy.family)(plan)
    (scores.sums() * torch.arange(1.0, len(batch.candidates) + 1)).sum().backward()
    grads = [p.grad.flatten() for p in policy.model.parameters() if p.grad is not None]
    return plan, scores, torch.cat(grads).clone()


def mixed(policy: Policy) -> CandidateBatch:
    """Clips of two paces, one of them twice, a picture with a clip, and text alone."""
    blocks = tuple(Block(type=kind) for kind in ("image", "video"))
    both = (Message(role="user", content=(*blocks, Block(type="text", text="Compare."))),)
    rows = [
        (user("What happens?", videos=1), [], [clip(0)], ["it moves", "nothing does"]),
        (user("And then?", videos=1), [], [clip(0)], ["yes"]),
        (user("A slow one, at length?", videos=1), [], [clip(1, fps=0.5)], ["no", "maybe"]),
        (both, [IMAGE], [clip(2)], ["alike"]),
        (user("Words only"), [], [], ["fine"]),
    ]
    conditions, candidates = [], []
    for number, (prompt, images, videos, responses) in enumerate(rows):
        made = policy.preparer.condition(prompt, images, None, videos=videos, id=f"row-{number}")
        conditions.append(made)
        for text in responses:
            ids = policy.preparer.response(prompt, text)
            candidates.append(Candidate(condition=number, response_ids=ids))
    return CandidateBatch(conditions=conditions, candidates=candidates)


def test_layouts_agree_in_scores_and_gradients(policy):
    batch = mixed(policy)
    padded_plan, padded, gradient = scored(policy, batch, "padded")
    shared_plan, shared, shared_gradient = scored(policy, batch, "shared_prefix")
    assert torch.allclose(padded.logps, shared.logps, atol=1e-5)
    assert (shared_gradient - gradient).norm() <= 1e-5 * gradient.norm()
    # The clip of the first two rows is encoded once where rows may share.
    assert shared_plan.video_order.tolist() == [0, 0, 1, 2]
    assert padded_plan.video_order.tolist() == [0, 1, 2, 3, 4, 5]


def test_another_clip_changes_the_scores(policy):
    def sums(seed: int) -> torch.Tensor:
        prompt = user("What happens?", videos=1)
        made = policy.preparer.condition(prompt, [], None, videos=[clip(seed)])
        ids = policy.preparer.response(prompt, "it moves")
        batch = CandidateBatch(
            conditions=[made], candidates=[Candidate(condition=0, response_ids=ids)]
        )
        return scored(policy, batch, "shared_prefix")[1].sums()

    assert (sums(0) - sums(1)).abs().item() > 1e-4


def test_tokens_and_positions_are_the_processors_and_the_models_own(policy):
    for pace in (0.5, 2.0, 7.0):
        shown = clip(3, fps=pace)
        made = policy.preparer.condition(user("What?", videos=1), [], None, videos=[shown])
        metadata = VideoMetadata(
            total_num_frames=shown.num_source_frames,
            fps=shown.source_fps,
            frames_indices=list(shown.indices),
        )
        wanted = policy.processor(
            text=[made.text],
            videos=[shown.frames],
            video_metadata=[metadata],
            do_sample_frames=False,
            return_tensors="pt",
        )
        assert made.prompt_ids == wanted["input_ids"][0].tolist()
        pixels = made.videos[0].inputs["pixel_values_videos"]
        assert torch.equal(pixels, wanted["pixel_values_videos"])
        if policy.family.num_axes == 3:
            timed = "second_per_grid_ts" in policy.family.video_inputs
            seconds = torch.as_tensor(wanted["second_per_grid_ts"]) if timed else None
            positions, _ = policy.model.model.get_rope_index(
                wanted["input_ids"],
                wanted["mm_token_type_ids"],
                video_grid_thw=wanted["video_grid_thw"],
                **({"second_per_grid_ts": seconds} if timed else {}),
            )
            assert torch.equal(made.positions, positions[:, 0])


@pytest.mark.parametrize("family", WITH_CLIPS)
def test_generation_continues_where_training_would_score(tmp_path, family):
    """The greedy answer's tokens are the likeliest under the scorer, one after another."""
    policy = tiny(tmp_path / family, family, WORDS)
    policy.model.eval()
    tokenizer = policy.preparer.tokenizer
    odd = set(tokenizer.all_special_ids) - {tokenizer.eos_token_id}
    # No odd token is ever the likeliest, so that a reply's text gives back its tokens.
    policy.model.get_output_embeddings().weight.data[sorted(odd)] = 0
    prompt = user("What happens?", videos=1)
    shown = clip(4, fps=0.5)
    request = Request(id="r", prompt=prompt, videos=(shown,))
    (reply,) = LocalGenerator(policy).generate([request], Sampling(max_new_tokens=8))
    made = policy.preparer.condition(prompt, [], None, videos=[shown])
    tokens = policy.preparer.tokenizer(reply.text, add_special_tokens=False)["input_ids"]
    assert len(tokens) == reply.num_tokens > 0
    batch = CandidateBatch(
        conditions=[made], candidates=[Candidate(condition=0, response_ids=tokens)]
    )
    plan = plan_of(policy, batch, "shared_prefix")
    scores = Scorer(policy.model, policy.family)(plan, competitor=True)
    assert (scores.logps[0] > scores.competitor_logps[0] - 1e-5).all()


def test_a_family_without_clips_says_so(tmp_path):
    llava = tiny(tmp_path / "llava", "llava15")
    with pytest.raises(RowDropped, match="llava15 takes no clips") as drop:
        llava.preparer.condition(user("What?", videos=1), [], None, videos=[clip(0)], id="row-1")
    assert drop.value.reason == "no_clips"


def test_a_place_without_a_clip_is_refused(policy):
    with pytest.raises(DataError, match="video places and videos do not match"):
        policy.preparer.condition(user("What?", videos=1), [], None, id="row-1")


def test_clips_of_other_lengths_are_answered_side_by_side(policy):
    """OneVision takes clips of equal length in a batch; requests are sorted into such."""
    policy.model.eval()
    prompt = user("What happens?", videos=1)
    requests = [
        Request(id=f"r{n}", prompt=prompt, videos=(clip(n, frames=frames),))
        for n, frames in enumerate((4, 2, 4, 2))
    ]
    sampling = Sampling(max_new_tokens=4)
    together = LocalGenerator(policy).generate(requests, sampling)
    apart = [LocalGenerator(policy).generate([r], sampling)[0] for r in requests]
    assert [reply.text for reply in together] == [reply.text for reply in apart]


def test_a_training_batch_of_other_lengths_says_what_to_do(tmp_path):
    policy = tiny(tmp_path / "onevision", "llava_onevision")
    prompt = user("What happens?", videos=1)
    conditions = [
        policy.preparer.condition(prompt, [], None, videos=[clip(n, frames=frames)], id=f"row-{n}")
        for n, frames in enumerate((4, 2))
    ]
    ids = policy.preparer.response(prompt, "it moves")
    candidates = [Candidate(condition=n, response_ids=ids) for n in (0, 1)]
    with pytest.raises(DataError, match=r"got 2 and 4.*num_frames"):
        plan_of(
            policy, CandidateBatch(conditions=conditions, candidates=candidates), "shared_prefix"
        )
