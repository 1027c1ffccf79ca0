"""InternVL, Idefics3, SmolVLM: how many tokens tiles take, what is written around them."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Idefics3Config, InternVLConfig

from mmalign.errors import MediaError
from mmalign.generate.base import Request, Sampling
from mmalign.generate.local import LocalGenerator
from mmalign.media import embed
from mmalign.models.families import FAMILIES
from mmalign.models.load import load_processor
from mmalign.models.tiny import TinyModel
from mmalign.records import user

TILED = {f.name: f for f in FAMILIES if f.name in ("internvl", "idefics3", "smolvlm")}
# Width and height: one tile for InternVL, then a column, a row, and two by two.
SHAPES = [(32, 32), (20, 50), (90, 31), (200, 210)]


def pictures() -> list[Image.Image]:
    random = np.random.RandomState(0)
    return [
        Image.fromarray(random.randint(0, 255, (height, width, 3), dtype=np.uint8))
        for width, height in SHAPES
    ]


@pytest.fixture(scope="module", params=sorted(TILED))
def generator(request, tmp_path_factory) -> LocalGenerator:
    path = tmp_path_factory.mktemp("tiny") / request.param
    TinyModel(output=str(path), family=request.param).build()
    return LocalGenerator.from_checkpoint(str(path), batch_size=8)


def test_tokens_at_the_published_sizes():
    """InternVL3: 448 pixels, patches of 14, half of them by side: 16^2 a tile. Idefics3: 364
    pixels, patches of 14, two by two into one: 13^2.
    """
    tiles = {"pixel_values": torch.empty(7, 3, 448, 448, device="meta")}
    assert TILED["internvl"].num_image_tokens(tiles, InternVLConfig()) == 7 * 256
    vision = {"image_size": 364, "patch_size": 14}
    config = Idefics3Config(vision_config=vision, scale_factor=2)
    tiles = {"pixel_values": torch.ones(1, 5, 3, 364, 364)}
    assert TILED["idefics3"].num_image_tokens(tiles, config) == 5 * 169
    # SmolVLM2-500M: 512 pixels, patches of 16, four by four into one.
    config = Idefics3Config(vision_config={"image_size": 512, "patch_size": 16}, scale_factor=4)
    tiles = {"pixel_values": torch.ones(1, 3, 3, 512, 512)}
    assert TILED["smolvlm"].num_image_tokens(tiles, config) == 3 * 64


def test_tokens_are_counted_as_the_model_makes_features(generator):
    preparer, model = generator.policy.preparer, generator.policy.model
    counts = set()
    for image in pictures():
        encoded = preparer.encoder.image(embed(image), None, None)
        features = model.get_image_features(**encoded.inputs, return_dict=True).pooler_output
        assert encoded.num_tokens == sum(len(piece) for piece in features)
        counts.add(encoded.num_tokens)
    assert len(counts) > 1, "the pictures should differ in their tiles"


def test_a_batch_of_pictures_in_unlike_tiles_answers_as_each_alone(generator):
    media = [embed(image) for image in pictures()]
    requests = [
        Request(id=str(i), prompt=user("what is it?", images=2), images=(media[i], media[-1 - i]))
        for i in range(len(media))
    ]
    sampling = Sampling(max_new_tokens=6)
    together = generator.generate(requests, sampling)
    assert together == [generator.generate([one], sampling)[0] for one in requests]
    assert len({made.text for made in together}) > 1


def test_image_features_are_the_mean_over_all_tiles(generator):
    images = pictures()
    found = generator.image_features(images)
    for image, mean in zip(images, found, strict=True):
        made = generator.policy.preparer.encoder.processed(image)
        inputs = {name: made[name] for name in generator.policy.family.image_inputs}
        with torch.inference_mode():
            encoded = generator.policy.model.get_image_features(**inputs, return_dict=True)
        assert torch.allclose(mean, torch.cat(list(encoded.pooler_output)).mean(0), atol=1e-5)


def test_what_stands_around_tiles_is_never_generated(generator):
    preparer = generator.policy.preparer
    condition = preparer.condition(user("", images=1), [embed(pictures()[2])], None)
    bare = preparer.condition(user(""), [], None)
    around = set(condition.prompt_ids) - set(bare.prompt_ids)
    special = {i for i, t in preparer.tokenizer.added_tokens_decoder.items() if t.special}
    assert len(around & special) >= 3
    assert around & special <= set(generator._banned)
    assert preparer.end_token_id not in generator._banned


def test_a_response_ends_as_the_template_ends_a_turn(generator):
    """Idefics3's tokenizer names another token, which ends a text."""
    preparer = generator.policy.preparer
    end = {"internvl": "<|im_end|>"}.get(generator.policy.family.name, "<end_of_utterance>")
    ids = preparer.response(user("hi"), "a dog.")
    assert preparer.tokenizer.decode(ids[-1:]) == end
    assert ids.count(ids[-1]) == 1
    assert not set(ids[:-1]) & set(preparer.tokenizer.all_special_ids)
    assert ids[-1] in generator._end


def test_a_tile_that_the_model_would_drop_is_refused(tmp_path):
    """Black without a mean to subtract is zero, which Idefics3 takes for padding."""
    path = TinyModel(output=str(tmp_path / "m"), family="smolvlm", pixel_mean=0.0).build()
    preparer = load_processor(str(path))
    black = embed(Image.new("RGB", (32, 32)))
    with pytest.raises(MediaError, match=re.escape("take for padding")):
        preparer.condition(user("hi", images=1), [black], None)
    dark = embed(Image.new("RGB", (32, 32), (1, 0, 0)))
    assert preparer.condition(user("hi", images=1), [dark], None).num_image_tokens == 5 * 16
