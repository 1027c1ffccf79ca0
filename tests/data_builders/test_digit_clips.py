from __future__ import annotations

import hashlib
import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_builders.config import load_builder
from data_builders.digit_clips import (
    ACTIONS,
    CAPTION_PROMPT,
    MAX_EVENTS,
    DigitClip,
    DigitClips,
    Event,
    encode,
)
from data_builders.digit_world import COLORS, PARTNER, RGB, SPLITS, USUAL_COLOR
from mmalign.clips import Backend, FrameSampling, open_clip, working_backends
from mmalign.config import load_config, validate
from mmalign.errors import ConfigError, DataError
from mmalign.handwriting import DIGITS, handwriting
from mmalign.models.tiny import TinyModel
from mmalign.records import Example, Media, check, prompt_text
from mmalign.store import open_dataset

LAB = Path(__file__).resolve().parents[2] / "configs" / "lab"
ALL = FrameSampling(num_frames=6)


def clips(**knobs: Any) -> DigitClips:
    return DigitClips(**({"output": Path("unused"), "num_clips": 1} | knobs))


def drawn(world: DigitClips, count: int = 1500) -> list[DigitClip]:
    return [world.clip(index) for index in range(count)]


def event(digit: int, action: str = "stays", cells: tuple[int, ...] = (0, 0), color: int = 0):
    drawing = handwriting()[1]["train"][digit][0]
    return Event(digit=digit, color=color, drawing=drawing, action=action, cells=cells)


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def truth(clip: DigitClip, question: str) -> str:
    """The answer to a question, read from its words."""
    present = [DIGITS[digit] for digit in clip.present]
    match question.split():
        case ["is", "there", "a", digit, "in", "the", "clip", "?"]:
            right = digit in present
        case ["does", "the", first, "come", "before", "the", second, "?"]:
            right = present.index(first) < present.index(second)
        case ["does", "the", digit, verb, "?"]:
            right = ACTIONS[clip.events[present.index(digit)].action] == verb
        case _:
            raise AssertionError(question)
    return "yes" if right else "no"


def test_a_caption_tells_every_event_in_order_of_time():
    events = (event(3, "moves", (0, 1)), event(7, "stays", (2, 2), color=2))
    clip = DigitClip(index=0, world="biased", events=events)
    assert clip.caption() == "first a red three moves , then a blue seven stays ."


def test_partners_follow_one_another_in_the_biased_world_alone():
    def share(found: list[DigitClip]) -> float:
        """Digits that have their partner right before or after them."""
        digits = pairs = 0
        for clip in found:
            digits += len(clip.present)
            pairs += sum(PARTNER[a] == b for a, b in pairwise(clip.present))
        return 2 * pairs / digits

    # First whole .7, and then a single one of another pair with .5; else .3 x .5 x .7 whole second.
    whole, single = 2 * (0.7 + 0.3 * 0.5 * 0.7), 0.7 * 0.5 + 0.3 + 0.3 * 0.5 * 0.3
    assert share(drawn(clips())) == pytest.approx(whole / (whole + single), abs=0.03)
    assert share(drawn(clips(p_break=0.0, two_pairs=0.0))) == 1.0
    assert share(drawn(clips(p_break=1.0))) == 0.0
    assert share(drawn(clips(world="balanced"))) < 0.2
    first = Counter(PARTNER[clip.present[0]] > clip.present[0] for clip in drawn(clips()))
    assert first[True] / first.total() == pytest.approx(0.5, abs=0.05)


def test_colours_are_usual_in_the_biased_world():
    def usual(found: list[DigitClip]) -> float:
        events = [event for clip in found for event in clip.events]
        return sum(event.color == USUAL_COLOR[event.digit] for event in events) / len(events)

    assert usual(drawn(clips())) == pytest.approx(0.6 + 0.4 / 5, abs=0.03)
    assert usual(drawn(clips(world="balanced"))) == pytest.approx(1 / 5, abs=0.03)


