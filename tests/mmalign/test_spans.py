"""Differing phrases: words to characters to tokens."""

from hypothesis import given
from hypothesis import strategies as st

from mmalign.records import Span
from mmalign.spans import differing_spans, marked_tokens, one_sided


def phrases(text, spans):
    return [(span.phrase, text[span.start : span.end]) for span in spans]


def test_replaced_words_get_one_phrase_on_each_side():
    chosen, rejected = "a red cup on a table.", "a big blue cup on a chair."
    ours, theirs = differing_spans(chosen, rejected)
    assert phrases(chosen, ours) == [(1, "red"), (2, "table")]
    assert phrases(rejected, theirs) == [(1, "big blue"), (2, "chair")]
    assert one_sided(ours, theirs) == 0


def test_insertions_and_deletions_stand_on_one_side():
    chosen, rejected = "a cat and one dog sleep .", "a cat sleep near the tree ."
    ours, theirs = differing_spans(chosen, rejected)
    assert phrases(chosen, ours) == [(1, "and one dog")]
    assert phrases(rejected, theirs) == [(2, "near the tree")]
    assert one_sided(ours, theirs) == 2


def test_punctuation_is_a_word_of_its_own():
    ours, theirs = differing_spans("No, a goose.", "No, a duck!")
    assert [(s.start, s.end) for s in ours] == [(6, 12)]
    assert [(s.start, s.end) for s in theirs] == [(6, 11)]


def test_frequent_words_of_long_texts_align_too():
    # difflib's auto-junk would ignore words that make up over 1 % of 200 or more.
    chosen = " ".join(["the cat"] * 150)
    rejected = " ".join(["the dog"] * 150)
    ours, theirs = differing_spans(chosen, rejected)
    assert phrases(chosen, ours) == [(number, "cat") for number in range(1, 151)]
    assert phrases(rejected, theirs) == [(number, "dog") for number in range(1, 151)]


WORDS = st.lists(st.sampled_from(["a", "red", "cat", "dog", "on", ",", "it's"]), max_size=12)


@given(WORDS, WORDS)
def test_what_is_left_after_removing_the_spans_is_the_same(one, other):
    texts = [" ".join(one), " ".join(other)]
    sides = differing_spans(*texts)

    def rest(text, spans):
        for span in reversed(spans):
            assert text[span.start : span.end].strip() == text[span.start : span.end] != ""
            text = text[: span.start] + text[span.end :]
        return text.split()

    kept = [rest(text, spans) for text, spans in zip(texts, sides, strict=True)]
    assert "".join(kept[0]) == "".join(kept[1])
    if texts[0] == texts[1]:
        assert sides == ((), ())


def test_tokens_overlapping_a_span_are_marked():
    # " a", " red", " cup": blanks belong to the word after them
    offsets = [(0, 1), (1, 5), (5, 9)]
    red = marked_tokens([Span(start=2, end=5, phrase=1)], offsets, 9)
    assert red == [False, True, False, False]
    # half a word is enough
    assert marked_tokens([Span(start=6, end=7, phrase=1)], offsets, 9)[2]


def test_the_end_of_turn_belongs_to_a_span_over_everything():
    offsets = [(0, 1), (1, 5)]
    assert marked_tokens([Span(start=0, end=5, phrase=1)], offsets, 5) == [True, True, True]
    assert marked_tokens([Span(start=1, end=5, phrase=1)], offsets, 5) == [False, True, False]
