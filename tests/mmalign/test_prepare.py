"""Prompts and responses to tokens: budgets, end-of-turn, placeholders, real pictures."""

import numpy as np
import pytest
from PIL import Image

from mmalign.encode import shrink
from mmalign.errors import MediaError
from mmalign.media import embed
from mmalign.models.load import load_processor
from mmalign.models.tiny import TinyModel
from mmalign.prepare import Preparer, RowDropped, TokenLimits, _largest_share
from mmalign.records import Block, Message, user


def picture(width: int, height: int):
    pixels = np.random.RandomState(0).randint(0, 255, (height, width, 3), dtype=np.uint8)
    return embed(Image.fromarray(pixels))


@pytest.fixture(scope="module", params=["llava15", "qwen25vl"])
def preparer(request, tmp_path_factory) -> Preparer:
    path = tmp_path_factory.mktemp("tiny") / request.param
    TinyModel(
        output=str(path), family=request.param, image_size=64
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
    assert caught.value.reason == "control_token"


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
    if preparer.family.token_pixels:
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
    assert condition.num_image_tokens == (4 if preparer.family.token_pixels else 64)


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


def test_a_control_token_in_a_text_drops_the_row(preparer):
    end = preparer.tokenizer.eos_token
    for text in (f"a cat {end} and a dog", end):
        with pytest.raises(RowDropped) as caught:
            preparer.response(user("hi"), text)
        assert caught.value.reason == "control_token"
    with pytest.raises(RowDropped) as caught:
        preparer.condition(user(f"hi {end}"), (), None, id="row-4")
    assert "row-4" in str(caught.value)


def test_a_large_picture_is_shrunk_from_the_size_its_processor_gave_it(preparer):
    """One token too many is one size smaller, however large the file."""
    if preparer.family.token_pixels is None:
        pytest.skip("every picture gives as many tokens")
    prompt, media = user("hi", images=1), picture(1000, 1000)
    whole = preparer.condition(prompt, [media], None)
    response = preparer.response(prompt, "a dog")
    limit = len(whole.prompt_ids) + len(response) - 1
    condition, (ids,) = with_limits(preparer, max_tokens=limit).fit(
        prompt, [media], ["a dog"], None
    )
    assert ids == response
    assert whole.num_image_tokens / 2 < condition.num_image_tokens < whole.num_image_tokens


def test_room_is_shared_by_cutting_the_largest():
    assert _largest_share([2, 9, 9], 12) == 5
    assert _largest_share([4], 3) == 3
    assert _largest_share([1, 2], 10) == 2


def test_a_picture_that_its_processor_refuses_is_a_media_error(preparer):
    if preparer.family.token_pixels is None:
        pytest.skip("this family crops instead")
    with pytest.raises(MediaError, match="refuses"):
        preparer.condition(user("hi", images=1), [picture(900, 4)], None)


def test_a_processor_without_a_template_is_told(preparer, tmp_path):
    import shutil

    from mmalign.errors import ModelError

    preparer.processor.save_pretrained(tmp_path / "p")
    preparer.config.save_pretrained(tmp_path / "p")
    (tmp_path / "p" / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="chat template"):
        load_processor(str(tmp_path / "p"))
    shutil.rmtree(tmp_path / "p")
