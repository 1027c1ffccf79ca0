"""Small pipelines of every known class: loaded, asked, saved, and loaded by plain diffusers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mmalign.diffusion.backbones import SIZES
from mmalign.diffusion.config import DiffusionConfig, ImageLora
from mmalign.diffusion.denoiser import DenoisePlan, Denoiser
from mmalign.diffusion.load import load_encoders, load_pipeline, load_policy
from mmalign.diffusion.tiny import TinyPipeline
from mmalign.errors import ModelError

KINDS = ("sdxl", "sd", "sd3")
WORDS = ("a", "bold", "seven")


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / request.param
    return TinyPipeline(output=path, pipeline=request.param, words=WORDS).build()


def plain(folder: Path):
    """As diffusers loads it, with nothing of ours."""
    from diffusers import DiffusionPipeline

    absent = {"text_encoder_3": None, "tokenizer_3": None}
    return DiffusionPipeline.from_pretrained(folder, **(absent if folder.name == "sd3" else {}))


def plan_of(folder: Path, backbone, count: int = 2) -> DenoisePlan:
    pipeline = load_encoders(DiffusionConfig(path=str(folder)))
    prompts = ["a bold seven", "a seven", "something else"][:count]
    with torch.no_grad():
        conditions = backbone.encode(pipeline, prompts)
    if backbone.sizes:
        conditions[SIZES] = torch.tensor([[40, 50, 0, 4, 32, 32], [32, 32, 0, 0, 32, 32.0]])
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(count, 4, 16, 16, generator=generator) for _ in range(2))
    return DenoisePlan(
        latents=latents, noise=noise, steps=torch.tensor([3, 700]), conditions=conditions
    )


def test_a_word_is_one_token_and_others_are_spelled(folder):
    tokenizer = load_encoders(DiffusionConfig(path=str(folder))).tokenizer
    assert len(tokenizer("a bold seven").input_ids) == 5
    assert len(tokenizer("a cold seven").input_ids) == 8
    assert len(tokenizer("a bold seven " * 40, truncation=True).input_ids) == 77


def test_the_error_is_that_of_the_pipelines_own_parts(folder):
    policy = load_policy(DiffusionConfig(path=str(folder)))
    plan = plan_of(folder, policy.backbone)
    errors = Denoiser(policy.model, policy.backbone, policy.schedule)(plan).errors
    assert errors.shape == (2,)
    for place in range(2):
        # Each image alone has the same error as in the batch.
        one = DenoisePlan(
            latents=plan.latents[place : place + 1],
            noise=plan.noise[place : place + 1],
            steps=plan.steps[place : place + 1],
            conditions={name: v[place : place + 1] for name, v in plan.conditions.items()},
        )
        alone = Denoiser(policy.model, policy.backbone, policy.schedule)(one).errors
        assert torch.allclose(alone, errors[place : place + 1], rtol=1e-4)


def test_prompt_size_and_timestep_all_matter(folder):
    policy = load_policy(DiffusionConfig(path=str(folder)))
    denoiser = Denoiser(policy.model, policy.backbone, policy.schedule)
    plan = plan_of(folder, policy.backbone)
    errors = denoiser(plan).errors
    for name, values in plan.conditions.items():
        changed = {**plan.conditions, name: values.flip(0)}
        other = DenoisePlan(
            latents=plan.latents, noise=plan.noise, steps=plan.steps, conditions=changed
        )
        assert not torch.equal(denoiser(other).errors, errors), name


def test_min_snr_multiplies_the_errors(folder):
    policy = load_policy(DiffusionConfig(path=str(folder)))
    plan = plan_of(folder, policy.backbone)
    plain = Denoiser(policy.model, policy.backbone, policy.schedule)(plan).errors
    weighed = Denoiser(policy.model, policy.backbone, policy.schedule, min_snr_gamma=5.0)
    if policy.schedule.prediction == "flow":
        with pytest.raises(ModelError, match="not defined"):
            weighed(plan)
        return
    weights = policy.schedule.min_snr_weights(plan.steps, 5.0)
    assert torch.allclose(weighed(plan).errors, plain * weights)


def test_a_trained_backbone_is_a_pipeline_for_plain_diffusers(folder, tmp_path):
    policy = load_policy(DiffusionConfig(path=str(folder)))
    with torch.no_grad():
        next(policy.model.parameters()).mul_(2)
    saved = tmp_path / folder.name
    policy.save(saved)
    again = plain(saved)
    trained = getattr(again, policy.backbone.part)
    for (name, one), other in zip(
        policy.model.named_parameters(), trained.parameters(), strict=True
    ):
        assert torch.equal(one, other), name
    assert {file.name for file in saved.iterdir()} == {file.name for file in folder.iterdir()}


def test_an_adapter_loads_with_load_lora_weights(folder, tmp_path):
    config = DiffusionConfig(path=str(folder), lora=ImageLora(rank=4, alpha=2))
    policy = load_policy(config)
    denoiser = Denoiser(policy.model, policy.backbone, policy.schedule)
    plan = plan_of(folder, policy.backbone)
    before = denoiser(plan).errors
    before.sum().backward()  # Only the adapter has gradients.
    trained = {name for name, p in policy.model.named_parameters() if p.grad is not None}
    assert trained
    assert all("lora_" in name for name in trained)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.3)
    after = denoiser(plan).errors
    assert not torch.allclose(after, before)
    with policy.without_adapter():
        assert torch.equal(denoiser(plan).errors, before)
    assert {n for n, p in policy.model.named_parameters() if p.requires_grad} == trained

    policy.save(tmp_path / "adapter")
    theirs = plain(folder)
    theirs.load_lora_weights(str(tmp_path / "adapter"))
    ours = load_pipeline(DiffusionConfig(path=str(folder), adapter=str(tmp_path / "adapter")))
    for pipeline in (theirs, ours):
        loaded = getattr(pipeline, policy.backbone.part)
        found = Denoiser(loaded, policy.backbone, policy.schedule)(plan).errors
        assert torch.allclose(found, after, rtol=1e-4), type(pipeline)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"dtype": "bfloat16"}, "must be float32"),
        ({"adapter": "somewhere"}, "is for sampling"),
        ({"path": "no/such"}, "cannot be fetched|holds no pipeline"),
    ],
)
def test_what_cannot_train_is_refused(folder, changes, told):
    with pytest.raises(ModelError, match=told):
        load_policy(DiffusionConfig(**{"path": str(folder), **changes}))


def test_a_pipeline_of_another_class_is_refused(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "AudioPipeline"}')
    with pytest.raises(ModelError, match="not known here"):
        load_policy(DiffusionConfig(path=str(tmp_path)))
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_policy(DiffusionConfig(path=str(tmp_path)))


def saved_without(folder: Path, place: Path, *parts: str) -> Path:
    pipeline = plain(folder)
    pipeline.register_modules(**dict.fromkeys(parts))
    pipeline.save_pretrained(place)
    return place


def test_a_pipeline_without_what_encodes_its_prompts_is_refused(folder, tmp_path):
    needed = {"sd": "text_encoder", "sdxl": "text_encoder_2", "sd3": "text_encoder_2"}[folder.name]
    path = saved_without(folder, tmp_path / folder.name, needed)
    for load in (load_policy, load_encoders, load_pipeline):
        with pytest.raises(ModelError, match=f"was saved without {needed}, and"):
            load(DiffusionConfig(path=str(path)))


def test_sdxl_with_its_second_encoder_alone_is_for_a_unet_that_reads_it_alone(folder, tmp_path):
    if folder.name != "sdxl":
        return
    from diffusers import UNet2DConditionModel

    path = saved_without(folder, tmp_path / "sdxl", "text_encoder", "tokenizer")
    with pytest.raises(ModelError, match="text_encoder_2, 32 wide; wanted 64"):
        load_encoders(DiffusionConfig(path=str(path)))
    unet = plain(folder).unet.config | {"cross_attention_dim": 32}
    UNet2DConditionModel.from_config(unet).save_pretrained(path / "unet")
    policy = load_policy(DiffusionConfig(path=str(path)))
    plan = plan_of(path, policy.backbone)
    assert plan.conditions["encoder_hidden_states"].shape == (2, 77, 32)
    errors = Denoiser(policy.model, policy.backbone, policy.schedule)(plan).errors
    assert errors.isfinite().all()
