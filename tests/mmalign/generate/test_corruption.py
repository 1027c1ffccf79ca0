"""What a corrupted request cannot see: for every family, pictures and clips, cached or not."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mmalign.clips import Clip
from mmalign.generate import local
from mmalign.generate.base import (
    Corruption,
    Generation,
    MaskImageTokens,
    NoisePixels,
    Request,
    Sampling,
)
from mmalign.generate.corrupt import noised, visible_tokens
from mmalign.generate.local import LocalGenerator
from mmalign.media import embed
from mmalign.models.families import FAMILIES
from mmalign.models.load import ModelConfig, base_model
from mmalign.models.tiny import TinyModel
from mmalign.records import Media, user

CASES = [
    (family.name, kind)
    for family in FAMILIES
    for kind in ("image", "clip")
    if kind == "image" or family.video_inputs
]
GREEDY = Sampling(max_new_tokens=6)


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> dict[str, str]:
    """A tiny checkpoint of each family."""
    folder = tmp_path_factory.mktemp("tiny")
    return {
        family.name: str(TinyModel(output=str(folder / family.name), family=family.name).build())
        for family in FAMILIES
    }


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(case))
def case(request, paths) -> Case:
    family, kind = request.param
    return Case(LocalGenerator.from_checkpoint(paths[family], batch_size=8), kind)


@dataclass
class Seen:
    """What the model was given and what it made: logits [B, steps, V], positions of each step."""

    inputs: dict[str, torch.Tensor]
    encoded: dict[str, Any]
    positions: list[torch.Tensor]
    logits: torch.Tensor
    new_ids: torch.Tensor
    answers: list[Generation] = field(default_factory=list)


@dataclass
class Case:
    """One family with one kind of media."""

    generator: LocalGenerator
    kind: str

    def request(
        self,
        seed: int,
        corruption: Corruption | None = None,
        *,
        text: str = "what is it?",
        prefill: str = "",
    ) -> Request:
        pixels = np.random.RandomState(seed).randint(0, 255, (4, 32, 32, 3), dtype=np.uint8)
        images, videos = (), ()
        if self.kind == "image":
            images: tuple[Media, ...] = (embed(Image.fromarray(pixels[0])),)
        else:
            times = (0.0, 0.5, 1.0, 1.5)
            videos: tuple[Clip, ...] = (
                Clip(
                    frames=pixels, indices=(0, 1, 2, 3), timestamps=times, source_fps=2.0,
                    num_source_frames=4, duration_seconds=2.0, key=f"random-{seed}",
                ),
            )  # fmt: skip
        return Request(
            id=f"request-{seed}",
            prompt=user(text, images=len(images), videos=len(videos)),
            images=images,
            videos=videos,
            prefill=prefill,
            corruption=corruption,
        )

    def watch(self, *requests: Request, sampling: Sampling = GREEDY, **changes: Any) -> Seen:
        """Answer in one batch. `changes` are made to the settings of transformers' generate."""
        model = self.generator.policy.model
        inputs: dict[str, torch.Tensor] = {}
        encoded: dict[str, Any] = {}
        scores: list[torch.Tensor] = []
        positions: list[torch.Tensor] = []
        outs: list[torch.Tensor] = []
        generate, ban = model.generate, local._ban

        def spy(**given: Any) -> torch.Tensor:
            inputs.update({k: v for k, v in given.items() if isinstance(v, torch.Tensor)})
            encoded.update(given["mm_encoder_outputs"])
            for name, value in changes.items():
                setattr(given["generation_config"], name, value)
            outs.append(generate(**given))
            return outs[-1][:, given["input_ids"].shape[1] :]

        def recording(ids: list[int]) -> Any:
            process = ban(ids)

            def record(input_ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
                scores.append(logits.clone())
                return process(input_ids, logits)

            return record

        def positions_of(module: Any, args: Any, given: dict[str, Any]) -> None:
            positions.append(given["position_ids"].clone())

        text_model = base_model(model).get_decoder()
        hook = text_model.register_forward_pre_hook(positions_of, with_kwargs=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model, "generate", lambda **given: (spy(**given), outs[-1])[1])
            patch.setattr(local, "_ban", recording)
            answers = self.generator.generate(requests, sampling)
        hook.remove()
        assert len(outs) == 1
        return Seen(
            inputs=inputs,
            encoded=encoded,
            positions=positions,
            logits=torch.stack(scores, 1),
            new_ids=outs[0][:, inputs["input_ids"].shape[1] :],
            answers=answers,
        )

    def is_media(self, ids: torch.Tensor) -> torch.Tensor:
        preparer = self.generator.policy.preparer
        return ids == (preparer.image_token_id if self.kind == "image" else preparer.video_token_id)


ALL = MaskImageTokens(threshold=1.0, key="k")
HALF = MaskImageTokens(threshold=0.5, key="k")


@pytest.mark.parametrize("prefill", ["", "It is a"])
def test_what_is_hidden_whole_may_be_anything(case: Case, prefill: str):
    """The mask reaches every layer and every decode step, through no query around it."""
    one, other = (case.watch(case.request(s, ALL, prefill=prefill)) for s in (0, 1))
    assert torch.equal(one.logits, other.logits)
    assert one.answers[0].text == other.answers[0].text
    seen = [case.watch(case.request(s, prefill=prefill)) for s in (0, 1)]
    assert not torch.equal(seen[0].logits, seen[1].logits)
    for each in seen:
        assert (each.logits[:, 0] - one.logits[:, 0]).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nor_does_another_attention_let_it_through(case: Case, paths: dict[str, str], dtype: str):
    path = paths[case.generator.policy.family.name]
    config = ModelConfig(path=path, attention="eager", dtype=dtype)
    eager = Case(LocalGenerator.from_checkpoint(config, batch_size=8), case.kind)
    one, other = (eager.watch(eager.request(s, ALL, prefill="It")) for s in (0, 1))
    assert torch.equal(one.logits, other.logits)
    plain = eager.watch(eager.request(0, prefill="It"))
    assert not torch.equal(one.logits[:, 0], plain.logits[:, 0])


def test_a_sample_under_a_full_mask_may_be_of_any_picture(case: Case):
    sampling = Sampling(max_new_tokens=12, temperature=1.0, seed=5)
    one, other = (
        case.watch(replace(case.request(s, ALL), id="same"), sampling=sampling) for s in (0, 1)
    )
    assert one.answers == other.answers


@pytest.mark.parametrize("corruption", [HALF, ALL], ids=["half", "all"])
def test_without_a_cache_the_same_is_written(case: Case, corruption: Corruption):
    requests = [case.request(0, corruption, prefill="It"), case.request(1, corruption)]
    cached = case.watch(*requests)
    whole = case.watch(*requests, use_cache=False)
    assert whole.positions[-1].shape[-1] > 1, "the cache is off"
    assert cached.positions[-1].shape[-1] == 1
    assert torch.equal(cached.new_ids, whole.new_ids)
    assert torch.allclose(cached.logits, whole.logits, atol=1e-5)


def test_one_forward_without_generate_says_the_same(case: Case):
    """Tokens, mask and positions laid out here by hand, in a single pass over the whole row."""
    seen = case.watch(case.request(0, HALF, prefill="It is"))
    steps = seen.new_ids.shape[1]
    inputs = dict(seen.inputs)
    ids = inputs["input_ids"] = torch.cat([inputs["input_ids"], seen.new_ids], 1)
    ones = torch.ones_like(seen.new_ids)
    inputs["attention_mask"] = torch.cat([inputs["attention_mask"], ones], 1)
    last = inputs["position_ids"][..., -1:]
    following = last + torch.arange(1, steps + 1)
    inputs["position_ids"] = torch.cat([inputs["position_ids"], following], -1)
    if (token_types := case.generator.policy.family.token_types) is not None:
        new = token_types(0 * ones, ones.bool())
        inputs |= {name: torch.cat([inputs[name], types], 1) for name, types in new.items()}
    with torch.inference_mode():
        logits = case.generator.policy.model(
            **inputs, mm_encoder_outputs=seen.encoded, use_cache=False
        ).logits
    before = logits[:, ids.shape[1] - steps - 1 : -1]
    assert torch.allclose(before, seen.logits, atol=1e-5)
    before = before.clone()
    before[..., case.generator._banned] = float("-inf")
    assert torch.equal(before.argmax(-1), seen.new_ids)


def test_hiding_nothing_changes_nothing(case: Case):
    plain = case.watch(case.request(0))
    none = case.watch(case.request(0, MaskImageTokens(threshold=0.0, key="k")))
    assert torch.equal(plain.logits, none.logits)
    assert plain.answers == none.answers


def test_positions_do_not_know_of_the_mask(case: Case):
    """At no step: transformers would count positions by what the mask lets through."""
    plain, half, whole = (
        case.watch(case.request(0, c, prefill="It is"), case.request(1, c, text="?"))
        for c in (None, HALF, ALL)
    )
    axes = case.generator.policy.family.num_axes
    assert len(plain.positions) == GREEDY.max_new_tokens
    for step, ours in enumerate(plain.positions):
        assert torch.equal(ours, half.positions[step])
        assert torch.equal(ours, whole.positions[step])
        if step:
            assert torch.equal(ours, plain.positions[step - 1][..., -1:] + 1)
    assert plain.positions[0].shape == ((3,) if axes > 1 else ()) + plain.inputs["input_ids"].shape
    assert not torch.equal(plain.inputs["attention_mask"], half.inputs["attention_mask"])


def test_neighbours_of_other_lengths_change_nothing(case: Case):
    requests = [
        case.request(0, HALF),
        case.request(1, MaskImageTokens(threshold=0.9, key="other"), text="and " * 20),
        case.request(2, prefill="There are some of"),
        case.request(3, NoisePixels(steps=500, key="noise"), text="?"),
        case.request(4, ALL, text="what " * 9, prefill="It"),
    ]
    together = case.watch(*requests)
    # Batches are sorted by the length of their prompts.
    order = sorted(range(5), key=lambda i: (_prompt_length(case, requests[i]), i))
    for row, index in enumerate(order):
        alone = case.watch(requests[index])
        assert alone.answers[0] == together.answers[index]
        steps = alone.new_ids.shape[1]
        assert torch.allclose(alone.logits[0], together.logits[row, :steps], atol=1e-5)
        media = case.is_media(alone.inputs["input_ids"][0])
        ours = alone.inputs["attention_mask"][0, media]
        media = case.is_media(together.inputs["input_ids"][row])
        assert torch.equal(ours, together.inputs["attention_mask"][row, media])


def _prompt_length(case: Case, request: Request) -> int:
    return len(case.generator._prepare(request)[0].prompt_ids)


def test_one_key_one_mask(case: Case):
    """The sentences of a try share what they see, whatever stands before and after the picture."""
    tries = [
        case.request(0, replace(HALF, key="a/try1")),
        case.request(0, replace(HALF, key="a/try1"), prefill="It is a longer one"),
        case.request(0, replace(HALF, key="a/try2")),
    ]
    one, same, other = (_mask(case, case.watch(request)) for request in tries)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    reseeded = _mask(case, case.watch(tries[0], sampling=replace(GREEDY, seed=1)))
    assert not torch.equal(one, reseeded)
    assert 0 < one.sum() < len(one)


def _mask(case: Case, seen: Seen) -> torch.Tensor:
    """What of the picture is visible; all other tokens of the row must be."""
    media = case.is_media(seen.inputs["input_ids"][0])
    assert media.any()
    assert seen.inputs["attention_mask"][0, ~media].all()
    return seen.inputs["attention_mask"][0, media].bool()


@pytest.mark.parametrize("threshold", [0.5, 0.9, 0.99])
def test_visible_tokens_are_counted_by_a_binomial(threshold: float):
    """Mean n (1 - rho) and variance n rho (1 - rho) of what 2000 keys let through."""
    num_tokens, num_keys = 576, 2000
    masks = [MaskImageTokens(threshold=threshold, key=f"{i}") for i in range(num_keys)]
    counts = torch.stack([visible_tokens(mask, num_tokens, 0).sum() for mask in masks]).double()
    variance = num_tokens * threshold * (1 - threshold)
    assert abs(counts.mean() - num_tokens * (1 - threshold)) < 4 * (variance / num_keys) ** 0.5
    assert counts.var().item() == pytest.approx(variance, rel=0.15)


def test_no_place_is_more_visible_than_another():
    masks = [
        visible_tokens(MaskImageTokens(threshold=0.75, key=f"{i}"), 64, 3) for i in range(2000)
    ]
    shares = torch.stack(masks).double().mean(0)
    assert (shares - 0.25).abs().max() < 5 * (0.25 * 0.75 / 2000) ** 0.5


@pytest.mark.parametrize(
    ("steps", "kept"),
    [(100, 0.9983), (200, 0.994), (300, 0.981), (400, 0.945), (500, 0.863), (999, 0.285)],
)
def test_noise_keeps_so_much_of_the_picture(steps: int, kept: float):
    """sqrt(alpha-bar) of the published schedule; what is lost is unit noise."""
    pixels = torch.full((200_000,), 10.0)
    made = noised(pixels, NoisePixels(steps=steps, key="k"), 0)
    lost = math.sqrt(1 - kept**2)
    assert made.mean().item() == pytest.approx(10 * kept, abs=5 * lost / 200_000**0.5 + 0.0005 * 10)
    assert made.std().item() == pytest.approx(lost, rel=0.02)


def test_noise_is_drawn_from_its_key(case: Case):
    noise = NoisePixels(steps=500, key="a/try1")
    plain = case.watch(case.request(0))
    one, same, other = (
        case.watch(case.request(0, c, prefill=""))
        for c in (noise, noise, replace(noise, key="a/try2"))
    )
    assert torch.equal(one.logits, same.logits)
    assert not torch.equal(one.logits, other.logits)
    assert not torch.equal(one.logits, plain.logits)
    assert torch.equal(one.inputs["attention_mask"], plain.inputs["attention_mask"])
    for name, tensor in plain.inputs.items():
        assert ("pixel" in name) == (not torch.equal(tensor, one.inputs[name])), name
