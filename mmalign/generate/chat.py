"""A request in the words of a chat server, and the server's answer in ours."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmalign.clips import Clip, FrameSampling, open_clip, probe_clip
from mmalign.errors import DataError, MediaError, ModelError
from mmalign.generate.base import Request, Told
from mmalign.generate.ledger import Answer
from mmalign.media import embed, open_image, read_bytes, resolve
from mmalign.records import Media, Message

_ORIENTATION = 0x0112


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """One picture or clip of a request: the name that stands for it, and its data: URLs.

    `check` raises MediaError for a file that cannot be read.
    """

    name: str
    urls: Callable[[], list[str]]
    check: Callable[[], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A request as it will be sent, but with a name in the place of each picture.

    `key` is the hash of all that is asked, by which a ledger finds the answer.
    """

    id: str
    body: Mapping[str, Any]
    shown: tuple[Shown, ...]
    key: str

    def check(self) -> None:
        """Raise MediaError, naming the request, where a file cannot be read."""
        with _naming(self.id):
            for one in self.shown:
                one.check()

    def filled(self) -> dict[str, Any]:
        """The body with its pictures. Raises MediaError, naming the request."""
        with _naming(self.id):
            urls = {one.name: one.urls() for one in self.shown}
        messages = [
            {**message, "content": _filled(message["content"], urls)}
            for message in self.body["messages"]
        ]
        return {**self.body, "messages": messages}


def make_ask(
    request: Request, fields: Mapping[str, Any], *, frames: FrameSampling, seed: int
) -> Ask:
    """The body of a request: its messages, then `fields`; those that are None are left out.

    The key holds the seed also where it is not sent, so that two samples of one prompt are two.

    Servers take no clips alike, so the frames of a clip are sent as pictures, in order, without
    their times. A prefill becomes an assistant turn to be continued (vLLM's extension).
    Raises MediaError for a file that cannot be read, ModelError for what no server can do.
    """
    _refuse(request)
    root = request.media_root
    with _naming(request.id):
        shown = {
            "image": [_image(media, root) for media in request.images],
            "video": [_clip(clip, root, frames) for clip in request.videos],
        }
    messages = [_message(message) for message in request.prompt]
    order: list[Shown] = []
    for message in messages:
        for part in message["content"]:
            if part["type"] in shown:
                if not shown[part["type"]]:
                    raise _places(request.id)
                order.append(shown[part["type"]].pop(0))
                part["name"] = order[-1].name
    if any(shown.values()):
        raise _places(request.id)
    body: dict[str, Any] = {"messages": [_plain(message) for message in messages], **fields}
    if request.prefill:
        body["messages"].append({"role": "assistant", "content": request.prefill})
        body |= {"add_generation_prompt": False, "continue_final_message": True}
    body = {name: value for name, value in body.items() if value is not None}
    key = hashlib.sha256(json.dumps([body, seed], sort_keys=True).encode()).hexdigest()
    return Ask(id=request.id, body=body, shown=tuple(order), key=key)


def read_answer(text: str) -> Answer:
    """The answer in a server's reply. Raises ValueError saying what is wrong with it."""
    try:
        reply = json.loads(text)
        choice = reply["choices"][0]
        content, refusal = choice["message"].get("content"), choice["message"].get("refusal")
        reason, usage = choice["finish_reason"], reply["usage"]
        tokens = (usage["prompt_tokens"], usage["completion_tokens"])
    except ValueError:
        raise ValueError(f"no JSON: {text[:80]!r}") from None
    except (KeyError, IndexError, TypeError, AttributeError):
        raise ValueError(f"no chat completion with its usage: {text[:200]!r}") from None
    if not isinstance(content, str | None) or not all(isinstance(n, int) for n in tokens):
        raise ValueError(f"no chat completion with its usage: {text[:200]!r}")
    # A lone surrogate could be written to no dataset.
    content = (content or "").encode(errors="replace").decode()
    answer = Answer(
        text=content,
        finish_reason="refusal" if refusal else str(reason),
        prompt_tokens=tokens[0],
        completion_tokens=tokens[1],
    )
    if choice.get("token_ids") is None:
        return answer
    return replace(answer, token_ids=tuple(choice["token_ids"]), told=_told(reply, choice))


