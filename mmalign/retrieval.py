"""Images that look alike: embeddings, and nearest neighbours among them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from mmalign.clip_loading import Precision, device_for, dtypes, load_open_clip, open_clip_name

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

Index = Literal["auto", "exact", "ivf", "hnsw"]
# Exact search compares every pair: 1e5 images of 768 numbers are 1.5e13 operations, minutes on a
# processor. `auto` is exact up to here and approximate above it.
EXACT_UP_TO = 100_000


class ImageEncoder(Protocol):
    """Turns pictures into vectors whose inner product is their similarity."""

    @property
    def name(self) -> str:
        """What identifies the encoder in manifests and caches."""
        ...

    def encode(self, images: list[Image]) -> np.ndarray:
        """[N, D] float32, each row of length one."""
        ...


class OpenClipEncoder:
    """The projected image embedding of an open_clip model.

    `model` and `pretrained`: as in clip_encoders.OpenClipModel; None for random weights, which the
    name then says.
    """

    def __init__(
        self,
        model: str,
        *,
        pretrained: str | None,
        precision: Precision = "fp32",
        device: str | None = None,
    ) -> None:
        self.name = open_clip_name(model, pretrained)
        self._device = device_for(device)
        self._clip, self._transform, _ = load_open_clip(
            model, pretrained, precision=precision, device=self._device
        )
        self._dtype = dtypes()[precision]

    def encode(self, images: list[Image]) -> np.ndarray:
        """[N, D] float32, each row of length one."""
        import torch

        with torch.inference_mode():
            pixels = torch.stack([self._transform(image) for image in images])
            features = self._clip.encode_image(pixels.to(self._device, self._dtype))
            return _normalised(features)


class FeatureSource(Protocol):
    """A policy that shows what it sees; mmalign.generate.local has one."""

    @property
    def name(self) -> str:
        """Which model."""
        ...

    def image_features(self, images: list[Image]) -> torch.Tensor:
        """[N, D] float32: the mean over each picture's projected features."""
        ...


class PolicyVisionEncoder:
    """What the policy itself sees: the mean over its projected image features (Re-Align's text)."""

    def __init__(self, policy: FeatureSource) -> None:
        self._policy = policy
        self.name = f"policy:{policy.name}"

    def encode(self, images: list[Image]) -> np.ndarray:
        """[N, D] float32, each row of length one."""
        return _normalised(self._policy.image_features(images))


@dataclass(frozen=True, slots=True)
class Neighbour:
    """One neighbour: its row among the embeddings, and the cosine."""

    index: int
    similarity: float


def neighbours(
    embeddings: np.ndarray,
    k: int,
    *,
    index: Index = "auto",
    near_duplicate: float = 0.99,
    keys: Sequence[str] | None = None,
) -> list[list[Neighbour]]:
    """The `k` nearest rows of every row, nearest first; ties go to the smaller row.

    embeddings: [N, D] float32, rows of length one. Left out are the row itself, rows of the same
    key (a file's sha256), and rows more similar than `near_duplicate`. More candidates are fetched
    until k are found or none are left, so a row has fewer than k only where the set is too small,
    or where an approximate index ("ivf", "hnsw") finds no more. "auto" is exact up to EXACT_UP_TO
    rows, "ivf" above. All of them give the same answer every time.
    """
    embeddings = np.ascontiguousarray(embeddings, np.float32)
    num_rows = len(embeddings)
    found: list[list[Neighbour]] = [[] for _ in range(num_rows)]
    if num_rows < 2:
        return found
    if index == "auto":
        index = "exact" if num_rows <= EXACT_UP_TO else "ivf"
    codes = np.arange(num_rows) if keys is None else np.unique(list(keys), return_inverse=True)[1]
    search = _Search(embeddings, index)
    unfinished, num_fetch = np.arange(num_rows), min(num_rows, 2 * k + 2)
    while len(unfinished):
        candidates = search(unfinished, num_fetch)
        again = []
        for row, near in zip(unfinished, candidates, strict=True):
            exhausted = num_fetch == num_rows or near[-1] < 0
            near = near[near >= 0]
            similarity = embeddings[near].astype(np.float64) @ embeddings[row].astype(np.float64)
            order = np.lexsort((near, -similarity))
            near, similarity = near[order], similarity[order]
            allowed = (codes[near] != codes[row]) & (similarity <= near_duplicate)
            chosen = np.flatnonzero(allowed)[:k]
            # A candidate as near as the last one fetched may have a twin that was not fetched.
            settled = len(chosen) == k and similarity[chosen[-1]] > similarity[-1] + 1e-6
            if exhausted or settled:
                found[row] = [Neighbour(int(near[c]), float(similarity[c])) for c in chosen]
            else:
                again.append(row)
        unfinished, num_fetch = np.array(again, dtype=np.int64), min(num_rows, 4 * num_fetch)
    return found


class _Search:
    """A faiss index over rows of length one; -1 marks candidates that it does not find."""

    def __init__(self, embeddings: np.ndarray, index: Index) -> None:
        import faiss

        self._embeddings, self._kind = embeddings, index
        num_rows, width = embeddings.shape
        built: Any
        match index:
            case "ivf":
                num_cells = max(1, round(4 * math.sqrt(num_rows)))
                built = faiss.IndexIVFFlat(
                    faiss.IndexFlatIP(width), width, num_cells, faiss.METRIC_INNER_PRODUCT
                )
                built.nprobe = max(8, num_cells // 8)
                built.cp.min_points_per_centroid = 1
                built.train(embeddings)
                built.add(embeddings)
            case "hnsw":
                built = faiss.IndexHNSWFlat(width, 32, faiss.METRIC_INNER_PRODUCT)
                built.hnsw.efConstruction = 200
                # Several threads would link the graph in another order every time.
                num_threads = faiss.omp_get_max_threads()
                faiss.omp_set_num_threads(1)
                built.add(embeddings)
                faiss.omp_set_num_threads(num_threads)
            case _:
                built = faiss.IndexFlatIP(width)
                built.add(embeddings)
        self._index = built

    def __call__(self, rows: np.ndarray, num_fetch: int) -> np.ndarray:
        """[len(rows), num_fetch] int64: candidates of each row, about nearest first."""
        if self._kind == "hnsw":
            self._index.hnsw.efSearch = max(64, 2 * num_fetch)
        return self._index.search(self._embeddings[rows], num_fetch)[1]


def _normalised(features: torch.Tensor) -> np.ndarray:
    import torch

    return torch.nn.functional.normalize(features.detach().float(), dim=-1).cpu().numpy()
