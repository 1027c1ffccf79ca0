"""Clips that are folders of frames, as MM-RLHF keeps them."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mmalign.errors import MediaError
from mmalign.generate.base import Request
from mmalign.media import open_image, resolve
from mmalign.records import Block, Media

if TYPE_CHECKING:
    from mmalign.clips import Clip
    from mmalign.models.families import Family

# Evenly spread from the first to the last, as MM-RLHF's released loader takes them.
NUM_FRAMES = 10
# Nothing tells how fast the frames were shown; M-RoPE alone asks.
FPS = 1.0


def with_frames(request: Request, family: Family) -> Request:
    """The request with each clip that is a folder read as the family can: a clip, or pictures.

    Raises MediaError for a folder that is empty or cannot be read.
    """
    frames = {
        place: _frames(clip, request.media_root)
        for place, clip in enumerate(request.videos)
        if isinstance(clip, Media) and clip.path and resolve(clip, request.media_root).is_dir()
    }
    if not frames:
        return request
    if family.video_inputs:
        videos = tuple(
            _clip(frames[place], request.media_root) if place in frames else clip
            for place, clip in enumerate(request.videos)
        )
        return replace(request, videos=videos)
    return _as_pictures(request, frames)


def _as_pictures(request: Request, frames: dict[int, list[Media]]) -> Request:
    """The request with the frames of each folder as pictures in the clip's place."""
    pictures, images, place = iter(request.images), list[Media](), -1
    prompt = []
    for message in request.prompt:
        content: list[Block] = []
        for block in message.content:
            taken = [block]
            if block.type == "image":
                images.append(next(pictures))
            if block.type == "video":
                place += 1
                images += frames.get(place, [])
                taken = [Block(type="image") for _ in frames.get(place, [])] or taken
            content += taken
        prompt.append(replace(message, content=tuple(content)))
    videos = tuple(clip for n, clip in enumerate(request.videos) if n not in frames)
    return replace(request, prompt=tuple(prompt), images=tuple(images), videos=videos)


def _frames(clip: Media, root: Path | None) -> list[Media]:
    folder = resolve(clip, root)
    try:
        names = sorted(f.name for f in folder.iterdir() if f.is_file() and f.name[0] != ".")
    except OSError as error:
        raise MediaError(f"cannot be read ({error.strerror})", where=str(folder)) from None
    if not names:
        raise MediaError("is a folder without frames", where=str(folder))
    count = min(NUM_FRAMES, len(names))
    places = [i * (len(names) - 1) // max(1, count - 1) for i in range(count)]
    return [Media(path=f"{clip.path}/{names[place]}") for place in places]


def _clip(frames: list[Media], root: Path | None) -> Clip:
    import numpy as np

    from mmalign.clips import Clip

    pictures = [np.asarray(open_image(frame, root)) for frame in frames]
    if len({picture.shape for picture in pictures}) > 1:
        raise MediaError(
            "holds frames of several sizes", where=str(Path(frames[0].path or "").parent)
        )
    stacked = np.stack(pictures)
    count = len(pictures)
    return Clip(
        frames=stacked,
        indices=tuple(range(count)),
        timestamps=tuple(n / FPS for n in range(count)),
        source_fps=FPS,
        num_source_frames=count,
        duration_seconds=count / FPS,
        key=hashlib.sha256(stacked.tobytes()).hexdigest(),
    )
