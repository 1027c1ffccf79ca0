"""Judges of generated pictures: one number a picture, higher is better.

    judge = PickScore().load()
    scores = judge.score(["a red cup"] * 2, [first, second])

Compare scores of one prompt with each other: between prompts they mean little. A score depends on
its prompt and picture alone, up to rounding, however they are batched.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

from pydantic import Field, PositiveInt

from mmalign.clip_encoders import AnyClip, ClipEncoder, OpenClipModel, TransformersClip
from mmalign.clip_loading import Precision
from mmalign.config import Strict
from mmalign.diffusion.aesthetic import aesthetic_head
from mmalign.diffusion.digits import DigitReader, DigitStyle
from mmalign.errors import MediaError, ModelError
from mmalign.media import to_rgb

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor, nn

MAX_RATIO = 50


class ImageJudge(Protocol):
    """Scores pictures, each for its own prompt."""

    @property
    def name(self) -> str:
        """Which judge, with which weights."""
        ...

    def score(self, prompts: Sequence[str], pictures: Sequence[Image]) -> list[float]:
        """One number a picture, higher is better, independent of its neighbours.

        Raises ValueError where there are not as many prompts as pictures.
        """
        ...


class JudgeConfig(Strict):
    """How a judge runs. device: a GPU if there is one where None. batch_size: pictures at once."""

    precision: Precision = "fp32"
    device: str | None = None
    batch_size: PositiveInt = 32


class PickScore(JudgeConfig):
    """PickScore (arXiv 2305.01569): exp(logit_scale) * cosine; about 18 to 24.

    Many scripts, DiffusionDPO's among them, report the bare cosine instead, a hundredth of this.
    model, processor: hub names or folders.
    """

    name: Literal["pick_score"] = "pick_score"
    model: str = "yuvalkirstain/PickScore_v1"
    processor: str | None = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"

    def load(self) -> ImageJudge:
        """Load the model. Raises ModelError where it cannot be."""
        clip = TransformersClip(model=self.model, processor=self.processor)
        encoder = clip.load(precision=self.precision, device=self.device)
        return _CosineJudge(
            f"{self.name}:{self.model}", encoder, batch_size=self.batch_size, scale=encoder.scale
        )


class HPSv2(JudgeConfig):
    """Human Preference Score v2 (arXiv 2306.09341): 100 * cosine; about 20 to 32.

    checkpoint: HPS_v2.1_compressed.pt for v2.1, HPS_v2_compressed.pt for v2.0. The numbers of the
        two do not compare, and no file says which it is, so there is no default: the judge's name
        holds the path. null, which must be written out: random weights.
    model: the open_clip architecture of the checkpoint, a name or the path of a JSON config.

    As in the released code, a picture is made to fit whole, with black bars, where other CLIPs cut
    out the centre. The released code runs under fp16 autocast, this in float32 by default.
    """

    name: Literal["hps_v2"] = "hps_v2"
    checkpoint: str | None
    model: str = "ViT-H-14"

    def load(self) -> ImageJudge:
        """Load the model. Raises ModelError where it cannot be."""
        # A tag of open_clip would load too, as a plain CLIP under the name of HPS.
        if self.checkpoint is not None and not Path(self.checkpoint).is_file():
            raise ModelError(
                "no such checkpoint",
                where=self.checkpoint,
                wanted="HPS_v2.1_compressed.pt, or HPS_v2_compressed.pt for v2.0",
                fix="download it from the hub's xswu/HPSv2, and name the file",
            )
        clip = OpenClipModel(model=self.model, pretrained=self.checkpoint)
        encoder = clip.load(precision=self.precision, device=self.device, resize_mode="longest")
        name = f"{self.name}:{self.model}:{self.checkpoint or 'random'}"
        return _CosineJudge(name, encoder, batch_size=self.batch_size, scale=100.0)


class ClipScore(JudgeConfig):
    """CLIPScore on torchmetrics' scale: 100 * max(cosine, 0).

    Hessel et al. (arXiv 2104.08718) multiply by 2.5 instead of 100, and put "A photo depicts"
    before each text; here the prompt is taken as it stands.
    clip: which model, of which library.
    """

    name: Literal["clip_score"] = "clip_score"
    clip: AnyClip

    def load(self) -> ImageJudge:
        """Load the model. Raises ModelError where it cannot be."""
        encoder = self.clip.load(precision=self.precision, device=self.device)
        return _CosineJudge(
            f"{self.name}:{encoder.name}",
            encoder,
            batch_size=self.batch_size,
            scale=100.0,
            least=0.0,
        )


class Aesthetic(JudgeConfig):
    """LAION's aesthetic predictor v2: a head on the picture's CLIP embedding; about 1 to 10.

    The embedding has length one; the head is linear layers of 768-1024-128-64-16-1 with nothing
    but dropout between them. The prompt is not read.
    head: the file sac+logos+ava1-l14-linearMSE.pth; null, which must be written out, for a random
        one. clip: the model that the head was trained on, of transformers, whose folder also says
        which activation it has; open_clip builds this model with a wrong one unless told.
    """

    name: Literal["aesthetic"] = "aesthetic"
    head: str | None
    clip: str = "openai/clip-vit-large-patch14"

    def load(self) -> ImageJudge:
        """Load CLIP and head. Raises ModelError where either cannot be, or they do not fit."""
        clip = TransformersClip(model=self.clip)
        encoder = clip.load(precision=self.precision, device=self.device)
        head = aesthetic_head(encoder.width, self.head).to(encoder.device)
        name = f"{self.name}:{self.head or 'random'}:{self.clip}"
        return _AestheticJudge(name, encoder, head, batch_size=self.batch_size)


AnyJudge = Annotated[
    PickScore | HPSv2 | Aesthetic | ClipScore | DigitStyle | DigitReader,
    Field(discriminator="name"),
]


class _CosineJudge:
    """scale * max(cosine, least) of prompt and picture."""

    def __init__(
        self,
        name: str,
        encoder: ClipEncoder,
        *,
        batch_size: int,
        scale: float,
        least: float = -1.0,
    ) -> None:
        self.name = name
        self._encoder, self._batch_size = encoder, batch_size
        self._scale, self._least = scale, least

    def score(self, prompts: Sequence[str], pictures: Sequence[Image]) -> list[float]:
        """One number a picture. Each distinct prompt is encoded once."""
        import torch

        _check_lengths(prompts, pictures)
        if not pictures:
            return []
        rows = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        texts = torch.cat(
            [self._encoder.texts(batch) for _, batch in _batches(list(rows), self._batch_size)]
        )
        scores: list[float] = []
        for start, batch in _batches(pictures, self._batch_size):
            seen = self._encoder.pictures(_in_rgb(batch, start))
            asked = texts[[rows[prompt] for prompt in prompts[start : start + len(batch)]]]
            cosine = (seen * asked).sum(dim=-1)
            scores += _numbers(self._scale * cosine.clamp(min=self._least), self.name)
        return scores


class _AestheticJudge:
    """The head's number for each picture."""

    def __init__(self, name: str, encoder: ClipEncoder, head: nn.Module, *, batch_size: int):
        self.name = name
        self._encoder, self._head, self._batch_size = encoder, head, batch_size

    def score(self, prompts: Sequence[str], pictures: Sequence[Image]) -> list[float]:
        """One number a picture, whatever its prompt."""
        import torch

        _check_lengths(prompts, pictures)
        scores: list[float] = []
        with torch.inference_mode():
            for start, batch in _batches(pictures, self._batch_size):
                seen = self._encoder.pictures(_in_rgb(batch, start))
                scores += _numbers(self._head(seen)[:, 0], self.name)
        return scores


