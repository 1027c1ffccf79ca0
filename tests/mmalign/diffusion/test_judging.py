"""Judges of pictures: each number computed again by plain library calls, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import load_file, save_file

from mmalign.clip_encoders import OpenClipModel, TransformersClip
from mmalign.diffusion.judging import Aesthetic, AnyJudge, ClipScore, HPSv2, PickScore
from mmalign.diffusion.tiny import TinyPipeline, _tokenizer
from mmalign.errors import MediaError, ModelError

WORDS = ("a", "bold", "seven", "slanted", "red", "cup")
PROMPTS = ["a bold seven", "a red cup", "a", "slanted cup on a 7-inch table!", "a bold seven"]
SIZE, SCALE = 32, 57.0
PREPROCESSOR: Any = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}
OPEN_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {
        "image_size": SIZE,
        "layers": 2,
        "width": 64,
        "head_width": 32,
        "patch_size": 8,
    },
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
HEAD_KEYS = (0, 2, 4, 6, 7)


def picture(seed: int, width: int = 40, height: int = 40) -> Image.Image:
    """A blurred pattern, so that resizing and cropping matter."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


PICTURES = [picture(0), picture(1, 90, 50), picture(2, 33, 70), picture(3, 32, 32), picture(4)]


def tokenizer_of(folder: Path, words: tuple[str, ...] = WORDS) -> Any:
    return _tokenizer(TinyPipeline(output=folder, words=words))


def save_clip(folder: Path, width: int) -> str:
    """A small CLIP with random weights, saved as transformers saves it, processor and all."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    tokenizer = tokenizer_of(folder)
    tower = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "initializer_factor": 3.0,
    }
    config = CLIPConfig(
        projection_dim=width,
        text_config={
            **tower,
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config={**tower, "image_size": SIZE, "patch_size": 8},
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPModel(config)
    model.logit_scale.data.fill_(math.log(SCALE))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(**PREPROCESSOR).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_clip(tmp_path_factory.mktemp("judges") / "clip", 16)


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """As wide as the CLIP that LAION's head reads."""
    return save_clip(tmp_path_factory.mktemp("judges") / "wide", 768)


@pytest.fixture(scope="module")
def head_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """LAION's file: five linear layers, under the numbers that the dropouts between leave them."""
    generator = torch.Generator().manual_seed(0)
    sizes = (768, 1024, 128, 64, 16, 1)
    state = {}
    for key, rows, columns in zip(HEAD_KEYS, sizes[1:], sizes, strict=False):
        weight = torch.randn(rows, columns, generator=generator) / math.sqrt(columns)
        state[f"layers.{key}.weight"] = weight
        state[f"layers.{key}.bias"] = torch.randn(rows, generator=generator)
    path = tmp_path_factory.mktemp("judges") / "sac+logos+ava1-l14-linearMSE.pth"
    torch.save(state, path)
    return str(path)


