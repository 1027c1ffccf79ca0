"""Both layouts score every candidate alike, in loss and gradients, for every family."""

import io

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mmalign.attention.choose import MASKED, Attention, choose, sliding_window
from mmalign.errors import DataError
from mmalign.media import embed
from mmalign.models.families import FAMILIES, mrope_positions
from mmalign.models.families.base import mrope_positions_by_frame
from mmalign.models.load import ModelConfig, Policy, TrainParts, load_policy
from mmalign.models.tiny import TinyModel
from mmalign.records import Media, user
from mmalign.scoring.candidates import Candidate, CandidateBatch, Condition
from mmalign.scoring.plan import joined, make_plan
from mmalign.scoring.scorer import Scorer


def picture(seed: int, width: int, height: int) -> Media:
    pixels = np.random.RandomState(seed).randint(0, 255, (height, width, 3), dtype=np.uint8)
    return embed(Image.fromarray(pixels))


@pytest.fixture(scope="module", params=[family.name for family in FAMILIES])
def policy(request, tmp_path_factory) -> Policy:
    path = tmp_path_factory.mktemp("tiny") / request.param
    TinyModel(output=str(path), family=request.param).build()
    train = TrainParts(vision=True, projector=True)
    return load_policy(ModelConfig(path=str(path), train=train))


PICTURES = [picture(0, 32, 32), picture(1, 40, 16), picture(2, 20, 30)]


def batch_of(policy: Policy, rows: list[tuple[str, list[int], list[str]]]) -> CandidateBatch:
    """Rows of (prompt, picture numbers, responses) as a batch."""
    conditions: list[Condition] = []
    candidates: list[Candidate] = []
    for index, (text, pictures, responses) in enumerate(rows):
        pictures = pictures[: policy.family.max_images]
        prompt = user(text, images=len(pictures))
        media = [PICTURES[i] for i in pictures]
        conditions.append(policy.preparer.condition(prompt, media, None, id=f"row-{index}"))
        for response in responses:
            ids = policy.preparer.response(prompt, response)
            candidates.append(Candidate(condition=index, response_ids=ids))
    return CandidateBatch(conditions=conditions, candidates=candidates)


def attention_of(policy: Policy) -> Attention:
    config = policy.model.config.get_text_config()
    return choose("auto", policy.family, config, "cpu", torch.float32)


def plan_of(policy: Policy, batch: CandidateBatch, layout):
    """layout: padded, shared_prefix (rows under masks), or packed (shared_prefix in one row)."""
    return make_plan(
        batch,
        policy.family,
        "padded" if layout == "padded" else "shared_prefix",
        packed=layout == "packed",
        window=sliding_window(policy.model.config.get_text_config()),
        image_token_id=policy.preparer.image_token_id,
        video_token_id=policy.preparer.video_token_id,
        pad_token_id=policy.preparer.tokenizer.pad_token_id,
    )


def scorer_of(policy: Policy, layout: str) -> Scorer:
    return Scorer(
        policy.model, policy.family, attention_of(policy) if layout == "packed" else MASKED
    )


def scores_and_gradients(policy: Policy, batch: CandidateBatch, layout):
    policy.model.zero_grad()
    scores = scorer_of(policy, layout)(plan_of(policy, batch, layout), competitor=True)
    weights = torch.arange(1.0, len(batch.candidates) + 1)
    loss = (scores.sums() * weights).sum() / weights.sum()
    loss.backward()
    gradients = torch.cat(
        [p.grad.flatten() for p in policy.model.parameters() if p.grad is not None]
    )
    return scores, loss.item(), gradients.clone()


MIXED = [
    ("describe", [0], ["hello there", "bye", "a longer one of them"]),
    ("what is in both of these pictures?", [1, 2], ["x", "yy"]),
    ("no picture at all", [], ["text only"]),
    ("describe", [2], ["hello there"]),
]


@pytest.fixture(params=["shared_prefix", "packed"])
def layout(request, policy) -> str:
    if request.param == "packed" and not attention_of(policy).packs:
        pytest.skip("this family's attention takes masks")
    return request.param


def test_layouts_agree_on_unequal_prompts_many_images_many_candidates(policy, layout):
    batch = batch_of(policy, MIXED)
    padded, loss, gradient = scores_and_gradients(policy, batch, "padded")
    shared, shared_loss, shared_gradient = scores_and_gradients(policy, batch, layout)
    assert torch.equal(padded.mask, shared.mask)
    assert torch.allclose(padded.logps, shared.logps, atol=1e-5)
    assert torch.allclose(padded.competitor_logps, shared.competitor_logps, atol=1e-5)
    assert shared_loss == pytest.approx(loss, rel=1e-5)
    assert (shared_gradient - gradient).norm() <= 1e-5 * gradient.norm()
    plan = plan_of(policy, batch, layout)
    assert plan.num_tokens < plan_of(policy, batch, "padded").num_tokens
    if layout == "packed":
        assert plan.num_tokens == plan.input_ids.numel()


