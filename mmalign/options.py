"""Multiple choice: the options that a question offers, and the one that a text chooses."""

from __future__ import annotations

import re
from collections.abc import Mapping

from mmalign.answers import option_letter

# "(A) a cat", "B. a dog", "C: none", on lines of their own or one after the other.
_OPTION = re.compile(
    r"(?:^|(?<=\s))\(?([A-Z])[).:]\s+(.+?)(?=\s+\(?[A-Z][).:]\s|\s*\n|\s*$)", re.MULTILINE
)
_ARTICLES = {"a", "an", "the"}
_NEGATIONS = {"no", "not", "neither", "nor", "never", "t"}  # "isn't" is read as "isn", "t"
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)}


def options_of(question: str) -> dict[str, str]:
    """The options that a question offers, by letter, or {} where it offers none.

    Letters must begin at A and follow each other: "Mr. B. Smith" offers nothing.
    """
    found: dict[str, str] = {}
    for letter, text in _OPTION.findall(question):
        if letter == chr(ord("A") + len(found)):
            found[letter] = text
    return found if len(found) >= 2 else {}


def chosen_option(text: str, options: Mapping[str, str]) -> str | None:
    """The letter that a text chooses, by letter or by an option's words, or None.

    A letter with the words of another option is None, and so are the words of two options; but
    words that an option shares with a longer one count for the longer only. Words with a "not"
    that is not the option's own are None as well.
    """
    letter = option_letter(text, "".join(options))
    padded = f" {' '.join(words_of(text))} "
    found = {
        key: words
        for key, option in options.items()
        if (words := f" {' '.join(words_of(option))} ").strip() and words in padded
    }
    named = [
        key
        for key, words in found.items()
        if not any(words != other and words in other for other in found.values())
    ]
    if letter is not None:
        return letter if not named or letter in named else None
    if len(named) != 1:
        return None
    others = padded.replace(found[named[0]], " ").split()
    return None if _NEGATIONS & set(others) else named[0]


def words_of(text: str) -> list[str]:
    """Lower-cased words without punctuation and articles, small numbers as digits."""
    words: list[str] = re.findall(r"\w+", text.lower())
    return [_DIGITS.get(word, word) for word in words if word not in _ARTICLES]
