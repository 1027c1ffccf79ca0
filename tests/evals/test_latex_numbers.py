"""Values of short LaTeX expressions: those of latex2sympy2 1.9.1 and Python's eval."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evals.benchmarks.latex_numbers import value_of


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12", 12),
        ("1.50", 1.5),
        (".5", 0.5),
        ("1,000", 1000),
        ("1,234.5", 1234.5),
        ("2.0", 2),
        ("-0.0", 0),
        ("2.0+1", 3),
        ("2.5\\times2", 5.0),
        ("6/2", 3.0),
        ("\\frac{6}{2}", 3.0),
        ("0/2", 0.0),
        ("8/4/2", 1.0),
        ("1:2", 0.5),
        ("1:2\\pi", 1 / (2 * math.pi)),
        ("[7]", 7),
        ("\\{7\\}", 7),
        ("[1+2]3", 9),
        ("\\{2\\}\\{3\\}", 6),
        ("2-3-4", -5),
        ("--3", 3),
        ("2\\times3\\div4\\cdot2", 3.0),
        ("(1+2)(3+4)", 21),
        ("\\frac{1}{2}", 0.5),
        ("\\frac{4}{2}", 2.0),
        ("5\\sqrt{3}", 5 * math.sqrt(3)),
        ("\\sqrt{4}", 2.0),
        ("\\sqrt[3]{8}", 2.0),
        ("\\frac{3\\sqrt{3}}{2}", 1.5 * math.sqrt(3)),
        ("2\\pi", 2 * math.pi),
        ("2/3\\pi", 2 / (3 * math.pi)),
        ("2^{10}", 1024),
        ("2^3^2", 64),
        ("-2^2", -4),
        ("10^{-2}", 0.01),
        ("10^{400}", 10**400),
        ("2^{1/2}", math.sqrt(2)),
    ],
)
def test_values(text, value):
    found = value_of(text)
    assert found == pytest.approx(value)
    assert isinstance(found, int) == isinstance(value, int)


@pytest.mark.parametrize(
    "text",
    ["", "a", "5cm", "1,00", "5.", "1/0", "\\frac{1}{0}", "\\sqrt{-4}", "(-8)^{1/3}", "(3", "3)",
     "(3}", "2^", "\\frac{1}", "\\sqrt[3", "\\infty", "3!", "50%", "10^{9999}", "9^{9^{9^{9}}}",
     "\\frac12", "\\frac1{2}", "\\frac{1}2", "\\sqrt2", "\\sqrt(4)", "2^(3)", "2^-1",
     "2^\\frac{1}{2}", "[7)", "\\{7}", "1,2", "(-1)^{0.5}", "10^{999}" * 20,
     "1" * 201, "(" * 150 + "1", "__import__('os')", "1e3"],
)  # fmt: skip
def test_what_has_no_value(text):
    assert value_of(text) is None


@given(st.text(alphabet="12.,/^(){}[]+-* \\fracsqtpi", max_size=40))
def test_it_never_raises(text):
    value_of(text)
