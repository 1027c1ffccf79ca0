import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmalign.answers import option_letter, unwrapped, yes_no


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Yes", "yes"),
        ("no.", "no"),
        ("NO", "no"),
        ("**No**", "no"),
        ("'yes'", "yes"),
        (",no", "no"),
        ("<answer>Yes</answer>", "yes"),
        ("The answer is no", "no"),
        ("Final answer:\n\nYes.", "yes"),
        ("No, there is no dog in the image.", "no"),
        ("No there is not", "no"),
        ("Yes there is", "yes"),
        ("The picture shows a park. Yes, a dog is in it.", "yes"),
        ("Yes. There is no cat, though.", "yes"),
        ("Yes, no", None),
        ("yes\nno", None),
        ("Yes. No.", None),
        ("yes/no", None),
        ("Yes, there is a dog and no cat", None),
        ("There is no dog, I think.", None),
        ("There is no doubt about the dog", None),
        ("No dogs, but a cat", None),
        ("No doubt.", None),
        ("No one", None),
        ("No-one", None),
        ("nope", None),
        ("Yesterday", None),
        ("not sure", None),
        ("A dog.", None),
        ("", None),
    ],
)
def test_yes_no_reads_a_statement_or_nothing(text, answer):
    assert yes_no(text) == answer


@given(st.text(max_size=40))
def test_yes_no_never_finds_a_word_that_is_not_there(text):
    answer = yes_no(text)
    assert answer is None or answer in text.lower()


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("B. a cat", "B"),
        ("A. A dog", "A"),
        ("The answer is (C) a dog", "C"),
        ("Answer: option D", "D"),
        ("**A**", "A"),
        ("A cat", None),
        ("A, B", None),
        ("A and B", None),
        ("A. Or rather B.", None),
        ("b", None),
        ("E.", None),
        ("Because", None),
        ("", None),
    ],
)
def test_option_letter_reads_one_letter_or_nothing(text, letter):
    assert option_letter(text) == letter


def test_option_letter_takes_other_letters():
    assert option_letter("E.", options="ABCDE") == "E"


def test_commands_of_looks_are_taken_off():
    assert unwrapped("\\text{a} \\mathbf {B}, \\frac{1}{2}") == "a B, \\frac{1}{2}"