def test_the_balanced_world_shows_every_digit_and_number_alike():
    found = drawn(clips(world="balanced"))
    seen = Counter(digit for clip in found for digit in clip.present)
    assert max(seen.values()) < 1.3 * min(seen.values())
    numbers = Counter(len(clip.events) for clip in found)
    assert numbers.keys() == {1, 2, 3}
    assert max(numbers.values()) < 1.25 * min(numbers.values())
    assert all(len(set(clip.present)) == len(clip.present) for clip in found)


def test_counterfactuals_replace_their_share_and_leave_the_others_alone():
    kept = list(zip(drawn(clips()), drawn(clips(counterfactual_share=0.2)), strict=True))
    balanced = [after for _, after in kept if after.world == "balanced"]
    assert len(balanced) / len(kept) == pytest.approx(0.2, abs=0.03)
    assert all(before == after for before, after in kept if after.world == "biased")


def test_train_and_test_never_share_a_drawing():
    train, test = (
        {event.drawing for clip in drawn(clips(digits=split)) for event in clip.events}
        for split in ("train", "test")
    )
    assert train
    assert test
    assert not train & test


@pytest.mark.parametrize("num_frames", [6, 11])
def test_every_frame_is_filled_and_digits_do_what_is_said_of_them(num_frames: int):
    actions: Counter[str] = Counter()
    for clip in drawn(clips(num_frames=num_frames)):
        assert sum(len(event.cells) for event in clip.events) == num_frames
        assert min(len(event.cells) for event in clip.events) >= 2
        for shown in clip.events:
            turns = sum(a != b for a, b in pairwise(shown.cells))
            assert turns == (shown.action == "moves")
            actions[shown.action] += 1
        for before, after in pairwise(clip.events):
            assert (before.cells[-1] == after.cells[0]) == (before.action == "changes")
        assert clip.events[-1].action != "changes"
    assert min(actions.values()) > 0.4 * max(actions.values())


def test_where_digits_do_one_thing_nothing_is_asked_about_it(tmp_path: Path):
    world = clips(output=tmp_path, num_clips=60, actions=("stays",), questions_per_clip=3)
    found = drawn(world, 60)
    assert {event.action for clip in found for event in clip.events} == {"stays"}
    asked = [text for clip in found for text, _ in world.questions(clip)]
    assert sum("come before" in text for text in asked) > 20
    assert all("come before" in text or "is there" in text for text in asked)
    evaluation = world.model_copy(update={"evaluation": True, "embed_media": False})
    files = {path.name for path in evaluation.build().glob("pope-*")}
    assert files == {f"pope-{split}.jsonl" for split in (*SPLITS, "order")}


def test_a_frame_shows_one_digit_in_its_colour_and_nothing_elsewhere():
    events = (event(8, "moves", (0, 0, 3), color=1), event(5, "stays", (2, 2, 2), color=4))
    frames = clips(noise=0.0).frames(DigitClip(index=0, world="biased", events=events))
    assert frames.shape == (6, 16, 16, 3)
    for number, (cell, color) in enumerate([(0, 1)] * 2 + [(3, 1)] + [(2, 4)] * 3):
        cells = frames[number].reshape(2, 8, 2, 8, 3).swapaxes(1, 2).reshape(4, 64, 3)
        brightest = cells[cell].max(0) / 255
        assert brightest == pytest.approx(0.25 + 0.7 * np.array(RGB[color]), abs=0.05)
        assert (np.delete(cells, cell, 0) == round(0.25 * 255)).all()


def test_every_frame_has_noise_of_its_own():
    clip = DigitClip(index=3, world="biased", events=(event(1, "stays", (0,) * 6),))
    ground = clips(noise=0.12).frames(clip)[:, 8:] / 255
    assert ground.std() == pytest.approx(0.7 * 0.12, abs=0.005)
    assert abs(np.corrcoef(ground[0].ravel(), ground[1].ravel())[0, 1]) < 0.15


