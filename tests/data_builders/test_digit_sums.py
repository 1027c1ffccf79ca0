"""Pictured sums: what is shown, asked, true, and how answers are written."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import yaml

from data_builders.config import load_builder
from data_builders.digit_scenes import painted
from data_builders.digit_sums import QUESTION, Answers, DigitSums, Form, thinking, written
from data_builders.malform import KINDS, completed, malformed
from mmalign.config import validate
from mmalign.errors import ConfigError, DataError
from mmalign.media import open_image
from mmalign.models.tiny import TinyModel
from mmalign.records import Example, Verifiable, check, prompt_text
from mmalign.store import open_dataset
from mmalign.think import parts_of
from mmalign.verify import Verifiers, truth_problem

LAB = Path(__file__).resolve().parents[2] / "configs/lab"
DONE = "<think> three and four make 7 </think> <answer> \\boxed{ 7 } </answer>"


def sums(**knobs: Any) -> DigitSums:
    return DigitSums(**({"output": Path("unused"), "num_rows": 1} | knobs))


def truth(total: int) -> Verifiable:
    return Verifiable(id="a", prompt=(), answer=str(total), verifier="number")


def test_two_or_three_digits_are_shown_and_added(tmp_path: Path):
    dataset = open_dataset(sums(output=tmp_path / "rows", num_rows=60).build(), Verifiable)
    rows = list(dataset)
    assert [row.id for row in rows[:2]] == ["sum-000000", "sum-000001"]
    numbers = Counter()
    for row in rows:
        assert list(check(row)) == []
        assert truth_problem(row) is None
        assert prompt_text(row.prompt) == QUESTION
        digits = json.loads(row.origin.detail)["digits"]
        assert row.answer == str(sum(digits))
        numbers[len(digits)] += 1
        assert open_image(row.images[0]).size == (32, 32)
    assert numbers.keys() == {2, 3}
    assert dataset.manifest.counts == {"sum": 60}
    assert dataset.manifest.kind == "verifiable"


def test_digits_are_drawn_alike_and_may_repeat():
    world = sums()
    shown = [world.sum(index).digits for index in range(1500)]
    seen = Counter(digit for digits in shown for digit in digits)
    assert max(seen.values()) < 1.3 * min(seen.values())
    assert any(len(set(digits)) < len(digits) for digits in shown)


def test_a_picture_shows_its_digits_where_they_stand():
    one = sums().sum(3)
    pixels = np.asarray(painted(one.objects, [0, 3], 0.0))
    ground = round(0.25 * 255)
    filled = {
        (row, column)
        for row in range(4)
        for column in range(4)
        if (pixels[8 * row : 8 * row + 8, 8 * column : 8 * column + 8] != ground).any()
    }
    assert filled == {divmod(placed.cell, 4) for placed in one.objects}


def test_train_and_test_share_no_drawing():
    train, test = (
        {p.drawing for i in range(1500) for p in sums(digits=split).sum(i).objects}
        for split in ("train", "test")
    )
    assert not train & test


def test_thinking_adds_step_by_step():
    assert thinking([3, 4]) == "three and four make 7"
    assert thinking([3, 4, 5]) == "three and four make 7 , 7 and five make 12"
    assert thinking([9, 9, 9], off=-1) == "nine and nine make 18 , 18 and nine make 26"


@pytest.mark.parametrize(
    ("form", "text", "problem"),
    [
        ("tagged", DONE, ""),
        (
            "half_tagged",
            "<think> three and four make 7 </think> the answer is \\boxed{ 7 } .",
            "no_answer",
        ),
        ("boxed", "three and four make 7 . the answer is \\boxed{ 7 } .", "no_tags"),
        ("plain", "the answer is 7 .", "no_tags"),
    ],
)
def test_answers_are_written_and_read_in_every_form(form, text, problem):
    assert written(form, [3, 4]) == text
    assert parts_of(text).problem == problem
    with Verifiers() as verifiers:
        given = verifiers.check_response(text, truth(7)).correct
        assert given is (form != "plain")
        assert verifiers.check_response(written(form, [3, 4], off=1), truth(7)).correct is False
        if problem:
            whole = completed(text)
            assert (whole is not None) == (form != "plain")
            assert whole is None or verifiers.check_response(whole, truth(7)).correct


@pytest.mark.parametrize("total", range(28))
def test_every_sum_is_read(total):
    digits = [min(9, total), min(9, max(0, total - 9)), max(0, total - 18)]
    with Verifiers() as verifiers:
        for form in ("tagged", "half_tagged", "boxed"):
            assert verifiers.check_response(written(form, digits), truth(total)).correct


def test_examples_have_forms_by_their_shares_and_slips(tmp_path: Path):
    answers = Answers(tagged=0.5, half_tagged=0.1, boxed=0.1, plain=0.3, slips=0.2)
    world = sums(output=tmp_path / "rows", num_rows=300, answers=answers)
    drawn = [world.answer(world.sum(index), answers) for index in range(2000)]
    shares = Counter(form for form, _ in drawn)
    for form, share in answers.shares.items():
        assert shares[form] / 2000 == pytest.approx(share, abs=0.04)
    with Verifiers() as verifiers:
        right = [
            verifiers.check_response(text, truth(sum(world.sum(index).digits))).correct
            for index, (form, text) in enumerate(drawn)
            if form != "plain"
        ]
    assert sum(map(bool, right)) / len(right) == pytest.approx(0.8, abs=0.04)
    dataset = open_dataset(world.build(), Example)
    assert [row.answer for row in dataset] == [text for _, text in drawn[:300]]
    assert dataset.manifest.counts == dict(Counter(form for form, _ in drawn[:300]))


def test_answers_change_neither_pictures_nor_questions(tmp_path: Path):
    questions = ("how much ?", "add :")
    knobs = {"num_rows": 12, "questions": questions, "seed": 3}
    rows = open_dataset(sums(output=tmp_path / "rows", **knobs).build(), Verifiable)
    told = open_dataset(sums(output=tmp_path / "told", answers=Answers(), **knobs).build(), Example)
    assert [(r.prompt, r.images) for r in rows] == [(r.prompt, r.images) for r in told]
    assert {prompt_text(row.prompt) for row in rows} == set(questions)


def test_a_short_build_is_a_prefix_and_another_is_not_overwritten(tmp_path: Path):
    short, long = (
        list(open_dataset(sums(output=tmp_path / str(n), num_rows=n).build(), Verifiable))
        for n in (5, 9)
    )
    assert short == long[:5]
    assert sums(output=tmp_path / "5", num_rows=5).build() == tmp_path / "5"
    with pytest.raises(DataError, match="another config"):
        sums(output=tmp_path / "5", num_rows=5, seed=1).build()


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"num_digits": [1]}, "from 2 to 3"),
        ({"questions": []}, "questions"),
        ({"answers": {"tagged": 0.9}}, "add up to 1.5"),
        ({"answers": {"tagt": 0.9}}, "did you mean answers.tagged"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(knobs, message):
    with pytest.raises(ConfigError, match=message):
        validate({"output": "somewhere", "num_rows": 2} | knobs, DigitSums, "sums.yaml")


def test_the_labs_model_knows_every_word_of_its_world():
    model = validate(yaml.safe_load((LAB / "sums_model.yaml").read_text()), TinyModel, "model")
    texts = [
        written(form, [a, b, c])
        for form in get_args(Form)
        for a in range(10)
        for b in range(10)
        for c in range(10)
    ]
    texts += [malformed(DONE, kind) for kind in KINDS]
    for name in ("train", "prompts", "test", "test_ood"):
        builder = load_builder(LAB / f"sums_{name}.yaml")
        assert isinstance(builder, DigitSums)
        texts += builder.questions
    assert {word for text in texts for word in text.split()} == set(model.words or ())
