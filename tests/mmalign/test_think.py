"""The think and answer form, and the answer that a response gives."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmalign.think import boxed, final_answer, parts_of

GOOD = "<think>3 and 4</think>\n<answer> The answer is $\\boxed{12}$</answer>"
PROMPT = "Think within <think> </think> tags, then answer within <answer> </answer> tags."


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        GOOD + "\n",
        "\n " + GOOD + " \n\n",
        "<think>a</think><answer>b</answer>",
        "<think>\na\n\nb\n</think>\n\n<answer>\nb\nc\n</answer>",
    ],
)
def test_the_form_allows_white_space_around_its_blocks_and_lines_in_them(text):
    parts = parts_of(text)
    assert parts.well_formed
    assert parts.problem == ""


def test_parts_are_the_contents_of_the_blocks():
    parts = parts_of(GOOD)
    assert (parts.think, parts.answer) == ("3 and 4", "The answer is $\\boxed{12}$")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "no_tags"),
        ("Thus, the answer is 12.", "no_tags"),
        ("Answer: 12", "no_tags"),
        ("<Think>a</Think><Answer>b</Answer>", "no_tags"),
        ("< think >a</ think >< answer >b</ answer >", "no_tags"),
        ("<answer>b</answer>", "no_think"),
        ("<thinking>a</thinking><answer>b</answer>", "no_think"),
        ("<think>a</think>b", "no_answer"),
        ("<think>a", "unclosed_think"),
        ("<think>a<answer>b</answer>", "unclosed_think"),
        ("a</think><answer>b</answer>", "unopened_think"),
        ("<think>a</think><answer>b", "unclosed_answer"),
        ("<think>a</think>b</answer>", "unopened_answer"),
        ("<think>a</think><think>b</think><answer>c</answer>", "two_thinks"),
        ("<think><think>a</think></think><answer>c</answer>", "two_thinks"),
        ("<think>a</think><answer>b</answer><answer>c</answer>", "two_answers"),
        ("<think>I close with </answer></think><answer>b</answer>", "two_answers"),
        ("<answer>b</answer><think>a</think>", "wrong_order"),
        ("<think>a<answer>b</answer></think>", "wrong_order"),
        ("<think>a<answer></think>b</answer>", "wrong_order"),
        ("</think>a<think><answer>b</answer>", "wrong_order"),
        ("Well. " + GOOD, "text_outside"),
        (GOOD + " Done.", "text_outside"),
        ("<think>a</think> so <answer>b</answer>", "text_outside"),
        ("<think> \n</think><answer>b</answer>", "empty_think"),
        ("<think>a</think><answer> </answer>", "empty_answer"),
        (PROMPT + "\n" + GOOD, "two_thinks"),
        ("<think>" + PROMPT + "</think><answer>b</answer>", "two_thinks"),
    ],
)
def test_what_breaks_the_form_is_named(text, problem):
    assert parts_of(text).problem == problem
    assert not parts_of(text).well_formed


def test_a_block_that_is_not_the_only_one_has_no_content():
    parts = parts_of("<think>a</think><think>b</think><answer>c</answer>")
    assert (parts.think, parts.answer) == (None, "c")


@given(st.text(alphabet="<>/thinkanswer \n", max_size=60), st.text(max_size=10))
def test_nothing_but_the_form_is_well_formed(text, more):
    for candidate in (text, f"<think>{text}</think><answer>{more}</answer>"):
        parts = parts_of(candidate)
        if parts.well_formed:
            head, _, rest = candidate.strip().partition("</think>")
            assert head.startswith("<think>")
            assert rest.strip().startswith("<answer>")
            assert candidate.strip().endswith("</answer>")
            assert parts.think
            assert parts.answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (GOOD, "12"),
        ("<think>a</think><answer> 12\n</answer>\n", "12"),
        ("<answer>b\nc</answer>", "b\nc"),
        ("<think>It is \\boxed{3}.</think><answer>4</answer>", "4"),
        ("<answer>4</answer> or \\boxed{5}", "4"),
        ("<think>a<answer></think>12</answer>", "12"),
        ("no tags, but \\boxed{3}, no, \\boxed{ 4 }", "4"),
        ("<answer>3</answer><answer>4</answer>", None),
        ("<answer>3</answer><answer>\\boxed{4}</answer>", "4"),
        (PROMPT + "<answer>3</answer>", None),
        ("</answer>3<answer>", None),
        ("<answer>\\boxed{4</answer>", None),
        ("<answer>12, that is \\boxed{}</answer>", None),
        ("<answer></answer>", None),
        ("The answer is 12.", None),
        ("None", None),
        ("", None),
    ],
)
def test_the_answer_is_in_the_one_block_or_the_last_box(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed {7}", "7"),
        ("\\boxed{\\boxed{7}}", "7"),
        ("\\boxed{7", None),
        ("\\boxed{\\frac{1}{2}", None),
        ("\\boxed{3} and so \\boxed{4", None),
        ("\\boxed{7\\}", None),
        ("\\boxed 7", None),
        ("boxed{7}", None),
    ],
)
def test_a_box_is_read_by_its_braces_or_not_at_all(text, content):
    assert boxed(text) == content


def test_long_and_deep_responses_are_read():
    digits = "9" * 1_000_000
    assert final_answer(f"<answer>\\boxed{{{digits}}}</answer>") == digits
    assert final_answer("\\boxed{" * 100_000) is None
    assert parts_of("<think>" * 100_000).problem == "two_thinks"
