from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmalign.numerals import number


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12", "12"),
        (" 12.\n", "12"),
        ("**12**", "12"),
        ("1,000", "1000"),
        ("1{,}000", "1000"),
        ("1,234,567.5", "2469135/2"),
        ("-0.5", "-1/2"),
        ("−5", "-5"),
        (".5", "1/2"),
        ("1e3", "1000"),
        ("2.5E-1", "1/4"),
        ("3/4", "3/4"),
        ("7 3/4", "31/4"),
        ("\\frac{1}{2}", "1/2"),
        ("-\\dfrac{1}{2}", "-1/2"),
        ("\\frac12", "1/2"),
        ("7\\frac{3}{4}", "31/4"),
        ("2 million", "2000000"),
        ("$12", "12"),
        ("\\$12", "12"),
        ("$12$", "12"),
        ("50%", "50"),
        ("50\\%", "50"),
        ("90^\\circ", "90"),
        ("5 cm", "5"),
        ("5\\text{ cm}", "5"),
        ("5 cm^2", "5"),
        ("12 apples", "12"),
        ("3 + 4 = 7", "7"),
        ("$x = -3$", "-3"),
        ("The answer is 12.", "12"),
        ("The answer is twelve.", "12"),
        ("Twelve", "12"),
        ("zero apples", "0"),
    ],
)
def test_one_number_is_read(text, value):
    assert number(text) == Fraction(value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "None",
        "many",
        "12 or 13",
        "twenty seven",
        "twenty-seven",
        "one two",
        "12, 13",
        "x = 3, y = 4",
        "not 12",
        "more than 12",
        "1 000",
        "1,5",
        "1,000,00",
        "1.2.3",
        "12:30",
        "1/2/3",
        "3/0",
        "3-4",
        "5-5",
        "4!",
        "12x",
        "x^2",
        "x_2",
        "B2",
        "3D",
        "\\sqrt{4}",
        "4 \\pi",
        "4 pi",
        "2 dozen",
        "the one with a hat",
        "9" * 401,
        "9" * 1_000_000,
        "1e999999999",
    ],
)
def test_what_gives_no_number_or_several_is_none(text):
    assert number(text) is None


@given(st.fractions())
def test_a_written_fraction_is_itself(value):
    assert number(str(value)) == value


@given(st.integers(min_value=-(10**12), max_value=10**12))
def test_thousands_commas_change_nothing(value):
    assert number(f"{value:,}") == value


@given(st.text(max_size=40))
def test_no_text_raises(text):
    number(text)
