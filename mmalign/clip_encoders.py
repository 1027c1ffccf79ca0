"""CLIP models, of transformers or of open_clip: texts and pictures as vectors of length one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

from pydantic import Field

from mmalign.clip_loading import (
    Precision,
    ResizeMode,
    device_for,
    dtypes,
    load_open_clip,
    load_transformers_clip,
    open_clip_name,
)
from mmalign.config import Strict
from mmalign.errors import ModelError
from mmalign.models.lora import first_line

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor


class ClipEncoder(Protocol):
    """Texts and pictures in one space, where the inner product is the cosine.

    name: which weights. width: D. scale: exp(logit_scale), what the model was trained to multiply
    cosines by; about 100 for most. device: where the vectors are.
    """

    name: str
    width: int
    scale: float
    device: str

    def texts(self, texts: Sequence[str]) -> Tensor:
        """[N, D] float32, rows of length one; cut at the model's length, 77 tokens for most."""
        ...

    def pictures(self, pictures: Sequence[Image]) -> Tensor:
        """[N, D] float32, rows of length one, of RGB pictures of any size."""
        ...


class TransformersClip(Strict):
    """A CLIP that transformers loads.

    model, processor: hub names or folders. The processor brings tokenizer and image sizes; the
    model's own where None.
    """

    library: Literal["transformers"] = "transformers"
    model: str
    processor: str | None = None

    def load(self, *, precision: Precision = "fp32", device: str | None = None) -> ClipEncoder:
        """Load model and processor. Raises ModelError where they are no CLIP, or do not fit."""
        return _FromTransformers(self, precision, device)


class OpenClipModel(Strict):
    """A CLIP that open_clip loads.

    model: one of its names, the path of a model's JSON config, or "hf-hub:owner/name" or
    "local-dir:folder" with weights of its own. pretrained: one of the model's tags, a checkpoint
    file, or null, which must be written out: random weights, which the name then says.
    """

    library: Literal["open_clip"] = "open_clip"
    model: str
    pretrained: str | None

    def load(
        self,
        *,
        precision: Precision = "fp32",
        device: str | None = None,
        resize_mode: ResizeMode | None = None,
    ) -> ClipEncoder:
        """Load it. resize_mode: `load_open_clip`'s. Raises ModelError where that cannot be done."""
        return _FromOpenClip(self, precision, device, resize_mode)


AnyClip = Annotated[TransformersClip | OpenClipModel, Field(discriminator="library")]


class _FromOpenClip:
    """An open_clip model, asked by its own tokenizer and transform."""

    def __init__(
        self,
        config: OpenClipModel,
        precision: Precision,
        device: str | None,
        resize_mode: ResizeMode | None,
    ) -> None:
        import open_clip
        import torch

        self.name = open_clip_name(config.model, config.pretrained)
        self.device = device_for(device)
        self._clip, self._transform, known_as = load_open_clip(
            config.model,
            config.pretrained,
            precision=precision,
            device=self.device,
            resize_mode=resize_mode,
        )
        self._dtype = dtypes()[precision]
        try:
            self._tokenize: Any = open_clip.get_tokenizer(known_as)
        except Exception as error:
            raise ModelError(
                f"has no tokenizer that can be loaded ({first_line(error)})", where=self.name
            ) from error
        self.scale = float(self._clip.logit_scale.detach().float().exp())
        with torch.inference_mode():
            self.width = self._clip.encode_text(self._tokenize("a").to(self.device)).shape[-1]

    def texts(self, texts: Sequence[str]) -> Tensor:
        """[N, D] float32, rows of length one."""
        import torch

        with torch.inference_mode():
            return _unit(self._clip.encode_text(self._tokenize(list(texts)).to(self.device)))

    def pictures(self, pictures: Sequence[Image]) -> Tensor:
        """[N, D] float32, rows of length one."""
        import torch

        pixels = torch.stack([self._transform(picture) for picture in pictures])
        with torch.inference_mode():
            return _unit(self._clip.encode_image(pixels.to(self.device, self._dtype)))


class _FromTransformers:
    """A transformers CLIPModel, asked by a processor that was seen to fit."""

    def __init__(self, config: TransformersClip, precision: Precision, device: str | None) -> None:
        from transformers import AutoImageProcessor, AutoTokenizer

        self.name = f"transformers:{config.model}"
        self.device = device_for(device)
        self._dtype = dtypes()[precision]
        self._clip = load_transformers_clip(config.model, self._dtype).eval().to(self.device)
        processor = config.processor or config.model
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(processor)
            # Published scores come from Pillow's resizing; transformers' own choice is torchvision.
            self._processor = AutoImageProcessor.from_pretrained(processor, backend="pil")
        except Exception as error:
            raise ModelError(
                f"processor cannot be loaded ({first_line(error)})",
                where=processor,
                wanted="a tokenizer and preprocessor_config.json",
            ) from error
        self.width = int(self._clip.config.projection_dim)
        self.scale = float(self._clip.logit_scale.detach().float().exp())
        self._check_processor(processor)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """[N, D] float32, rows of length one."""
        import torch

        # Always the full length: what a text is padded to must not depend on its neighbours.
        tokens = self._tokens(texts).to(self.device)
        with torch.inference_mode():
            return _unit(self._clip.get_text_features(**tokens).pooler_output)

    def pictures(self, pictures: Sequence[Image]) -> Tensor:
        """[N, D] float32, rows of length one."""
        import torch

        pixels = self._pixels(pictures).to(self.device, self._dtype)
        with torch.inference_mode():
            return _unit(self._clip.get_image_features(pixel_values=pixels).pooler_output)

    def _tokens(self, texts: Sequence[str]) -> Any:
        return self._tokenizer(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=self._clip.config.text_config.max_position_embeddings,
            return_tensors="pt",
        )

    def _pixels(self, pictures: Sequence[Image]) -> Tensor:
        return self._processor(images=list(pictures), return_tensors="pt")["pixel_values"]

    def _check_processor(self, where: str) -> None:
        """A text is read where it ends: with another model's tokenizer every text reads alike."""
        from PIL import Image

        text, ids = self._clip.config.text_config, self._tokens(["a"])["input_ids"][0]
        # Old configs say 2 and mean the greatest token, as transformers reads them.
        end = int(ids.max()) if text.eos_token_id == 2 else text.eos_token_id
        if (
            int(ids.max()) >= text.vocab_size
            or end not in ids
            or end != self._tokenizer.eos_token_id
        ):
            raise ModelError(
                "the tokenizer is not this model's",
                where=where,
                got=f"tokens up to {int(ids.max())}, the end {self._tokenizer.eos_token_id}",
                wanted=f"tokens below {text.vocab_size}, the end {end}",
                fix=f"name the processor that {self.name} was trained with",
            )
        got = tuple(self._pixels([Image.new("RGB", (3, 2))]).shape[-2:])
        side = self._clip.config.vision_config.image_size
        if got != (side, side):
            raise ModelError(
                "makes pictures of another size than the model's",
                where=where,
                got=f"{got[1]}x{got[0]}",
                wanted=f"{side}x{side}",
                fix=f"name the processor that {self.name} was trained with",
            )


def _unit(features: Tensor) -> Tensor:
    import torch

    return torch.nn.functional.normalize(features.float(), dim=-1)
