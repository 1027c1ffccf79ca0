"""Clips on preview pages: a strip of what is there, and one of what the policy was shown."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_builders.built_page import marked, write_preview
from data_builders.clip_page import ClipArtist, clean_strip, spoilt_strip
from data_builders.perturb import Drop, Mask, Shuffle, apply
from data_builders.preview import preview
from mmalign.clips import Clip, FrameSampling, open_clip
from mmalign.records import Example, Media, Origin, Preference, Span, user
from mmalign.report.page import Card, Page, Strip
from mmalign.spans import differing_spans
from mmalign.store import open_dataset, write_dataset

FRAMES = FrameSampling(num_frames=6)
OPS = (Mask(), Shuffle(), Drop())


def grey(num_frames: int) -> Clip:
    """Frame i is all of grey 10 i."""
    values = (10 * np.arange(num_frames, dtype=np.uint8)).reshape(-1, 1, 1, 1)
    return Clip(
        frames=np.broadcast_to(values, (num_frames, 16, 16, 3)).copy(),
        indices=tuple(range(num_frames)),
        timestamps=tuple(float(i) for i in range(num_frames)),
        source_fps=1.0,
        num_source_frames=num_frames,
        duration_seconds=float(num_frames),
        key="grey",
    )


def pixels(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))


def corners(strip: Strip) -> list[int]:
    return [int(pixels(uri)[0, 0, 0]) for uri, _ in strip.frames]


def test_a_strip_shows_the_frames_in_order():
    strip = clean_strip(grey(5))
    assert corners(strip) == [0, 10, 20, 30, 40]
    assert [under for _, under in strip.frames] == ["1", "2", "3", "4", "5"]
    assert strip.label == "clip, 5 frames of 5.0 s"


def test_a_long_clip_is_thinned_and_says_so():
    strip = clean_strip(grey(20))
    assert len(strip.frames) == 16
    assert [under for _, under in strip.frames][:6] == ["1", "2", "3", "4", "6", "7"]
    assert strip.label.endswith("16 of them shown")


def test_numbers_say_which_clean_frame_a_spoilt_slot_shows():
    ops = (Shuffle(), Drop())
    _, steps = apply(grey(8), ops, 3)
    strip = spoilt_strip(grey(8), steps)
    assert [10 * (int(under) - 1) for _, under in strip.frames] == corners(strip)
    assert len(strip.frames) < 8
    assert "shuffle; drop" in strip.label


def pair(write_clip, folder: Path, name: str, clip_name: str | None = None) -> Preference:
    media = write_clip(folder / f"{name}.mkv", ord(name))
    _, steps = apply(open_clip(media, folder, FRAMES), OPS, ord(name))
    detail = {
        "try": 2,
        "response": "he drives a car",
        "perturbation": steps,
        "frames": FRAMES.model_dump(mode="json"),
    }
    chosen, rejected = "A man walks.", "A man drives."
    spans = differing_spans(chosen, rejected)
    return Preference(
        id=name,
        prompt=user("What happens?", videos=1),
        videos=(Media(path=clip_name or media.path),),
        chosen=chosen,
        rejected=rejected,
        chosen_spans=spans[0],
        rejected_spans=spans[1],
        origin=Origin(builder="rrpo_video", reason="accepted:try2", detail=json.dumps(detail)),
    )


def dataset_of(folder: Path, *pairs: Preference) -> Path:
    write_dataset(
        folder / "data",
        Preference,
        pairs,
        media_root=str(folder),
        builder="rrpo_video",
        counts={"accepted:try2": len(pairs)},
    )
    return folder / "data"


def test_a_pair_has_its_clip_and_what_the_policy_saw(write_clip, tmp_path):
    one = pair(write_clip, tmp_path, "a")
    with ClipArtist() as artist:
        strips, problems = artist.strips(one, tmp_path)
    assert problems == []
    clean, spoilt = strips
    clip = open_clip(one.videos[0], tmp_path, FRAMES)
    seen, _ = apply(clip, OPS, ord("a"))
    assert corners(clean) == clip.frames[:, 0, 0, 0].tolist()
    assert [pixels(uri).mean() for uri, _ in spoilt.frames] == pytest.approx(
        [frame.mean() for frame in seen.frames]
    )


def test_the_builders_page_draws_both_strips(write_clip, tmp_path):
    path = dataset_of(tmp_path, pair(write_clip, tmp_path, "a"))
    page = write_preview(path).read_text()
    assert page.count('<figure class="strip">') == 2
    num_spoilt = page.count("as it was shown (mask")
    assert num_spoilt > 1, "the label and each frame's text for those who do not see it"
    assert "The first strip is the clip" in page
    assert '<mark class="bad">drives</mark>' in page
    assert "he drives a car" in page, "the policy's own words, where they were rewritten"
    assert "order" not in page.partition("<h2")[2], "the record of steps is drawn, not printed"


def test_highlights_are_the_spans_of_the_record():
    """Overlapping ones are one highlight, and no character is lost or told twice."""
    spans = (Span(start=6, end=9, phrase=2), Span(start=2, end=5, phrase=1))
    spans += (Span(start=4, end=7, phrase=3),)
    made = marked("a cat is.", spans, kind="bad")
    assert str(made) == "a cat is."
    assert "".join(text for text, kind in made.parts if kind) == "cat is."
    assert marked("as it is", (), kind="good").parts == (("as it is", None),)


def test_a_clip_that_is_gone_leaves_the_page_whole(write_clip, tmp_path):
    path = dataset_of(
        tmp_path,
        pair(write_clip, tmp_path, "a", clip_name="gone.mkv"),
        pair(write_clip, tmp_path, "b"),
    )
    page = write_preview(path).read_text()
    assert page.count('<figure class="strip">') == 2
    assert "gone.mkv: " in page


def test_steps_of_another_clip_are_told_on_the_card(write_clip, tmp_path):
    one = pair(write_clip, tmp_path, "a")
    detail = json.loads(one.origin.detail) | {"frames": {"num_frames": 3}}
    changed = replace(one, origin=Origin(detail=json.dumps(detail)))
    with ClipArtist() as artist:
        strips, (problem,) = artist.strips(changed, tmp_path)
    assert [len(strip.frames) for strip in strips] == [3], "the clean one can be drawn"
    assert "cannot be done again" in problem


@pytest.mark.parametrize("detail", ["", "no JSON", "[1]", '{"perturbation": 3}'])
def test_any_clip_is_drawn_whatever_its_origin_tells(write_clip, tmp_path, detail):
    row = Example(
        id="e",
        prompt=user("?", videos=1),
        videos=(write_clip(tmp_path / "e.mkv", 5),),
        answer="x",
        origin=Origin(detail=detail),
    )
    write_dataset(tmp_path / "data", Example, [row], media_root=str(tmp_path))
    page = preview(open_dataset(tmp_path / "data", Example)).html()
    assert page.count('<figure class="strip">') == 1
    assert page.count("<li><img") == 8


def test_a_strip_holds_its_frames_itself():
    strip = Strip("clip", (("https://example.org/frame.png", "1"),))
    with pytest.raises(ValueError, match="is not a data URI"):
        Page("p").gallery([Card("c", [], [], strips=(strip,))])
