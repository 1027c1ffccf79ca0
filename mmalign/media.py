"""Images: find, check, decode. Every picture the library opens goes through open_image."""

from __future__ import annotations

import hashlib
import io
import stat
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from mmalign.errors import MediaError
from mmalign.records import Media

if TYPE_CHECKING:
    from PIL.Image import Image

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ImageLimits:
    """What a picture may be before it is refused.

    Pillow has a limit of its own, 179 million pixels, which a higher `max_pixels` does not lift.
    """

    max_pixels: int = 64_000_000
    max_bytes: int = 256 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureHeader:
    """What a file says of its picture: pixels, upright, and Pillow's name of its colour mode."""

    width: int
    height: int
    mode: str


def resolve(media: Media, root: Path | None) -> Path:
    """The file a media path means. Raises MediaError when it climbs out of `root`."""
    if media.path is None:
        raise MediaError("has neither a path nor bytes", where="media")
    if root is None:
        raise MediaError("has a path but the dataset declares no media root", where=media.path)
    try:
        root = root.resolve()
        path = (root / media.path).resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise MediaError(f"is no usable path ({error})", where=repr(media.path)) from None
    if not path.is_relative_to(root):
        raise MediaError(
            "climbs out of the media root", where=media.path, wanted=f"a path inside {root}"
        )
    return path


def read_bytes(
    media: Media,
    root: Path | None = None,
    limits: ImageLimits = ImageLimits(),
    *,
    verify: bool = False,
) -> bytes:
    """The encoded bytes of a picture, from the row or from its file.

    With `verify`, they must also have the sha256 that the row declares, where it declares one.
    """
    where = _name(media)
    if media.bytes is not None:
        _check_size(len(media.bytes), limits, where)
        data = media.bytes
    else:
        path = resolve(media, root)
        where = str(path)
        try:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):
                raise MediaError("is not a file", where=where, wanted="a picture")
            _check_size(status.st_size, limits, where)
            data = path.read_bytes()
        except OSError as error:
            raise MediaError(
                f"cannot be read ({error.strerror})",
                where=where,
                fix="correct the path or the media root, or drop the row",
            ) from None
    if verify and media.sha256 and hashlib.sha256(data).hexdigest() != media.sha256:
        raise MediaError(
            "has changed since the row was written",
            where=where,
            got=f"sha256 {hashlib.sha256(data).hexdigest()}",
            wanted=media.sha256,
            fix="restore the file or build the dataset again",
        )
    return data


def open_image(
    media: Media,
    root: Path | None = None,
    limits: ImageLimits = ImageLimits(),
    *,
    verify: bool = False,
) -> Image:
    """Decode a picture to 8-bit RGB, upright by its EXIF orientation.

    Transparent parts show white, 16-bit greys are scaled by 1/257, and of an animation the first
    frame counts. The number of pixels is taken from the header, before anything is decoded.
    Raises MediaError for a missing, empty, truncated, oversized or unreadable file.
    """
    from PIL import ImageOps

    def decoded(image: Image) -> Image:
        image.load()
        return to_rgb(ImageOps.exif_transpose(image), _name(media))

    return _opened(media, root, limits, decoded, verify=verify)


def picture_header(
    media: Media, root: Path | None = None, limits: ImageLimits = ImageLimits()
) -> PictureHeader:
    """A picture's size and mode, its pixels not decoded. Raises MediaError as open_image does."""

    def told(image: Image) -> PictureHeader:
        # Pillow would decode a whole PNG to see whether an orientation comes after the pixels.
        may_lie = "exif" in image.info or image.format != "PNG"
        # By EXIF, orientations from 5 on lie on their side.
        lies = may_lie and image.getexif().get(0x0112, 1) >= 5
        width, height = image.size[::-1] if lies else image.size
        return PictureHeader(width=width, height=height, mode=image.mode)

    return _opened(media, root, limits, told)


def to_rgb(image: Image, where: str) -> Image:
    """A picture as 8-bit RGB, by the rules of `open_image`. Raises MediaError for other depths."""
    from PIL import Image

    if image.mode.startswith("I"):
        deep = image.convert("I")
        low, high = deep.getextrema()
        if not 0 <= low <= high <= 65535:  # type: ignore[operator]
            raise MediaError("has no 16-bit range", where=where, got=f"values {low} to {high}")
        # Half is added because Pillow cuts off the fraction.
        return deep.point(lambda value: value * (1 / 257) + 0.5).convert("L").convert("RGB")
    if image.mode == "F":
        raise MediaError("has floating-point pixels", where=where, wanted="8 or 16 bits a channel")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def embed(image: Image, *, path: str | None = None) -> Media:
    """A picture as PNG bytes inside the row, with its hash."""
    sink = io.BytesIO()
    image.save(sink, format="PNG")
    data = sink.getvalue()
    return Media(path=path, bytes=data, sha256=hashlib.sha256(data).hexdigest())


def media_key(media: Media) -> str:
    """A name that two media of one dataset share only if they are the same picture."""
    if media.sha256:
        return media.sha256
    # Bytes before the path: in many public sets every embedded picture is called "image.png".
    if media.bytes is not None:
        return hashlib.sha256(media.bytes).hexdigest()
    return media.path or ""


def _opened(
    media: Media,
    root: Path | None,
    limits: ImageLimits,
    read: Callable[[Image], T],
    *,
    verify: bool = False,
) -> T:
    """What `read` makes of the picture's file, whose header has passed the limits."""
    from PIL import Image, UnidentifiedImageError

    where = _name(media)
    data = read_bytes(media, root, limits, verify=verify)
    if not data:
        raise MediaError("is empty", where=where, got="0 bytes", fix="replace it or drop the row")
    try:
        with warnings.catch_warnings():
            # We refuse by our own limit, below; Pillow need not warn about its own.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
        with image:
            if image.width * image.height > limits.max_pixels:
                raise _too_many_pixels(f"{image.width}x{image.height}", limits, where)
            return read(image)
    except MediaError:
        raise
    except Image.DecompressionBombError as error:
        raise _too_many_pixels(str(error), limits, where) from None
    except UnidentifiedImageError:
        raise MediaError(
            "is no picture in a known format", where=where, got=f"bytes that begin {data[:12]!r}"
        ) from None
    except Exception as error:
        # Pillow's decoders raise whatever they like on a broken file; each means the same here.
        raise MediaError(
            f"cannot be decoded ({error})", where=where, fix="replace it or drop the row"
        ) from None


def _name(media: Media) -> str:
    return media.path or f"embedded image {(media.sha256 or '')[:12]}".strip()


def _check_size(num_bytes: int, limits: ImageLimits, where: str) -> None:
    if num_bytes > limits.max_bytes:
        raise MediaError(
            "file is too large",
            where=where,
            got=f"{num_bytes} bytes",
            wanted=f"at most {limits.max_bytes}",
        )


def _too_many_pixels(got: str, limits: ImageLimits, where: str) -> MediaError:
    return MediaError(
        "has too many pixels",
        where=where,
        got=got,
        wanted=f"at most {limits.max_pixels}",
        fix="make it smaller or drop the row",
    )
