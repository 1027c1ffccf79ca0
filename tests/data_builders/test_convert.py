"""What convert does with clips, folders of frames, rankings, and files of two kinds."""

from __future__ import annotations

import hashlib
import json
from fractions import Fraction
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_builders.convert import NUM_FRAMES, convert, with_frames
from data_builders.importers import mm_rlhf, rrpo, sharegpt
from mmalign import cli
from mmalign.clips import ClipReader
from mmalign.errors import DataError, MediaError
from mmalign.records import Block, Example, Media, Message, Preference, Ranking, user
from mmalign.store import Manifest, open_dataset, read_manifest

MASKED = {
    "question": "<image>\nWhat colour?",
    "answer": "It is red.",
    "pred": "It is blue.",
    "answer_masked": "It is <MASK> red </MASK>.",
    "pred_masked": "It is <MASK> blue </MASK>.",
    "video": "clip.mp4",
}
PAIR = {"id": "q", "prompt": "What?", "chosen": "A cat.", "rejected": "A dog."}
ANNOTATED = {
    "id": "q",
    "question": "What?",
    "models_output": ["A cat.", "A tom.", "A dog."],
    "final_ranking": "1=2>3",
}


def turns(*values: str) -> list[dict[str, str]]:
    return [
        {"from": ("human", "gpt")[index % 2], "value": value} for index, value in enumerate(values)
    ]


def clip(path: Path, num_frames: int = 4) -> Path:
    """A clip of one red frame after the other."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=Fraction(4))
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        pixels = np.zeros((32, 32, 3), np.uint8)
        pixels[..., 0] = 255
        for _ in range(num_frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def frames(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True)
    for index in range(count):
        Image.new("RGB", (8, 8), (index, 0, 0)).save(folder / f"c01_{index:04d}.png")
    return folder


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def quarantine(out: Path) -> dict[str, str]:
    told = map(json.loads, (out / "quarantine.jsonl").read_text().splitlines())
    return {entry["id"]: f"{entry['reason']}: {entry['detail']}" for entry in told}


def imported(source: Path, out: Path, read: Any = mm_rlhf.read, **options: Any) -> Manifest:
    return convert(source, out, read, **options)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run `mmalign data …`; returns the exit code and what it printed."""
    verb = EntryPoint("data", "data_builders.data_cli:app", cli.GROUP)
    monkeypatch.setattr(cli, "verbs", lambda: {"data": verb})

    def call(*arguments: object) -> tuple[int, str]:
        return cli.run(["data", *map(str, arguments)]), capsys.readouterr().out

    return call


