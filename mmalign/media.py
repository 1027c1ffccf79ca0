"""Images: find, check, decode. Every picture the library opens goes through open_image."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mmalign.errors import MediaError
from mmalign.records import Media

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, kw_only=True)
class ImageLimits:
    """What a picture may be before it is refused."""

    max_pixels: int = 64_000_000
    max_bytes: int = 256 * 2**20


def resolve(media: Media, root: Path | None) -> Path:
    """The file a media path means. Raises MediaError when it climbs out of `root`."""
    if media.path is None:
        raise MediaError("has neither a path nor bytes", where="media")
    if root is None:
        raise MediaError("has a path but the dataset declares no media root", where=media.path)
    root = root.resolve()
    path = (root / media.path).resolve()
    if not path.is_relative_to(root):
        raise MediaError(
            "climbs out of the media root", where=media.path, wanted=f"a path inside {root}"
        )
    return path


def read_bytes(media: Media, root: Path | None, limits: ImageLimits = ImageLimits()) -> bytes:
    """The encoded bytes of a picture, from the row or from its file."""
    if media.bytes is not None:
        return media.bytes
    path = resolve(media, root)
    try:
        if path.stat().st_size > limits.max_bytes:
            raise MediaError("file is too large", where=str(path), wanted=f"{limits.max_bytes} bytes")
        return path.read_bytes()
    except OSError as error:
        raise MediaError(f"cannot be read ({error.strerror})", where=str(path)) from None


def open_image(
    media: Media, root: Path | None = None, limits: ImageLimits = ImageLimits()
) -> Image:
    """Decode a picture to RGB, upright by its EXIF orientation.

    Raises MediaError for a missing, empty, truncated, oversized or unreadable file.
    """
    from PIL import Image, ImageOps

    name = media.path or f"embedded image {(media.sha256 or '')[:12]}"
    data = read_bytes(media, root, limits)
    if not data:
        raise MediaError("is empty", where=name, got="0 bytes")
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            if width * height > limits.max_pixels:
                raise MediaError(
                    "has too many pixels",
                    where=name,
                    got=f"{width}x{height}",
                    wanted=f"at most {limits.max_pixels} pixels",
                )
            image.load()
            return ImageOps.exif_transpose(image).convert("RGB")
    except MediaError:
        raise
    except Exception as error:
        # Pillow's decoders raise whatever they like on a broken file; each means the same here.
        raise MediaError(f"cannot be decoded ({error})", where=name) from None


def embed(image: Image, *, path: str | None = None) -> Media:
    """A picture as PNG bytes inside the row, with its hash."""
    sink = io.BytesIO()
    image.save(sink, format="PNG")
    data = sink.getvalue()
    return Media(path=path, bytes=data, sha256=hashlib.sha256(data).hexdigest())


def media_key(media: Media) -> str:
    """A name that two media share only if they are the same picture."""
    return media.sha256 or media.path or hashlib.sha256(media.bytes or b"").hexdigest()
