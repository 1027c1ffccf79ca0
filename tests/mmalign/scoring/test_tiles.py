"""Families that cut a picture into tiles: how many tokens it takes, known without the model."""

import numpy as np
import pytest
import torch
from PIL import Image

from mmalign.media import embed
from mmalign.models.load import ModelConfig, Policy, load_policy
from mmalign.models.tiny import TinyModel
from mmalign.records import user
from mmalign.scoring.plan import joined

# Width and height: squares, the shapes of tiles, shapes between them, and very long ones.
SIZES = [(32, 32), (64, 32), (31, 97), (40, 16), (16, 40), (200, 150), (150, 203), (9, 300), (5, 4)]


@pytest.fixture(scope="module", params=["llava_next", "llava_onevision"])
def policy(request, tmp_path_factory) -> Policy:
    folder = tmp_path_factory.mktemp("tiny") / request.param
    TinyModel(output=str(folder), family=request.param).build()
    return load_policy(ModelConfig(path=str(folder)))


def picture(width: int, height: int) -> Image.Image:
    pixels = np.random.RandomState(0).randint(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_picture_takes_as_many_tokens_as_the_processor_and_the_model_say(policy, size):
    image = picture(*size)
    condition = policy.preparer.condition(user("look", images=1), [embed(image)], None)
    made = policy.processor(text=[condition.text], images=[image], return_tensors="pt")
    assert condition.prompt_ids == made.input_ids[0].tolist()
    inputs = {name: made[name] for name in policy.family.image_inputs}
    with torch.no_grad():
        (features,) = policy.model.model.get_image_features(**inputs).pooler_output
    assert condition.num_image_tokens == len(features)


def test_pictures_of_other_numbers_of_tiles_are_joined_as_the_processor_joins_them(tmp_path):
    """LLaVA-NeXT keeps the tiles of each of several pictures in a prompt."""
    TinyModel(output=str(tmp_path / "next"), family="llava_next").build()
    policy = load_policy(ModelConfig(path=str(tmp_path / "next")))
    images = [picture(64, 32), picture(64, 64), picture(32, 96)]
    prompt = user("look", images=3)
    condition = policy.preparer.condition(prompt, [embed(image) for image in images], None)
    made = policy.processor(text=[condition.text], images=images, return_tensors="pt")
    assert condition.prompt_ids == made.input_ids[0].tolist()
    assert len({one.inputs["pixel_values"].shape[1] for one in condition.images}) == 3
    for name in policy.family.image_inputs:
        own = joined(name, [one.inputs[name] for one in condition.images])
        assert torch.equal(own, made[name])
