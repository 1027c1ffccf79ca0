"""Pictures of a pipeline: noise of their own, batches of any size, adapters, numbers not finite."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from mmalign.diffusion.config import DiffusionConfig
from mmalign.diffusion.prompts import ImagePrompt, read_prompts
from mmalign.diffusion.sampling import Draw, ImageSampler, ImageSampling, named, picture_of
from mmalign.diffusion.tiny import TinyPipeline
from mmalign.errors import DataError, ModelError
from mmalign.media import embed
from mmalign.records import ImagePreference
from mmalign.store import write_dataset

DRAWS = [Draw(id=str(n), prompt=["bold seven", "three"][n % 2]) for n in range(5)]


@pytest.fixture(scope="module", params=["sdxl", "sd", "sd3"])
def folder(request, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / request.param
    return TinyPipeline(output=path, pipeline=request.param, words=("bold", "seven")).build()


def sampler(folder: Path, **settings) -> ImageSampler:
    sampling = ImageSampling(**({"num_steps": 2, "guidance": 3.0, "size": 32} | settings))
    return ImageSampler.from_checkpoint(DiffusionConfig(path=str(folder)), sampling)


def arrays(pictures) -> np.ndarray:
    return np.stack([np.asarray(picture, int) for picture in pictures])


def test_a_picture_depends_on_its_own_seed_and_id_alone(folder):
    together = arrays(sampler(folder, batch_size=5).draw(DRAWS))
    apart = arrays(sampler(folder, batch_size=2).draw(DRAWS[::-1]))[::-1]
    assert np.abs(together - apart).max() <= 1
    assert together.shape == (5, 32, 32, 3)
    other = [Draw(id=draw.id, prompt=draw.prompt, seed=1) for draw in DRAWS]
    assert np.abs(arrays(sampler(folder).draw(other)) - together).max() > 20


def test_two_prompts_of_one_id_start_from_one_noise(folder):
    """With no step to speak of, what is drawn is the noise: the prompts hardly show."""
    one = [Draw(id="a", prompt="seven"), Draw(id="a", prompt="bold"), Draw(id="b", prompt="seven")]
    first, second, third = arrays(sampler(folder, num_steps=1, guidance=1.0).draw(one))
    assert np.abs(first - second).mean() < 0.5 * np.abs(first - third).mean()


def test_a_negative_prompt_and_guidance_change_the_picture(folder):
    plain = arrays(sampler(folder).draw(DRAWS[:1]))
    assert (arrays(sampler(folder, guidance=9.0).draw(DRAWS[:1])) != plain).any()
    assert (arrays(sampler(folder, negative_prompt="bold").draw(DRAWS[:1])) != plain).any()


def test_the_name_changes_with_any_part_of_the_weights(folder, tmp_path):
    before = named(DiffusionConfig(path=str(folder)))
    shutil.copytree(folder, tmp_path / folder.name)
    moved = named(DiffusionConfig(path=str(tmp_path / folder.name)))
    assert before.partition("@")[2] == moved.partition("@")[2]
    weights = next((tmp_path / folder.name / "vae").glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    after = named(DiffusionConfig(path=str(tmp_path / folder.name)))
    assert before.partition("@")[2] != after.partition("@")[2]


def test_numbers_that_are_not_finite_are_no_picture():
    pixels = torch.full((3, 4, 4), 0.5)
    assert np.asarray(picture_of(pixels, "here")).tolist() == np.full((4, 4, 3), 128).tolist()
    pixels[1, 2, 3] = float("nan")
    with pytest.raises(ModelError, match=r"not finite.*vae_dtype=float32"):
        picture_of(pixels, "here")


def test_prompts_are_read_from_lines_json_and_datasets(tmp_path):
    text = tmp_path / "prompts.txt"
    text.write_text("a cat\n\n  a dog \na cat\n")
    cat, dog = (
        ImagePrompt(id="line-00001", text="a cat"),
        ImagePrompt(id="line-00003", text="a dog"),
    )
    assert read_prompts(text) == [cat, dog]
    lines = tmp_path / "prompts.jsonl"
    lines.write_text('{"prompt": "a cat", "id": 7}\n{"caption": "a dog"}\n')
    assert read_prompts(lines) == [
        ImagePrompt(id="7", text="a cat"),
        ImagePrompt(id="line-00002", text="a dog"),
    ]
    from PIL import Image

    media = embed(Image.new("RGB", (4, 4)))
    rows = [
        ImagePreference(id=f"r{n}", prompt=prompt, chosen=media, rejected=media)
        for n, prompt in enumerate(["a cat", "a cat", "a dog"])
    ]
    write_dataset(tmp_path / "pairs", ImagePreference, rows)
    assert [prompt.id for prompt in read_prompts(tmp_path / "pairs")] == ["r0", "r2"]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.txt", "\n \n", "holds no prompt"),
        ("a.jsonl", '{"text": "a cat"}\n', "line 1.*has no prompt"),
        ("a.jsonl", "[1\n", "line 1.*is not JSON"),
        ("a.jsonl", '{"prompt": "a", "id": 1}\n{"prompt": "b", "id": 1}\n', "one id"),
        ("a.txt", "\ud800", "cannot be read"),
    ],
)
def test_prompts_that_cannot_be_used_are_errors(tmp_path, name, content, told):
    (tmp_path / name).write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(DataError, match=told):
        read_prompts(tmp_path / name)
    with pytest.raises(DataError, match="cannot be read"):
        read_prompts(tmp_path / "absent.txt")


def test_a_pipeline_of_a_class_without_backbone_draws_too(tmp_path):
    folder = TinyPipeline(output=tmp_path / "other", words=("seven",)).build()
    index = folder / "model_index.json"
    told = json.loads(index.read_text()) | {"_class_name": "StableDiffusionXLPAGPipeline"}
    index.write_text(json.dumps(told))
    drawing = sampler(folder)
    assert type(drawing.pipeline).__name__ == "StableDiffusionXLPAGPipeline"
    assert arrays(drawing.draw(DRAWS[:2])).shape == (2, 32, 32, 3)
    config = DiffusionConfig(path=str(folder), attention="flash")
    with pytest.raises(ModelError, match="attention of this class"):
        ImageSampler.from_checkpoint(config, ImageSampling())
    index.write_text(json.dumps(told | {"_class_name": "NoSuchPipeline"}))
    with pytest.raises(ModelError, match="cannot be loaded"):
        sampler(folder)
