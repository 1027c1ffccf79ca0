"""Pictures on their way to a server: as they are where any decoder reads them so, else as PNG."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from mmalign.clips import FrameSampling, open_clip
from mmalign.errors import DataError, MediaError
from mmalign.generate.base import Request, Sampling
from mmalign.media import embed, open_image
from mmalign.records import Block, Media, Message, user


def noise(mode: str = "RGB", size: tuple[int, int] = (12, 8)) -> Image.Image:
    shape = (size[1], size[0], 4)
    pixels = np.random.RandomState(0).randint(0, 255, shape, dtype=np.uint8)
    return Image.fromarray(pixels, "RGBA").convert(mode)


def saved(image: Image.Image, kind: str, **settings) -> Media:
    sink = io.BytesIO()
    image.save(sink, kind, **settings)
    return Media(bytes=sink.getvalue())


def turned() -> Media:
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(noise(), "JPEG", exif=exif)


def sent(scripted, request: Request, **settings) -> list[tuple[str, bytes]]:
    """Kind and bytes of each picture that the server got, in order."""
    scripted.bodies.clear()
    scripted.config(**settings).load().generate([request], Sampling())
    parts = [
        part["image_url"]["url"]
        for message in scripted.bodies[0]["messages"]
        for part in message["content"]
        if isinstance(part, dict) and part["type"] == "image_url"
    ]
    both = [part.removeprefix("data:image/").split(";base64,") for part in parts]
    return [(kind, base64.b64decode(data)) for kind, data in both]


def asking(*images: Media, **settings) -> Request:
    return Request(id="x", prompt=user("?", images=len(images)), images=images, **settings)


@pytest.mark.parametrize(
    ("media", "kind"),
    [
        (saved(noise(), "JPEG"), "jpeg"),
        (saved(noise("L"), "JPEG"), "jpeg"),
        (saved(noise(), "PNG"), "png"),
    ],
    ids=["jpeg", "grey", "png"],
)
def test_plain_files_are_sent_as_they_are(scripted, media, kind):
    assert sent(scripted, asking(media)) == [(kind, media.bytes)]


@pytest.mark.parametrize(
    "media",
    [
        turned(),
        saved(noise("RGBA"), "PNG"),
        saved(noise("P"), "PNG"),
        saved(noise("CMYK"), "JPEG"),
        saved(noise(), "WEBP", lossless=True),
        saved(noise(), "BMP"),
    ],
    ids=["turned", "transparent", "palette", "cmyk", "webp", "bmp"],
)
def test_what_decoders_read_differently_is_sent_decoded(scripted, media):
    [(kind, data)] = sent(scripted, asking(media))
    assert kind == "png"
    got = Image.open(io.BytesIO(data))
    assert got.mode == "RGB"
    assert (np.asarray(got) == np.asarray(open_image(media))).all()


def test_pictures_stand_where_the_prompt_has_them(scripted, tmp_path):
    colors = {name: Image.new("RGB", (4, 4), name) for name in ("red", "blue")}
    colors["red"].save(tmp_path / "red.png")
    image, text = Block(type="image"), Block(type="text", text="then")
    prompt = (
        Message(role="user", content=(image, text, image)),
        Message(role="assistant", content=(Block(type="text", text="ok"),)),
        Message(role="user", content=(image,)),
    )
    red, blue = Media(path="red.png"), embed(colors["blue"])
    request = Request(id="x", prompt=prompt, images=(red, blue, red), media_root=tmp_path)
    pictures = [
        Image.open(io.BytesIO(data)).getpixel((0, 0)) for _, data in sent(scripted, request)
    ]
    assert pictures == [(255, 0, 0), (0, 0, 255), (255, 0, 0)]
    kinds = [[part["type"] for part in m["content"]] for m in scripted.bodies[0]["messages"][::2]]
    assert kinds == [["image_url", "text", "image_url"], ["image_url"]]


def film(path: Path) -> Media:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width = stream.height = 32
        for level in range(0, 240, 30):
            pixels = np.full((32, 32, 3), level, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
        container.mux(stream.encode())
    return Media(path=path.name)


def test_a_clip_is_sent_as_its_frames_in_order(scripted, tmp_path):
    media = film(tmp_path / "film.mp4")
    frames = FrameSampling(num_frames=3)
    clip = open_clip(media, tmp_path, frames)
    for video in (media, clip):
        request = Request(
            id="x",
            prompt=user("?", images=1, videos=1),
            images=(saved(noise(), "PNG"),),
            videos=(video,),
            media_root=tmp_path,
        )
        first, *rest = sent(scripted, request, frames=frames)
        assert first == ("png", saved(noise(), "PNG").bytes)
        got = [np.asarray(Image.open(io.BytesIO(data))) for _, data in rest]
        assert (np.stack(got) == clip.frames).all()
        kinds = [part["type"] for part in scripted.bodies[0]["messages"][0]["content"]]
        assert kinds == ["image_url"] * 4 + ["text"]


def test_other_frames_of_a_clip_are_another_request(scripted, tmp_path):
    video, ledger = film(tmp_path / "film.mp4"), tmp_path / "answers.jsonl"
    request = Request(id="x", prompt=user("?", videos=1), videos=(video,), media_root=tmp_path)
    for num_frames in (2, 2, 3):
        frames = FrameSampling(num_frames=num_frames)
        scripted.config(ledger=ledger, frames=frames).load().generate([request], Sampling())
    assert len(scripted.bodies) == 2


@pytest.mark.parametrize("content", [None, b"no clip"], ids=["absent", "no_clip"])
def test_an_unreadable_clip_names_the_request_before_anything_is_asked(scripted, tmp_path, content):
    if content:
        (tmp_path / "bad.mp4").write_bytes(content)
    fine = Request(id="fine", prompt=user("?"))
    videos = (Media(path="bad.mp4"),)
    bad = Request(id="bad", prompt=user("?", videos=1), videos=videos, media_root=tmp_path)
    with pytest.raises(MediaError, match="request bad, "):
        scripted.config().load().generate([fine, bad], Sampling())
    assert scripted.bodies == []


@pytest.mark.parametrize(
    "media",
    [
        Media(bytes=b"not a picture"),
        Media(bytes=saved(noise(), "PNG").bytes[:60]),
        Media(path="absent.png"),
        Media(path="../climbing.png"),
        Media(bytes=saved(noise(), "PNG").bytes, sha256="0" * 64),
    ],
    ids=["no_picture", "torn", "absent", "climbing", "changed"],
)
def test_an_unreadable_picture_names_the_request_before_anything_is_asked(
    scripted, media, tmp_path
):
    fine = [Request(id=f"fine{n}", prompt=user("?")) for n in range(5)]
    bad = Request(id="bad", prompt=user("?", images=1), images=(media,), media_root=tmp_path)
    with pytest.raises(MediaError, match="request bad, "):
        scripted.config().load().generate([*fine, bad], Sampling())
    assert scripted.bodies == []


@pytest.mark.parametrize("places", [0, 2])
def test_places_and_pictures_must_agree(scripted, places):
    picture = saved(noise(), "PNG")
    request = Request(id="x", prompt=user("?", images=places), images=(picture,))
    with pytest.raises(DataError, match=r"request x: .* number of places"):
        scripted.config().load().generate([request], Sampling())
