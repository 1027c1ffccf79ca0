"""The value of a short LaTeX expression of numbers: \\frac{1}{2}, 5\\sqrt{3}, 2\\pi/3, 1:2, [7].

MATH-Vision's scorer evaluates both sides by latex2sympy2 (1.5.4, 1.8.3 and 1.9.1 were asked, and
agree) and Python's `eval` of what sympy prints. Here is only what answers need, read without
running anything: + - * / : ^, brackets of four kinds, \\frac, \\sqrt, \\pi, products.

What differs: logarithms, factorials, percents, sines and degrees have a value there and none here,
nor has a text that its parser reads only in part, such as "7]" or "5.", which are 7 and 5 there.
Where a negative is divided by a decimal or a product, sympy prints the divisor without brackets:
-3/1.5 is -0.5 there and -2 here.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction

# Longer ones are no short answers; a power must not fill the memory.
MAX_CHARS = 200
_MAX_BITS = 4096
_TOKEN = re.compile(
    r"\s*((?:\d+(?:,\d{3})*)?\.\d+|\d+(?:,\d{3})*|\\frac|\\sqrt|\\pi|\\times|\\cdot|\\div|\\[{}]|[-+*/:^(){}\[\]])\s*"
)
_OPERATORS = {"\\times": "*", "\\cdot": "*", "\\div": "/", ":": "/"}
_CLOSING = {"(": ")", "{": "}", "[": "]", "\\{": "\\}"}
_ENDS = {*"+-*/^", *_CLOSING.values()}

Value = int | float
# What is read, and the tokens that are left.
_Read = tuple[Value, list[str]]


def value_of(text: str) -> Value | None:
    """The value, an int or a float as the scorer's `eval` gives it; None where it has none.

    "2.0" is the int 2, since sympy reads decimals exactly; "6/2" and "\\frac{6}{2}" are the float
    3.0, since it prints them as they stand. Arguments of \\frac and \\sqrt need braces.
    """
    if len(text) > MAX_CHARS:
        return None
    try:
        found, rest = _sum(_tokens(text))
    except (ValueError, ArithmeticError, IndexError, RecursionError):
        return None
    # Python prints no number of more than some thousand digits.
    too_large = isinstance(found, int) and found.bit_length() > _MAX_BITS
    return None if rest or too_large else found


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
    while tokens and tokens[0] in {"+", "-"}:
        sign = 1 if tokens[0] == "+" else -1
        more, tokens = _product(tokens[1:])
        value = value + sign * more
    return value, tokens


def _product(tokens: list[str]) -> _Read:
    value, tokens = _signed(tokens)
    while tokens and tokens[0] in {"*", "/"}:
        more, rest = _signed(tokens[1:])
        value, tokens = (value / more if tokens[0] == "/" else value * more), rest
    return value, tokens


def _signed(tokens: list[str]) -> _Read:
    if tokens[0] in {"+", "-"}:
        value, rest = _signed(tokens[1:])
        return (-value if tokens[0] == "-" else value), rest
    value, tokens = _power(tokens)
    # What stands side by side is taken together first: 2/3\pi is 2/(3\pi).
    while tokens and tokens[0] not in _ENDS:
        more, tokens = _power(tokens)
        value = value * more
    return value, tokens


def _power(tokens: list[str]) -> _Read:
    value, tokens = _atom(tokens)
    # From the left, as latex2sympy2 does: 2^3^2 is 64.
    while tokens and tokens[0] == "^":
        if tokens[1] == "{" or tokens[1] not in {*_CLOSING, "\\frac", "\\sqrt"}:
            exponent, tokens = _atom(tokens[1:])
        else:
            raise ValueError("is no exponent")
        value = _raised(value, exponent)
    return value, tokens


def _raised(base: Value, exponent: Value) -> Value:
    bits = base.bit_length() if isinstance(base, int) and isinstance(exponent, int) else 0
    if bits * abs(exponent) > _MAX_BITS:
        raise ValueError("is too large")
    found = base**exponent
    if isinstance(found, complex):
        raise ValueError("is not real")
    return found


def _atom(tokens: list[str]) -> _Read:
    first, rest = tokens[0], tokens[1:]
    if first in _CLOSING:
        return _closed(first, rest)
    if first == "\\frac":
        top, rest = _braced(rest)
        bottom, rest = _braced(rest)
        return top / bottom, rest
    if first == "\\sqrt":
        degree: Value = 2
        if rest[0] == "[":
            degree, rest = _closed("[", rest[1:])
        radicand, rest = _braced(rest)
        return _raised(float(radicand), 1 / degree), rest
    if first == "\\pi":
        return math.pi, rest
    exact = Fraction(first)
    return (int(exact) if exact.denominator == 1 else float(exact)), rest


def _closed(opened: str, tokens: list[str]) -> _Read:
    """What stands between a bracket that was opened and the one that closes it."""
    value, tokens = _sum(tokens)
    if tokens[0] != _CLOSING[opened]:
        raise ValueError("is not closed")
    return value, tokens[1:]


def _braced(tokens: list[str]) -> _Read:
    if tokens[0] != "{":
        raise ValueError("has no braces")
    return _closed("{", tokens[1:])
