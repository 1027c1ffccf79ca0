"""The BDHS builder: what it asks for, what it keeps, and what it says about the mask."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_builders.base import GeneratorConfig
from data_builders.bdhs import BDHS, MaskTokens, tell_visible, tell_yield, yields
from mmalign.clips import Clip
from mmalign.generate.base import Generation, MaskImageTokens, Request, Sampling
from mmalign.hallucinate import AlikeWords, Bias, Guided, Noise
from mmalign.media import embed
from mmalign.models.load import ModelConfig
from mmalign.models.tiny import TinyModel
from mmalign.prepare import RowDropped
from mmalign.records import Example, Media, Preference, Span, user
from mmalign.similarity import TokenOverlap
from mmalign.store import Dataset, open_dataset, write_dataset

PICTURE = (Media(path="a.png"),)
ROWS = [
    Example(id="a", prompt=user("What?", images=1), images=PICTURE, answer="A red cat sits."),
    Example(id="b", prompt=user("What?", images=1), images=PICTURE, answer="It is blue."),
    Example(id="c", prompt=user("What?", images=1), images=PICTURE, answer=None),
    Example(id="d", prompt=user("Else?"), answer="No picture here."),
    Example(id="e", prompt=user("What?", images=1), images=PICTURE, answer="One man stands."),
]


class Policy:
    """Writes by a rule; remembers what it was asked."""

    name = "policy"

    def __init__(self) -> None:
        self.asked: list[Request] = []
        self.samplings: list[Sampling] = []

    def generate(self, requests, sampling: Sampling) -> list[Generation]:
        self.asked += requests
        self.samplings.append(sampling)
        texts = [self.write(request) for request in requests]
        return [
            Generation(id=request.id, text=text, num_tokens=1, finished=True)
            for request, text in zip(requests, texts, strict=True)
        ]

    def write(self, request: Request) -> str:
        name = request.id.partition("/")[0]
        answer = {row.id: row.answer or "" for row in ROWS}[name]
        if name == "a":
            return " dog runs over two green hills. And so on"
        if name == "b":  # Alike when guided, and at last as well.
            return answer[len(request.prefill) :] if request.prefill else f"{answer} Very blue."
        return "The image is too blurry to say." if not request.prefill else "\n"


def build(tmp_path: Path, policy: Policy, rows=ROWS, **changes) -> Dataset[Preference]:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    write_dataset(tmp_path / "in", Example, rows, media_root=str(tmp_path))
    settings = {
        "source": tmp_path / "in",
        "output": tmp_path / "out",
        "generator": GeneratorConfig(model=ModelConfig(path="none"), temperature=0.7),
        "similarity": AlikeWords(threshold=0.6),
        "guidance": Guided(swap=0.0),
        "tries": 3,
        "seed": 5,
    }
    BDHS(**(settings | changes)).build_with(policy, TokenOverlap())
    return open_dataset(tmp_path / "out", Preference)


def test_pairs_of_answers_and_what_the_policy_made_of_them(tmp_path: Path) -> None:
    policy = Policy()
    dataset = build(tmp_path, policy)
    pairs = {pair.id: pair for pair in dataset}
    assert set(pairs) == {"a", "b"}
    assert pairs["a"].chosen == "A red cat sits."
    assert pairs["a"].rejected.endswith("dog runs over two green hills.")
    assert pairs["a"].images == PICTURE
    assert pairs["a"].origin.reason == "accepted:try1"
    assert pairs["b"].rejected == "It is blue. Very blue."
    assert pairs["b"].origin.reason == "accepted:free"
    # "it is blue" against "it is blue very blue": 2 * 3 / (3 + 5)
    assert json.loads(pairs["b"].origin.detail) == {
        "similarity": 0.75,
        "first_try_alike": True,
        "tries": 3,
    }
    assert dataset.manifest.counts == {
        "accepted:free": 1,
        "accepted:try1": 1,
        "dropped:no_answer": 1,
        "dropped:no_picture": 1,
        "dropped:refusal": 1,
    }
    assert dataset.manifest.model == {"generator": "policy", "similarity": "token_overlap"}
    assert {r.id.partition("/")[0] for r in policy.asked} == {"a", "b", "e"}
    assert {r.corruption for r in policy.asked if r.id.startswith("b/try2")} == {
        MaskImageTokens(threshold=0.99, key="b/try2")
    }
    assert all(r.media_root == tmp_path for r in policy.asked)
    assert {(s.temperature, s.seed) for s in policy.samplings} == {(0.7, 5)}
    html = (tmp_path / "out/preview.html").read_text()
    assert "accepted:free, similarity 0.75, first try alike True, tries 3" in html


def test_the_phrases_that_differ_are_marked(tmp_path: Path) -> None:
    for pair in build(tmp_path, Policy()):
        if pair.id == "b":
            assert pair.chosen_spans == ()
            assert pair.rejected_spans == (Span(start=12, end=22, phrase=1),)
        else:
            marked = [pair.rejected[span.start : span.end] for span in pair.rejected_spans]
            assert "dog runs over two green hills" in marked[-1]


def test_chunks_and_shards_change_nothing(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one = build(tmp_path / "one", Policy(), shard_rows=100)
    two = build(tmp_path / "two", Policy(), shard_rows=1)
    assert list(one) == list(two)


def test_a_row_that_cannot_be_asked_stops_nobody_else(tmp_path: Path) -> None:
    class Strict(Policy):
        def write(self, request: Request) -> str:
            if request.id.startswith("b"):
                raise RowDropped("control_token", "the response holds </s>", where="b")
            return super().write(request)

    dataset = build(tmp_path, Strict())
    assert [pair.id for pair in dataset] == ["a"]
    assert dataset.manifest.counts["dropped:control_token"] == 1


def test_clips_are_passed_on(tmp_path: Path) -> None:
    clip = (Media(path="clip.mp4"),)
    rows = [Example(id="a", prompt=user("?", videos=1), videos=clip, answer="A red cat sits.")]
    policy = Policy()
    dataset = build(tmp_path, policy, rows)
    assert dataset[0].videos == clip
    assert {r.videos for r in policy.asked} == {clip}


def test_the_settings_are_those_of_online_training(tmp_path: Path) -> None:
    config = BDHS(
        source=tmp_path, output=tmp_path, generator=GeneratorConfig(model=ModelConfig(path="none"))
    )
    assert config.bias == Bias()
    assert config.model_copy(update={"corruption": Noise(steps=100)}).bias == Bias(
        corruption=Noise(steps=100)
    )


def test_yields_are_cumulative_shares_of_what_was_tried() -> None:
    counts = {
        "accepted:try1": 74,
        "accepted:try2": 10,
        "accepted:try10": 1,
        "accepted:free": 10,
        "dropped:refusal": 5,
        "dropped:no_answer": 50,
        "quarantined:unreadable": 7,
    }
    assert yields(counts) == pytest.approx({1: 0.74, 2: 0.84, 10: 0.85})
    assert yields({"accepted:unchecked": 5}) == {}


def test_the_log_says_how_soon_negatives_differ(caplog) -> None:
    with caplog.at_level(logging.INFO, logger="mmalign"):
        tell_yield({"accepted:try1": 3, "accepted:try2": 1})
        tell_yield({"accepted:unchecked": 1})
    assert [r.getMessage() for r in caplog.records] == [
        "negatives that differ enough: 75.0% by try 1, 100.0% by try 2"
    ]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    return TinyModel(output=str(path / "model"), family="qwen25vl", patch_size=4).build()


def pictures(tmp_path: Path) -> Path:
    rows = []
    for n in range(4):
        pixels = np.random.RandomState(n).randint(0, 255, (32, 32, 3), dtype=np.uint8)
        rows.append(
            Example(
                id=f"row-{n}",
                prompt=user("what is it?", images=1),
                images=(embed(Image.fromarray(pixels)),),
                answer="A dog sits. It is red.",
            )
        )
    write_dataset(tmp_path / "in", Example, rows)
    return tmp_path / "in"


def test_a_model_builds_the_same_pairs_twice_and_others_with_another_mask(tiny, tmp_path) -> None:
    """Sixteen tokens a picture; random weights write nonsense, which never ends by itself."""

    def rejected(name: str, threshold: float) -> list[str]:
        config = BDHS(
            source=pictures(tmp_path / name),
            output=tmp_path / name / "out",
            generator=GeneratorConfig(model=ModelConfig(path=str(tiny)), max_new_tokens=200),
            corruption=MaskTokens(threshold=threshold),
            guidance=Guided(sentence_tokens=200),
            similarity=AlikeWords(),
            tries=2,
        )
        config.build()
        dataset = open_dataset(config.output, Preference)
        counts = dataset.manifest.counts
        assert sum(counts.values()) == 4
        return [pair.rejected for pair in dataset]

    for name in "abc":
        (tmp_path / name).mkdir()
    one, again, other = rejected("a", 0.9), rejected("b", 0.9), rejected("c", 0.0)
    assert one
    assert one == again
    assert one != other


def test_a_mask_that_often_hides_everything_is_warned_of(tiny, tmp_path, caplog) -> None:
    """0.99^16 = 85 %; 0.5^16 is nothing; all hidden is what was asked for."""
    config = BDHS(
        source=pictures(tmp_path),
        output=tmp_path / "out",
        generator=GeneratorConfig(model=ModelConfig(path=str(tiny))),
    )
    generator, source = config.generator.load(), config.load_source()
    with caplog.at_level(logging.INFO, logger="mmalign"):
        for threshold in (0.99, 0.5, 1.0):
            tell_visible(
                MaskTokens(threshold=threshold), generator, source.examples, source.media_root
            )
    told = [(r.levelname, r.getMessage()) for r in caplog.records]
    assert [level for level, _ in told] == ["INFO", "WARNING", "INFO", "INFO"]
    assert told[0][1].startswith("16 image tokens an example: 0.2 visible on average, none in 85 %")
    assert "hides all of 16 image tokens in 85 % of tries" in told[1][1]
    assert "8.0 visible on average" in told[2][1]


def test_a_clip_is_hidden_like_a_picture(tiny) -> None:
    """The request's own path, with a real model: a clip of a wholly hidden picture is any clip."""
    generator = GeneratorConfig(model=ModelConfig(path=str(tiny)), max_new_tokens=8).load()

    def answer(seed: int, threshold: float) -> str:
        frames = np.random.RandomState(seed).randint(0, 255, (4, 32, 32, 3), dtype=np.uint8)
        clip = Clip(
            frames=frames, indices=(0, 1, 2, 3), timestamps=(0.0, 0.5, 1.0, 1.5), source_fps=2.0,
            num_source_frames=4, duration_seconds=2.0, key=str(seed),
        )  # fmt: skip
        request = Request(
            id="x",
            prompt=user("what?", videos=1),
            videos=(clip,),
            corruption=MaskImageTokens(threshold=threshold, key="k"),
        )
        return generator.generate([request], Sampling(max_new_tokens=12, temperature=1.0))[0].text

    assert answer(0, 1.0) == answer(1, 1.0)
    assert answer(0, 0.0) != answer(1, 0.0)