@pytest.mark.parametrize(
    ("format", "row"),
    [
        ("rlhf_v", {"image": "a.png", "text": '{"question": "q", "chosen": "a", "rejected": "b"}'}),
        (
            "povid",
            {
                "image": "a.png",
                "conversations": turns("<image>\nq", "a"),
                "rejected_conversations": turns("<image>\nq", "b"),
            },
        ),
        (
            "sharegpt",
            {
                "images": ["a.png"],
                "conversations": turns("<image>q"),
                "chosen": turns("q", "a")[1],
                "rejected": turns("q", "b")[1],
            },
        ),
        ("mm_rlhf", PAIR | {"image": "a.png"}),
        ("rrpo", MASKED),
    ],
)
def test_every_format_makes_a_dataset_that_validates(
    run: Any, tmp_path: Path, format: str, row: Any
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    clip(tmp_path / "clip.mp4")
    source = lines(tmp_path / "rows.jsonl", row)
    assert run("convert", source, tmp_path / "out", "--from", format)[0] == 0
    assert run("validate", tmp_path / "out")[0] == 0
    (pair,) = open_dataset(tmp_path / "out", Preference)
    assert pair.origin.builder == f"import:{format}"
    assert [media.sha256 is not None for media in (*pair.images, *pair.videos)] == [True]


# --- clips ----------------------------------------------------------------------------------


def test_clips_are_probed_hashed_and_embedded_on_request(tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    path = clip(tmp_path / "clips" / "clip.mp4")
    source = lines(tmp_path / "masked.jsonl", MASKED)
    imported(source, tmp_path / "out", rrpo.read, media_root=tmp_path / "clips")
    (pair,) = open_dataset(tmp_path / "out", Preference)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert pair.videos == (Media(path="clip.mp4", sha256=sha256),)
    assert read_manifest(tmp_path / "out").media_root == str((tmp_path / "clips").resolve())
    options: dict[str, Any] = {"media_root": tmp_path / "clips", "embed_media": True}
    imported(source, tmp_path / "embedded", rrpo.read, **options)
    (pair,) = open_dataset(tmp_path / "embedded", Preference)
    assert pair.videos == (Media(path="clip.mp4", sha256=sha256, bytes=path.read_bytes()),)


def test_clips_that_cannot_be_read_lose_only_their_rows(tmp_path: Path) -> None:
    good = clip(tmp_path / "clip.mp4")
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "words.mp4").write_text("no clip")
    (tmp_path / "cut.mp4").write_bytes(good.read_bytes()[:200])
    names = ["clip.mp4", "gone.mp4", "empty.mp4", "words.mp4", "cut.mp4", "../clip.mp4"]
    rows = [PAIR | {"id": name, "video": name} for name in names]
    source = lines(tmp_path / "p.jsonl", *rows)
    manifest = imported(source, tmp_path / "out")
    assert manifest.counts == {"imported": 1, "quarantined:unreadable_media": 5}
    assert all(
        reason.startswith("unreadable_media: ") for reason in quarantine(tmp_path / "out").values()
    )


def test_a_clip_is_read_once_and_its_reader_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for name in ("probe", "close"):
        plain = getattr(ClipReader, name)

        def noted(self: Any, *arguments: Any, plain: Any = plain, name: str = name) -> Any:
            calls.append(name)
            return plain(self, *arguments)

        monkeypatch.setattr(ClipReader, name, noted)
    clip(tmp_path / "clip.mp4")
    rows = [
        PAIR | {"video": "clip.mp4"},
        PAIR | {"video": "gone.mp4"},
        PAIR | {"video": "clip.mp4"},
    ]
    imported(lines(tmp_path / "p.jsonl", *rows), tmp_path / "out")
    assert calls == ["probe", "probe", "close"]
    calls.clear()
    with pytest.raises(DataError, match="has no usable row"):
        imported(lines(tmp_path / "q.jsonl", rows[1]), tmp_path / "none")
    assert calls == ["probe", "close"]


@pytest.mark.real
def test_clips_of_other_people_are_imported(tmp_path: Path, real: Path) -> None:
    names = sorted(path.name for path in (real / "videos").iterdir())
    rows = [MASKED | {"media_path": name, "video": None} for name in names]
    source = lines(tmp_path / "masked.jsonl", *rows)
    manifest = imported(source, tmp_path / "out", rrpo.read, media_root=real / "videos")
    assert manifest.counts == {"imported": len(names)}
    for pair in open_dataset(tmp_path / "out", Preference):
        (video,) = pair.videos
        data = (real / "videos" / str(video.path)).read_bytes()
        assert video.sha256 == hashlib.sha256(data).hexdigest()


def test_the_folder_may_be_named_either_way(run: Any, tmp_path: Path) -> None:
    (tmp_path / "media").mkdir()
    clip(tmp_path / "media" / "clip.mp4")
    Image.new("RGB", (8, 8)).save(tmp_path / "media" / "a.png")
    row = {
        "conversations": turns("<image><video>What?", "Red."),
        "images": ["a.png"],
        "videos": ["clip.mp4"],
    }
    source = lines(tmp_path / "s.jsonl", row)
    for option in ("--media-root", "--images-root"):
        out = tmp_path / option
        arguments = (source, out, "--from", "sharegpt", option, tmp_path / "media")
        assert run("convert", *arguments) == (0, f"{out}: 1 example records\n")
        assert open_dataset(out, Example)[0].videos[0].sha256


# --- folders of frames ----------------------------------------------------------------------


def test_a_folder_of_frames_becomes_ten_pictures(tmp_path: Path) -> None:
    """Of 28 frames, every third: 27 * i / 9."""
    frames(tmp_path / "video" / "v1", 28)
    source = lines(tmp_path / "p.jsonl", PAIR | {"video": "video/v1"})
    imported(source, tmp_path / "out")
    (pair,) = open_dataset(tmp_path / "out", Preference)
    assert pair.prompt == user("What?", images=NUM_FRAMES)
    names = [f"video/v1/c01_{3 * i:04d}.png" for i in range(10)]
    assert [image.path for image in pair.images] == names
    assert all(image.sha256 for image in pair.images)
    assert pair.videos == ()


@pytest.mark.parametrize("count", [1, 2, 9, 10, 11, 57, 300])
def test_frames_are_those_of_the_released_loader(tmp_path: Path, count: int) -> None:
    frames(tmp_path / "v", count)
    record = Example(id="1", prompt=user("q", videos=1), videos=(Media(path="v/"),))
    images = with_frames(record, tmp_path).images
    loader = np.unique(np.linspace(0, count - 1, 10, dtype=int))
    assert [image.path for image in images] == [f"v/c01_{index:04d}.png" for index in loader]


def test_frames_take_the_place_of_their_clip(tmp_path: Path) -> None:
    frames(tmp_path / "v", 2)
    kinds = ("image", "video", "video", "image")
    blocks = (*(Block(type=kind) for kind in kinds), Block(type="text", text="q"))
    record = Example(
        id="1",
        prompt=(Message(role="user", content=blocks),),
        images=(Media(path="a.png"), Media(path="b.png")),
        videos=(Media(path="v"), Media(path="c.mp4")),
    )
    changed = with_frames(record, tmp_path)
    found = [block.type for block in changed.prompt[0].content]
    assert found == ["image", "image", "image", "video", "image", "text"]
    assert [image.path for image in changed.images] == [
        "a.png",
        "v/c01_0000.png",
        "v/c01_0001.png",
        "b.png",
    ]
    assert changed.videos == (Media(path="c.mp4"),)


def test_hidden_files_and_folders_are_no_frames(tmp_path: Path) -> None:
    folder = frames(tmp_path / "v", 2)
    (folder / ".DS_Store").write_bytes(b"x")
    (folder / "more").mkdir()
    record = Example(id="1", prompt=user("q", videos=1), videos=(Media(path="v"),))
    assert len(with_frames(record, tmp_path).images) == 2


def test_a_bad_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "v").mkdir()
    for path, words in (("v", "folder without frames"), ("../v", "climbs out")):
        record = Example(id="1", prompt=user("q", videos=1), videos=(Media(path=path),))
        with pytest.raises(MediaError, match=words):
            with_frames(record, tmp_path)


