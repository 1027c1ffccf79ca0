"""Prompts and responses to tokens: budgets, end-of-turn, placeholders, real pictures."""

import numpy as np
import pytest
from PIL import Image

from mmalign.media import embed
from mmalign.models.load import load_processor
from mmalign.models.tiny import TinyModel
from mmalign.prepare import Preparer, RowDropped, TokenLimits, shrink
from mmalign.records import Block, Message, user


def picture(width: int, height: int):
    pixels = np.random.RandomState(0).randint(0, 255, (height, width, 3), dtype=np.uint8)
    return embed(Image.fromarray(pixels))


@pytest.fixture(scope="module", params=["llava15", "qwen25vl"])
def preparer(request, tmp_path_factory) -> Preparer:
    path = tmp_path_factory.mktemp("tiny") / request.param
    TinyModel(
        output=str(path), family=request.param, image_size=64,
        patch_size=8 if request.param == "llava15" else 4,
    ).build()  # fmt: skip
    return load_processor(str(path))


def with_limits(preparer: Preparer, **limits) -> Preparer:
    return Preparer(preparer.processor, preparer.config, preparer.family, TokenLimits(**limits))


def test_a_response_ends_with_one_end_of_turn_token(preparer):
    end = preparer.tokenizer.eos_token_id
    ids = preparer.response(user("hi"), "a dog.")
    assert ids.count(end) == 1
    assert ids[-1] == end
    assert preparer.tokenizer.decode(ids[:-1]).strip() == "a dog."
    assert preparer.prefill(user("hi"), "a dog.") == ids[:-1]
    assert preparer.prefill(user("hi"), "  ") == []


def test_a_prefill_is_the_start_of_the_response(preparer):
    whole = preparer.response(user("hi"), "a dog and a cat")
    part = preparer.prefill(user("hi"), "a dog")
    assert whole[: len(part)] == part


def test_several_turns_are_rendered_in_order(preparer):
    prompt = (
        *user("first question", images=1),
        Message(role="assistant", content=(Block(type="text", text="first answer"),)),
        *user("second question"),
    )
    text = preparer.condition(prompt, [picture(32, 32)], None).text
    places = [text.index(words) for words in ("first question", "first answer", "second question")]
    assert places == sorted(places)


def test_a_placeholder_in_a_response_drops_the_row(preparer):
    name = preparer.tokenizer.decode([preparer.image_token_id])
    with pytest.raises(RowDropped) as caught:
        preparer.response(user("hi"), f"I see {name} there")
    assert caught.value.reason == "image_token_in_response"


def test_an_empty_response_drops_the_row(preparer):
    with pytest.raises(RowDropped) as caught:
        preparer.response(user("hi"), "")
    assert caught.value.reason == "empty_response"


@pytest.mark.parametrize("images", [0, 2])
def test_picture_count_must_match_the_places(preparer, images):
    with pytest.raises(RowDropped) as caught:
        preparer.condition(user("hi", images=1), [picture(32, 32)] * images, None, id="row-3")
    assert caught.value.reason == "image_count"
    assert "row-3" in str(caught.value)


def test_what_fits_is_not_touched(preparer):
    condition, ids = with_limits(preparer, max_tokens=2000).fit(
        user("hi", images=1), [picture(64, 64)], ["a dog", "cats"], None
    )
    assert ids == [preparer.response(user("hi", images=1), text) for text in ("a dog", "cats")]
    assert condition.num_image_tokens == 64


def test_over_budget_fewer_pixels_come_before_a_shorter_response(preparer):
    prompt, response = user("hi", images=1), "x" * 20
    words = len(preparer.condition(prompt, [picture(64, 64)], None).prompt_ids) - 64
    limit = words + 40 + 21
    small = with_limits(preparer, max_tokens=limit)
    if preparer.family.dynamic_resolution:
        condition, (ids,) = small.fit(prompt, [picture(64, 64)], [response], None)
        assert condition.num_image_tokens <= 40
        assert len(ids) >= 21
    else:
        with pytest.raises(RowDropped) as caught:
            small.fit(prompt, [picture(64, 64)], [response], None, id="row-9")
        assert caught.value.reason == "too_long"
        assert "row-9" in str(caught.value)


def test_then_the_response_is_cut_and_the_image_never(preparer):
    prompt, response = user("hi", images=1), "y" * 200
    whole = preparer.condition(prompt, [picture(8, 8)], None)
    limit = len(whole.prompt_ids) + 10
    condition, (ids,) = with_limits(preparer, max_tokens=limit).fit(
        prompt, [picture(8, 8)], [response], None
    )
    assert len(ids) == 10
    assert condition.prompt_ids.count(preparer.image_token_id) == condition.num_image_tokens
    assert len(condition.prompt_ids) + len(ids) <= limit


def test_then_the_row_is_dropped(preparer):
    with pytest.raises(RowDropped) as caught:
        with_limits(preparer, max_tokens=12).fit(
            user("hi " * 30, images=1), [picture(8, 8)], ["a dog"], None
        )
    assert caught.value.reason == "too_long"


def test_max_pixels_shrinks_pictures_of_families_with_dynamic_resolution(preparer):
    small = with_limits(preparer, max_pixels=16 * 16)
    condition = small.condition(user("hi", images=1), [picture(64, 64)], None)
    assert condition.num_image_tokens == (4 if preparer.family.dynamic_resolution else 64)


def test_shrink_keeps_the_shape():
    assert shrink(Image.new("RGB", (400, 100)), 10_000).size == (200, 50)
    image = Image.new("RGB", (10, 10))
    assert shrink(image, 100) is image


def test_recent_pictures_are_processed_once(preparer, monkeypatch):
    fresh = with_limits(preparer)
    calls = []
    original = fresh.processor.image_processor

    class Counting:
        def __call__(self, **kwargs):
            calls.append(1)
            return original(**kwargs)

    monkeypatch.setattr(fresh.processor, "image_processor", Counting())
    media = picture(32, 32)
    for _ in range(3):
        fresh.condition(user("hi", images=1), [media], None)
    assert len(calls) == 1
