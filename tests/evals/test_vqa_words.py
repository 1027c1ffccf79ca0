"""The normalisers of VQA's scorers, each odd corner by hand, and the accuracy of ten answers."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evals.benchmarks.vqa_words import (
    CONTRACTIONS,
    VIZWIZ_CONTRACTIONS,
    evalai,
    leave_one_out,
    official,
    one_line,
    short,
    vizwiz,
)


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("Yes", "yes"),
        ("\tA red\nbus ", "red bus"),
        ("The cat and an apple", "cat and apple"),
        ("two", "2"),
        ("None", "0"),
        ("eleven", "eleven"),
        ("two-three", "2 3"),  # a hyphen in a word parts it
        ("two- three four-five", "2 3 fourfive"),  # one that stands by a blank takes all with it
        ("left/right", "left right"),
        ("left / right/up", "left rightup"),
        ("left/right - up", "left right up"),  # each mark by itself
        ("1,000", "1000"),
        ("1,000-2,000", "10002000"),  # a comma between digits takes every mark with it
        ("red,blue", "red blue"),
        ("red, blue", "red blue"),
        ("1,b", "1 b"),
        ("1,,000", "1 000"),  # two commas are none between digits
        ("5.", "5"),  # what looks like a look-behind is none
        ("2.5", "2.5"),
        ("v.2", "v.2"),
        (".", ""),
        ("St. Mary's.", "st mary's"),
        ("." * 32 + "x", "x"),
        ("." * 40 + "x", "." * 8 + "x"),  # only the first 32: the flag is taken for a count
        ("dont", "don't"),
        ("wont", "won't"),
        ("Im", "im"),  # in the table as "Im", looked up as "im"
        ("lets", "lets"),
        ("somebody'd", "somebodyd"),
        ("y'allll couldnt've", "y'all'll couldn't've"),
        ("2:30 50% 'stop' #1 $5", "2:30 50% 'stop' #1 $5"),
        ("what?!", "what"),
        ("a", ""),
        ("", ""),
    ],
)
def test_vqas_script(text, same):
    assert official(text) == same


@pytest.mark.parametrize(
    ("text", "by_evalai", "by_script"),
    [
        ("1,000-2,000", "1000 2000", "10002000"),  # its commas are gone before the others are seen
        ("red,blue", "redblue", "red blue"),
        ("what? -yes", "what yes", "what yes"),
        ("why?not", "whynot", "why not"),
        ("the dog's", "dog 's", "dog's"),
        ("ow's'at", "ow 's'at", "'ow's'at"),
        ("She's two.", "she 's 2", "she's 2"),
        ("1,,000", "1000", "1 000"),
    ],
)
def test_what_evalais_processor_does_otherwise(text, by_evalai, by_script):
    assert (evalai(text), official(text)) == (by_evalai, by_script)


def test_vizwiz_has_curly_apostrophes():
    assert vizwiz("dont cant weve") == "don’t can't we've"
    assert official("dont cant weve") == "don't can't we've"
    # The word that lacks one of two: in one table the other is straight.
    assert vizwiz("couldn'tve wouldn'tve") == "couldn’t’ve wouldn'tve"
    assert vizwiz("wouldn’tve") == "wouldn’t’ve"


def test_the_table_of_contractions():
    """As counted in the released script: 120 entries, of which three are no missing apostrophe."""
    assert len(CONTRACTIONS) == len(VIZWIZ_CONTRACTIONS) == 120
    odd = {key for key, word in CONTRACTIONS.items() if len(word) != len(key) + 1}
    assert odd == {"let's", "she's", "somebody'd"}
    assert all(word.replace("'", "") == key.replace("'", "") for key, word in CONTRACTIONS.items())
    assert [k for k in CONTRACTIONS if k.endswith("at")] == ["ow's'at", "'ows'at", "'ow'sat"]
    assert [k for k in CONTRACTIONS if k.startswith(("yall", "y'all"))] == [
        *("yall", "yall'll", "y'allll", "yall'd've", "y'alld've", "y'all'dve")
    ]
    assert sum("'" in word for word in VIZWIZ_CONTRACTIONS.values()) == 8
    assert sum("'" in key for key in VIZWIZ_CONTRACTIONS) == 2


@given(st.text(alphabet="aA one2,.;/-'?’\n\t", max_size=20))
def test_what_all_of_them_leave(text):
    for rewritten in (official(text), evalai(text), vizwiz(text)):
        assert rewritten == rewritten.lower().strip()
        assert not re.search(r"[;/?\n\t-]|  ", rewritten)
        assert not {"a", "one"} & set(rewritten.split())


@pytest.mark.parametrize(("same", "accuracy"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1)])
def test_ten_references(same, accuracy):
    """Two of ten: left out twice with 1/3, eight times with 2/3: (2/3 + 16/3) / 10 = 0.6."""
    assert leave_one_out("x", ["x"] * same + ["y"] * (10 - same)) == pytest.approx(accuracy)


@given(st.lists(st.sampled_from("xyz"), min_size=1, max_size=12))
def test_the_accuracy_is_a_mean_over_the_one_left_out(references):
    parts = [
        min(1, sum(one == "x" for place, one in enumerate(references) if place != out) / 3)
        for out in range(len(references))
    ]
    assert leave_one_out("x", references) == pytest.approx(sum(parts) / len(parts))


@pytest.mark.parametrize(
    ("answer", "is_short"),
    [
        ("red", True),
        ("\n a red bus\n\n", True),
        ("one two three four five", True),
        ("one two three four five six", False),
        ("red\nblue", False),
        (" \n", False),
        ("", False),
    ],
)
def test_short_answers(answer, is_short):
    assert short(answer, 5) is is_short


def test_one_line():
    assert one_line("\n a\tb\nc ") == "a b c"