def _check_lengths(prompts: Sequence[str], pictures: Sequence[Image]) -> None:
    if len(prompts) != len(pictures):
        raise ValueError(f"{len(prompts)} prompts for {len(pictures)} pictures")


def _batches(items: Sequence[Any], size: int) -> Iterator[tuple[int, Sequence[Any]]]:
    for start in range(0, len(items), size):
        yield start, items[start : start + size]


def _in_rgb(pictures: Sequence[Image], start: int) -> list[Image]:
    for row, picture in enumerate(pictures, start=start):
        # Made to fit, a side would vanish; cut, the other would first take all memory.
        if max(picture.size) > MAX_RATIO * min(picture.size):
            raise MediaError(
                "is too narrow to judge",
                where=f"picture {row}",
                got="{}x{}".format(*picture.size),
                wanted=f"one side at most {MAX_RATIO} times the other",
            )
    return [to_rgb(p, f"picture {row}") for row, p in enumerate(pictures, start=start)]


def _numbers(scores: Tensor, name: str) -> list[float]:
    """Python floats. Raises ModelError for one that is not finite: it would compare as worse."""
    numbers: list[float] = scores.float().tolist()
    if wrong := [number for number in numbers if not math.isfinite(number)]:
        raise ModelError(
            "gave a score that is not finite",
            where=name,
            got=wrong[0],
            fix="use precision: fp32; if it is, the weights are damaged",
        )
    return numbers
