"""Beginnings and pictures that requests share are computed once, and nothing else changes."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mmalign.clips import Clip
from mmalign.generate import local, shared
from mmalign.generate.base import MaskImageTokens, NoisePixels, Request, Sampling
from mmalign.generate.local import LocalGenerator
from mmalign.generate.shared import Encoder, Row, cuts
from mmalign.media import embed
from mmalign.models.load import ModelConfig, base_model, load_policy
from mmalign.models.lora import Lora
from mmalign.models.tiny import TinyModel
from mmalign.records import Media, user

WORDS = ("is", "there", "a", "dog", "?", *(f"w{number}" for number in range(40)))
QUESTIONS = ("is there a dog ?", "is there a w1 w2 w3 w4 ?", "is there w5 ?", "w6")
# One linear, two with M-RoPE (one with features for several layers), tiles, and one that cannot
# share beginnings, since its pictures' tokens see later ones.
FAMILIES = ("llava15", "qwen25vl", "qwen3vl", "smolvlm", "gemma3")
GREEDY, SAMPLED = Sampling(max_new_tokens=8), Sampling(max_new_tokens=8, temperature=1.0, seed=3)


@pytest.fixture(scope="module", params=FAMILIES)
def generator(request, tmp_path_factory) -> LocalGenerator:
    folder = tmp_path_factory.mktemp("tiny") / request.param
    path = TinyModel(output=str(folder), family=request.param, words=WORDS).build()
    return LocalGenerator.from_checkpoint(str(path), batch_size=32, device="cpu")


def picture(seed: int, width: int = 32) -> Media:
    pixels = np.random.RandomState(seed).randint(0, 255, (32, width, 3), dtype=np.uint8)
    return embed(Image.fromarray(pixels))


def asked(num_pictures: int = 3) -> list[Request]:
    """Four questions on each picture, the second of another shape."""
    return [
        Request(
            id=f"{number}-{text}",
            prompt=user(text, images=1),
            images=(picture(number, 60 if number == 1 else 32),),
            prefill="there is" if text == "w6" else "",
        )
        for text in QUESTIONS
        for number in range(num_pictures)
    ]


@pytest.fixture
def logits(generator, monkeypatch) -> dict[str, torch.Tensor]:
    """[steps, V] of each request, as the model gave them."""
    found: dict[str, torch.Tensor] = {}
    run, ban = LocalGenerator._run, local._ban

    def recording(self: Any, requests: list[Request], *rest: Any) -> Any:
        steps: list[torch.Tensor] = []

        def banning(ids: list[int]) -> Any:
            process = ban(ids)
            return lambda before, scores: (steps.append(scores.clone()), process(before, scores))[1]

        monkeypatch.setattr(local, "_ban", banning)
        made = run(self, requests, *rest)
        for row, request in enumerate(requests):
            found[request.id] = torch.stack([step[row] for step in steps])
        return made

    monkeypatch.setattr(LocalGenerator, "_run", recording)
    return found


@pytest.fixture
def caches(monkeypatch) -> list[tuple[int, int]]:
    """(rows, rows run through the model) of every batch whose beginnings were shared."""
    found: list[tuple[int, int]] = []
    make = shared.prefix_cache

    def spy(policy: Any, rows: Any, *rest: Any) -> Any:
        found.append((len(rows), len({row.seen for row in rows})))
        return make(policy, rows, *rest)

    monkeypatch.setattr(local, "prefix_cache", spy)
    return found


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_answers_are_those_of_each_request_alone(generator, logits, caches, sampling):
    requests = asked()
    alone = [generator.generate([request], sampling)[0] for request in requests]
    expected = dict(logits)
    assert not caches
    together = generator.generate(requests, sampling)
    assert caches == ([] if generator.policy.family.name == "gemma3" else [(12, 3)])
    assert together == alone
    for one, whole in zip(together, requests, strict=True):
        steps = len(one.token_ids)
        assert torch.allclose(logits[whole.id][:steps], expected[whole.id][:steps], atol=2e-5)
    assert len({one.token_ids for one in alone}) > 3


def test_other_batches_of_the_same_requests_answer_the_same(generator, caches, monkeypatch):
    requests = asked()
    requests.append(Request(id="text", prompt=user("w7 " * 30)))
    requests.append(Request(id="two", prompt=user("w8", images=2), images=(picture(0),) * 2))
    whole = {one.id: one for one in generator.generate(requests, SAMPLED)}
    monkeypatch.setattr(generator, "batch_size", 5)
    small = generator.generate(requests[::-1], SAMPLED)
    assert {one.id: one for one in small} == whole
    if generator.policy.family.name != "gemma3":
        assert len(caches) > 1


def test_a_picture_is_encoded_once_in_all_batches(generator, monkeypatch):
    requests, seen = asked(), []
    encode = shared.image_features

    def spy(body: Any, inputs: Any) -> Any:
        made = encode(body, inputs)
        count = generator.policy.family.num_pieces
        pooled = made.pooler_output
        # Each picture of this family is cut into as many pieces as its own inputs say.
        seen.append(len(pooled) if count is None else len(pooled) / _pieces(generator))
        return made

    monkeypatch.setattr(shared, "image_features", spy)
    monkeypatch.setattr(generator, "batch_size", 3)
    plain = generator.generate(requests, GREEDY)
    first = sum(seen)
    assert first == 3
    generator.generate(requests, GREEDY)
    assert sum(seen) == 2 * first, "features outlive the weights that made them"
    monkeypatch.setattr(local, "Encoder", lambda policy: Encoder(policy, kept_bytes=0))
    assert generator.generate(requests, GREEDY) == plain
    assert sum(seen) > 3 * first


def _pieces(generator: LocalGenerator) -> float:
    """Pieces of the three pictures, on average."""
    count = generator.policy.family.num_pieces
    assert count is not None
    preparer = generator.policy.preparer
    images = [
        preparer.encoder.image(picture(n, 60 if n == 1 else 32), None, None) for n in range(3)
    ]
    return sum(count(image.inputs) for image in images) / 3


def test_weights_changed_between_calls_are_used(generator):
    before = generator.generate(asked(1), SAMPLED)
    tower = base_model(generator.policy.model).model
    weights = [p for name, p in tower.named_parameters() if generator.policy.family.vision in name]
    kept = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        for weight in weights:
            weight.normal_(std=0.5)
        after = generator.generate(asked(1), SAMPLED)
        for weight, old in zip(weights, kept, strict=True):
            weight.copy_(old)
    assert after != before
    assert generator.generate(asked(1), SAMPLED) == before


def test_what_sees_a_picture_otherwise_shares_nothing_with_it(generator, logits):
    """Hidden tokens and noise are of a request; requests with the same ones share."""
    kinds = (
        None,
        MaskImageTokens(threshold=0.5, key="a"),
        MaskImageTokens(threshold=0.5, key="b"),
        NoisePixels(steps=900, key="a"),
    )
    requests = [
        replace(one, id=f"{one.id} {number}", corruption=kind)
        for number, kind in enumerate(kinds)
        for one in asked(1)
    ]
    alone = [generator.generate([request], GREEDY)[0] for request in requests]
    expected = dict(logits)
    assert generator.generate(requests, GREEDY) == alone
    for request, one in zip(requests, alone, strict=True):
        steps = len(one.token_ids)
        assert torch.allclose(logits[request.id][:steps], expected[request.id][:steps], atol=2e-5)
    firsts = [expected[f"0-{QUESTIONS[0]} {number}"][0] for number in range(4)]
    assert all((a - b).abs().max() > 1e-4 for a, b in combinations(firsts, 2))


@pytest.mark.parametrize("family", ["llava_onevision", "qwen25vl", "qwen3vl"])
def test_questions_on_one_clip_share_it(tmp_path, caches, family):
    folder = TinyModel(output=str(tmp_path / family), family=family, words=WORDS).build()
    generator = LocalGenerator.from_checkpoint(str(folder), device="cpu")
    clips = [
        Clip(
            frames=np.random.RandomState(n).randint(0, 255, (4, 32, 32, 3), dtype=np.uint8),
            indices=(0, 1, 2, 3), timestamps=(0.0, 0.5, 1.0, 1.5), source_fps=2.0,
            num_source_frames=4, duration_seconds=2.0, key=f"clip-{n}",
        )
        for n in range(2)
    ]  # fmt: skip
    requests = [
        Request(id=f"{clip.key} {text}", prompt=user(text, videos=1), videos=(clip,))
        for text in QUESTIONS
        for clip in clips
    ]
    alone = [generator.generate([request], SAMPLED)[0] for request in requests]
    assert not caches
    assert generator.generate(requests, SAMPLED) == alone
    assert caches == [(8, 2)]


def test_an_adapter_shares_as_well(tmp_path, caches):
    folder = TinyModel(output=str(tmp_path / "model"), family="qwen25vl", words=WORDS).build()
    plain = LocalGenerator.from_checkpoint(str(folder), device="cpu")
    policy = load_policy(ModelConfig(path=str(folder), lora=Lora(rank=4, alpha=8)))
    with torch.no_grad():
        for name, weight in policy.model.named_parameters():
            if "lora_B" in name:
                weight.normal_(generator=torch.Generator().manual_seed(0))
    generator = LocalGenerator(policy)
    alone = [generator.generate([request], SAMPLED)[0] for request in asked()]
    assert generator.generate(asked(), SAMPLED) == alone
    assert caches == [(12, 3)]
    assert plain.generate(asked(), SAMPLED) != alone


def row(ids: list[int], seen: str, pictures: int = 1) -> Row:
    """The first `pictures` tokens are a picture's."""
    kinds = torch.zeros(len(ids), dtype=torch.long)
    kinds[:pictures] = 1
    return Row(
        ids=ids, num_prompt=len(ids), kinds=kinds, visible=kinds + 1, positions=kinds[None],
        images=(), videos=(), seen=seen,
    )  # fmt: skip


def test_cuts_by_hand():
    nines = [9] * 8
    # The common beginning; a row of its own keeps one token; the longest tail is of two.
    rows = [row([*nines, 1, 2], "a"), row([*nines, 1, 3], "a"), row([*nines, 4, 5], "a")]
    assert cuts(rows) == [8, 8, 8]
    assert cuts([*rows, row([*nines, 6], "b")]) == [8, 8, 8, 8]
    # Equal rows leave a token to predict from.
    assert cuts([row(nines, "a")] * 3) == [7, 7, 7]
    # One row, or two on different pictures: nothing to save.
    assert cuts(rows[:1]) == [0]
    assert cuts([row(nines, "a"), row(nines, "b")]) == [0, 0]
    # Two tokens of ten for three rows: 1 * 2 + 3 * 8 = 26 of 30 is no gain.
    short = [row([9, 9, n, *range(7)], "a", pictures=2) for n in (1, 2, 3)]
    assert cuts(short) == [0, 0, 0]
    # Questions that stand before the picture differ too early.
    behind = [row([n, *nines], "a", pictures=3) for n in (1, 2, 3)]
    assert cuts(behind) == [0, 0, 0]
