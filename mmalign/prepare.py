"""From a record's prompt, pictures and text to token ids, exactly as the model will see them.

The same code serves training, generation and evaluation, so they cannot disagree. The response is
tokenised apart from the prompt, as generation continues from the prompt's own tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from pydantic import PositiveInt

from mmalign.clips import Clip, FrameSampling
from mmalign.config import Strict
from mmalign.encode import MediaEncoder, thinned
from mmalign.errors import DataError, ModelError
from mmalign.log import get_logger
from mmalign.models.families import Family
from mmalign.records import Block, Media, Message, Span, prompt_text, user
from mmalign.scoring.candidates import Condition, EncodedMedia
from mmalign.spans import marked_tokens

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
    """Renders prompts with the processor's chat template and tokenises them."""

    def __init__(
        self,
        processor: Any,
        config: Any,
        family: Family,
        limits: TokenLimits = TokenLimits(),
        frames: FrameSampling = FrameSampling(),
    ) -> None:
        self.processor, self.config, self.family, self.limits = processor, config, family, limits
        self.frames = frames
        self.tokenizer = processor.tokenizer
        self._template = family.chat_template if processor.chat_template is None else None
        self.image_token_id: int = config.image_token_id
        self.video_token_id: int | None = config.video_token_id if family.video_inputs else None
        self.encoder = MediaEncoder(processor, config, family)
        # Rows repeat their prompts, and rendering and tokenising cost more than the small pictures.
        self._render = lru_cache(maxsize=1024)(self._render_once)
        self._response = lru_cache(maxsize=1024)(self._response_once)
        self._tokenise = lru_cache(maxsize=1024)(self._tokenise_once)
        added = self.tokenizer.added_tokens_decoder
        self._control = {index: str(token) for index, token in added.items() if token.special}
        self.end_token_id = self._end_of_turn()
        self._probe_boundary()

    @property
    def pad_token_id(self) -> int:
        """The padding token, or the end of a turn where a tokenizer has none; never attended."""
        pad = self.tokenizer.pad_token_id
        return self.end_token_id if pad is None else pad

    def condition(
        self,
        prompt: Sequence[Message],
        images: Sequence[Media],
        media_root: Path | None,
        *,
        videos: Sequence[Media | Clip] = (),
        id: str = "",
        max_pixels: int | None = None,
        max_frames: int | None = None,
    ) -> Condition:
        """A prompt, its pictures and its clips, ready to be scored or continued.

        Raises MediaError for a picture or clip that cannot be read, RowDropped where the prompt's
        places and the features do not match, or the family takes no clips.
        """
        self._refuse_control(prompt_text(prompt), "prompt", id)
        if self._template is not None and [message.role for message in prompt] != ["user"]:
            what = f"the family {self.family.name} takes one question, and no system message"
            raise RowDropped("many_turns", what, where=id or None)
        text = self._render(tuple(prompt), add_generation_prompt=True)
        pixels = min((n for n in (max_pixels, self.limits.max_pixels) if n), default=None)
        if len(images) > (self.family.max_images or len(images)):
            what = f"the family {self.family.name} takes {self.family.max_images} picture a prompt"
            raise RowDropped("many_images", what, where=id or None)
        frames = self.frames if max_frames is None else thinned(self.frames, max_frames)
        if videos and not self.family.video_inputs:
            what = f"the family {self.family.name} takes no clips"
            raise RowDropped("no_clips", what, where=id or None)
        encoded = tuple(self.encoder.image(media, media_root, pixels) for media in images)
        clips = tuple(self.encoder.clip(clip, media_root, pixels, frames) for clip in videos)
        ids = self._prompt_ids(text, encoded, clips, id)
        import torch

        positions = self.family.positions(
            torch.tensor(ids),
            [image.inputs for image in encoded],
            [clip.inputs for clip in clips],
            self.config,
        )
        return Condition(
            id=id,
            prompt_ids=ids,
            images=encoded,
            videos=clips,
            positions=positions + self.family.first_position,
            text=text,
        )

    def response(self, prompt: Sequence[Message], text: str) -> list[int]:
        """Token ids of a response as the template renders it, one end-of-turn token at its end."""
        return list(self._response(tuple(prompt), text))

    def _response_once(self, prompt: tuple[Message, ...], text: str) -> tuple[int, ...]:
        return (*self._response_tokens(prompt, text)[0], self.end_token_id)

    def _response_tokens(
        self, prompt: Sequence[Message], text: str
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Tokens of a response without its end, and the characters of `text` that each covers."""
        self._refuse_control(text, "response", "")
        end = self.end_token_id
        rendered = self._response_text(prompt, text)
        made = self.tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)
        ids = made["input_ids"]
        ids = ids[: ids.index(end)] if end in ids else ids
        if not ids:
            raise RowDropped("empty_response", "the response has no tokens")
        # The template may put a blank or a line break before the text, or trim it.
        shift = rendered.find(text.strip()) - (len(text) - len(text.lstrip()))
        offsets = [(a - shift, b - shift) for a, b in made["offset_mapping"][: len(ids)]]
        return ids, offsets

    def marked(self, prompt: Sequence[Message], text: str, spans: Sequence[Span]) -> list[bool]:
        """Which tokens of `response(prompt, text)` lie in a span of `text`."""
        _, offsets = self._response_tokens(prompt, text)
        return marked_tokens(spans, offsets, len(text))

    def prefill(self, prompt: Sequence[Message], text: str) -> list[int]:
        """Token ids of the start of a response, to be continued: no end-of-turn token."""
        return self.response(prompt, text)[:-1] if text.strip() else []

    def fit(
        self,
        prompt: Sequence[Message],
        images: Sequence[Media],
        responses: Sequence[str | None],
        media_root: Path | None,
        *,
        videos: Sequence[Media | Clip] = (),
        id: str = "",
    ) -> tuple[Condition, list[list[int]]]:
        """A condition and its responses within the token limit; None is the end of a turn alone.

        Order: fewer pixels, fewer frames, then shorter responses, then RowDropped("too_long").
        """
        make = partial(self.condition, prompt, images, media_root, videos=videos, id=id)
        condition = make()
        end = self.end_token_id
        ids = [[end] if text is None else self.response(prompt, text) for text in responses]
        limit = self.limits.max_tokens
        if limit is None:
            return condition, ids
        longest = max(map(len, ids))
        if len(condition.prompt_ids) + longest > limit and self.family.token_pixels is not None:
            condition = self._with_fewer_pixels(condition, limit - longest, make)
        if len(condition.prompt_ids) + longest > limit and videos:
            condition = self._with_fewer_frames(condition, limit - longest, make)
        room = limit - len(condition.prompt_ids)
        if room < min(self.limits.min_response_tokens, longest):
            raise RowDropped(
                "too_long",
                "the prompt leaves no room for a response",
                where=id or None,
                got=f"{len(condition.prompt_ids)} prompt tokens, "
                f"{condition.num_media_tokens} of them of pictures or clips",
                wanted=f"at most {limit} tokens in all",
            )
        return condition, [tokens[:room] for tokens in ids]

    def _with_fewer_pixels(
        self, condition: Condition, prompt_room: int, make: Callable[..., Condition]
    ) -> Condition:
        """The same condition with pictures shrunk until the prompt fits, or as small as they go."""
        assert self.family.token_pixels is not None
        if not condition.images:
            return condition
        token_pixels = self.family.token_pixels(self.config)
        room = prompt_room - (len(condition.prompt_ids) - condition.num_image_tokens)
        pixels = token_pixels * _largest_share([i.num_tokens for i in condition.images], room)
        while condition.num_image_tokens > room and pixels >= token_pixels:
            condition = make(max_pixels=int(pixels))
            # Sides are rounded to whole patches, so the first size may still be a little too large.
            pixels *= 0.9
        return condition

    def _with_fewer_frames(
        self, condition: Condition, prompt_room: int, make: Callable[..., Condition]
    ) -> Condition:
        """The same condition with clips thinned by halves until the prompt fits, or to two frames.

        Pictures go back to full size: where they shrank, it did not suffice.
        """
        frames = self.frames.num_frames or self.frames.max_frames
        while len(condition.prompt_ids) > prompt_room and frames > 2:
            frames = max(2, frames // 2)
            condition = make(max_frames=frames)
        return condition

    def _refuse_control(self, text: str, what: str, row: str) -> None:
        """A control token in a text would end the turn, or stand for a missing picture."""
        for token in self._control.values():
            if token in text:
                raise RowDropped(
                    "control_token",
                    f"the {what} holds the control token {token}",
                    where=row or None,
                )

    def _end_of_turn(self) -> int:
        """The control token that the template writes after a response, else the tokenizer's end.

        They differ in Gemma 3, whose <eos> ends a document and <end_of_turn> a turn.
        """
        after = self._response_text(user("Is it?"), "It is.").partition("It is.")[2].lstrip()
        written = [index for index, token in self._control.items() if after.startswith(token)]
        end = written[0] if written else self.tokenizer.eos_token_id
        if end is None:
            raise ModelError("the tokenizer has no end-of-turn token", fix="set its eos_token")
        return end

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
                messages,
                chat_template=self._template,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
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
        if whole.startswith(before):
            return whole[len(before) :].rstrip()
        # LLaVA-OneVision's published template writes "assistant \n" before an answer and
        # "assistant\n" where one is to be generated; the prompt counts as generation meets it.
        start = whole.rfind(text.strip())
        if "".join(whole[:start].split()) != "".join(before.split()):
            raise ModelError(
                "the chat template renders an answered prompt differently from an open one",
                got=repr(whole[max(0, len(before) - 40) : len(before) + 20]),
                wanted=f"a text that starts with {before[-40:]!r}",
                fix="use a template whose generation prompt is a prefix of the assistant turn",
            )
        return whole[start:].rstrip()

    def _tokenise_once(self, text: str, *, start: bool) -> tuple[int, ...]:
        bos = self.tokenizer.bos_token
        # Not again where the template has written it, be it behind the pictures.
        special = start and not (bos and bos in text)
        return tuple(self.tokenizer(text, add_special_tokens=special)["input_ids"])

    def _prompt_ids(
        self, text: str, images: Sequence[EncodedMedia], clips: Sequence[EncodedMedia], row: str
    ) -> list[int]:
        """A rendered prompt in tokens, with a placeholder for every feature."""
        if self.family.picture_text is not None:
            text = self._with_media(text, "image", self.processor.image_token, images, row)
        if self.family.video_text is not None:
            text = self._with_media(text, "video", self.processor.video_token, clips, row)
        ids = list(self._tokenise(text, start=True))
        if self.family.picture_text is None:
            ids = self._expand(ids, self.image_token_id, images, row)
        if self.family.video_text is None:
            ids = self._expand(ids, self.video_token_id, clips, row)
        return ids

    def _with_media(
        self, text: str, kind: str, token: str, media: Sequence[EncodedMedia], row: str
    ) -> str:
        """A rendered prompt with each picture's or clip's own text in place of its placeholder."""
        pieces = text.split(token)
        self._check_count(kind, len(pieces) - 1, len(media), row)
        texts = [one.text or "" for one in media]
        return "".join(part for pair in zip(pieces, [*texts, ""], strict=True) for part in pair)

    def _expand(
        self, ids: Sequence[int], token_id: int | None, media: Sequence[EncodedMedia], row: str
    ) -> list[int]:
        """Repeat each placeholder of one kind once for every feature of its picture or clip."""
        kind = "image" if token_id == self.image_token_id else "video"
        places = 0 if token_id is None else ids.count(token_id)
        self._check_count(kind, places, len(media), row)
        counts = iter(media)
        result: list[int] = []
        for token in ids:
            repeat = next(counts).num_tokens if token == token_id else 1
            result += [token] * repeat
        return result

    @staticmethod
    def _check_count(kind: str, places: int, count: int, row: str) -> None:
        if places != count:
            raise RowDropped(
                f"{kind}_count",
                f"{kind} places and {kind}s do not match",
                where=row or None,
                got=f"{places} places, {count} {kind}s",
                fix=f"give one file per {kind} block, and no placeholder text in a prompt",
            )


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
