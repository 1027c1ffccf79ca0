"""From a record's prompt, pictures and text to token ids, exactly as the model will see them.

The same code serves training, generation and evaluation, so they cannot disagree. The response is
tokenised apart from the prompt, as generation continues from the prompt's own tokens.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError
from pydantic import PositiveInt

from mmalign.config import Strict
from mmalign.errors import DataError, MediaError, ModelError
from mmalign.log import get_logger
from mmalign.media import media_key, open_image
from mmalign.models.families import Family
from mmalign.records import Block, Media, Message, prompt_text, user
from mmalign.scoring.candidates import Condition, EncodedImage

if TYPE_CHECKING:
    from PIL.Image import Image


logger = get_logger("prepare")


class RowDropped(DataError):
    """A row that cannot be used as it is; `reason` is a short name to count by."""

    def __init__(self, reason: str, what: str, **parts: Any) -> None:
        self.reason = reason
        super().__init__(what, **parts)


class TokenLimits(Strict):
    """How long a row may be. Image tokens are never cut.

    What is too long is first given fewer pixels (where the family's token count follows the
    picture's size), then a shorter response, and at last it is dropped.
    """

    max_tokens: PositiveInt | None = None
    min_response_tokens: PositiveInt = 1
    max_pixels: PositiveInt | None = None


class Preparer:
    """Renders prompts with the processor's chat template and tokenises them.

    Holds the most recent processed pictures, since the rows of one picture usually come together.
    """

    def __init__(
        self,
        processor: Any,
        config: Any,
        family: Family,
        limits: TokenLimits = TokenLimits(),
        cached_images: int = 64,
    ) -> None:
        self.processor, self.config, self.family, self.limits = processor, config, family, limits
        self.tokenizer = processor.tokenizer
        self.image_token_id: int = config.image_token_id
        self._recent: OrderedDict[tuple[str, int | None], EncodedImage] = OrderedDict()
        self._cached_images = cached_images
        # Rows repeat their prompts, and rendering and tokenising cost more than the small pictures.
        self._render = lru_cache(maxsize=1024)(self._render_once)
        self._response = lru_cache(maxsize=1024)(self._response_once)
        self._tokenise = lru_cache(maxsize=1024)(self._tokenise_once)
        if self.tokenizer.eos_token_id is None:
            raise ModelError("the tokenizer has no end-of-turn token", fix="set its eos_token")
        added = self.tokenizer.added_tokens_decoder.values()
        self._control = tuple(str(token) for token in added if token.special)
        self._probe_boundary()

    @property
    def pad_token_id(self) -> int:
        """The padding token, or the end of a turn where a tokenizer has none; never attended."""
        pad = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad is None else pad

    def condition(
        self,
        prompt: Sequence[Message],
        images: Sequence[Media],
        media_root: Path | None,
        *,
        id: str = "",
        max_pixels: int | None = None,
    ) -> Condition:
        """A prompt and its pictures, ready to be scored or continued.

        Raises MediaError for a picture that cannot be read, RowDropped where the prompt's image
        places and the image features do not match.
        """
        self._refuse_control(prompt_text(prompt), "prompt", id)
        text = self._render(tuple(prompt), add_generation_prompt=True)
        pixels = min((n for n in (max_pixels, self.limits.max_pixels) if n), default=None)
        encoded = tuple(self._encode(media, media_root, pixels) for media in images)
        ids = self._expand(self._tokenise(text, start=True), encoded, id)
        import torch

        positions = self.family.positions(
            torch.tensor(ids), [image.inputs for image in encoded], self.config
        )
        return Condition(id=id, prompt_ids=ids, images=encoded, positions=positions, text=text)

    def response(self, prompt: Sequence[Message], text: str) -> list[int]:
        """Token ids of a response as the template renders it, one end-of-turn token at its end."""
        return list(self._response(tuple(prompt), text))

    def _response_once(self, prompt: tuple[Message, ...], text: str) -> tuple[int, ...]:
        self._refuse_control(text, "response", "")
        end = self.tokenizer.eos_token_id
        ids = self._tokenise(self._response_text(prompt, text), start=False)
        ids = ids[: ids.index(end)] if end in ids else ids
        if not ids:
            raise RowDropped("empty_response", "the response has no tokens")
        return (*ids, end)

    def prefill(self, prompt: Sequence[Message], text: str) -> list[int]:
        """Token ids of the start of a response, to be continued: no end-of-turn token."""
        return self.response(prompt, text)[:-1] if text.strip() else []

    def fit(
        self,
        prompt: Sequence[Message],
        images: Sequence[Media],
        responses: Sequence[str],
        media_root: Path | None,
        *,
        id: str = "",
    ) -> tuple[Condition, list[list[int]]]:
        """A condition and its responses within the token limit.

        Order: fewer pixels, then shorter responses, then RowDropped("too_long").
        """
        condition = self.condition(prompt, images, media_root, id=id)
        ids = [self.response(prompt, text) for text in responses]
        limit = self.limits.max_tokens
        if limit is None:
            return condition, ids
        longest = max(map(len, ids))
        over = len(condition.prompt_ids) + longest > limit
        if over and images and self.family.token_pixels is not None:
            condition = self._with_fewer_pixels(
                condition, limit - longest, prompt, images, media_root
            )
        room = limit - len(condition.prompt_ids)
        if room < min(self.limits.min_response_tokens, longest):
            raise RowDropped(
                "too_long",
                "the prompt leaves no room for a response",
                where=id or None,
                got=f"{len(condition.prompt_ids)} prompt tokens, "
                f"{condition.num_image_tokens} of them image tokens",
                wanted=f"at most {limit} tokens in all",
            )
        return condition, [tokens[:room] for tokens in ids]

    def _with_fewer_pixels(
        self,
        condition: Condition,
        prompt_room: int,
        prompt: Sequence[Message],
        images: Sequence[Media],
        media_root: Path | None,
    ) -> Condition:
        """The same condition with pictures shrunk until the prompt fits, or as small as they go."""
        assert self.family.token_pixels is not None
        token_pixels = self.family.token_pixels(self.config)
        words = len(condition.prompt_ids) - condition.num_image_tokens
        room = prompt_room - words
        pixels = token_pixels * _largest_share([i.num_tokens for i in condition.images], room)
        while condition.num_image_tokens > room and pixels >= token_pixels:
            condition = self.condition(
                prompt, images, media_root, id=condition.id, max_pixels=int(pixels)
            )
            # Sides are rounded to whole patches, so the first size may still be a little too large.
            pixels *= 0.9
        return condition

    def _refuse_control(self, text: str, what: str, row: str) -> None:
        """A control token in a text would end the turn, or stand for a missing picture."""
        for token in self._control:
            if token in text:
                raise RowDropped(
                    "control_token",
                    f"the {what} holds the control token {token}",
                    where=row or None,
                )

    def _probe_boundary(self) -> None:
        """Warn where tokenising a response apart gives other tokens than tokenising it in place."""
        prompt = user("Is it?")
        before = self._render(prompt, add_generation_prompt=True)
        rest = self._response_text(prompt, "It is.")
        joint = self._tokenise(before + rest, start=True)
        apart = self._tokenise(before, start=True) + self._tokenise(rest, start=False)
        if joint != apart:
            logger.warning(
                "this tokenizer joins the end of a prompt with the start of a response: responses "
                "are tokenised apart here, as generation meets them"
            )

    def _render_once(self, prompt: tuple[Message, ...], *, add_generation_prompt: bool) -> str:
        messages = [
            {
                "role": message.role,
                "content": [
                    {"type": block.type, **({"text": block.text} if block.type == "text" else {})}
                    for block in message.content
                ],
            }
            for message in prompt
        ]
        try:
            return self.processor.apply_chat_template(
                messages, add_generation_prompt=add_generation_prompt, tokenize=False
            )
        except (ValueError, TemplateError) as error:
            raise ModelError(
                f"the processor's chat template cannot render a prompt ({error})",
                fix="give the checkpoint a chat_template.jinja that its model was trained with",
            ) from None

    def _response_text(self, prompt: Sequence[Message], text: str) -> str:
        turn = Message(role="assistant", content=(Block(type="text", text=text),))
        before = self._render(tuple(prompt), add_generation_prompt=True)
        whole = self._render_once((*prompt, turn), add_generation_prompt=False)
        if not whole.startswith(before):
            raise ModelError(
                "the chat template renders an answered prompt differently from an open one",
                got=repr(whole[max(0, len(before) - 40) : len(before) + 20]),
                wanted=f"a text that starts with {before[-40:]!r}",
                fix="use a template whose generation prompt is a prefix of the assistant turn",
            )
        return whole[len(before) :].rstrip()

    def _tokenise_once(self, text: str, *, start: bool) -> tuple[int, ...]:
        bos = self.tokenizer.bos_token
        special = start and not (bos and text.startswith(bos))
        return tuple(self.tokenizer(text, add_special_tokens=special)["input_ids"])

    def _expand(self, ids: Sequence[int], images: Sequence[EncodedImage], row: str) -> list[int]:
        """Repeat each image placeholder once for every feature of its picture."""
        places = ids.count(self.image_token_id)
        if places != len(images):
            raise RowDropped(
                "image_count",
                "image places and pictures do not match",
                where=row or None,
                got=f"{places} places, {len(images)} pictures",
                fix="give one picture per image block, and no placeholder text in a prompt",
            )
        counts = iter(images)
        result: list[int] = []
        for token in ids:
            repeat = next(counts).num_tokens if token == self.image_token_id else 1
            result += [token] * repeat
        return result

    def _encode(self, media: Media, root: Path | None, max_pixels: int | None) -> EncodedImage:
        # A path names a picture only together with its root; a hash names it anywhere.
        place = "" if media.sha256 or media.bytes is not None else str(root)
        name = (place + media_key(media), max_pixels)
        if name in self._recent:
            self._recent.move_to_end(name)
            return self._recent[name]
        image = open_image(media, root, verify=media.sha256 is not None)
        if max_pixels is not None:
            image = shrink(image, max_pixels)
        try:
            made = self.processor.image_processor(images=[image], return_tensors="pt")
        except ValueError as error:
            where = media.path or f"embedded image {(media.sha256 or '')[:12]}"
            raise MediaError(f"the image processor refuses it ({error})", where=where) from None
        inputs = {key: made[key] for key in self.family.image_inputs}
        digest = hashlib.sha256(f"{name}".encode()).hexdigest()
        encoded = EncodedImage(
            key=digest,
            inputs=inputs,
            num_tokens=self.family.num_image_tokens(inputs, self.config),
        )
        self._recent[name] = encoded
        if len(self._recent) > self._cached_images:
            self._recent.popitem(last=False)
        return encoded


def _largest_share(sizes: Sequence[int], room: float) -> float:
    """The cap under which sizes that are larger get cut so that all together fit into `room`.

    Example: sizes 2, 9, 9 and room 12 give 5: 2 + 5 + 5.
    """
    for rank, size in enumerate(sorted(sizes)):
        share = room / (len(sizes) - rank)
        if size > share:
            return share
        room -= size
    return max(sizes)


def shrink(image: Image, max_pixels: int) -> Image:
    """The picture itself, or a smaller one of the same shape with at most `max_pixels` pixels."""
    width, height = image.size
    if width * height <= max_pixels:
        return image
    scale = (max_pixels / (width * height)) ** 0.5
    return image.resize((max(1, int(width * scale)), max(1, int(height * scale))))
