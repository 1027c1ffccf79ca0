"""Pictures: every broken or odd file is either decoded sensibly or refused in a sentence."""

from __future__ import annotations

import hashlib
import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmalign.errors import MediaError
from mmalign.media import (
    ImageLimits,
    PictureHeader,
    embed,
    media_key,
    open_image,
    picture_header,
    read_bytes,
    resolve,
)
from mmalign.records import Media


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    sink = io.BytesIO()
    image.save(sink, format, **options)
    return sink.getvalue()


def opened(image: Image.Image, format: str = "PNG", **options: object) -> Image.Image:
    return open_image(Media(bytes=encoded(image, format, **options)))


def first_pixel(image: Image.Image) -> tuple[int, ...]:
    assert image.mode == "RGB"
    return tuple(np.asarray(image)[0, 0].tolist())


def png_header(width: int, height: int) -> bytes:
    """A valid PNG of that size in its header, with hardly any pixel data behind it."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(bytes(64))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "media"
    folder.mkdir()
    Image.new("RGB", (4, 3), (10, 20, 30)).save(folder / "a.png")
    return folder


# --- what decodes ---------------------------------------------------------------------------


def test_a_file_and_its_embedded_bytes_decode_alike(root: Path) -> None:
    from_file = open_image(Media(path="a.png"), root)
    from_bytes = open_image(Media(bytes=(root / "a.png").read_bytes()))
    assert from_file.size == (4, 3)
    assert first_pixel(from_file) == first_pixel(from_bytes) == (10, 20, 30)


@pytest.mark.parametrize(
    ("image", "format", "expected"),
    [
        (Image.new("CMYK", (2, 2), (255, 0, 0, 0)), "TIFF", (0, 255, 255)),
        (Image.new("1", (2, 2), 1), "PNG", (255, 255, 255)),
        (Image.new("L", (1, 1), 7), "PNG", (7, 7, 7)),
        (Image.new("RGBA", (2, 2), (255, 0, 0, 0)), "PNG", (255, 255, 255)),
        (Image.new("RGBA", (2, 2), (255, 0, 0, 255)), "PNG", (255, 0, 0)),
        (Image.new("RGBA", (2, 2), (0, 0, 0, 51)), "PNG", (204, 204, 204)),
        (Image.new("LA", (2, 2), (10, 0)), "PNG", (255, 255, 255)),
        (Image.new("LA", (2, 2), (10, 255)), "PNG", (10, 10, 10)),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else None,
)
def test_colour_modes_become_rgb_on_white(
    image: Image.Image, format: str, expected: tuple[int, ...]
) -> None:
    assert first_pixel(opened(image, format)) == expected


def test_transparent_palette_entries_show_white_and_the_others_their_colour() -> None:
    image = Image.new("P", (2, 1), 0)
    image.putpalette([255, 0, 0, 0, 255, 0] + [0] * 762)
    image.putpixel((1, 0), 1)
    pixels = np.asarray(opened(image, transparency=0))[0].tolist()
    assert pixels == [[255, 255, 255], [0, 255, 0]]


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bit_greys_are_scaled_and_rounded_not_clipped(format: str) -> None:
    levels = np.arange(256)
    values = np.concatenate([levels * 257, [128, 129]])  # 128 / 257 is just below one half
    pixels = np.asarray(opened(Image.fromarray(values[None].astype(np.uint16)), format))[0, :, 0]
    assert pixels.tolist() == [*levels, 0, 1]


def test_values_beyond_sixteen_bits_and_floats_are_refused() -> None:
    with pytest.raises(MediaError, match="has no 16-bit range; got values 0 to 70000"):
        opened(Image.fromarray(np.array([[0, 70000]], dtype=np.int32)), "TIFF")
    with pytest.raises(MediaError, match="floating-point"):
        opened(Image.fromarray(np.zeros((2, 2), dtype=np.float32)), "TIFF")


def test_an_exif_rotated_photo_stands_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side; shown turned by 90 degrees
    assert opened(Image.new("RGB", (40, 20)), "JPEG", exif=exif).size == (20, 40)


@pytest.mark.parametrize(("orientation", "size"), [(1, (4, 3)), (3, (4, 3)), (6, (3, 4))])
def test_a_header_tells_the_upright_size_and_the_files_own_mode(
    orientation: int, size: tuple[int, int]
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    media = Media(bytes=encoded(Image.new("CMYK", (4, 3)), "JPEG", exif=exif.tobytes()))
    assert picture_header(media) == PictureHeader(width=size[0], height=size[1], mode="CMYK")
    assert open_image(media).size == size


def test_a_header_is_read_without_the_pixels_and_refused_as_pictures_are() -> None:
    assert picture_header(Media(bytes=png_header(64, 32))).width == 64
    with pytest.raises(MediaError):
        open_image(Media(bytes=png_header(64, 32)))
    for data in (b"", b"no picture", png_header(100_000, 100_000)):
        with pytest.raises(MediaError):
            picture_header(Media(bytes=data))


def test_the_first_frame_of_an_animation_counts() -> None:
    frames = [Image.new("RGB", (2, 2), colour) for colour in ("red", "blue")]
    gif = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert first_pixel(open_image(Media(bytes=gif))) == (255, 0, 0)


# --- what is refused ------------------------------------------------------------------------


def test_empty_truncated_and_foreign_bytes_are_refused() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    for format in ("PNG", "JPEG"):
        whole = encoded(Image.fromarray(noise), format)
        with pytest.raises(MediaError, match=r"cannot be decoded .*Replace it or drop the row"):
            open_image(Media(bytes=whole[: len(whole) // 2]))
    with pytest.raises(MediaError, match="is empty; got 0 bytes"):
        open_image(Media(bytes=b""))
    with pytest.raises(MediaError, match=r"known format; got bytes that begin b'<!DOCTYPE ht'"):
        open_image(Media(bytes=b"<!DOCTYPE html><p>Not found"))


@pytest.mark.parametrize("side", [9_000, 10_000, 60_000])
def test_a_decompression_bomb_is_refused_from_its_header(
    side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Below Pillow's warning (89 million pixels), between that and its error, and beyond it."""
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(MediaError, match="has too many pixels"):
            open_image(Media(bytes=png_header(side, side)))