def _told(reply: Mapping[str, Any], choice: Mapping[str, Any]) -> Told:
    """What vLLM adds for `return_token_ids` and `logprobs`; empty for what is not there."""
    content = (choice.get("logprobs") or {}).get("content") or ()
    return Told(
        prompt_ids=tuple(reply.get("prompt_token_ids") or ()),
        logps=tuple(float(one["logprob"]) for one in content),
        model=str(reply.get("model")),
        ending=str(choice["finish_reason"]),
    )


def _refuse(request: Request) -> None:
    where, fix = f"request {request.id}", "use a generator with engine: local"
    if request.corruption is not None:
        raise ModelError(
            "a server cannot hide image tokens or pixels from its model", where=where, fix=fix
        )
    if request.num_tokens is not None:
        raise ModelError(
            "a server cannot be asked for an exact number of tokens", where=where, fix=fix
        )


def _message(message: Message) -> dict[str, Any]:
    parts = [
        {"type": "text", "text": block.text} if block.type == "text" else {"type": block.type}
        for block in message.content
    ]
    return {"role": message.role, "content": parts}


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    """A message of one text as a string: templates of models without eyes take nothing else."""
    parts = message["content"]
    only_text = len(parts) == 1 and parts[0]["type"] == "text"
    return {**message, "content": parts[0]["text"]} if only_text else message


def _filled(content: Any, urls: Mapping[str, list[str]]) -> Any:
    if isinstance(content, str):
        return content
    filled = []
    for part in content:
        if part["type"] == "text":
            filled.append(part)
        else:
            filled += [{"type": "image_url", "image_url": {"url": u}} for u in urls[part["name"]]]
    return filled


def _image(media: Media, root: Path | None) -> Shown:
    data = read_bytes(media, root, verify=media.sha256 is not None)
    return Shown(
        name=hashlib.sha256(data).hexdigest(),
        urls=lambda: [_image_url(media, root)],
        check=lambda: open_image(media, root),
    )


def _clip(clip: Media | Clip, root: Path | None, frames: FrameSampling) -> Shown:
    if not isinstance(clip, Media):
        return Shown(name=clip.key, urls=lambda: _frame_urls(clip), check=lambda: None)
    verify = clip.sha256 is not None
    return Shown(
        name=f"{_file_hash(clip, root)} {frames!r}",
        urls=lambda: _frame_urls(open_clip(clip, root, frames, verify=verify)),
        # The first frame; all of them are decoded once, when they are sent.
        check=lambda: probe_clip(clip, root, verify=verify),
    )


def _file_hash(media: Media, root: Path | None) -> str:
    if media.bytes is not None:
        return hashlib.sha256(media.bytes).hexdigest()
    path = resolve(media, root)
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise MediaError(f"cannot be read ({error.strerror})", where=str(path)) from None


def _image_url(media: Media, root: Path | None) -> str:
    """The file's own bytes where every decoder reads them as open_image does, else a PNG of it."""
    from PIL import Image

    decoded, data = open_image(media, root), read_bytes(media, root)
    with Image.open(io.BytesIO(data)) as header:
        kind, upright = header.format, header.getexif().get(_ORIENTATION, 1) == 1
        opaque = header.mode in ("RGB", "L") and not header.has_transparency_data
    if kind in ("JPEG", "PNG") and upright and opaque:
        return _url(kind, data)
    return _url("PNG", embed(decoded).bytes)


def _frame_urls(clip: Clip) -> list[str]:
    from PIL import Image

    return [_url("PNG", embed(Image.fromarray(frame)).bytes) for frame in clip.frames]


def _url(kind: str, data: bytes | None) -> str:
    assert data is not None
    return f"data:image/{kind.lower()};base64,{base64.b64encode(data).decode()}"


def _places(request_id: str) -> DataError:
    return DataError(
        "the prompt has another number of places than there are pictures and clips",
        where=f"request {request_id}",
        fix="give one file for each place",
    )


@contextmanager
def _naming(request_id: str) -> Iterator[None]:
    """Put the request's id before the place of a MediaError."""
    try:
        yield
    except MediaError as error:
        raise MediaError(
            error.what,
            where=f"request {request_id}, {error.where}",
            got=error.got,
            wanted=error.wanted,
            fix=error.fix,
        ) from None
