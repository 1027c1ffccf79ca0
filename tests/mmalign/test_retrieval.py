"""Retrieval: faiss against brute force, what is never a neighbour, and encoders that repeat."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmalign.errors import ModelError
from mmalign.retrieval import (
    EXACT_UP_TO,
    Index,
    OpenClipEncoder,
    PolicyVisionEncoder,
    neighbours,
)

SMALL_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


def unit(num_rows: int, width: int, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((num_rows, width)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def brute_force(rows: np.ndarray, k: int, near_duplicate: float) -> list[list[int]]:
    cosine = rows.astype(np.float64) @ rows.astype(np.float64).T
    answer = []
    for row, line in enumerate(cosine):
        order = sorted(range(len(rows)), key=lambda other: (-line[other], other))
        answer.append([o for o in order if o != row and line[o] <= near_duplicate][:k])
    return answer


def test_exact_search_equals_brute_force() -> None:
    rows = unit(300, 8)
    found = neighbours(rows, 7, index="exact", near_duplicate=0.9)
    assert [[n.index for n in line] for line in found] == brute_force(rows, 7, 0.9)
    assert found[5][0].similarity == pytest.approx(float(rows[5] @ rows[found[5][0].index]))
    assert neighbours(rows, 7, near_duplicate=0.9) == found


def test_ties_go_to_the_smaller_row_whatever_the_index_returns_first(monkeypatch) -> None:
    """Row 0 looks at 40 equal rows with k = 2: six are fetched at first, the last six by number."""
    rows = np.zeros((41, 2), np.float32)
    rows[0], rows[1:] = (1, 0), (0.6, 0.8)

    class LargestFirst:
        def __init__(self, embeddings: np.ndarray, index: Index) -> None:
            self.cosine = embeddings @ embeddings.T

        def __call__(self, wanted: np.ndarray, num_fetch: int) -> np.ndarray:
            numbers = np.arange(len(self.cosine))
            order = [np.lexsort((-numbers, -self.cosine[row])) for row in wanted]
            return np.stack(order)[:, :num_fetch]

    for search in (None, LargestFirst):
        if search is not None:
            monkeypatch.setattr("mmalign.retrieval._Search", search)
        found = neighbours(rows, 2, near_duplicate=0.9)
        assert [n.index for n in found[0]] == [1, 2]
        assert [n.index for n in found[40]] == [0], "the other equal rows are duplicates"


def test_self_and_near_duplicates_and_equal_files_are_no_neighbours() -> None:
    angles = np.array([0.0, 0.05, 0.5, 0.5, 1.0])  # cos 0.05 = 0.9988
    rows = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    found = neighbours(rows, 4, near_duplicate=0.99)
    assert [n.index for n in found[0]] == [2, 3, 4]
    assert [n.index for n in found[2]] == [1, 0, 4]
    everything = neighbours(rows, 4, near_duplicate=2.0, keys=["a", "b", "c", "c", "b"])
    assert [n.index for n in everything[0]] == [1, 2, 3, 4]
    assert [n.index for n in everything[3]] == [1, 0, 4]
    assert [n.index for n in everything[4]] == [2, 3, 0]


def test_many_duplicates_do_not_hide_the_k_others() -> None:
    """Fifty near-duplicates come before the three real neighbours: the search must go on."""
    rows = unit(54, 32)
    rows[:51] = rows[0] + 1e-4 * rows[:51]
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    found = neighbours(rows, 3)
    assert sorted(n.index for n in found[7]) == [51, 52, 53]


@pytest.mark.parametrize(("num_rows", "expected"), [(0, []), (1, [[]])])
def test_too_few_pictures_have_no_neighbours(num_rows: int, expected: list[object]) -> None:
    assert neighbours(unit(num_rows, 4), 10) == expected


@pytest.mark.parametrize("index", ["ivf", "hnsw"])
def test_approximate_indexes_find_most_of_the_neighbours_and_repeat(index: Index) -> None:
    rows = unit(2000, 16)
    exact = neighbours(rows, 10, index="exact")
    found = neighbours(rows, 10, index=index)
    hits = sum(
        len({n.index for n in a} & {n.index for n in b}) for a, b in zip(exact, found, strict=True)
    )
    assert hits / 20_000 > 0.85
    assert all(n.index != row for row, line in enumerate(found) for n in line)
    assert neighbours(rows, 10, index=index) == found


def test_auto_turns_to_the_approximate_index_above_its_bound(monkeypatch) -> None:
    assert EXACT_UP_TO == 100_000
    rows = unit(600, 16)
    exact, ivf = (neighbours(rows, 10, index=index) for index in ("exact", "ivf"))
    assert exact != ivf
    monkeypatch.setattr("mmalign.retrieval.EXACT_UP_TO", 599)
    assert neighbours(rows, 10) == ivf
    monkeypatch.setattr("mmalign.retrieval.EXACT_UP_TO", 600)
    assert neighbours(rows, 10) == exact


@pytest.fixture(scope="module")
def small_clip(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("clip") / "small-clip-for-tests.json"
    path.write_text(json.dumps(SMALL_CLIP))
    return str(path)


def test_open_clip_gives_unit_rows_and_repeats(small_clip: str) -> None:
    pictures = [Image.new("RGB", (w, h), c) for w, h, c in ((40, 20, "red"), (9, 33, "blue"))]
    encoder = OpenClipEncoder(small_clip, pretrained=None, device="cpu")
    rows = encoder.encode(pictures)
    assert rows.shape == (2, 16)
    assert rows.dtype == np.float32
    assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    assert not np.allclose(rows[0], rows[1], atol=1e-3)
    torch.rand(1)  # the weights must not depend on what was drawn before
    again = OpenClipEncoder(small_clip, pretrained=None, device="cpu")
    assert np.array_equal(again.encode(pictures), rows)
    assert encoder.name.endswith(":random")


def test_open_clip_loads_a_checkpoint_file(small_clip: str, tmp_path: Path) -> None:
    first = OpenClipEncoder(small_clip, pretrained=None, device="cpu")
    weights = {key: value + 0.1 for key, value in first._clip.state_dict().items()}
    torch.save(weights, tmp_path / "weights.pt")
    loaded = OpenClipEncoder(small_clip, pretrained=str(tmp_path / "weights.pt"), device="cpu")
    picture = Image.new("RGB", (32, 32), "green")
    assert not np.allclose(loaded.encode([picture]), first.encode([picture]), atol=1e-3)
    assert loaded.name.endswith("weights.pt")


def test_an_unknown_open_clip_model_is_named() -> None:
    with pytest.raises(ModelError, match="open_clip:ViT-Q-99:random"):
        OpenClipEncoder("ViT-Q-99", pretrained=None, device="cpu")


def test_weights_for_another_activation_are_refused() -> None:
    """open_clip warns, and goes on with a model that was never trained."""
    with pytest.raises(ModelError, match="Use model=ViT-L-14-quickgelu") as caught:
        OpenClipEncoder("ViT-L-14", pretrained="openai", device="cpu")
    assert str(caught.value).startswith("open_clip:ViT-L-14:openai: ")


class Policy:
    name = "tiny"

    def image_features(self, images: list[Image.Image]) -> torch.Tensor:
        return torch.tensor([[3.0, 4.0]] * len(images))


def test_the_policy_encoder_normalises_what_the_policy_sees() -> None:
    encoder = PolicyVisionEncoder(Policy())
    assert encoder.encode([Image.new("RGB", (2, 2))]) == pytest.approx(np.array([[0.6, 0.8]]))
    assert encoder.name == "policy:tiny"
