"""Latents and prompts on disk, each made once by a VAE and text encoders that then leave memory.

data/pairs/encoded/stabilityai-stable-diffusion-xl-base-1.0-3f2a91c0/
  key.json                       what made them, in plain words
  encoded-0c1f….safetensors      up to 64 rows', whole or absent

A picture goes by the digest of its bytes and its frame, a prompt by that of its text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mmalign.diffusion.framing import Frame
from mmalign.errors import TrainingError
from mmalign.store import write_atomically
from trainers.keyed_folder import KeyedFolder, tensors_in


class EncodedStore(KeyedFolder):
    """One folder of encoded pictures and prompts. `index`: the file and tensor names of each."""

    kept = "latents and prompts"
    pattern = "encoded-*.safetensors"
    anew = "delete the folder, and they are made anew"
    elsewhere = "set data.encoded to another folder"

    def __init__(self, folder: Path, key: dict[str, Any], about: dict[str, Any]) -> None:
        super().__init__(folder, key, about)
        self.index: dict[str, tuple[Path, list[str]]] = {}
        self._damaged: list[Path] = []

    def look(self) -> None:
        """Find what is stored. A file that is cut short is said and counts as absent."""
        files = self.folder.glob(self.pattern)
        self.index, self._damaged = tensors_in(files, lost="what it held is made again")

    def missing(self, digests: Iterable[str]) -> list[str]:
        """Those that are not stored. Raises TrainingError where the key differs."""
        self.check()
        self.look()
        return [digest for digest in dict.fromkeys(digests) if digest not in self.index]

    def claim(self, digests: Iterable[str]) -> list[str]:
        """Hold the folder for writing; what is still missing then."""
        self.hold()
        missing = self.missing(digests)
        for file in self._damaged:
            file.unlink()
        return missing

    def write(self, made: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Write what belongs to several digests as one file, whole or not at all."""
        tensors = {
            f"{digest}/{part}": tensor.cpu().contiguous()
            for digest, parts in made.items()
            for part, tensor in parts.items()
        }
        write_atomically(self.folder / f"encoded-{next(iter(made))}.safetensors", save(tensors))

    def read(self, digest: str) -> dict[str, Tensor]:
        """What is stored of a picture or prompt. Raises TrainingError where nothing is."""
        if digest not in self.index:
            raise TrainingError(
                "a picture or prompt is not encoded: it changed since this run began",
                where=str(self.folder),
                got=f"digest {digest[:12]}",
                fix="put it back as it was, or start the run anew",
            )
        file, parts = self.index[digest]
        try:
            with safe_open(file, "pt") as stored:
                return {part: stored.get_tensor(f"{digest}/{part}").clone() for part in parts}
        except (SafetensorError, OSError) as error:
            raise TrainingError(
                f"cannot be read ({error})", where=str(file), fix="delete it and start again"
            ) from None


def picture_digest(data: bytes, frame: Frame) -> str:
    """What an encoded picture goes by."""
    told = f"{frame.left!r} {frame.top!r} {frame.flip}"
    return hashlib.sha256(hashlib.sha256(data).digest() + told.encode()).hexdigest()


def prompt_digest(prompt: str) -> str:
    """What an encoded prompt goes by."""
    return hashlib.sha256(b"prompt " + prompt.encode()).hexdigest()
