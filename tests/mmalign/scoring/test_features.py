"""Features kept of a frozen tower score as the tower itself does, for every family."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from mmalign.attention.choose import MASKED, choose
from mmalign.clips import Clip
from mmalign.media import embed
from mmalign.models.families import FAMILIES
from mmalign.models.load import ModelConfig, Policy, load_policy
from mmalign.models.tiny import TinyModel
from mmalign.records import user
from mmalign.scoring.candidates import Candidate, CandidateBatch, Condition, EncodedMedia
from mmalign.scoring.cost import padded_cost, shared_cost
from mmalign.scoring.features import feature_parameters, without_pixels
from mmalign.scoring.planner import planner_of
from mmalign.scoring.scorer import Scorer, body_and_head

LAYOUTS = ("padded", "shared_prefix", "packed")
NOISE = np.random.RandomState(0)
PICTURES = [
    embed(Image.fromarray(NOISE.randint(0, 255, (height, width, 3), dtype=np.uint8)))
    for height, width in ((32, 32), (16, 40))
]


@pytest.fixture(scope="module", params=[family.name for family in FAMILIES])
def policy(request, tmp_path_factory) -> Policy:
    path = tmp_path_factory.mktemp("tiny") / request.param
    TinyModel(output=str(path), family=request.param).build()
    loaded = load_policy(ModelConfig(path=str(path)))
    # Some families have weights beside tower and projector that features depend on.
    for parameter in feature_parameters(loaded.model).values():
        parameter.requires_grad_(False)
    return loaded


@pytest.fixture
def no_tower(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on, the tower must not run on a picture."""

    def forbid() -> None:
        body, _ = body_and_head(policy.model)

        of_pictures, clips = type(body).get_image_features, []

        def called(self, *arguments, **named):
            assert clips, "the tower was asked for a picture"
            return of_pictures(self, *arguments, **named)

        monkeypatch.setattr(type(body), "get_image_features", called)
        if policy.family.video_inputs:
            of_clips = type(body).get_video_features

            def called_for_clips(self, *arguments, **named):
                # Qwen3-VL makes the features of a clip by the function for pictures.
                clips.append(1)
                try:
                    return of_clips(self, *arguments, **named)
                finally:
                    clips.pop()

            monkeypatch.setattr(type(body), "get_video_features", called_for_clips)

    return forbid


def batch_of(policy: Policy, rows: list[tuple[str, list[int]]], clips=()) -> CandidateBatch:
    """Rows of (prompt, picture numbers) with two responses each."""
    conditions, candidates = [], []
    for number, (text, pictures) in enumerate(rows):
        pictures = [PICTURES[i] for i in pictures[: policy.family.max_images]]
        prompt = user(text, images=len(pictures), videos=len(clips))
        conditions.append(policy.preparer.condition(prompt, pictures, None, videos=clips))
        for response in ("this", "that one, or is it?"):
            ids = policy.preparer.response(prompt, response)
            candidates.append(Candidate(condition=number, response_ids=ids))
    return CandidateBatch(conditions=conditions, candidates=candidates)


def with_features(policy: Policy, batch: CandidateBatch) -> CandidateBatch:
    """The same batch with features of each picture in the place of its pixels."""
    scorer = Scorer(policy.model, policy.family)

    def kept(image: EncodedMedia) -> EncodedMedia:
        with torch.no_grad():
            made = scorer(image)
        return replace(image, inputs=without_pixels(image.inputs), features=made)

    def of(condition: Condition) -> Condition:
        return replace(condition, images=tuple(kept(image) for image in condition.images))

    return replace(batch, conditions=[of(condition) for condition in batch.conditions])


def scored(policy: Policy, batch: CandidateBatch, layout: str):
    """Log-probabilities, and the gradients of a loss of them."""
    attention = MASKED
    if layout == "packed":
        config = policy.model.config.get_text_config()
        attention = choose("auto", policy.family, config, "cpu", torch.float32)
        if not attention.packs:
            pytest.skip("this family's attention takes masks")
    planner = planner_of(policy, "padded" if layout == "padded" else "shared_prefix", attention)
    policy.model.zero_grad()
    scores = Scorer(policy.model, policy.family, attention)(planner(batch))
    (scores.sums() * torch.arange(1.0, len(batch.candidates) + 1)).sum().backward()
    gradients = {n: p.grad for n, p in policy.model.named_parameters() if p.grad is not None}
    assert gradients
    return scores.logps.detach(), gradients


