"""What Gemma 3 and PaliGemma have of their own: masks, positions, rendering, the end of a turn."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mmalign.attention.choose import sliding_window
from mmalign.config import validate
from mmalign.errors import ModelError
from mmalign.media import embed
from mmalign.models.families import family_of
from mmalign.models.load import ModelConfig, Policy, load_policy
from mmalign.models.tiny import TinyModel
from mmalign.models.tiny.gemma import SLIDING_WINDOW
from mmalign.prepare import RowDropped
from mmalign.records import Block, Media, Message, user
from mmalign.scoring.candidates import Candidate, CandidateBatch
from mmalign.scoring.plan import Plan, make_plan
from mmalign.scoring.scorer import Scorer


def tiny(folder: Any, family: str, **settings: Any) -> Policy:
    path = folder / family
    TinyModel(output=str(path), family=family).build()
    return load_policy(validate({"path": str(path), **settings}, ModelConfig, "test"))


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory) -> Policy:
    return tiny(tmp_path_factory.mktemp("tiny"), "gemma3")


@pytest.fixture(scope="module")
def paligemma(tmp_path_factory) -> Policy:
    return tiny(tmp_path_factory.mktemp("tiny"), "paligemma")


def picture(seed: int, width: int = 32, height: int = 32) -> Media:
    pixels = np.random.RandomState(seed).randint(0, 255, (height, width, 3), dtype=np.uint8)
    return embed(Image.fromarray(pixels))


def opened(media: Media) -> Image.Image:
    return Image.open(io.BytesIO(media.bytes or b""))


def batch_of(policy: Policy, num_pictures: int) -> CandidateBatch:
    prompt = user("what is in this?", images=num_pictures)
    media = [picture(i) for i in range(num_pictures)]
    return CandidateBatch(
        conditions=[policy.preparer.condition(prompt, media, None)],
        candidates=[
            Candidate(condition=0, response_ids=policy.preparer.response(prompt, "a longer reply"))
        ],
    )


def plan_of(policy: Policy, batch: CandidateBatch, layout, window: int | None) -> Plan:
    return make_plan(
        batch,
        policy.family,
        layout,
        window=window,
        image_token_id=policy.preparer.image_token_id,
        video_token_id=None,
        pad_token_id=policy.preparer.pad_token_id,
    )


def given_to_the_language_model(policy: Policy, layout: str, num_pictures: int) -> dict[str, Any]:
    """Mask and positions of one prompt with one response; `padded` leaves both to transformers."""
    seen: dict[str, Any] = {}
    window = sliding_window(policy.model.config.get_text_config())
    plan = plan_of(policy, batch_of(policy, num_pictures), layout, window)
    hook = policy.model.model.language_model.register_forward_pre_hook(
        lambda module, args, given: seen.update(given), with_kwargs=True
    )
    with torch.inference_mode():
        Scorer(policy.model, policy.family)(plan)
    hook.remove()
    return seen


@pytest.mark.parametrize("num_pictures", [0, 1, 2])
def test_gemma3s_two_masks_are_transformers_own(gemma3, num_pictures):
    theirs = given_to_the_language_model(gemma3, "padded", num_pictures)["attention_mask"]
    ours = given_to_the_language_model(gemma3, "shared_prefix", num_pictures)["attention_mask"]
    assert set(theirs) == set(ours) == {"full_attention", "sliding_attention"}
    for kind, mask in theirs.items():
        assert torch.equal(ours[kind], mask), kind
    assert not torch.equal(ours["full_attention"], ours["sliding_attention"])
    if num_pictures == 0:
        return
    ids = batch_of(gemma3, num_pictures).conditions[0].prompt_ids
    first = ids.index(gemma3.preparer.image_token_id)
    last = first + 15
    assert SLIDING_WINDOW < 16
    full, sliding = ours["full_attention"][0, 0], ours["sliding_attention"][0, 0]
    # A picture is seen both ways; the window hides what lies before it, and nothing after.
    assert full[first, last]
    assert full[last, first]
    assert sliding[first, last]
    assert not sliding[last, first]
    if num_pictures == 2:
        second = first + ids[first + 16 :].index(gemma3.preparer.image_token_id) + 16
        assert full[second, first]
        assert not full[first, second]


def test_a_plan_without_gemma3s_window_is_refused(gemma3):
    plan = plan_of(gemma3, batch_of(gemma3, 1), "shared_prefix", None)
    with pytest.raises(ModelError, match="layers with a sliding window"):
        Scorer(gemma3.model, gemma3.family)(plan)


@pytest.mark.parametrize("num_pictures", [0, 1, 2])
def test_paligemmas_mask_and_positions_are_transformers_own(paligemma, num_pictures):
    theirs = given_to_the_language_model(paligemma, "padded", num_pictures)
    ours = given_to_the_language_model(paligemma, "shared_prefix", num_pictures)
    assert torch.equal(ours["attention_mask"], theirs["attention_mask"])
    assert torch.equal(ours["position_ids"], theirs["position_ids"])
    assert ours["position_ids"][0, :3].tolist() == [1, 2, 3]
    size = len(batch_of(paligemma, num_pictures).conditions[0].prompt_ids)
    mask = ours["attention_mask"][0, 0]
    assert mask[:size, :size].all()
    assert not mask[:size, size:].any()
    assert torch.equal(mask[size:, size:], torch.ones_like(mask[size:, size:]).tril())


def test_gemma3s_chats_are_tokenised_as_its_processor_does(gemma3):
    chat = [
        ("system", ["Be brief."]),
        ("user", [picture(0), "What is it? "]),
        ("assistant", ["A thing."]),
        ("user", ["And this?", picture(1, 60, 20)]),
    ]
    prompt = tuple(
        Message(
            role=role,
            content=tuple(
                Block(type="text", text=part) if isinstance(part, str) else Block(type="image")
                for part in parts
            ),
        )
        for role, parts in chat
    )
    media = [part for _, parts in chat for part in parts if isinstance(part, Media)]
    ours = gemma3.preparer.condition(prompt, media, None)
    theirs = gemma3.processor.apply_chat_template(
        [
            {
                "role": role,
                "content": [
                    {"type": "text", "text": part}
                    if isinstance(part, str)
                    else {"type": "image", "image": opened(part)}
                    for part in parts
                ],
            }
            for role, parts in chat
        ],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    assert ours.prompt_ids == theirs["input_ids"][0].tolist()
    kinds = (theirs["input_ids"] == gemma3.preparer.image_token_id).int()
    types = gemma3.family.token_types(kinds, kinds > 1)["token_type_ids"]
    assert torch.equal(types, theirs["token_type_ids"].int())
    pixels = torch.cat([image.inputs["pixel_values"] for image in ours.images])
    assert torch.equal(pixels, theirs["pixel_values"])


def test_gemma3s_turn_ends_with_its_own_token(gemma3):
    """Not with the tokenizer's <eos>, which its chats never hold."""
    preparer = gemma3.preparer
    end = preparer.tokenizer.convert_tokens_to_ids("<end_of_turn>")
    assert preparer.end_token_id == end != preparer.tokenizer.eos_token_id
    response = preparer.response(user("Is it?"), "It is.")
    assert response.count(end) == 1
    assert response[-1] == end
    assert preparer.tokenizer.eos_token_id not in response
    assert preparer.prefill(user("Is it?"), "It is.") == response[:-1]


