from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_builders.digit_scenes import DigitScenes, Placed, Scene, question
from data_builders.digit_world import (
    BY_POPULARITY,
    COLORS,
    PARTNER,
    RGB,
    SPLITS,
    USUAL_COLOR,
)
from mmalign.config import validate
from mmalign.errors import ConfigError, DataError
from mmalign.handwriting import DIGITS
from mmalign.media import open_image
from mmalign.records import Example, check, prompt_text
from mmalign.store import open_dataset


def scenes(**knobs: Any) -> DigitScenes:
    return DigitScenes(**({"output": Path("unused"), "num_scenes": 1} | knobs))


def share(worlds: DigitScenes, holds, count: int = 2000) -> float:
    return sum(holds(worlds.scene(index)) for index in range(count)) / count


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_caption_names_every_object_in_reading_order():
    objects = (Placed(2, 3, 0, 0), Placed(9, 7, 2, 0))
    scene = Scene(index=0, world="biased", objects=objects)
    assert scene.caption() == "the image shows a red three and a blue seven ."


def test_partners_come_together_in_the_biased_world_alone():
    def together(scene: Scene) -> bool:
        return all(PARTNER[digit] in scene.present for digit in scene.present)

    # One pair or two, each whole with 0.7: (0.7 + 0.49) / 2.
    assert share(scenes(world="biased"), together) == pytest.approx(0.595, abs=0.04)
    assert share(scenes(world="biased", p_break=0.0), together) == 1.0
    assert share(scenes(world="balanced"), together) < 0.1


def test_the_biased_world_prefers_some_pairs():
    world = scenes(two_pairs=0.0, p_break=0.0)
    first = Counter(min(world.scene(index).present) for index in range(3000))
    for digit, popularity in {3: 0.32, 1: 0.24, 2: 0.18, 4: 0.14, 0: 0.12}.items():
        assert first[digit] / 3000 == pytest.approx(popularity, abs=0.03)
    assert BY_POPULARITY == [3, 7, 1, 8, 2, 6, 4, 9, 0, 5]


def test_digits_wear_their_usual_colour_in_the_biased_world():
    def usual(scene: Scene) -> bool:
        return scene.objects[0].color == USUAL_COLOR[scene.objects[0].digit]

    assert share(scenes(world="biased"), usual) == pytest.approx(0.6 + 0.4 / 5, abs=0.04)
    assert share(scenes(world="balanced"), usual) == pytest.approx(1 / 5, abs=0.04)


def test_the_balanced_world_shows_every_digit_alike():
    world = scenes(world="balanced")
    drawn = [world.scene(index) for index in range(2000)]
    seen = Counter(digit for scene in drawn for digit in scene.present)
    assert max(seen.values()) < 1.25 * min(seen.values())
    assert Counter(len(scene.present) for scene in drawn).keys() == {1, 2, 3, 4}
    assert all(len(set(scene.present)) == len(scene.present) for scene in drawn)


def test_counterfactuals_replace_their_share_and_leave_the_others_alone():
    plain, mixed = scenes(), scenes(counterfactual_share=0.2)
    kept = [(plain.scene(i), mixed.scene(i)) for i in range(1000)]
    balanced = [after for _, after in kept if after.world == "balanced"]
    assert len(balanced) / 1000 == pytest.approx(0.2, abs=0.04)
    assert all(before == after for before, after in kept if after.world == "biased")


def test_train_and_test_never_share_a_drawing():
    train, test = (
        {p.drawing for i in range(1500) for p in scenes(digits=split).scene(i).objects}
        for split in ("train", "test")
    )
    assert train
    assert test
    assert not train & test


def test_a_picture_shows_its_digits_in_their_colours_and_nothing_elsewhere():
    objects = tuple(
        Placed(cell, 8, color, scenes().scene(0).objects[0].drawing)
        for cell, color in enumerate(range(len(COLORS)))
    )
    clean = scenes(noise=0.0)
    pixels = np.asarray(clean.picture(Scene(index=0, world="biased", objects=objects)))
    ground = round(0.25 * 255)
    assert pixels.shape == (32, 32, 3)
    assert (pixels[16:] == ground).all()
    for placed in objects:
        top, left = (8 * part for part in divmod(placed.cell, 4))
        brightest = pixels[top : top + 8, left : left + 8].reshape(-1, 3).max(0) / 255
        assert brightest == pytest.approx(0.25 + 0.7 * np.array(RGB[placed.color]), abs=0.05)


def test_noise_has_the_deviation_asked_for_and_is_not_clipped_away():
    empty = Scene(index=3, world="biased", objects=())
    pixels = np.asarray(scenes(noise=0.12).picture(empty)) / 255
    assert pixels.mean() == pytest.approx(0.25, abs=0.01)
    assert pixels.std() == pytest.approx(0.7 * 0.12, abs=0.005)


def test_questions_are_half_yes_and_always_true():
    world = scenes(questions_per_scene=5)
    answers: Counter[str] = Counter()
    for index in range(200):
        scene = world.scene(index)
        for digit, answer in world.questions(scene):
            assert (digit in scene.present) == (answer == "yes")
            answers[answer] += 1
    assert answers["yes"] == answers["no"] == 500
    assert question(7) == "is there a seven in the image ?"