@pytest.mark.parametrize("layout", LAYOUTS)
def test_kept_features_give_the_same_scores_and_gradients_to_the_bit(policy, no_tower, layout):
    """One response a row, so that the tower sees its picture alone in the padded layout too."""
    for rows in ([("which?", [0])], [("and this?", [1])]):
        batch = batch_of(policy, rows)
        if layout == "padded":
            batch = replace(batch, candidates=batch.candidates[:1])
        logps, gradients = scored(policy, batch, layout)
        kept = with_features(policy, batch)
        again, its_gradients = scored(policy, kept, layout)
        assert torch.equal(again, logps)
        assert its_gradients.keys() == gradients.keys()
        assert all(torch.equal(its_gradients[name], gradients[name]) for name in gradients)
    no_tower()
    scored(policy, kept, layout)
    with pytest.raises(AssertionError, match="the tower was asked"):
        scored(policy, batch, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_features_of_many_pictures_find_their_places(policy, no_tower, layout):
    """The tower sees several pictures at once here, and rounds otherwise than for each alone."""
    rows = [("which?", [0, 1]), ("and now?", [1, 0]), ("no picture", []), ("this?", [1])]
    batch = batch_of(policy, rows)
    kept = with_features(policy, batch)
    logps, gradients = scored(policy, batch, layout)
    no_tower()
    again, its_gradients = scored(policy, kept, layout)
    assert torch.allclose(again, logps, atol=1e-5)
    for name in gradients:
        difference = (its_gradients[name] - gradients[name]).norm()
        assert difference <= 1e-4 * gradients[name].norm() + 1e-6, name


@pytest.mark.parametrize("layout", ["padded", "shared_prefix"])
def test_clips_beside_kept_pictures_go_through_the_tower(policy, no_tower, layout):
    if not policy.family.video_inputs:
        pytest.skip("this family takes no clips")
    frames = NOISE.randint(0, 255, (4, 32, 32, 3), dtype=np.uint8)
    clip = Clip(
        frames=frames,
        indices=(0, 1, 2, 3),
        timestamps=(0.0, 0.5, 1.0, 1.5),
        source_fps=2.0,
        num_source_frames=4,
        duration_seconds=2.0,
        key="noise",
    )
    batch = batch_of(policy, [("which?", [0])], clips=(clip,))
    kept = with_features(policy, batch)
    logps, _ = scored(policy, batch, layout)
    no_tower()
    again, _ = scored(policy, kept, layout)
    assert torch.allclose(again, logps, atol=1e-5)


def test_no_weight_outside_the_named_ones_enters_a_feature(policy):
    """What else trains, may: a kept feature does not go stale."""
    apart = feature_parameters(policy.model)
    trains = [n for n, p in policy.model.named_parameters() if p.requires_grad]
    assert trains
    assert not set(trains) & set(apart)
    (image,) = batch_of(policy, [("which?", [0])]).conditions[0].images
    made = Scorer(policy.model, policy.family)(image)
    assert not any(tensor.requires_grad for tensor in (made.pooled, *made.deeper))
    for parameter in apart.values():
        parameter.requires_grad_(True)
    try:
        assert Scorer(policy.model, policy.family)(image).pooled.requires_grad
    finally:
        for parameter in apart.values():
            parameter.requires_grad_(False)


def test_the_cost_of_a_layout_counts_no_tower_that_does_not_run(policy):
    batch = batch_of(policy, [("which?", [0])])
    kept = with_features(policy, batch)
    cost = planner_of(policy).cost
    assert padded_cost(kept, cost) < padded_cost(batch, cost)
    assert shared_cost(kept, cost, packed=True) < shared_cost(batch, cost, packed=True)