@pytest.mark.parametrize("backend", ["pyav", "decord", "torchcodec"])
def test_a_clip_comes_back_from_a_decoder_to_the_bit(backend: Backend):
    if reason := working_backends()[backend]:
        pytest.skip(reason)
    world = clips(noise=0.2)
    frames = world.frames(world.clip(0))
    data = encode(frames)
    clip = open_clip(Media(bytes=data), None, ALL, backend=backend)
    assert (clip.frames == frames).all()
    assert clip.timestamps == (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
    assert clip.source_fps == 4.0
    # No name of the library that wrote it, which would change the hash with every update.
    assert b"Lavf" not in data


def test_questions_are_half_yes_and_always_true():
    world = clips(questions_per_clip=5)
    answers: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    for clip in drawn(world, 200):
        for question, answer in world.questions(clip):
            assert truth(clip, question) == answer
            answers[answer] += 1
            kinds["there" if "there" in question else "come" if "come" in question else "do"] += 1
    assert answers["yes"] == answers["no"] == 500
    assert min(kinds.values()) > 150


@pytest.mark.parametrize("split", [*SPLITS, "order", "action"])
def test_question_files_are_true_and_half_yes(split: str):
    world = clips(world="balanced")
    num_asked = 0
    for clip in drawn(world, 200):
        asked = world.pope(clip, split)
        labels = [label for _, label in asked]
        assert labels.count("yes") == labels.count("no")
        assert [truth(clip, question) for question, _ in asked] == labels
        assert len({question for question, _ in asked}) == len(asked)
        num_asked += len(asked)
        if split == "order" and asked:
            # The same two digits in both orders: without a sense of time, one of the two is right.
            assert {*asked[0][0].split()} == {*asked[1][0].split()}
        assert asked or (split == "order" and len(clip.events) == 1)
    assert num_asked > 200


def test_adversarial_questions_ask_for_absent_partners():
    three = DigitClip(index=0, world="balanced", events=(event(3),))
    asked = [question for question, _ in clips().pope(three, "adversarial")]
    assert asked == ["is there a three in the clip ?", "is there a seven in the clip ?"]


def test_a_training_pool_is_complete_in_itself(tmp_path: Path):
    world = clips(output=tmp_path / "pool", num_clips=12, tasks=("caption", "question"), seed=4)
    dataset = open_dataset(world.build(), Example)
    records = list(dataset)
    assert [record.id for record in records[:3]] == [
        "clip-000000/caption",
        "clip-000000/q0",
        "clip-000000/q1",
    ]
    assert len(records) == 12 * 3
    assert [list(check(record)) for record in records] == [[]] * len(records)
    for record, clip in zip(records[::3], drawn(world, 12), strict=True):
        assert (prompt_text(record.prompt), record.answer) == (CAPTION_PROMPT, clip.caption())
        opened = open_clip(record.videos[0], None, ALL, verify=True)
        assert (opened.frames == world.frames(clip)).all()
        told = json.loads(record.origin.detail)
        phrases = [f"a {item['color']} {item['digit']} {item['action']}" for item in told]
        assert record.answer == f"first {' , then '.join(phrases)} ."
        assert [cell for item in told for cell in item["cells"]] == [
            cell for event in clip.events for cell in event.cells
        ]
    assert {record.answer for record in records if "/q" in record.id} == {"yes", "no"}
    assert records[0].videos == records[1].videos
    assert not (tmp_path / "pool" / "media").exists()
    assert dataset.manifest.counts == {"clips:biased": 12}


def test_a_short_build_is_a_prefix_of_a_long_one(tmp_path: Path):
    short, long = (
        list(open_dataset(clips(output=tmp_path / str(n), num_clips=n).build(), Example))
        for n in (4, 7)
    )
    assert short == long[:4]
    other = clips(output=tmp_path / "other", num_clips=4, seed=1).build()
    assert short != list(open_dataset(other, Example))


def test_an_evaluation_holds_popes_and_chairs_files(tmp_path: Path):
    world = clips(
        output=tmp_path / "eval",
        num_clips=20,
        world="balanced",
        digits="test",
        embed_media=False,
        evaluation=True,
    )
    built = world.build()
    dataset = open_dataset(built, Example)
    for record in dataset:
        data = (dataset.media_root / (record.videos[0].path or "")).read_bytes()
        assert hashlib.sha256(data).hexdigest() == record.videos[0].sha256
    by_file = {f"{clip.name}.mov": clip for clip in drawn(world, 20)}
    objects = rows(built / "objects.jsonl")
    # In order of time: the scorer counts captions that tell another order.
    assert {row["video"]: row["objects"] for row in objects} == {
        name: [DIGITS[digit] for digit in clip.present] for name, clip in by_file.items()
    }
    for split in (*SPLITS, "order", "action"):
        asked = rows(built / f"pope-{split}.jsonl")
        assert [row["question_id"] for row in asked] == list(range(1, len(asked) + 1))
        assert all(set(row) == {"question_id", "video", "text", "label"} for row in asked)
        for row in asked:
            assert (built / "media" / row["video"]).is_file()
            assert truth(by_file[row["video"]], row["text"]) == row["label"]
    assert (built / "synonyms.txt").read_text().splitlines() == list(DIGITS)


def test_two_builds_are_byte_identical(tmp_path: Path):
    one, two = (
        digests(
            clips(output=tmp_path / name, num_clips=6, embed_media=False, evaluation=True).build()
        )
        for name in ("one", "two")
    )
    assert len(one) == 6 + 7 + 2
    assert one == two


def test_a_complete_dataset_is_kept_and_anothers_is_not_overwritten(tmp_path: Path):
    world = clips(output=tmp_path / "pool", num_clips=3)
    shard = world.build() / "shard-00000.parquet"
    written = shard.stat().st_mtime_ns
    assert world.build() == tmp_path / "pool"
    assert shard.stat().st_mtime_ns == written
    with pytest.raises(DataError, match="another config"):
        clips(output=tmp_path / "pool", num_clips=3, seed=1).build()


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"evaluation": True}, "embed_media: false"),
        ({"world": "balanced", "counterfactual_share": 0.1}, "counterfactual_share"),
        ({"num_frames": 5}, "num_frames"),
        ({"actions": ["changes"]}, "actions needs stays or moves"),
        ({"actions": ["jumps"]}, "actions"),
        ({"tasks": []}, "tasks"),
        ({"num_scenes": 2}, "num_scenes"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(knobs: dict[str, Any], message: str):
    data = {"output": "somewhere", "num_clips": 2} | knobs
    with pytest.raises(ConfigError, match=message):
        validate(data, DigitClips, "clips.yaml")


def test_the_labs_model_knows_every_word_of_the_world():
    words = set(load_config(LAB / "clips_model.yaml", TinyModel).words or ())
    world = load_builder(LAB / "clips_train.yaml", [f"actions=[{', '.join(ACTIONS)}]"])
    assert isinstance(world, DigitClips)
    said: set[str] = set(CAPTION_PROMPT.split())
    for clip in drawn(world, 400):
        said |= set(clip.caption().split())
        for question, answer in world.questions(clip):
            said |= {*question.split(), answer}
    assert said == words
    assert set(COLORS) | set(DIGITS) <= words
    assert MAX_EVENTS == 3


def test_the_labs_worlds_share_handwriting_and_clips_with_no_test():
    train, pairs, test = (load_builder(LAB / f"clips_{n}.yaml") for n in ("train", "pairs", "test"))
    assert isinstance(train, DigitClips)
    assert isinstance(pairs, DigitClips)
    assert isinstance(test, DigitClips)
    assert (train.world, pairs.world, test.world) == ("biased", "balanced", "balanced")
    assert (train.digits, pairs.digits, test.digits) == ("train", "train", "test")
    assert len({train.seed, pairs.seed, test.seed}) == 3
    assert train.actions == pairs.actions == test.actions
