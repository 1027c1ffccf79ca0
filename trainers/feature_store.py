"""Features of pictures on disk, and the pictures of prepared rows that have them.

data/realign_coco/features/llava-hf-llava-1.5-7b-hf-3f2a91c0/
  key.json                              what made the features, in plain words
  pictures-0c1f….safetensors            up to 64 pictures', whole or absent

A picture goes by the digest of all that its processor made of it, so that another picture, or the
same one at another size, never gets its features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from mmalign.errors import TrainingError
from mmalign.scoring.candidates import CandidateBatch, EncodedMedia, Features
from mmalign.scoring.features import without_pixels
from mmalign.store import write_atomically
from trainers.keyed_folder import KeyedFolder, tensors_in
from trainers.objectives.base import PreparedRow

ELSEWHERE = "set features.folder to another folder"
ANEW = "`mmalign precompute RECIPE --fresh` makes them anew"


class FeatureStore(KeyedFolder):
    """One folder of features. `index`: the file and tensor names of each picture."""

    kept = "vision features"
    pattern = "pictures-*.safetensors"
    anew = ANEW
    elsewhere = ELSEWHERE

    def __init__(self, folder: Path, key: dict[str, Any], about: dict[str, Any]) -> None:
        super().__init__(folder, key, about)
        self.index: dict[str, tuple[Path, list[str]]] = {}
        self._damaged: list[Path] = []

    def look(self) -> None:
        """Find what is stored. A file that is cut short is said and counts as absent."""
        files = self.folder.glob(self.pattern)
        self.index, self._damaged = tensors_in(files, lost="its features are made again")

    def missing(self, digests: Iterable[str]) -> list[str]:
        """Those of `digests` that are not stored. Raises TrainingError where the key differs."""
        self.check()
        self.look()
        return [digest for digest in digests if digest not in self.index]

    def claim(self, digests: Iterable[str]) -> list[str]:
        """Hold the folder for writing; what is still missing then.

        Raises TrainingError where it cannot be written, or another process is writing it.
        """
        self.hold()
        missing = self.missing(digests)
        for file in self._damaged:
            file.unlink()
        return missing

    def write(self, made: Mapping[str, Features]) -> None:
        """Write several pictures' features as one file, whole or not at all."""
        tensors: dict[str, Tensor] = {}
        for digest, features in made.items():
            for place, tensor in enumerate((features.pooled, *features.deeper)):
                tensors[f"{digest}/{place}"] = tensor.cpu().contiguous()
        write_atomically(self.folder / f"pictures-{next(iter(made))}.safetensors", save(tensors))

    def features(self, digest: str) -> Features:
        """A picture's features, read from disk. Raises TrainingError where they are not there."""
        if digest not in self.index:
            raise TrainingError(
                "a picture has no stored features: it changed since this run began",
                where=str(self.folder),
                got=f"digest {digest[:12]}",
                fix="put the picture back as it was, or start the run anew",
            )
        file, parts = self.index[digest]
        with safe_open(file, "pt") as stored:
            # Copies: a view would keep the whole file's memory with it between processes.
            pooled, *deeper = (
                stored.get_tensor(f"{digest}/{n}").clone() for n in range(len(parts))
            )
        return Features(pooled=pooled, deeper=tuple(deeper))


class PictureFeatures:
    """The pictures of prepared rows and their features in `store`."""

    def __init__(self, store: FeatureStore) -> None:
        self.store = store
        self._digests: dict[str, str] = {}

    def digest(self, picture: EncodedMedia) -> str:
        """A hash of all that the processor made of a picture.

        Asked first while it has its pixels, and remembered for when it has not.
        """
        if picture.key not in self._digests:
            found = hashlib.sha256()
            for name, tensor in sorted(picture.inputs.items()):
                found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                found.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
            self._digests[picture.key] = found.hexdigest()
        return self._digests[picture.key]

    def sizes(self, row: PreparedRow) -> dict[str, int]:
        """Tokens of the row's distinct pictures, by digest."""
        pictures = (picture for condition in row.conditions for picture in condition.images)
        return {self.digest(picture): picture.num_tokens for picture in pictures}

    def find(self, row: PreparedRow, digest: str) -> EncodedMedia:
        """The row's picture of this digest. Raises TrainingError where it has none."""
        for condition in row.conditions:
            for picture in condition.images:
                if self.digest(picture) == digest:
                    return picture
        raise TrainingError("a picture changed since this run began", where=f"row {row.id}")

    def slim(self, row: PreparedRow) -> PreparedRow:
        """The row without the pixels of pictures that have features."""

        def slim(picture: EncodedMedia) -> EncodedMedia:
            if self.digest(picture) not in self.store.index:
                return picture
            return replace(picture, inputs=without_pixels(picture.inputs))

        conditions = tuple(
            replace(condition, images=tuple(map(slim, condition.images)))
            for condition in row.conditions
        )
        return replace(row, conditions=conditions)

    def attach(self, batch: CandidateBatch) -> CandidateBatch:
        """The batch with the features of every picture, each distinct one read once."""
        read: dict[str, Features] = {}

        def with_features(picture: EncodedMedia) -> EncodedMedia:
            digest = self.digest(picture)
            if digest not in read:
                read[digest] = self.store.features(digest)
            inputs = without_pixels(picture.inputs)
            return replace(picture, inputs=inputs, features=read[digest])

        conditions = [
            replace(condition, images=tuple(map(with_features, condition.images)))
            for condition in batch.conditions
        ]
        return replace(batch, conditions=conditions)
