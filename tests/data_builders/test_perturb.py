"""Perturbations: within their ranges, on the own time axis, and done again from the record."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from data_builders.perturb import (
    Drop,
    Freeze,
    Mask,
    Perturbation,
    Reverse,
    Shuffle,
    apply,
    can_change,
    replay,
    sources,
    told,
)
from mmalign.clips import Clip
from mmalign.errors import DataError

EVERY = (Mask(), Shuffle(), Drop(), Freeze(), Reverse())


def film(num_frames: int = 8, height: int = 32, width: int = 48, still: bool = False) -> Clip:
    """Frame i is all of value i."""
    shown = [0 if still else i for i in range(num_frames)]
    values = np.array(shown, np.uint8).reshape(-1, 1, 1, 1)
    return Clip(
        frames=np.broadcast_to(values, (num_frames, height, width, 3)).copy(),
        indices=tuple(3 * i for i in shown),
        timestamps=tuple(0.5 * i for i in shown),
        source_fps=6.0,
        num_source_frames=3 * num_frames,
        duration_seconds=0.5 * num_frames,
        key="film",
    )


def values(clip: Clip) -> list[int]:
    """What each frame shows in its first corner."""
    return [int(frame[0, 0, 0]) for frame in clip.frames]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    height=st.integers(10, 90),
    width=st.integers(10, 90),
    share=st.tuples(st.floats(0.1, 0.6), st.floats(0.1, 0.3)).map(lambda s: (s[0], s[0] + s[1])),
    seed=st.integers(0, 2**63 - 1),
)
def test_a_block_has_its_share_of_the_area_and_one_place_in_every_frame(height, width, share, seed):
    clip = film(3, height, width)
    spoilt, (step,) = apply(clip, [Mask(share=share, grey=200)], seed)
    grey = (spoilt.frames == 200).all(-1)
    covered = np.argwhere(grey[0])
    (top, left), (bottom, right) = covered.min(0), covered.max(0)
    assert grey[0, top : bottom + 1, left : right + 1].all(), "one rectangle"
    assert (grey == grey[0]).all(), "the same in every frame"
    assert share[0] <= grey[0].mean() <= share[1] + 1e-9
    assert [top, left] == [step["top"], step["left"]]
    rest = ~grey[0]
    assert (spoilt.frames[:, rest] == clip.frames[:, rest]).all()
    assert values(clip) == [0, 1, 2], "the clean clip is left as it was"


def test_blocks_use_the_whole_range_and_many_places():
    steps = [apply(film(), [Mask()], seed)[1][0] for seed in range(300)]
    shares = [step["height"] * step["width"] / (32 * 48) for step in steps]
    assert min(shares) < 0.27
    assert max(shares) > 0.48
    assert len({(step["top"], step["left"]) for step in steps}) > 100
    shapes = [step["width"] / step["height"] for step in steps]
    assert min(shapes) < 1 < max(shapes)


@pytest.mark.parametrize("num_frames", [2, 3, 16])
def test_a_shuffle_keeps_every_frame_and_never_their_order(num_frames):
    own = list(range(num_frames))
    for seed in range(60):
        spoilt, (step,) = apply(film(num_frames), [Shuffle()], seed)
        assert sorted(values(spoilt)) == own
        assert values(spoilt) != own
        assert values(spoilt) == step["order"]


def test_a_shuffle_of_repeated_frames_is_seen():
    """A short clip is sampled with repeats: an exchange of two that are equal shows nothing."""
    clip = film(2)
    double = np.repeat(np.arange(2), 2)
    clip = Clip(
        frames=clip.frames[double],
        indices=(0, 0, 3, 3),
        timestamps=(0.0, 0.0, 0.5, 0.5),
        source_fps=6.0,
        num_source_frames=6,
        duration_seconds=1.0,
        key="short",
    )
    for seed in range(60):
        assert values(apply(clip, [Shuffle()], seed)[0]) != [0, 0, 1, 1]


def test_a_drop_removes_its_share_and_keeps_order_and_times():
    for seed in range(60):
        clip = film(8)
        spoilt, (step,) = apply(clip, [Drop(share=(0.25, 0.5))], seed)
        kept = values(spoilt)
        assert 4 <= len(kept) <= 6
        assert sorted({*kept, *step["dropped"]}) == list(range(8))
        assert kept == sorted(kept)
        assert spoilt.indices == tuple(3 * value for value in kept)
        assert spoilt.timestamps == tuple(0.5 * value for value in kept)
        assert spoilt.sampled_fps == pytest.approx(clip.sampled_fps * len(kept) / 8)


def test_a_drop_leaves_at_least_one_frame():
    assert len(apply(film(2), [Drop(share=(1.0, 1.0))], 0)[0].frames) == 1


def test_a_freeze_holds_one_frame_to_the_end():
    lengths = set()
    for seed in range(60):
        spoilt, (step,) = apply(film(8), [Freeze(share=(0.25, 0.75))], seed)
        shown = values(spoilt)
        stands = step["slot"]
        assert shown == [min(i, stands) for i in range(8)]
        lengths.add(step["num_frames"])
    assert lengths == {2, 3, 4, 5, 6}


def test_a_freeze_anywhere_goes_on_after_it():
    slots = set()
    for seed in range(60):
        spoilt, (step,) = apply(film(8), [Freeze(share=(0.25, 0.25), place="anywhere")], seed)
        stands = step["slot"]
        expected = [stands if stands < i <= stands + 2 else i for i in range(8)]
        assert values(spoilt) == expected
        slots.add(stands)
    assert slots == {0, 1, 2, 3, 4, 5}


def test_reversing_turns_the_frames_and_not_the_times():
    clip = film(4)
    spoilt, steps = apply(clip, [Reverse()], 0)
    assert values(spoilt) == [3, 2, 1, 0]
    assert (spoilt.indices, spoilt.timestamps) == (clip.indices, clip.timestamps)
    assert steps == [{"op": "reverse"}]


@pytest.mark.parametrize("ops", itertools.permutations(EVERY, 3))
def test_what_was_done_is_done_again_from_its_record_alone(ops):
    clip = film(9, 20, 30)
    spoilt, steps = apply(clip, ops, 7)
    again = replay(clip, json.loads(json.dumps(steps)))
    assert (again.frames == spoilt.frames).all()
    assert (again.indices, again.timestamps) == (spoilt.indices, spoilt.timestamps)
    assert again.key == spoilt.key
    assert list(spoilt.timestamps) == sorted(set(spoilt.timestamps))
    assert len(spoilt.frames) == len(spoilt.indices) == len(sources(9, steps))
    assert all(told(step) for step in steps)


def test_sources_say_which_clean_frame_a_slot_shows():
    ops = (Shuffle(), Drop(), Reverse(), Freeze())
    for seed in range(20):
        spoilt, steps = apply(film(9), ops, seed)
        assert sources(9, steps) == values(spoilt)


def test_seed_clip_and_ops_make_the_key():
    def key(clip: Clip, *ops, seed=0) -> str:
        return apply(clip, ops, seed)[0].key

    base = key(film(), Mask(), Shuffle())
    assert base == key(film(), Mask(), Shuffle())
    other = replace(film(), key="other")
    others = [
        key(film(), Mask(), Shuffle(), seed=1),
        key(film(), Shuffle(), Mask()),
        key(other, Mask(), Shuffle()),
        "film",
    ]
    assert len({base, *others}) == 5


def test_the_seed_alone_decides():
    one, again = (apply(film(), (Mask(), Shuffle(), Drop()), 5) for _ in range(2))
    assert one[1] == again[1]
    assert (one[0].frames == again[0].frames).all()


@pytest.mark.parametrize("clip", [film(1), film(4, still=True)], ids=["one frame", "repeated"])
def test_what_stands_still_can_only_be_masked(clip):
    temporal = (Shuffle(), Drop(), Freeze(), Reverse())
    spoilt, steps = apply(clip, temporal, 0)
    assert [step["op"] for step in steps] == ["shuffle", "drop", "freeze", "reverse"]
    assert all(step["noop"] for step in steps)
    assert (spoilt.frames == clip.frames).all()
    assert (replay(clip, steps).frames == clip.frames).all()
    assert not can_change(clip, temporal)
    assert can_change(clip, (*temporal, Mask()))


def test_ops_after_a_drop_meet_what_it_left():
    """Of two frames a drop leaves one, and then nothing is left to shuffle."""
    _, steps = apply(film(2), (Drop(), Shuffle()), 0)
    assert "noop" not in steps[0]
    assert "noop" in steps[1]


@pytest.mark.parametrize(
    "step",
    [
        {"op": "shuffle", "order": [1, 0]},
        {"op": "drop", "dropped": [0, 1, 2]},
        {"op": "drop", "dropped": [7]},
        {"op": "freeze", "slot": 1, "num_frames": 2},
        {"op": "mask", "top": 0, "left": 30, "height": 10, "width": 30, "grey": 1},
        {"op": "mask", "top": -4, "left": 0, "height": 10, "width": 30, "grey": 1},
        {"op": "twirl"},
        {"noop": "of nothing"},
        "reverse",
    ],
)
def test_records_of_another_clip_are_refused(step):
    with pytest.raises(DataError, match=r"cannot be done again.*Sample its frames"):
        replay(film(3), [step])


@pytest.mark.parametrize("share", [(0.5, 0.25), (0.0, 0.5), (0.5, 1.5)])
def test_shares_that_are_none_are_refused(share):
    with pytest.raises(ValidationError, match="least <= most"):
        Mask(share=share)


def test_ops_are_read_by_name():
    ops = TypeAdapter(tuple[Perturbation, ...]).validate_python(
        [{"name": "freeze", "place": "anywhere"}, {"name": "mask", "share": [0.1, 0.2]}]
    )
    assert ops == (Freeze(place="anywhere"), Mask(share=(0.1, 0.2)))
