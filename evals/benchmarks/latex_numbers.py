"""The value of a short LaTeX expression of numbers: \\frac{1}{2}, 5\\sqrt{3}, 2\\pi/3, 2^{10}.

MATH-Vision's scorer evaluates both sides so, by latex2sympy and Python's `eval`. Here is only what
answers need, read without running anything: + - * / ^, brackets, \\frac, \\sqrt, \\pi, products.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction

# Deeper or longer ones are no short answers; a power must not fill the memory.
MAX_CHARS = 200
_MAX_EXACT_POWER = 64
_TOKEN = re.compile(
    r"\s*((?:\d+(?:,\d{3})*)?\.\d+|\d+(?:,\d{3})*|\\frac|\\sqrt|\\pi|\\times|\\cdot|\\div|[-+*/^(){}\[\]])\s*"
)
_OPERATORS = {"\\times": "*", "\\cdot": "*", "\\div": "/"}
_CLOSING = {"(": ")", "{": "}"}

Value = int | float


def value_of(text: str) -> Value | None:
    """The value, an int where it is a whole number without a decimal point; None where it has none.

    "2.0" is a float and "6/2" an int, which is how Python prints what sympy reads.
    """
    if len(text) > MAX_CHARS:
        return None
    try:
        tokens = _tokens(text)
        found, rest = _sum(tokens)
    except (ValueError, ArithmeticError, IndexError, RecursionError, TypeError):
        return None
    if rest or isinstance(found, complex):
        return None
    if isinstance(found, float):
        return found
    return int(found) if found.denominator == 1 else float(found)


# What is read, and the tokens that are left. Fractions are exact, decimals and roots are floats.
_Exact = Fraction | float
_Read = tuple[_Exact, list[str]]


def _tokens(text: str) -> list[str]:
    found, place = [], 0
    while place < len(text):
        match = _TOKEN.match(text, place)
        if match is None:
            raise ValueError("is no number")
        found.append(_OPERATORS.get(match[1], match[1].replace(",", "")))
        place = match.end()
    return found


def _sum(tokens: list[str]) -> _Read:
    value, tokens = _product(tokens)
    while tokens and tokens[0] in "+-":
        sign = 1 if tokens[0] == "+" else -1
        more, tokens = _product(tokens[1:])
        value = value + sign * more
    return value, tokens


def _product(tokens: list[str]) -> _Read:
    value, tokens = _signed(tokens)
    while tokens and tokens[0] in "*/":
        more, rest = _signed(tokens[1:])
        value, tokens = (value / more if tokens[0] == "/" else value * more), rest
    return value, tokens


def _signed(tokens: list[str]) -> _Read:
    if tokens[0] in "+-":
        value, rest = _signed(tokens[1:])
        return (-value if tokens[0] == "-" else value), rest
    value, tokens = _power(tokens)
    # What stands side by side is taken together first: 2/3\pi is 2/(3\pi).
    while tokens and tokens[0] not in "+-*/^)}]":
        more, tokens = _power(tokens)
        value = value * more
    return value, tokens


def _power(tokens: list[str]) -> _Read:
    value, tokens = _atom(tokens)
    # From the left, as latex2sympy does: 2^3^2 is 64.
    while tokens and tokens[0] == "^":
        exponent, tokens = _atom(tokens[1:])
        whole = isinstance(exponent, Fraction) and exponent.denominator == 1
        exact = whole and abs(exponent) <= _MAX_EXACT_POWER
        value = value ** int(exponent) if exact else float(value) ** float(exponent)
    return value, tokens


def _atom(tokens: list[str]) -> _Read:
    first, rest = tokens[0], tokens[1:]
    if first in _CLOSING:
        value, rest = _sum(rest)
        if rest[0] != _CLOSING[first]:
            raise ValueError("is not closed")
        return value, rest[1:]
    if first == "\\frac":
        top, rest = _argument(rest)
        bottom, rest = _argument(rest)
        return top / bottom, rest
    if first == "\\sqrt":
        degree: _Exact = Fraction(2)
        if rest[0] == "[":
            degree, rest = _sum(rest[1:])
            if rest[0] != "]":
                raise ValueError("is not closed")
            rest = rest[1:]
        radicand, rest = _argument(rest)
        if radicand < 0:
            raise ValueError("has no real root")
        return float(radicand) ** (1 / float(degree)), rest
    if first == "\\pi":
        return math.pi, rest
    return (float(first) if "." in first else Fraction(int(first))), rest


def _argument(tokens: list[str]) -> _Read:
    """What stands in braces, or one digit: \\frac12 is a half."""
    if tokens[0].isdigit() and len(tokens[0]) > 1:
        return Fraction(int(tokens[0][0])), [tokens[0][1:], *tokens[1:]]
    return _atom(tokens)
