"""Forms broken and completed: the words stay, the answer stays, the form goes or comes."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_builders.malform import (
    KINDS,
    completed,
    malformed,
    plain_words,
    shifted_tags,
    strip_all_tags,
    strip_answer_tags,
    unclosed_think,
)
from mmalign.think import TAGS, final_answer, parts_of

# The form of the paper's figure.
BOXED = "<think>3 and 4\nmake 7</think>\n<answer> The answer is $\\boxed{7}$</answer>"
WORDS = "<think> three and four make 7 </think> <answer> \\boxed{ 7 } </answer>"
UNBOXED = "<think>3 and 4</think><answer>7</answer>"

words = st.text(alphabet="ab \n.{}", min_size=1, max_size=12).filter(str.strip)
gaps = st.sampled_from(["", " ", "\n", "\n\n "])


@st.composite
def well_formed(draw) -> str:
    a, b, c, d, e, f = (draw(gaps) for _ in range(6))
    think, answer = draw(words), f"so \\boxed{{{draw(st.integers(0, 99))}}}"
    return f"{a}<think>{b}{think}</think>{c}<answer>{d}{answer}{e}</answer>{f}"


def bare(text: str) -> list[str]:
    """The words without any tags."""
    for tag in TAGS:
        text = text.replace(tag, " ")
    return text.split()


def test_all_tags_go():
    assert strip_all_tags(BOXED) == "3 and 4\nmake 7\nThe answer is $\\boxed{7}$"
    assert strip_all_tags(WORDS) == "three and four make 7 \\boxed{ 7 }"
    # Words beside tags do not grow together.
    assert strip_all_tags(UNBOXED) == "3 and 4 7"


def test_only_the_answers_tags_go():
    assert strip_answer_tags(BOXED) == (
        "<think>3 and 4\nmake 7</think>\nThe answer is $\\boxed{7}$"
    )
    assert strip_answer_tags(WORDS) == "<think> three and four make 7 </think> \\boxed{ 7 }"


def test_the_thinking_ends_in_the_answer():
    assert shifted_tags(BOXED) == (
        "<think>3 and 4\nmake 7<answer>\n</think> The answer is $\\boxed{7}$</answer>"
    )
    assert shifted_tags(WORDS) == (
        "<think> three and four make 7 <answer> </think> \\boxed{ 7 } </answer>"
    )
    # Found without a box too.
    assert final_answer(shifted_tags(UNBOXED)) == "7"


def test_words_take_the_place_of_tags():
    assert plain_words(BOXED) == "3 and 4\nmake 7\nAnswer: The answer is $\\boxed{7}$"
    assert plain_words(WORDS) == "three and four make 7 Answer: \\boxed{ 7 }"


def test_the_thinking_is_not_closed():
    assert unclosed_think(BOXED) == (
        "<think>3 and 4\nmake 7\n<answer> The answer is $\\boxed{7}$</answer>"
    )
    assert final_answer(unclosed_think(UNBOXED)) == "7"


@pytest.mark.parametrize("kind", KINDS)
@given(text=well_formed())
def test_a_broken_form_keeps_answer_and_words(kind, text):
    assert parts_of(text).well_formed
    broken = malformed(text, kind)
    assert not parts_of(broken).well_formed
    assert final_answer(broken) == final_answer(text)
    inserted = ["Answer:"] if kind == "plain_words" else []
    kept = [word for word in bare(broken) if word not in inserted]
    assert kept == bare(text)
    assert len(bare(broken)) == len(bare(text)) + len(inserted)
    assert broken != text
    assert malformed(broken, kind) == broken


def test_every_kind_breaks_the_form_in_its_own_way():
    broken = [malformed(BOXED, kind) for kind in KINDS]
    assert len(set(broken)) == len(KINDS)
    assert [parts_of(text).problem for text in broken] == [
        "no_tags",
        "no_answer",
        "wrong_order",
        "no_tags",
        "unclosed_think",
    ]


DONE = "<think> 3 and 4. </think>\n<answer> So \\boxed{7}. </answer>"


@pytest.mark.parametrize(
    "text",
    [
        "3 and 4. So \\boxed{7}.",
        "<think>3 and 4. So \\boxed{7}.",
        "<think>3 and 4.</think> So \\boxed{7}.",
        "<think>3 and 4.</think> So \\boxed{7}.</answer>",
        "<think>3 and 4.</think><answer>So \\boxed{7}.",
        "<think>3 and 4. <answer>So \\boxed{7}.</answer>",
        "3 and 4.</think><answer>So \\boxed{7}.</answer>\n",
        "3 and 4. <answer>So \\boxed{7}.</answer>",
        "3 <think>and 4.</think><answer>So \\boxed{7}.</answer>",
        "<think>3 and</think> 4. <answer>So \\boxed{7}.</answer>",
    ],
)
def test_a_form_is_completed_where_it_is_clear_what_is_the_answer(text):
    assert not parts_of(text).well_formed
    assert completed(text) == DONE


def test_a_form_is_completed_in_the_words_of_the_lab():
    assert completed("three and four make 7 . the answer is \\boxed{ 7 } .") == (
        "<think> three and four make 7 . </think>\n<answer> the answer is \\boxed{ 7 } . </answer>"
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "3 and 4. So 7.",
        "\\boxed{7}",
        "So \\boxed{7}. I think.",
        "<think>a</think><think>b</think><answer>7</answer>",
        "<think></think><answer>7</answer>",
        "<think>a</think><answer></answer>",
        "<answer>7</answer><think>a</think>",
        "<think>a</think><answer>7</answer> I think.",
        "<answer>7</answer>",
        "a</think>",
    ],
)
def test_what_is_not_clear_is_not_completed(text):
    assert completed(text) is None


@given(st.lists(st.sampled_from([*TAGS, "a", "b.", " \\boxed{7}", "\n", " "]), max_size=9))
def test_completing_keeps_all_words(parts):
    text = "".join(parts)
    if (made := completed(text)) is not None:
        assert parts_of(made).well_formed
        assert re.sub(r"\s", "", "".join(bare(made))) == re.sub(r"\s", "", "".join(bare(text)))
