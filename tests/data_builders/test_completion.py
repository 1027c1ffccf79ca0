"""Completion: gaps are filled in view of the retrieved picture, or the reply is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_builders.completion import Gapped, InfillCompleter, InstructCompleter
from data_builders.masking import MASK, Masked, Refused
from mmalign.generate.base import Generation, Request, Sampling
from mmalign.records import Media, user

ANSWER = "a red cup and a blue plate."
TWO_GAPS = Masked(ANSWER, ((2, 9), (16, 26)))


class Script:
    """Replies from a list, in the order asked; counts words as tokens."""

    name = "script"

    def __init__(self, *replies: str) -> None:
        self.replies, self.calls = list(replies), list[list[Request]]()

    def generate(self, requests, sampling: Sampling) -> list[Generation]:
        self.calls.append(list(requests))
        texts = [self.replies.pop(0) for _ in requests]
        return [
            Generation(id=r.id, text=text, num_tokens=1, finished=not text.endswith("…"))
            for r, text in zip(requests, texts, strict=True)
        ]

    def count_tokens(self, text: str) -> int:
        return len(text.split())


def gapped(name: str, masked: Masked = TWO_GAPS) -> Gapped:
    prompt = user("What is there?", images=1)
    return Gapped(id=f"{name}/rank2", prompt=prompt, image=Media(path=f"{name}.png"), masked=masked)


def test_infill_continues_the_text_so_far_gap_by_gap() -> None:
    script = Script(" green  vase\n", " tall lamp")
    responses = InfillCompleter().complete([gapped("x")], script, Sampling(), Path("root"))
    assert responses == ["a green vase and a tall lamp."]
    first, second = (call[0] for call in script.calls)
    assert (first.id, second.id) == ("x/rank2/gap1", "x/rank2/gap2")
    assert (first.prefill, second.prefill) == ("a", "a green vase and a")
    assert (first.num_tokens, second.num_tokens) == (2, 2)
    assert first.images == (Media(path="x.png"),)
    assert first.prompt == user("What is there?", images=1)
    assert first.media_root == Path("root")


def test_infill_asks_for_all_first_gaps_together_then_all_second_ones() -> None:
    one_gap = Masked("a cup.", ((2, 5),))
    script = Script("A", "B", "C", "D", "E")
    items = [gapped("x"), gapped("y", one_gap), gapped("z")]
    responses = InfillCompleter().complete(items, script, Sampling(), Path())
    assert responses == ["a A and a D.", "a B.", "a C and a E."]
    ids = [[request.id for request in call] for call in script.calls]
    assert ids == [
        ["x/rank2/gap1", "y/rank2/gap1", "z/rank2/gap1"],
        ["x/rank2/gap2", "z/rank2/gap2"],
    ]


def test_infill_of_an_answer_that_is_one_gap_starts_from_nothing() -> None:
    script = Script("Two dogs")
    whole = Masked("One cat", ((0, 7),))
    assert InfillCompleter().complete([gapped("x", whole)], script, Sampling(), Path()) == [
        "Two dogs"
    ]
    assert script.calls[0][0].prefill == ""


def test_a_gap_filled_with_blanks_is_refused_and_its_other_gaps_are_not_asked_for() -> None:
    script = Script(" \n")
    responses = InfillCompleter().complete([gapped("x")], script, Sampling(), Path())
    assert responses == [Refused("empty_gap", "a ")]
    assert len(script.calls) == 2
    assert script.calls[1] == []


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (" a green vase and a lamp.\n", "a green vase and a lamp."),
        (f"a green vase and a {MASK}.", Refused("mask_left", f"a green vase and a {MASK}.")),
        ("  ", Refused("empty_response")),
        ("a green…", Refused("cut_short", "a green…")),
    ],
)
def test_instruct_asks_once_and_checks_the_reply(reply: str, expected: str | Refused) -> None:
    script = Script(reply)
    assert InstructCompleter().complete([gapped("x")], script, Sampling(), Path()) == [expected]
    (request,) = script.calls[0]
    assert request.id == "x/rank2"
    assert request.images == (Media(path="x.png"),)
    assert f"Answer: a {MASK} and a {MASK}." in request.prompt[0].content[-1].text
    assert "red" not in request.prompt[0].content[-1].text, "the chosen words must not leak"