def test_a_frame_that_is_no_picture_loses_the_row(tmp_path: Path) -> None:
    folder = frames(tmp_path / "v", 3)
    (folder / "c01_0001.png").write_text("no picture")
    source = lines(tmp_path / "p.jsonl", PAIR | {"video": "v"}, PAIR)
    imported(source, tmp_path / "out")
    assert quarantine(tmp_path / "out")["q/p-1"].startswith("unreadable_media: v/c01_0001.png")


# --- kinds ----------------------------------------------------------------------------------


def test_rankings_are_imported(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    source = lines(
        tmp_path / "data.jsonl",
        ANNOTATED | {"image": "a.png"},
        ANNOTATED | {"id": "two", "models_output": ["", "x", "y"]},
        ANNOTATED | {"id": "three", "image": "gone.png"},
    )
    manifest = imported(source, tmp_path / "out")
    assert manifest.kind == "ranking"
    (ranking,) = open_dataset(tmp_path / "out", Ranking)
    assert [response.rank for response in ranking.responses] == [0, 0, 1]
    assert ranking.images[0].sha256
    told = quarantine(tmp_path / "out")
    assert told["two"] == "invalid_record: responses has an empty text"
    assert told["three"].startswith("unreadable_media")


def test_a_file_of_two_kinds_keeps_the_first(tmp_path: Path) -> None:
    source = lines(tmp_path / "p.jsonl", PAIR, ANNOTATED, PAIR)
    manifest = imported(source, tmp_path / "out")
    assert (manifest.kind, manifest.num_records) == ("preference", 2)
    assert manifest.counts == {"imported": 2, "quarantined:another_kind": 1}
    assert "is a ranking, those before it a preference" in quarantine(tmp_path / "out")["q"]


def test_a_first_row_that_is_left_out_decides_nothing(tmp_path: Path) -> None:
    chosen, rejected = turns("q", "a")[1], turns("q", "b")[1]
    rows = [
        {"conversations": turns("q"), "images": ["gone.png"]},
        {"conversations": turns("q"), "chosen": chosen, "rejected": rejected},
    ]
    assert imported(lines(tmp_path / "s.jsonl", *rows), tmp_path / "o", sharegpt.read).kind == (
        "preference"
    )