@pytest.fixture(scope="module")
def architecture(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("judges") / "small-hps-for-tests.json"
    path.write_text(json.dumps(OPEN_CLIP))
    return str(path)


@pytest.fixture(scope="module")
def small(architecture: str) -> tuple[Any, Any, Any]:
    """A small open_clip model, its transform and its tokenizer, by open_clip alone."""
    import open_clip

    open_clip.add_model_config(Path(architecture))
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model, _, transform = open_clip.create_model_and_transforms(Path(architecture).stem)
    return model.eval(), transform, open_clip.get_tokenizer(Path(architecture).stem)


@pytest.fixture(scope="module")
def checkpoint(small: tuple[Any, Any, Any], tmp_path_factory: pytest.TempPathFactory) -> str:
    """As HPS's files are: the weights under "state_dict", beside other things."""
    path = tmp_path_factory.mktemp("judges") / "HPS_v2.1_compressed.pt"
    torch.save({"epoch": 3, "state_dict": small[0].state_dict()}, path)
    return str(path)


@pytest.fixture
def judges(clip_folder, wide_folder, head_file, architecture, checkpoint) -> list[Any]:
    """The config of every judge, with every library."""
    weights = OpenClipModel(model=architecture, pretrained=checkpoint)
    return [
        PickScore(model=clip_folder, processor=clip_folder, device="cpu"),
        HPSv2(checkpoint=checkpoint, model=architecture, device="cpu"),
        Aesthetic(head=head_file, clip=wide_folder, device="cpu"),
        ClipScore(clip=TransformersClip(model=clip_folder), device="cpu"),
        ClipScore(clip=weights, device="cpu"),
    ]


def cosines(small: tuple[Any, Any, Any], transform: Any) -> list[float]:
    """One pair at a time, by open_clip alone."""
    model, _, tokenize = small
    found = []
    with torch.inference_mode():
        for prompt, image in zip(PROMPTS, PICTURES, strict=True):
            seen, asked = model.encode_image(transform(image)[None]), tokenize([prompt])
            asked = model.encode_text(asked)
            found.append(float(torch.nn.functional.cosine_similarity(seen, asked)))
    return found


def logits(folder: str) -> list[float]:
    """exp(logit_scale) * cosine, one pair at a time, by transformers alone."""
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

    model = CLIPModel.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    found = []
    for prompt, image in zip(PROMPTS, PICTURES, strict=True):
        inputs = tokenizer([prompt], return_tensors="pt") | processor([image], return_tensors="pt")
        with torch.inference_mode():
            found.append(float(model(**inputs).logits_per_image))
    return found


def test_pick_score_is_the_logit_not_the_cosine(clip_folder: str) -> None:
    judge = PickScore(model=clip_folder, processor=clip_folder, device="cpu").load()
    scores = judge.score(PROMPTS, PICTURES)
    assert scores == pytest.approx(logits(clip_folder), abs=1e-4)
    assert max(map(abs, scores)) > 1, "a cosine is at most 1"
    assert len({round(score, 2) for score in scores}) == len(scores)
    assert all(type(score) is float for score in scores)
    assert judge.name == f"pick_score:{clip_folder}"


def test_hps_is_a_hundred_cosines_of_the_whole_picture(small, architecture, checkpoint) -> None:
    def whole(image: Image.Image) -> torch.Tensor:
        """The longer side made the model's, the rest black, as in HPS's released code."""
        scale = SIZE / max(image.size)
        width, height = (round(side * scale) for side in image.size)
        canvas = Image.new("RGB", (SIZE, SIZE))
        inner = image.resize((width, height), Image.Resampling.BICUBIC)
        canvas.paste(inner, ((SIZE - width) // 2, (SIZE - height) // 2))
        pixels = torch.from_numpy(np.asarray(canvas) / 255).float().permute(2, 0, 1)
        mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
        return (pixels - mean) / torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]

    judge = HPSv2(checkpoint=checkpoint, model=architecture, device="cpu").load()
    scores = judge.score(PROMPTS, PICTURES)
    assert scores == pytest.approx([100 * c for c in cosines(small, whole)], abs=1e-3)
    cropped = [100 * c for c in cosines(small, small[1])]
    assert scores[0] == pytest.approx(cropped[0], abs=1e-3), "a square has nothing to cut"
    assert abs(scores[1] - cropped[1]) > 0.01
    assert judge.name == f"hps_v2:{architecture}:{checkpoint}"


def test_clip_score_is_a_hundred_cosines_and_never_negative(
    small, architecture, checkpoint, clip_folder, tmp_path
) -> None:
    by_transformers = ClipScore(clip=TransformersClip(model=clip_folder), device="cpu").load()
    wanted = [max(0.0, 100 * logit / SCALE) for logit in logits(clip_folder)]
    assert by_transformers.score(PROMPTS, PICTURES) == pytest.approx(wanted, abs=1e-3)
    assert by_transformers.name == f"clip_score:transformers:{clip_folder}"

    found = cosines(small, small[1])
    state = small[0].state_dict()
    torch.save(state | {"text_projection": -state["text_projection"]}, tmp_path / "turned.pt")
    for path, sign in ((checkpoint, 1), (str(tmp_path / "turned.pt"), -1)):
        judge = ClipScore(
            clip=OpenClipModel(model=architecture, pretrained=path), device="cpu"
        ).load()
        wanted = [max(0.0, sign * 100 * cosine) for cosine in found]
        assert judge.score(PROMPTS, PICTURES) == pytest.approx(wanted, abs=1e-3)
        assert judge.name == f"clip_score:open_clip:{architecture}:{path}"
    assert any(cosine != 0 for cosine in found)


def test_the_aesthetic_head_is_linear_on_unit_embeddings_and_reads_no_prompt(
    wide_folder: str, head_file: str
) -> None:
    from transformers import AutoImageProcessor, CLIPModel

    judge = Aesthetic(head=head_file, clip=wide_folder, device="cpu").load()
    scores = judge.score(PROMPTS, PICTURES)
    assert scores == judge.score(["anything else"] * 5, PICTURES), "and dropout is off"

    model: Any = CLIPModel.from_pretrained(wide_folder).eval()
    processor = AutoImageProcessor.from_pretrained(wide_folder, backend="pil")
    state = {k: v.double().numpy() for k, v in torch.load(head_file).items()}
    for image, score in zip(PICTURES, scores, strict=True):
        with torch.inference_mode():
            pixels = processor([image], return_tensors="pt")["pixel_values"]
            features = model.get_image_features(pixels).pooler_output[0].double().numpy()
        values = features / np.linalg.norm(features)
        for key in HEAD_KEYS:
            values = state[f"layers.{key}.weight"] @ values + state[f"layers.{key}.bias"]
        assert score == pytest.approx(float(values[0]), abs=1e-4)
    assert judge.name == f"aesthetic:{head_file}:{wide_folder}"


def test_a_score_depends_on_its_pair_alone(judges) -> None:
    for config in judges:
        judge = config.load()
        scores = judge.score(PROMPTS, PICTURES)
        for batch_size in (1, 2):
            again = config.model_copy(update={"batch_size": batch_size}).load()
            assert again.score(PROMPTS, PICTURES) == pytest.approx(scores, abs=1e-3), config.name
        turned = judge.score(PROMPTS[::-1], PICTURES[::-1])
        assert turned[::-1] == pytest.approx(scores, abs=1e-3)
        assert judge.score(PROMPTS[3:4], PICTURES[3:4]) == pytest.approx(scores[3:4], abs=1e-3)


def test_no_pictures_and_unequal_lists(judges) -> None:
    for config in judges:
        judge = config.load()
        assert judge.score([], []) == []
        with pytest.raises(ValueError, match="2 prompts for 1 pictures"):
            judge.score(PROMPTS[:2], PICTURES[:1])
        with pytest.raises(ValueError, match="0 prompts for 1 pictures"):
            judge.score([], PICTURES[:1])


def test_a_long_prompt_is_cut_at_77_tokens(judges) -> None:
    """Start, 75 words of one token each, end."""
    for config in (judge for judge in judges if judge.name != "aesthetic"):
        judge = config.load()
        lengths = (200, 75, 74)
        long, exact, short = judge.score(
            [" ".join((["a", "red", "cup"] * 80)[:n]) for n in lengths], PICTURES[:1] * 3
        )
        assert long == pytest.approx(exact, abs=1e-3)
        if exact:
            assert abs(exact - short) > 1e-2


def test_pictures_of_any_mode_and_size(judges) -> None:
    """Modes are read as datasets' pictures are: transparent is white, 16 bits are scaled."""
    grey = PICTURES[0].convert("L")
    clear = PICTURES[0].copy()
    clear.putalpha(0)
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    pairs = [
        (grey, grey.convert("RGB")),
        (clear, Image.new("RGB", clear.size, "white")),
        (deep, grey.convert("RGB")),
        (PICTURES[0].convert("P"), PICTURES[0].convert("P").convert("RGB")),
        (PICTURES[0].convert("1"), PICTURES[0].convert("1").convert("RGB")),
        (PICTURES[0].convert("CMYK"), PICTURES[0].convert("CMYK").convert("RGB")),
        (Image.new("RGB", (1, 1), "red"), Image.new("RGB", (50, 50), "red")),
        (picture(1, 300, 6), picture(1, 300, 6)),
    ]
    for config in judges:
        judge = config.load()
        given, wanted = (
            judge.score(["a cup"] * len(pairs), [pair[side] for pair in pairs]) for side in (0, 1)
        )
        assert given == pytest.approx(wanted, abs=1e-3), config.name
        with pytest.raises(MediaError, match="picture 1: has floating-point pixels"):
            judge.score(["a"] * 2, [grey, grey.convert("F")])
        with pytest.raises(MediaError, match="picture 0: is too narrow to judge; got 300x5"):
            judge.score(["a"], [picture(1, 300, 5)])


def test_random_weights_must_be_written_out_and_are_named(architecture, wide_folder) -> None:
    for given in ({"name": "hps_v2"}, {"name": "aesthetic"}, {"name": "clip_score"}):
        with pytest.raises(ValidationError, match="Field required"):
            TypeAdapter(AnyJudge).validate_python(given)
    for clip in ({"library": "open_clip", "model": "ViT-H-14"}, {"model": "ViT-H-14"}):
        with pytest.raises(ValidationError):
            TypeAdapter(AnyJudge).validate_python({"name": "clip_score", "clip": clip})
    judge = TypeAdapter(AnyJudge).validate_python(
        {"name": "hps_v2", "checkpoint": None, "model": architecture, "device": "cpu"}
    )
    assert judge.load().name.endswith(":random")
    assert judge.load().score(PROMPTS, PICTURES) == judge.load().score(PROMPTS, PICTURES)
    weights = OpenClipModel(model=architecture, pretrained=None)
    assert ClipScore(clip=weights, device="cpu").load().name.endswith(":random")
    assert ":random:" in Aesthetic(head=None, clip=wide_folder, device="cpu").load().name


def damaged(folder: str, tmp_path: Path) -> Path:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    return copy


def refuse(config: Any, *parts: str) -> None:
    """Its load is a ModelError that holds all of `parts`."""
    with pytest.raises(ModelError) as caught:
        config.load()
    for part in parts:
        assert part in str(caught.value), caught.value


def test_a_transformers_folder_that_is_none_or_damaged(clip_folder: str, tmp_path: Path) -> None:
    def judge(path: Path) -> PickScore:
        return PickScore(model=str(path), processor=clip_folder, device="cpu")

    refuse(judge(tmp_path / "absent"), "absent", "no such folder")
    copy = damaged(clip_folder, tmp_path)
    weights = copy / "model.safetensors"
    state = load_file(weights)
    save_file({k: v for k, v in state.items() if k != "logit_scale"}, weights, {"format": "pt"})
    refuse(judge(copy), str(copy), "missing", "logit_scale")
    weights.write_bytes((Path(clip_folder) / weights.name).read_bytes()[:-500])
    refuse(judge(copy), str(copy), "cannot be loaded")
    wide = state["visual_projection.weight"].repeat(2, 1)
    save_file(state | {"visual_projection.weight": wide}, weights, {"format": "pt"})
    refuse(judge(copy), str(copy), "visual_projection.weight")
    (copy / "config.json").write_text(json.dumps({"model_type": "bert"}))
    refuse(judge(copy), "is another model; got bert; wanted clip")
    (copy / "config.json").write_text("{")
    refuse(judge(copy), str(copy), "cannot be loaded")


def test_a_processor_of_another_model(clip_folder: str, tmp_path: Path) -> None:
    def judge(path: Path) -> PickScore:
        return PickScore(model=clip_folder, processor=str(path), device="cpu")

    copy = damaged(clip_folder, tmp_path)
    for words in (WORDS[:-1], (*WORDS, "plate")):
        tokenizer_of(tmp_path, words).save_pretrained(copy)
        refuse(judge(copy), str(copy), "tokenizer is not this model's", clip_folder)
    tokenizer_of(tmp_path).save_pretrained(copy)
    judge(copy).load()
    stored = json.loads((copy / "preprocessor_config.json").read_text())
    larger = stored | {"crop_size": {"height": 40, "width": 40}, "size": {"shortest_edge": 40}}
    (copy / "preprocessor_config.json").write_text(json.dumps(larger))
    refuse(judge(copy), str(copy), "got 40x40", "wanted 32x32")
    (copy / "preprocessor_config.json").unlink()
    refuse(judge(copy), str(copy), "preprocessor_config.json")


def test_an_open_clip_checkpoint_that_is_none_or_damaged(
    architecture: str, checkpoint: str, tmp_path: Path
) -> None:
    def judge(path: Any) -> HPSv2:
        return HPSv2(checkpoint=str(path), model=architecture, device="cpu")

    path = tmp_path / "weights.pt"
    refuse(judge(path), "weights.pt: no such checkpoint", "HPS_v2.1_compressed.pt")
    refuse(judge("laion2b_s32b_b79k"), "no such checkpoint")
    state = torch.load(checkpoint)["state_dict"]
    contents = (b"", b"not weights", Path(checkpoint).read_bytes()[:-900])
    for content in contents:
        path.write_bytes(content)
        refuse(judge(path), "weights.pt", "cannot be loaded")
    for wrong in (
        {"state_dict": {}},
        {"state_dict": {k: v for k, v in state.items() if k != "visual.proj"}},
        {"state_dict": state | {"visual.proj": torch.zeros(64, 8)}},
        [1, 2],
    ):
        torch.save(wrong, path)
        refuse(judge(path), "weights.pt", "cannot be loaded")
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    refuse(HPSv2(checkpoint=checkpoint, model=str(broken), device="cpu"), "broken.json")
    judge(checkpoint).load()  # The broken one is forgotten.


def test_open_clip_weights_for_another_activation_are_refused() -> None:
    """open_clip warns, and goes on with a model that was never trained."""
    for model, tag in (("ViT-L-14", "openai"), ("ViT-B-32", "laion400m_e32")):
        weights = OpenClipModel(model=model, pretrained=tag)
        refuse(weights, f"open_clip:{model}:{tag}", "QuickGELU", f"model={model}-quickgelu")


def test_an_open_clip_folder_brings_its_own_weights(small, tmp_path: Path) -> None:
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": OPEN_CLIP, "preprocess_cfg": {}})
    )
    model = f"local-dir:{tmp_path}"
    refuse(OpenClipModel(model=model, pretrained=None), model, "cannot be loaded")
    save_file(small[0].state_dict(), tmp_path / "open_clip_model.safetensors")
    refuse(OpenClipModel(model=model, pretrained="openai"), "brings its own weights")
    weights = OpenClipModel(model=model, pretrained=None)
    judge = ClipScore(clip=weights, device="cpu").load()
    wanted = [max(0.0, 100 * cosine) for cosine in cosines(small, small[1])]
    assert judge.score(PROMPTS, PICTURES) == pytest.approx(wanted, abs=1e-3)
    assert judge.name == f"clip_score:open_clip:{model}"


def test_a_head_that_is_none_or_of_another_model(
    wide_folder: str, clip_folder: str, head_file: str, tmp_path: Path
) -> None:
    path = tmp_path / "head.pth"

    def judge(clip: str = wide_folder, head: Any = path) -> Aesthetic:
        return Aesthetic(head=str(head), clip=clip, device="cpu")

    refuse(judge(), "head.pth", "768-1024-128-64-16-1", "No such file")
    state = torch.load(head_file)
    with_relu = {
        key.replace(f".{old}.", f".{new}."): value
        for old, new in zip(HEAD_KEYS, (0, 3, 6, 9, 11), strict=True)
        for key, value in state.items()
        if f".{old}." in key
    }
    for wrong in (with_relu, state | {"layers.7.bias": torch.zeros(2)}, {"a": 1}, [state]):
        torch.save(wrong, path)
        refuse(judge(), "head.pth", "768-1024-128-64-16-1")
    path.write_bytes(b"not weights")
    refuse(judge(), "head.pth", "cannot be loaded")
    refuse(judge(clip_folder, head_file), head_file, "openai/clip-vit-large-patch14")


def test_a_score_that_is_no_number_is_never_returned(small, architecture, tmp_path) -> None:
    state = {k: v.clone() for k, v in small[0].state_dict().items()}
    state["visual.proj"][0, 0] = math.nan
    torch.save(state, tmp_path / "nan.pt")
    judge = HPSv2(checkpoint=str(tmp_path / "nan.pt"), model=architecture, device="cpu").load()
    with pytest.raises(ModelError, match=r"nan.pt: gave a score that is not finite; got nan"):
        judge.score(PROMPTS, PICTURES)


def test_half_precision_is_near_and_returns_floats(judges) -> None:
    for config in judges:
        scores = config.load().score(PROMPTS, PICTURES)
        rough = config.model_copy(update={"precision": "bf16"}).load().score(PROMPTS, PICTURES)
        assert rough == pytest.approx(scores, abs=6), config.name
        assert all(type(score) is float for score in rough)