def test_a_wide_picture_is_not_cut_up_whatever_the_config_says(gemma3, monkeypatch):
    image_processor = gemma3.processor.image_processor
    for name, value in {
        "do_pan_and_scan": True,
        "pan_and_scan_min_crop_size": 8,
        "pan_and_scan_max_num_crops": 4,
        "pan_and_scan_min_ratio_to_activate": 1.2,
    }.items():
        monkeypatch.setattr(image_processor, name, value)
    wide = picture(7, 96, 24)
    assert len(image_processor(images=[opened(wide)], return_tensors="pt").pixel_values) > 1
    ours = gemma3.preparer.condition(user("what?", images=1), [wide], None)
    theirs = gemma3.processor(
        text=[ours.text], images=[opened(wide)], add_special_tokens=False, return_tensors="pt"
    )
    assert ours.prompt_ids == theirs.input_ids[0].tolist()
    assert torch.equal(ours.images[0].inputs["pixel_values"], theirs.pixel_values)


@pytest.mark.parametrize("num_pictures", [1, 2])
def test_paligemmas_question_and_answer_are_its_processors_own(paligemma, num_pictures):
    batch = batch_of(paligemma, num_pictures)
    condition = batch.conditions[0]
    theirs = paligemma.processor(
        text=["<image>" * num_pictures + "what is in this?"],
        images=[[opened(picture(i)) for i in range(num_pictures)]],
        suffix=["a longer reply"],
        return_tensors="pt",
    )
    ours = condition.prompt_ids + batch.candidates[0].response_ids
    assert ours == theirs.input_ids[0].tolist()
    is_response = torch.arange(len(ours))[None] >= len(condition.prompt_ids)
    types = paligemma.family.token_types(torch.zeros(1, len(ours)), is_response)
    assert types["token_type_ids"].tolist() == theirs.token_type_ids.tolist()
    pixels = torch.cat([image.inputs["pixel_values"] for image in condition.images])
    assert torch.equal(pixels, theirs.pixel_values)


def test_paligemma_reads_a_question_without_a_picture(paligemma):
    condition = paligemma.preparer.condition(user("why?"), [], None)
    assert condition.text == "<bos>why?\n"
    assert condition.prompt_ids.count(paligemma.preparer.tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("roles", [("system", "user"), ("user", "assistant", "user")])
def test_paligemma_takes_one_question(paligemma, roles):
    text = (Block(type="text", text="so"),)
    prompt = tuple(Message(role=role, content=text) for role in roles)
    with pytest.raises(RowDropped, match="takes one question") as caught:
        paligemma.preparer.condition(prompt, [], None, id="row-7")
    assert caught.value.reason == "many_turns"


def test_paligemma_2_is_refused():
    """It caps attention scores and logits; both layouts would leave that out."""
    from transformers import PaliGemmaConfig

    first = PaliGemmaConfig(text_config={"model_type": "gemma"})
    assert family_of(first).name == "paligemma"
    with pytest.raises(ModelError, match=r"not supported yet.*text gemma2"):
        family_of(PaliGemmaConfig(text_config={"model_type": "gemma2"}))


@pytest.mark.parametrize("family", ["gemma3", "paligemma"])
def test_lora_adapts_the_language_model_alone(family, tmp_path):
    policy = tiny(tmp_path, family, lora={"rank": 2, "alpha": 4})
    trained = [n for n, p in policy.model.named_parameters() if p.requires_grad]
    assert len(trained) == 3 * 7 * 2
    assert all(".language_model.layers." in name for name in trained)