def test_checkpointed_layers_run_again_as_they_ran(policy):
    """Gradient checkpointing changes no gradient, with attention that has no mask least of all."""
    packed = "packed" if attention_of(policy).packs else "shared_prefix"
    batch = batch_of(policy, MIXED)
    runs: list[object] = []
    attention = policy.model.get_decoder().layers[-1].self_attn
    hook = attention.register_forward_hook(lambda *_: runs.append(None))
    policy.model.train()
    try:
        _, loss, gradient = scores_and_gradients(policy, batch, packed)
        policy.model.gradient_checkpointing_enable({"use_reentrant": False})
        _, again, checkpointed = scores_and_gradients(policy, batch, packed)
    finally:
        policy.model.gradient_checkpointing_disable()
        policy.model.eval()
        hook.remove()
    assert len(runs) == 1 + 2
    assert again == pytest.approx(loss, rel=1e-6)
    assert (checkpointed - gradient).norm() <= 1e-5 * gradient.norm()


words = st.text(alphabet="abc .", min_size=1, max_size=12).filter(str.strip)
rows = st.lists(
    st.tuples(
        words,
        st.lists(st.integers(0, 2), max_size=2),
        st.lists(words, min_size=1, max_size=3),
    ),
    min_size=1,
    max_size=3,
)


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(rows=rows)
def test_layouts_agree_whatever_the_batch(policy, layout, rows):
    batch = batch_of(policy, rows)
    padded, _, gradient = scores_and_gradients(policy, batch, "padded")
    shared, _, shared_gradient = scores_and_gradients(policy, batch, layout)
    assert torch.allclose(padded.logps, shared.logps, atol=1e-5)
    assert (shared_gradient - gradient).norm() <= 1e-5 * gradient.norm()


def test_padded_scores_are_the_models_own_logits(policy):
    """The reference of the reference: log-softmax of the full logits, one row at a time."""
    batch = batch_of(policy, MIXED)
    scores = Scorer(policy.model, policy.family)(plan_of(policy, batch, "padded"))
    for index, candidate in enumerate(batch.candidates):
        condition = batch.conditions[candidate.condition]
        ids = torch.tensor([condition.prompt_ids + candidate.response_ids])
        inputs = {
            name: joined(name, [image.inputs[name] for image in condition.images])
            for name in (policy.family.image_inputs if condition.images else ())
        }
        if policy.family.token_types is not None:
            kinds = (ids == policy.preparer.image_token_id).int()
            is_response = torch.arange(ids.shape[1])[None] >= len(condition.prompt_ids)
            inputs |= policy.family.token_types(kinds, is_response)
        logits = policy.model(input_ids=ids, **inputs).logits[0].log_softmax(-1)
        start = len(condition.prompt_ids)
        wanted = [
            logits[start - 1 + t, token].item() for t, token in enumerate(candidate.response_ids)
        ]
        assert scores.logps[index, : len(wanted)].tolist() == pytest.approx(wanted, abs=1e-5)
        assert scores.logps[index, len(wanted) :].abs().sum() == 0


def test_candidate_order_and_neighbours_change_nothing(policy, layout):
    batch = batch_of(policy, MIXED)
    whole = scorer_of(policy, layout)(plan_of(policy, batch, layout))
    order = [3, 0, 6, 2, 1, 5, 4]
    moved = CandidateBatch(
        conditions=batch.conditions, candidates=[batch.candidates[i] for i in order]
    )
    scores = scorer_of(policy, layout)(plan_of(policy, moved, layout))
    assert torch.allclose(scores.sums(), whole.sums()[order], atol=1e-5)
    alone = CandidateBatch(conditions=batch.conditions[:1], candidates=batch.candidates[:1])
    single = scorer_of(policy, layout)(plan_of(policy, alone, layout))
    assert single.sums()[0].item() == pytest.approx(whole.sums()[0].item(), abs=1e-5)


def test_blanking_the_picture_changes_the_scores(policy):
    def sums(number: int) -> torch.Tensor:
        batch = batch_of(policy, [("describe", [number], ["hello"])])
        return Scorer(policy.model, policy.family)(plan_of(policy, batch, "shared_prefix")).sums()

    PICTURES.append(embed(Image.new("RGB", (32, 32))))
    try:
        assert (sums(0) - sums(3)).abs().item() > 1e-4
    finally:
        PICTURES.pop()


def test_one_picture_of_many_conditions_is_encoded_once(policy):
    rows = [("a", [0], ["x"]), ("b", [0], ["y"]), ("c", [1], ["z"]), ("d", [1], ["w"])]
    batch = batch_of(policy, rows)
    plan = plan_of(policy, batch, "shared_prefix")
    order = plan.image_order.tolist()
    assert [order.count(piece) for piece in order] == [2] * len(order)
    assert len(set(order)) == max(order) + 1
    padded = plan_of(policy, batch, "padded")
    assert padded.image_order.tolist() == list(range(len(order)))


