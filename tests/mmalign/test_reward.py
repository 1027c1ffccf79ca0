"""Reward models at work: what a critic is asked, where critiques come from, what is averaged."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from mmalign.clips import Clip
from mmalign.config import validate
from mmalign.errors import ConfigError, DataError, MediaError
from mmalign.generate.base import Generation, Request, Sampling
from mmalign.media import embed
from mmalign.models.load import ModelConfig, load_policy
from mmalign.models.tiny import TinyModel, Tower
from mmalign.prepare import RowDropped
from mmalign.records import Block, Media, Message, user
from mmalign.reward import Critics, Judgement, RewardModel, critic_turn

TEMPLATE = "{question} / {response} ?"
SMALL = Tower(hidden=32, layers=2, heads=4, mlp=32)


def made(tmp_path_factory, **model) -> RewardModel:
    path = tmp_path_factory.mktemp("tiny") / "model"
    TinyModel(output=str(path), image_size=16, vision=SMALL, text=SMALL, **model).build()
    config = {"path": str(path), "reward_head": {"prompt": TEMPLATE}}
    return RewardModel(load_policy(validate(config, ModelConfig, "test")), batch_size=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> RewardModel:
    return made(tmp_path_factory)


def picture(seed: int) -> Media:
    pixels = np.random.RandomState(seed).randint(0, 255, (16, 16, 3), dtype=np.uint8)
    return embed(Image.fromarray(pixels))


def item(number: int, response: str = "a dog", **changes) -> Judgement:
    values = {
        "id": f"i{number}",
        "prompt": user("what is it", images=1),
        "images": (picture(number),),
        "response": response,
        "critique": f"good {'indeed ' * number}",
    }
    return Judgement(**(values | changes))


GIVEN, NONE = Critics(critiques="given"), Critics(critiques="none")


def rewards(model: RewardModel, items, critics) -> list[float]:
    return [one.reward for one in model.judge(items, critics)]


class Writer:
    """Writes what it is told to, and remembers what it was asked."""

    def __init__(self, *texts: str, finished: bool = True) -> None:
        self.texts, self.finished = texts, finished
        self.asked: list[Request] = []
        self.samplings: list[Sampling] = []

    def generate(self, requests, sampling) -> list[Generation]:
        self.asked, self.samplings = requests, [*self.samplings, sampling]
        return [
            Generation(
                id=request.id, text=self.texts[n % len(self.texts)], num_tokens=2,
                finished=self.finished,
            )
            for n, request in enumerate(requests)
        ]  # fmt: skip


@pytest.fixture
def written(model, monkeypatch):
    """Replaces what the model writes."""

    def replace(*texts: str, finished: bool = True) -> Writer:
        writer = Writer(*texts, finished=finished)
        monkeypatch.setattr(model, "_writer", writer)
        return writer

    return replace


def test_a_critic_sees_question_response_and_media_in_their_order():
    turn = critic_turn("Q {question} R {response} E", user("Is it?", images=2, videos=1), "{yes}")
    assert turn == user("Q Is it? R {yes} E", images=2, videos=1)


def test_a_conversation_keeps_who_said_what():
    prompt = (
        Message(role="system", content=(Block(type="text", text="Be short."),)),
        Message(role="user", content=(Block(type="text", text="Hi"), Block(type="image"))),
        Message(role="assistant", content=(Block(type="text", text="Ho"),)),
        Message(role="user", content=(Block(type="text", text="And?"),)),
    )
    question = "system: Be short.\nuser: Hi\nassistant: Ho\nuser: And?"
    assert critic_turn(TEMPLATE, prompt, "x") == user(f"{question} / x ?", images=1)


def test_order_and_batches_change_nothing(model):
    items = [item(n, "a dog" if n % 2 else "something longer") for n in range(5)]
    together = rewards(model, items, GIVEN)
    assert len(set(together)) == 5
    alone = [rewards(model, [one], GIVEN)[0] for one in items]
    assert together == pytest.approx(alone, abs=1e-5)
    assert rewards(model, items[::-1], GIVEN)[::-1] == pytest.approx(together, abs=1e-5)


def test_picture_response_and_critique_all_count(model):
    changes = [{}, {"images": (picture(9),)}, {"response": "a cat"}, {"critique": "bad"}]
    found = rewards(model, [item(0, **change) for change in changes], GIVEN)
    assert len({round(reward, 5) for reward in found}) == 4
    without = rewards(model, [item(0, **change) for change in changes], NONE)
    assert len({round(reward, 5) for reward in without}) == 3
    assert without[3] == pytest.approx(without[0], abs=1e-5)


def test_an_own_critique_is_written_to_the_critics_prompt_and_read_like_a_given_one(model, written):
    writer = written("good ")
    (own,) = model.judge([item(0)], Critics(max_new_tokens=7))
    assert writer.asked[0].prompt == user("what is it / a dog ?", images=1)
    assert writer.asked[0].images == item(0).images
    assert (writer.samplings[0].temperature, writer.samplings[0].max_new_tokens) == (0.0, 7)
    (given,) = model.judge([item(0, critique="good ")], GIVEN)
    assert own.reward == given.reward
    assert (own.critiques, own.num_tokens, own.num_cut) == (("good ",), 2, 0)


def test_a_cut_critique_is_scored_without_an_end_and_counted(model, written):
    written("good", finished=False)
    (cut,) = model.judge([item(0)], Critics())
    (whole,) = model.judge([item(0, critique="good")], GIVEN)
    assert cut.num_cut == 1
    assert cut.reward != pytest.approx(whole.reward, abs=1e-5)


def test_a_critique_that_says_nothing_is_none(model, written):
    written(" ")
    assert rewards(model, [item(0)], Critics()) == rewards(model, [item(0)], NONE)
    assert model.judge([item(0)], NONE)[0].critiques == ()


def test_several_critics_are_averaged_each_by_its_own_draw(model, written):
    writer = written("good", "bad", "fine")
    (both, other) = model.judge([item(0), item(1)], Critics(num_critics=3, temperature=0.7), seed=5)
    assert len({request.id for request in writer.asked}) == 6
    assert [request.id.startswith("i0") for request in writer.asked] == [True] * 3 + [False] * 3
    assert (writer.samplings[0].temperature, writer.samplings[0].seed) == (0.7, 5)
    singles = [item(0, critique=text) for text in ("good", "bad", "fine")]
    assert both.reward == pytest.approx(sum(rewards(model, singles, GIVEN)) / 3, abs=1e-5)
    assert both.critiques == other.critiques == ("good", "bad", "fine")


def test_the_models_own_words_follow_the_seed(model):
    critics = Critics(num_critics=2, max_new_tokens=5)
    one, same, other = (
        model.judge([item(0)], critics, seed=seed)[0].critiques for seed in (1, 1, 2)
    )
    assert one == same != other
    assert one[0] != one[1]
    greedy = Critics(max_new_tokens=5)
    assert model.judge([item(0)], greedy) == model.judge([item(0)], greedy, seed=9)


def test_only_own_critics_can_be_several():
    with pytest.raises(ConfigError, match="num_critics above 1"):
        validate({"critiques": "given", "num_critics": 2}, Critics, "test")


def test_what_cannot_be_judged_is_named(model):
    with pytest.raises(DataError, match=r"i0: no critique is given.*critiques: self"):
        model.judge([item(0, critique=" ")], GIVEN)
    with pytest.raises(MediaError, match=r"lost\.png"):
        model.judge([item(0, images=(Media(path="lost.png"),))], NONE)
    with pytest.raises(RowDropped, match="control token") as drop:
        model.judge([item(0, response="</s>")], NONE)
    assert drop.value.reason == "control_token"


def test_a_vocabulary_of_words_takes_a_prompt_of_its_own(tmp_path_factory):
    words = ("what", "is", "it", "a", "dog", "cat", "/", "?", "good", "bad")
    model = made(tmp_path_factory, words=words)
    items = [item(0, "a dog", critique="good"), item(1, "a cat", critique="bad")]
    assert len(set(rewards(model, items, GIVEN))) == 2


def test_clips_are_judged_beside_pictures(tmp_path_factory):
    model = made(tmp_path_factory, family="llava_onevision", patch_size=8)
    frames = np.random.RandomState(0).randint(0, 255, (4, 16, 16, 3), dtype=np.uint8)

    def clip(order: list[int]) -> Clip:
        return Clip(
            frames=frames[order], indices=(0, 1, 2, 3), timestamps=(0.0, 1.0, 2.0, 3.0),
            source_fps=1.0, num_source_frames=4, duration_seconds=4.0, key=str(order),
        )  # fmt: skip

    prompt = user("what is it", videos=1)
    items = [
        item(0, prompt=prompt, images=(), videos=(clip([0, 1, 2, 3]),)),
        item(0, prompt=prompt, images=(), videos=(clip([3, 2, 1, 0]),)),
        item(0),
        item(0, prompt=user("what is it"), images=()),
    ]
    found = rewards(model, items, GIVEN)
    assert len({round(reward, 5) for reward in found}) == 4
    assert rewards(model, items[:1], GIVEN)[0] == pytest.approx(found[0], abs=1e-5)
