"""The one number that a short answer gives, exactly, or None."""

from __future__ import annotations

import re
from fractions import Fraction

from mmalign.answers import unwrapped

# Python turns digits into a number in quadratic time, and 1e999999999 into a billion of digits.
MAX_DIGITS = 400

_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
# fmt: off
_WORDS = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
    "nineteen", "twenty",
]
# With one of these a number beside them is not what is meant, or not all of it.
_ALTERED = {
    "not", "never", "or", "than", "least", "most", "between", "pi", "dozen", "half", "root",
    "squared", "cubed", "plus", "minus", "times",
}
# fmt: on
_NUMBER = re.compile(
    r"(?<![\w.^/_{\\])(?<!\d,)(?P<sign>[-+]?)"
    r"(?:(?:(?P<whole>\d+)\s+)?(?P<top>\d+)\s*/\s*(?P<bottom>\d+)"
    r"|(?P<decimal>(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:[eE](?P<exponent>[-+]?\d+))?)"
    rf"(?:\s*(?P<scale>{'|'.join(_SCALES)})\b)?"
    r"(?!\w|[.,]\d|\s*[/^!])",
    re.IGNORECASE,
)
# The plain spelling of what LaTeX writes around numbers.
_PLAIN = (
    (re.compile(r"(?<=\d)\s*(?=\\[dt]?frac)"), " "),
    (re.compile(r"\\[dt]?frac\s*\{(\d+)\}\s*\{(\d+)\}|\\[dt]?frac\s*(\d)(\d)"), r"\1\3/\2\4"),
    (re.compile(r"\\[$%]|\$|\\[!,;() \[\]]|\^\s*\{?\\circ\}?|[*`]{2}"), ""),
    (re.compile(r"\b([mck]?m|in|inches|ft|feet|units?)\s*\^\s*(?:\{[23]\}|[23])(?!\d)"), r"\1"),
    (re.compile(r"\{,\}"), ","),
    (re.compile("[\u2212\u2013]"), "-"),
)


def number(text: str) -> Fraction | None:
    """The number that a short text gives, or None where it gives none, or more than one.

    "12", "1,000", "-0.5", "1e3", "3/4", "7 3/4", "\\frac{1}{2}", "2 million", "$12", "12 apples",
    "5 cm", "3 + 4 = 7", "The answer is 12.", and by itself a word from zero to twenty. Units and
    the per cent sign are dropped: "50%" is 50. None are "12 or 13", "x^2", "4 \\pi", "not 12",
    what has more than 400 digits, and other languages' decimal commas.
    """
    text = unwrapped(text)
    for pattern, plain in _PLAIN:
        text = pattern.sub(plain, text)
    if "\\" in text or _ALTERED & set(re.findall(r"[a-z]+", text.lower())):
        return None
    if "=" in text and not re.search(r"[,;]\s", text):
        text = text.rpartition("=")[2]
    found = list(_NUMBER.finditer(text))
    # A digit that belongs to no number is part of something that is not read.
    if re.search(r"\d", _NUMBER.sub("", text)) or len(found) > 1:
        return None
    return _value(found[0]) if found else _in_words(text)


def _value(match: re.Match[str]) -> Fraction | None:
    if sum(map(str.isdigit, match[0])) > MAX_DIGITS:
        return None
    scale = _SCALES[match["scale"].lower()] if match["scale"] else 0
    if match["top"]:
        if int(match["bottom"]) == 0:
            return None
        value = int(match["whole"] or 0) + Fraction(int(match["top"]), int(match["bottom"]))
    else:
        exponent = int(match["exponent"] or 0)
        if abs(exponent) > MAX_DIGITS:
            return None
        value = Fraction(match["decimal"].replace(",", "")) * Fraction(10) ** exponent
    return (-value if match["sign"] == "-" else value) * 10**scale


def _in_words(text: str) -> Fraction | None:
    words = re.findall(r"[a-z-]+", re.sub(r"(?i)^.*\banswer(?: is)?\b", "", text).lower())
    # "the one with a hat" gives no number, and "twenty seven" is not twenty.
    if len(words) not in (1, 2) or words[0] not in _WORDS:
        return None
    if words[-1] in _SCALES or (words[1:] and words[1] in _WORDS):
        return None
    return Fraction(_WORDS.index(words[0]))