def test_pillow_globals_stay_as_they_are() -> None:
    before = (Image.MAX_IMAGE_PIXELS, list(warnings.filters))
    opened(Image.new("RGB", (2, 2)))
    assert (Image.MAX_IMAGE_PIXELS, list(warnings.filters)) == before


def test_too_many_bytes_are_refused_in_a_row_and_in_a_file(root: Path) -> None:
    limits = ImageLimits(max_bytes=10)
    for media in (Media(path="a.png"), Media(bytes=bytes(11))):
        with pytest.raises(MediaError, match=r"file is too large.*wanted at most 10"):
            open_image(media, root, limits)


def test_missing_files_and_folders_are_refused(root: Path) -> None:
    with pytest.raises(MediaError, match=r"nope.png: cannot be read \(No such file.*media root"):
        open_image(Media(path="nope.png"), root)
    (root / "folder.png").mkdir()
    with pytest.raises(MediaError, match=r"folder.png: is not a file"):
        open_image(Media(path="folder.png"), root)
    with pytest.raises(MediaError, match="neither a path nor bytes"):
        open_image(Media(), root)
    with pytest.raises(MediaError, match="declares no media root"):
        open_image(Media(path="a.png"))


@pytest.mark.parametrize(
    "path", ["../secret.png", "x/../../secret.png", "/etc/hostname", "link.png"]
)
def test_paths_that_climb_out_of_the_root_are_refused(root: Path, path: str) -> None:
    secret = root.parent / "secret.png"
    Image.new("RGB", (1, 1)).save(secret)
    (root / "link.png").symlink_to(secret)
    with pytest.raises(MediaError, match="climbs out of the media root"):
        open_image(Media(path=path), root)


def test_paths_that_stay_inside_are_allowed(root: Path) -> None:
    (root / "alias.png").symlink_to(root / "a.png")
    assert resolve(Media(path="alias.png"), root) == (root / "a.png").resolve()
    assert resolve(Media(path="x/../a.png"), root) == (root / "a.png").resolve()


@pytest.mark.parametrize("path", ["a\0b.png", "x" * 5000 + ".png"])
def test_impossible_names_are_refused(root: Path, path: str) -> None:
    with pytest.raises(MediaError):
        open_image(Media(path=path), root)


def test_a_symlink_loop_is_refused(root: Path) -> None:
    (root / "loop.png").symlink_to(root / "loop.png")
    with pytest.raises(MediaError):
        open_image(Media(path="loop.png"), root)


# --- hashes ---------------------------------------------------------------------------------


def test_the_hash_is_verified_only_on_request(root: Path) -> None:
    changed = Media(path="a.png", sha256="0" * 64)
    assert open_image(changed, root).size == (4, 3)
    with pytest.raises(MediaError, match="has changed since the row was written"):
        open_image(changed, root, verify=True)
    data = (root / "a.png").read_bytes()
    right = Media(path="a.png", sha256=hashlib.sha256(data).hexdigest())
    assert read_bytes(right, root, verify=True) == data


def test_embedding_round_trips() -> None:
    media = embed(Image.new("RGB", (3, 2), (1, 2, 3)), path="x.png")
    assert first_pixel(open_image(media, verify=True)) == (1, 2, 3)


def test_media_keys_tell_pictures_apart() -> None:
    """Public sets give every embedded picture the same path, so the bytes must decide."""
    one, two = Media(path="image.png", bytes=b"1"), Media(path="image.png", bytes=b"2")
    assert media_key(one) != media_key(two)
    assert media_key(one) == media_key(Media(bytes=b"1"))
    assert media_key(Media(path="a.png")) != media_key(Media(path="b.png"))