def test_a_lost_image_token_is_named(policy):
    batch = batch_of(policy, [("describe", [0], ["x"])])
    condition = batch.conditions[0]
    place = condition.prompt_ids.index(policy.preparer.image_token_id)
    broken = Condition(
        id="coco-7",
        prompt_ids=condition.prompt_ids[:place] + condition.prompt_ids[place + 1 :],
        images=condition.images,
        positions=condition.positions[:, 1:],
    )
    with pytest.raises(DataError, match="row coco-7: image tokens and image features"):
        plan_of(policy, CandidateBatch(conditions=[broken], candidates=batch.candidates), "padded")


def made_by_the_processor(policy: Policy, text: str, pictures: list[int]):
    if policy.processor.chat_template is None:
        pytest.skip("its processor renders by itself: see its own tests")
    images = [Image.open(io.BytesIO(PICTURES[i].bytes)) for i in pictures] or None
    # As in apply_chat_template: what the template has written is not written again.
    bos = policy.preparer.tokenizer.bos_token
    special = not (bos and text.startswith(bos))
    return policy.processor(
        text=[text], images=images, add_special_tokens=special, return_tensors="pt"
    )


def test_prompt_tokens_are_the_processors_own(policy):
    for text, pictures, _ in MIXED:
        pictures = pictures[: policy.family.max_images]
        prompt = user(text, images=len(pictures))
        condition = policy.preparer.condition(prompt, [PICTURES[i] for i in pictures], None)
        made = made_by_the_processor(policy, condition.text, pictures)
        assert condition.prompt_ids == made.input_ids[0].tolist()
        if pictures and policy.family.num_axes == 3:
            wanted, _ = policy.model.model.get_rope_index(
                made.input_ids, made.mm_token_type_ids, image_grid_thw=made.image_grid_thw
            )
            assert torch.equal(condition.positions, wanted[:, 0])


def test_scores_are_those_of_the_processors_own_inputs(policy):
    """Whatever the processor hands the model besides, such as masks of pixels, changes nothing."""
    text, pictures, responses = MIXED[1]
    pictures = pictures[: policy.family.max_images]
    batch = batch_of(policy, [(text, pictures, responses[:1])])
    made = made_by_the_processor(policy, batch.conditions[0].text, pictures)
    logits = policy.model(**made).logits[0, -1].log_softmax(-1)
    scores = Scorer(policy.model, policy.family)(plan_of(policy, batch, "padded"))
    wanted = logits[batch.candidates[0].response_ids[0]].item()
    assert scores.logps[0, 0].item() == pytest.approx(wanted, abs=1e-5)


def test_mrope_positions_by_hand():
    """Two words, an image of 1x2x3 merged patches, one word: text resumes at 2 + max(2, 3)."""

    class Config:
        image_token_id = 9
        video_token_id = 8

        class vision_config:
            spatial_merge_size = 2
            tokens_per_second = 4

    grid = {"image_grid_thw": torch.tensor([[1, 4, 6]])}
    ids = torch.tensor([1, 1, 9, 9, 9, 9, 9, 9, 1])
    assert mrope_positions(ids, [grid], [], Config).tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5],
        [0, 1, 2, 2, 2, 3, 3, 3, 5],
        [0, 1, 2, 3, 4, 2, 3, 4, 5],
    ]
    # A clip of 3 patches in time, 0.4 s each: 4 positions a second make 0, 1.6, 3.2, cut.
    clip = {"video_grid_thw": torch.tensor([[3, 2, 2]]), "second_per_grid_ts": torch.tensor([0.4])}
    assert mrope_positions(torch.tensor([1, 8, 8, 8, 1]), [], [clip], Config).tolist() == [
        [0, 1, 2, 4, 2],
        [0, 1, 1, 1, 2],
        [0, 1, 1, 1, 2],
    ]
    # Without seconds (Qwen2-VL) time goes by one.
    untimed = {"video_grid_thw": clip["video_grid_thw"]}
    assert mrope_positions(torch.tensor([1, 8, 8, 8, 1]), [], [untimed], Config).tolist() == [
        [0, 1, 2, 3, 2],
        [0, 1, 1, 1, 2],
        [0, 1, 1, 1, 2],
    ]
    # Frames with words between them (Qwen3-VL) count as pictures do.
    frames = {"video_grid_thw": torch.tensor([[2, 2, 4]])}
    ids = torch.tensor([1, 8, 8, 1, 8, 8, 1])
    assert mrope_positions_by_frame(ids, [], [frames], Config).tolist() == [
        [0, 1, 1, 3, 4, 4, 6],
        [0, 1, 1, 3, 4, 4, 6],
        [0, 1, 2, 3, 4, 5, 6],
    ]
