"""Attention of backbones: held to one kernel in every layer, tried first, refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from mmalign.diffusion import attention
from mmalign.diffusion.attention import head_widths, trial, use_attention
from mmalign.diffusion.config import DiffusionConfig
from mmalign.diffusion.load import load_pipeline, load_policy
from mmalign.diffusion.tiny import TinyPipeline
from mmalign.errors import ModelError

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["sdxl", "sd", "sd3"])
def folder(request, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / request.param
    return TinyPipeline(output=path, pipeline=request.param).build()


@pytest.fixture
def kernels(monkeypatch) -> list[bool]:
    """Whether each call of SDPA was held to the flash kernel."""
    held: list[bool] = []

    def watched(*args, **kwargs):
        others = torch._C._get_math_sdp_enabled() or torch._C._get_mem_efficient_sdp_enabled()
        held.append(torch._C._get_flash_sdp_enabled() and not others)
        return scaled_dot_product_attention(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    return held


def asked(model, kind: str) -> torch.Tensor:
    """The backbone's answer to something made up."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 16, 16, generator=generator)
    states = torch.randn(2, 77, {"sd": 32}.get(kind, 64), generator=generator)
    times = torch.tensor([3.0, 700.0])
    if kind == "sd3":
        pooled = torch.randn(2, 64, generator=generator)
        return model(latents, states, pooled, times, return_dict=False)[0]
    added = {"text_embeds": torch.ones(2, 32), "time_ids": torch.full((2, 6), 32.0)}
    return model(latents, times, states, added_cond_kwargs=added, return_dict=False)[0]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_flash_alone_runs_in_every_layer_forward_and_again(folder, kernels, checkpointing):
    config = DiffusionConfig(path=str(folder), gradient_checkpointing=checkpointing)
    plain, flash = (load_policy(config).model.train() for _ in range(2))
    outputs = [asked(plain, folder.name)]
    assert kernels
    assert not any(kernels)
    layers = len(kernels)
    kernels.clear()
    assert use_attention(flash, "flash", CPU, torch.float32) == "flash"
    kernels.clear()  # Those of the trial.
    outputs.append(asked(flash, folder.name))
    assert kernels == [True] * layers
    for output in outputs:
        output.square().sum().backward()
    # Where layers are checkpointed, all of them ran again.
    again = [held for held in kernels if held]
    assert len(again) == (2 * layers if checkpointing else layers)
    assert torch.allclose(outputs[0], outputs[1], rtol=1e-4, atol=1e-5)
    for (name, one), other in zip(plain.named_parameters(), flash.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None and other.grad is not None:
            assert torch.allclose(one.grad, other.grad, rtol=1e-2, atol=1e-3), name


def test_a_pipeline_is_loaded_with_its_attention(folder, kernels):
    pipeline = load_pipeline(DiffusionConfig(path=str(folder), attention="flash"), "cpu")
    kernels.clear()
    model = pipeline.components["transformer" if folder.name == "sd3" else "unet"]
    with torch.no_grad():
        asked(model, folder.name)
    assert kernels
    assert all(kernels)
    with pytest.raises(ModelError, match="'xformers' cannot be used here: its kernels need CUDA"):
        load_pipeline(DiffusionConfig(path=str(folder), attention="xformers"), "cpu")


def unet():
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),  # type: ignore[arg-type]
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),  # type: ignore[arg-type]
        attention_head_dim=(2, 4),  # type: ignore[arg-type]
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
    )


def test_every_head_width_is_tried():
    assert head_widths(unet()) == [4]


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda q, k, v: scaled_dot_product_attention(q, k, v) * 1.1, "its numbers are wrong"),
        # Right but for its gradient.
        (
            lambda q, k, v: scaled_dot_product_attention(q, k, (v + v.detach()) / 2),
            "its numbers are wrong",
        ),
        (lambda q, k, v: 1 / 0, "division by zero"),
    ],
)
def test_what_fails_its_trial_is_refused_with_its_reason(monkeypatch, call, told):
    monkeypatch.setitem(attention._CALL, "flash", call)
    trial.cache_clear()
    try:
        with pytest.raises(ModelError, match=f"'flash' cannot be used here: {told}"):
            use_attention(unet(), "flash", CPU, torch.float32)
    finally:
        trial.cache_clear()


def test_a_kernel_of_torch_says_why_it_is_none():
    def held(query, key, value):
        return attention._flash(query, key, value[..., :3])

    attention._CALL["other"] = held
    try:
        reason = trial("other", "cpu", torch.float32, 4)
    finally:
        del attention._CALL["other"]
    assert reason is not None
    assert "No available kernel" in reason


def test_flash_on_cuda_computes_in_16_bits_alone():
    told = trial("flash", "cuda", torch.float32, 64)
    assert told is not None
    assert "16 bits" in told


def test_only_auto_goes_on_to_the_next(monkeypatch):
    """As on a GPU where the flash kernel does not run."""
    works = {"flash": "no kernel", "xformers": None}
    monkeypatch.setattr(attention, "trial", lambda name, *_: works[name])
    switched: list[str] = []
    monkeypatch.setitem(attention._SWITCH, "xformers", lambda model: switched.append("xformers"))
    cuda, model = torch.device("cuda"), unet()
    assert use_attention(model, "auto", cuda, torch.bfloat16) == "xformers"
    assert switched == ["xformers"]
    with pytest.raises(ModelError, match="no kernel"):
        use_attention(model, "flash", cuda, torch.bfloat16)
    works["xformers"] = "not built for this torch"
    assert use_attention(model, "auto", cuda, torch.bfloat16) == "sdpa"
    assert use_attention(model, "auto", CPU, torch.bfloat16) == "sdpa"


def test_xformers_is_switched_on_by_diffusers(monkeypatch):
    model, called = unet(), []
    monkeypatch.setattr(
        model, "enable_xformers_memory_efficient_attention", lambda: called.append(True)
    )
    monkeypatch.setattr(attention, "trial", lambda *_: None)
    assert use_attention(model, "xformers", torch.device("cuda"), torch.bfloat16) == "xformers"
    assert called == [True]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [40, 64, 160])
def test_kernels_on_a_gpu(dtype, width):
    """SDXL's heads are 64 wide, those of Stable Diffusion 1.x 40, 80 and 160."""
    assert trial("flash", "cuda", dtype, width) is None