def test_pope_asks_as_many_absent_as_present_digits():
    world = scenes(world="balanced")
    for scene in map(world.scene, range(200)):
        for split in SPLITS:
            asked = world.pope(scene, split)
            yes = [digit for digit, label in asked if label == "yes"]
            no = [digit for digit, label in asked if label == "no"]
            assert len(yes) == len(no) == min(2, len(scene.present))
            assert set(yes) <= set(scene.present)
            assert set(no) <= set(scene.absent)
            assert len(set(yes + no)) == len(asked)


def test_pope_adversarial_asks_for_partners_and_popular_for_the_frequent():
    three = Scene(index=0, world="balanced", objects=(Placed(0, 3, 0, 0),))
    world = scenes()
    assert world.pope(three, "adversarial") == [(3, "yes"), (7, "no")]
    assert world.pope(three, "popular") == [(3, "yes"), (7, "no")]
    nine = Scene(index=0, world="balanced", objects=(Placed(0, 9, 0, 0),))
    assert world.pope(nine, "adversarial") == [(9, "yes"), (4, "no")]
    assert world.pope(nine, "popular") == [(9, "yes"), (3, "no")]
    pair = Scene(index=0, world="balanced", objects=(Placed(0, 0, 0, 0), Placed(1, 5, 0, 0)))
    # Both partners are there, so the frequent ones follow.
    assert [digit for digit, label in world.pope(pair, "adversarial") if label == "no"] == [3, 7]


def test_a_training_pool_is_complete_in_itself(tmp_path: Path):
    built = scenes(
        output=tmp_path / "pool", num_scenes=12, tasks=("caption", "question"), seed=4
    ).build()
    dataset = open_dataset(built, Example)
    records = list(dataset)
    assert len(records) == 12 * 3
    assert [record.id for record in records[:3]] == [
        "scene-000000/caption",
        "scene-000000/q0",
        "scene-000000/q1",
    ]
    assert [record.id for record in records] == sorted(record.id for record in records)
    assert [list(check(record)) for record in records] == [[]] * len(records)
    caption, *questions = records[:3]
    assert prompt_text(caption.prompt) == "describe the image :"
    assert {record.answer for record in questions} == {"yes", "no"}
    objects = json.loads(caption.origin.detail)
    phrases = [f"a {item['color']} {item['digit']}" for item in objects]
    assert caption.answer == f"the image shows {' and '.join(phrases)} ."
    assert open_image(caption.images[0]).size == (32, 32)
    assert caption.images == questions[0].images
    assert not (built / "media").exists()
    assert dataset.manifest.counts == {"scenes:biased": 12}
    assert dataset.manifest.seed == 4


def test_a_short_build_is_a_prefix_of_a_long_one(tmp_path: Path):
    short, long = (
        list(open_dataset(scenes(output=tmp_path / str(n), num_scenes=n).build(), Example))
        for n in (5, 9)
    )
    assert short == long[:5]
    other = scenes(output=tmp_path / "other", num_scenes=5, seed=1).build()
    assert short != list(open_dataset(other, Example))


def test_an_evaluation_holds_popes_and_chairs_files(tmp_path: Path):
    builder = scenes(
        output=tmp_path / "eval",
        num_scenes=20,
        world="balanced",
        digits="test",
        embed_media=False,
        evaluation=True,
    )
    built = builder.build()
    dataset = open_dataset(built, Example)
    for record in dataset:
        data = (dataset.media_root / (record.images[0].path or "")).read_bytes()
        assert hashlib.sha256(data).hexdigest() == record.images[0].sha256
        assert open_image(record.images[0], dataset.media_root).size == (32, 32)
    truth = {row["image"]: set(row["objects"]) for row in rows(built / "objects.jsonl")}
    assert len(truth) == 20
    for split in SPLITS:
        asked = rows(built / f"pope-{split}.jsonl")
        assert [row["question_id"] for row in asked] == list(range(1, len(asked) + 1))
        assert all(set(row) == {"question_id", "image", "text", "label"} for row in asked)
        for row in asked:
            assert (built / "media" / row["image"]).is_file()
            digit = row["text"].removeprefix("is there a ").removesuffix(" in the image ?")
            assert (digit in truth[row["image"]]) == (row["label"] == "yes")
    assert (built / "synonyms.txt").read_text().splitlines() == list(DIGITS)


def test_two_builds_are_byte_identical(tmp_path: Path):
    one, two = (
        digests(
            scenes(output=tmp_path / name, num_scenes=8, embed_media=False, evaluation=True).build()
        )
        for name in ("one", "two")
    )
    assert len(one) == 8 + 5 + 2
    assert one == two


def test_a_complete_dataset_is_kept_and_anothers_is_not_overwritten(tmp_path: Path):
    builder = scenes(output=tmp_path / "pool", num_scenes=3)
    shard = builder.build() / "shard-00000.parquet"
    written = shard.stat().st_mtime_ns
    assert builder.build() == tmp_path / "pool"
    assert shard.stat().st_mtime_ns == written
    with pytest.raises(DataError, match="another config"):
        scenes(output=tmp_path / "pool", num_scenes=3, seed=1).build()
    assert shard.stat().st_mtime_ns == written


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"evaluation": True}, "embed_media: false"),
        ({"world": "balanced", "counterfactual_share": 0.1}, "counterfactual_share"),
        ({"tasks": []}, "tasks"),
        ({"p_brake": 0.1}, "did you mean p_break"),
        ({"num_scenes": 0}, "num_scenes"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(knobs: dict[str, Any], message: str):
    data = {"output": "somewhere", "num_scenes": 2} | knobs
    with pytest.raises(ConfigError, match=message):
        validate(data, DigitScenes, "scenes.yaml")
