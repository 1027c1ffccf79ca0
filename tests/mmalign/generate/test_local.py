"""The local generator: order, batching, seeds, prefill, banned tokens."""

import numpy as np
import pytest
import torch
from PIL import Image

from mmalign.errors import MediaError
from mmalign.generate.base import Request, Sampling, request_seed
from mmalign.generate.local import LocalGenerator, _gumbel, fingerprint
from mmalign.media import embed
from mmalign.models.tiny import TinyModel
from mmalign.records import Media, user

WORDS = tuple(["the", "image", "shows", "a", "dog", "cat", "and", ".", "one", "two"])


@pytest.fixture(scope="module", params=["llava15", "qwen25vl"])
def path(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / request.param
    return TinyModel(
        output=str(folder), family=request.param, words=WORDS
    ).build()  # fmt: skip


@pytest.fixture(scope="module")
def generator(path) -> LocalGenerator:
    return LocalGenerator.from_checkpoint(str(path), batch_size=3)


def picture(seed: int) -> Media:
    pixels = np.random.RandomState(seed).randint(0, 255, (32, 32, 3), dtype=np.uint8)
    return embed(Image.fromarray(pixels))


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    return [
        Request(
            id=f"r{i}",
            prompt=user("the image " * (i % 3) + "shows", images=1 + (i == 4)),
            images=(picture(i),) * (1 + (i == 4)),
            prefill="a dog" if i % 2 else "",
        )
        for i in range(8)
    ]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_order_batches_and_shards_change_nothing(generator, requests, temperature):
    sampling = Sampling(max_new_tokens=6, temperature=temperature, seed=3)
    together = generator.generate(requests, sampling)
    assert [g.id for g in together] == [r.id for r in requests]
    alone = [generator.generate([r], sampling)[0] for r in reversed(requests)][::-1]
    assert [g.text for g in alone] == [g.text for g in together]


def test_greedy_is_the_models_own_generate(generator, requests):
    request = requests[0]
    made = generator.generate([request], Sampling(max_new_tokens=5))[0]
    processor, model = generator.policy.processor, generator.policy.model
    condition = generator.policy.preparer.condition(request.prompt, request.images, None)
    from mmalign.media import open_image

    inputs = processor(
        text=[condition.text], images=[open_image(request.images[0])], return_tensors="pt"
    )
    banned = [[token] for token in generator._banned]
    out = model.generate(**inputs, max_new_tokens=5, do_sample=False, bad_words_ids=banned)
    new = out[0, inputs.input_ids.shape[1] :]
    assert made.text == processor.tokenizer.decode(new, skip_special_tokens=True).strip()


def test_a_seed_changes_samples_and_a_name_does_too(generator, requests):
    first = generator.generate(requests, Sampling(max_new_tokens=8, temperature=1.0, seed=0))
    second = generator.generate(requests, Sampling(max_new_tokens=8, temperature=1.0, seed=1))
    assert [g.text for g in first] != [g.text for g in second]
    assert request_seed(0, "a") != request_seed(0, "b")
    assert request_seed(0, "a") == request_seed(0, "a")


def test_gumbel_noise_draws_from_the_softmax():
    logits = torch.tensor([[0.0, 1.0, 2.0]]).repeat(4000, 1)
    noisy = _gumbel(list(range(4000)), temperature=1.0, top_p=1.0)(None, logits)
    shares = torch.bincount(noisy.argmax(-1), minlength=3) / 4000
    assert torch.allclose(shares, logits[0].softmax(-1), atol=0.03)


def test_top_p_keeps_the_nucleus_only():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().repeat(500, 1)
    noisy = _gumbel(list(range(500)), temperature=1.0, top_p=0.7)(None, logits)
    assert set(noisy.argmax(-1).tolist()) == {0, 1}


def test_placeholders_are_never_generated(generator, requests, monkeypatch):
    """Looked for among the token ids: the text of a special token is never shown."""
    seen: set[int] = set()
    finish = LocalGenerator._finish

    def spy(self, request, prefill, new):
        seen.update(new[: new.index(self._end[0])] if self._end[0] in new else new)
        return finish(self, request, prefill, new)

    monkeypatch.setattr(LocalGenerator, "_finish", spy)
    generator.generate(requests, Sampling(max_new_tokens=60, temperature=50.0))
    assert len(seen) > 10
    assert not seen & set(generator._banned)
    assert generator.policy.preparer.image_token_id in generator._banned


def test_decoding_settings_of_the_checkpoint_are_set_aside(generator, requests):
    """A shipped repetition penalty would change greedy answers unasked."""
    config = generator.policy.model.generation_config
    plain = generator.generate(requests, Sampling(max_new_tokens=6))
    config.repetition_penalty, config.no_repeat_ngram_size = 1.8, 1
    try:
        assert generator.generate(requests, Sampling(max_new_tokens=6)) == plain
        assert generator.policy.model.generation_config is config
    finally:
        config.repetition_penalty, config.no_repeat_ngram_size = None, None


def test_an_adapter_answers_as_it_was_trained_and_names_its_base(path, tmp_path, requests):
    from mmalign.models.load import Lora, ModelConfig, load_policy

    policy = load_policy(ModelConfig(path=str(path), lora=Lora(rank=4, alpha=8)))
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    policy.save(tmp_path / "adapter")
    trained = LocalGenerator(policy, batch_size=3)
    loaded = LocalGenerator.from_checkpoint(str(tmp_path / "adapter"), batch_size=3)
    sampling = Sampling(max_new_tokens=6)
    assert loaded.generate(requests, sampling) == trained.generate(requests, sampling)
    assert fingerprint(str(path)) in loaded.name
    assert fingerprint(str(tmp_path / "adapter")) in loaded.name


def test_fixed_lengths_are_kept(generator):
    asks = [
        Request(id=str(n), prompt=user("shows", images=1), images=(picture(0),), num_tokens=n)
        for n in (1, 3, 2, 3)
    ]
    made = generator.generate(asks, Sampling(temperature=1.0))
    assert [g.num_tokens for g in made] == [1, 3, 2, 3]


def test_prefill_and_continuation_join_to_one_text(generator):
    ask = Request(
        id="x", prompt=user("shows", images=1), images=(picture(0),), prefill="a dog",
        num_tokens=2,
    )  # fmt: skip
    text = generator.generate([ask], Sampling())[0].text
    assert text.startswith(" ")
    assert len(("a dog" + text).split()) == 4


def test_an_unreadable_picture_names_itself(generator):
    bad = Media(bytes=b"not a picture", path="broken.jpg")
    ask = Request(id="x", prompt=user("shows", images=1), images=(bad,))
    with pytest.raises(MediaError, match=r"broken\.jpg"):
        generator.generate([ask], Sampling())


def test_image_features_follow_the_picture(generator):
    images = [Image.new("RGB", (32, 32), c) for c in ("red", "blue", "red")]
    features = generator.image_features(images)
    assert features.shape[0] == 3
    assert torch.allclose(features[0], features[2])
    assert not torch.allclose(features[0], features[1])


def test_the_name_changes_with_the_weights(path, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(path, copy)
    assert fingerprint(str(copy)) == fingerprint(str(path))
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    assert fingerprint(str(copy)) != fingerprint(str(path))
