"""Splitting, cutting and swapping: nothing lost, nothing cut inside a word."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmalign.sentences import cut_sentence, first_sentence, split_sentences, swap_yes_no

ANY = st.text(alphabet=st.sampled_from("abE31 .!?…\n\r\t\"')*-。\u00a0\u2028"), max_size=60)
PROSE = st.lists(
    st.sampled_from(["A dog sits. ", "Is it?  ", "e.g. this. ", "It is 3.5 m.\n", "- two cats\n"]),
    min_size=1,
    max_size=6,
).map("".join)


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("A dog sits. It runs.", ["A dog sits. ", "It runs."]),
        ("Really?!  Yes! ", ["Really?!  ", "Yes! "]),
        ("It is 3.5 m long. So.", ["It is 3.5 m long. ", "So."]),
        ("Pets, e.g. Dogs, i.e. all. End", ["Pets, e.g. Dogs, i.e. all. ", "End"]),
        ("Dr. Smith and Mrs. Jones.", ["Dr. Smith and Mrs. Jones."]),
        ("J. Smith, at 9 a.m. on Monday.", ["J. Smith, at 9 a.m. on Monday."]),
        ("Cats, dogs, etc. They sit.", ["Cats, dogs, etc. ", "They sit."]),
        ("Cats, etc. and dogs.", ["Cats, etc. and dogs."]),
        ("1. A dog.\n2. A cat", ["1. A dog.\n", "2. A cat"]),
        ("**1.** Bold. Next", ["**1.** Bold. ", "Next"]),
        ("There are 3. The rest", ["There are 3. ", "The rest"]),
        ("Items:\n\n- a\n- b", ["Items:\n\n", "- a\n", "- b"]),
        ("no stop\r\nat all", ["no stop\r\n", "at all"]),
        ('He said "go." Then (he left.) So', ['He said "go." ', "Then (he left.) ", "So"]),
        ("a dog . a cat .", ["a dog . ", "a cat ."]),
        ("这是狗。那是猫。", ["这是狗。", "那是猫。"]),
        ("No. There is none.", ["No. ", "There is none."]),
        ("A. a cat", ["A. a cat"]),
        ("\n  It is. So", ["\n  It is. ", "So"]),
        ("word", ["word"]),
        ("  ", ["  "]),
        ("", []),
    ],
)
def test_sentences_end_where_a_reader_says(text: str, sentences: list[str]):
    assert split_sentences(text) == sentences


@given(st.one_of(ANY, PROSE, st.text(max_size=40)))
def test_nothing_is_lost(text: str):
    sentences = split_sentences(text)
    assert "".join(sentences) == text
    if text.strip():
        assert all(sentence.strip() for sentence in sentences)
        # A line break ends a sentence, so none is inside one.
        assert not any("\n" in s.strip() or "\r" in s.strip() for s in sentences)


@given(st.one_of(ANY, PROSE))
def test_the_first_sentence_is_the_splitters(text: str):
    sentences = split_sentences(text)
    sentence, ended = first_sentence(text)
    assert sentence == (sentences[0].rstrip() if text.strip() else "")
    assert ended or len(sentences) <= 1


def test_a_sentence_ends_after_the_prefix_only():
    # In the whole text "U.S." was followed by a small letter and ended nothing.
    assert first_sentence("In the U.S. Army men run. So", after=len("In the U.S.")) == (
        "In the U.S. Army men run.",
        True,
    )
    assert first_sentence("It costs 3.5 m. And", after=10) == ("It costs 3.5 m.", True)
    assert first_sentence("A dog runs", after=5) == ("A dog runs", False)
    assert first_sentence("A dog runs.", after=5) == ("A dog runs.", True)
    assert first_sentence("A dog.", after=6) == ("A dog.", False)


@pytest.mark.parametrize(
    ("sentence", "other"),
    [
        ("Yes, there is.", "No, there is."),
        ("  yes", "  no"),
        ("No.", "Yes."),
        ("no dogs", "yes dogs"),
        ("Now", "Now"),
        ("Not one", "Not one"),
        ("Nothing", "Nothing"),
        ("Northern", "Northern"),
        ("Nobody", "Nobody"),
        ("Yesterday", "Yesterday"),
        ("no-one", "no-one"),
        ("It is no dog", "It is no dog"),
    ],
)
def test_yes_and_no_are_swapped_as_words(sentence: str, other: str):
    assert swap_yes_no(sentence, random.Random(0), probability=1.0) == other
    assert swap_yes_no(sentence, random.Random(0), probability=0.0) == sentence


def test_half_of_them_are_swapped():
    swapped = sum(swap_yes_no("Yes.", random.Random(seed)) == "No." for seed in range(2000))
    assert abs(swapped / 2000 - 0.5) < 0.05


def test_every_cut_between_words_is_as_likely():
    found = [cut_sentence(" A big dog sits. ", random.Random(seed)) for seed in range(4000)]
    counts = {cut: found.count(cut) / 4000 for cut in found}
    assert set(counts) == {
        ("", "A big dog sits."),
        ("A", "big dog sits."),
        ("A big", "dog sits."),
        ("A big dog", "sits."),
        ("A big dog sits", "."),
    }
    assert all(abs(share - 0.2) < 0.04 for share in counts.values())


def cuts(sentence: str, *, whole: bool = False) -> set[str]:
    return {cut_sentence(sentence, random.Random(seed), whole=whole)[0] for seed in range(200)}


def test_a_single_word_is_written_anew_or_before_its_full_stop():
    assert cuts("Yes") == {""}
    assert cuts("Yes.") == {"", "Yes"}
    assert cuts("a dog .") == {"", "a", "a dog"}


def test_a_swapped_word_may_stay_whole():
    assert cuts("No", whole=True) == {"", "No"}
    assert cuts("No.", whole=True) == {"", "No"}


@given(PROSE, st.integers())
def test_prefix_and_rest_are_the_sentence(text: str, seed: int):
    for sentence in split_sentences(text):
        body = sentence.strip()
        prefix, rest = cut_sentence(sentence, random.Random(seed))
        assert body.startswith(prefix)
        assert body.endswith(rest)
        assert rest
        assert prefix.split() + rest.split() == body.split() or prefix + rest == body
