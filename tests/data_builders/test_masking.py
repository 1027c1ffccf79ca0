"""Masking: what is masked, where, and what a model's masking must keep."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_builders.masking import (
    MASK,
    Masked,
    ModelMasker,
    Refused,
    RuleMasker,
    locate,
    read_masked,
)
from mmalign.generate.base import Generation, Request, Sampling
from mmalign.records import Example, Media, user


class Replies:
    """Answers every request with the same text, and remembers what it was asked."""

    name = "replies"

    def __init__(self, text: str, *, finished: bool = True) -> None:
        self.text, self.finished, self.asked = text, finished, list[Request]()

    def generate(self, requests, sampling: Sampling) -> list[Generation]:
        self.asked += requests
        return [
            Generation(id=r.id, text=self.text, num_tokens=1, finished=self.finished)
            for r in requests
        ]


def example(answer: str) -> Example:
    image = (Media(path="a.png"),)
    return Example(id="a", prompt=user("What is it?", images=1), images=image, answer=answer)


def rule(answer: str, words: tuple[str, ...] | None = None) -> Masked | Refused:
    masker = RuleMasker(words=words)
    return masker.mask([example(answer)], Replies(""), Sampling(), Path())[0]


def model(answer: str, reply: str) -> Masked | Refused:
    return ModelMasker().mask([example(answer)], Replies(reply), Sampling(), Path())[0]


def test_given_words_are_masked_whatever_their_case_and_neighbours_merge() -> None:
    answer = "the image shows a Red three and a blue seven ."
    masked = rule(answer, ("red", "blue", "three", "seven"))
    assert masked == Masked(answer, ((18, 27), (34, 44)))
    assert isinstance(masked, Masked)
    assert masked.text == "the image shows a [MASK] and a [MASK] ."
    assert [answer[a:b] for a, b in masked.segments] == ["Red three", "blue seven"]


def test_without_words_every_content_word_is_masked_and_punctuation_kept() -> None:
    masked = rule("A man's dog, brown, sits in the well-kept garden.")
    assert isinstance(masked, Masked)
    assert masked.text == "A [MASK], [MASK], [MASK] in the [MASK]."


def test_nothing_to_mask_is_said() -> None:
    assert rule("Yes, it is.") == Refused("nothing_to_mask", "Yes, it is.")
    assert rule("a cat", ("dog",)) == Refused("nothing_to_mask", "a cat")


def test_a_models_masks_are_found_in_the_chosen_text() -> None:
    answer = "The woman and his dog sit on the bench, near the tree."
    masked = model(answer, f" The {MASK} and his {MASK} sit on the {MASK}, near the {MASK}.\n")
    assert isinstance(masked, Masked)
    assert [answer[a:b] for a, b in masked.segments] == ["woman", "dog", "bench", "tree"]


def test_neighbouring_masks_of_a_model_become_one() -> None:
    masked = model("a big red cup.", f"a {MASK} {MASK} {MASK}.")
    assert masked == Masked("a big red cup.", ((2, 13),))


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ("a big red cup.", "nothing_masked"),
        (f"a {MASK} mug.", "mask_not_aligned"),
        (f"Sure! a {MASK} cup.", "mask_not_aligned"),
        (f"a big red cup.{MASK}", "mask_not_aligned"),
        ("", "nothing_masked"),
    ],
)
def test_a_reply_that_is_not_the_answer_with_gaps_is_refused(reply: str, reason: str) -> None:
    assert model("a big red cup.", reply) == Refused(reason, reply)


def test_a_reply_cut_by_the_token_limit_is_refused() -> None:
    replies = Replies(f"a {MASK}", finished=False)
    examples = [example("a red cup on a table in the room")]
    masked = ModelMasker().mask(examples, replies, Sampling(), Path())
    assert masked == [Refused("cut_short", f"a {MASK}")]


def test_the_model_sees_the_question_the_answer_and_the_picture() -> None:
    replies = Replies(f"a {MASK}.")
    ModelMasker().mask([example("a cup.")], replies, Sampling(), Path("root"))
    (request,) = replies.asked
    text = request.prompt[0].content[-1].text
    assert "Question: What is it?" in text
    assert "Answer: a cup." in text
    assert request.images == (Media(path="a.png"),)
    assert request.media_root == Path("root")


@given(st.lists(st.text("ab ", min_size=1, max_size=4), min_size=3, max_size=9))
def test_gaps_that_exist_are_found_and_give_the_text_back(parts: list[str]) -> None:
    """Every other part is masked; the offsets may differ from ours, the text they make may not."""
    pieces = parts[::2] if len(parts) % 2 else [*parts[::2], ""]
    text = "".join(parts)
    gaps = locate(pieces, text)
    assert gaps is not None
    assert Masked(text, gaps).pieces == pieces
    assert all(a < b for a, b in gaps)


def test_offsets_of_a_padded_answer_are_those_of_the_answer_itself() -> None:
    masked = read_masked(f"a {MASK}.", "  a cup. ")
    assert masked == Masked("  a cup. ", ((4, 7),))
