"""Short answers as the scorers of VQA rewrite them before they compare them, and VQA's accuracy.

Three scripts share the same steps and differ around them:

    official  vqaEval.py of GT-Vision-Lab/VQA
    evalai    EvalAIAnswerProcessor of pythia and mmf, which TextVQA's accuracy and LLaVA use
    vizwiz    VizWiz's copy of vqaEval.py, whose table of contractions has curly apostrophes

The steps, with what is odd in them and kept so:

    1. Each of ; / [ ] " { } ( ) = + \\ _ - > < @ ` , ? ! becomes a blank; but it vanishes where a
       blank stands beside it anywhere in the text, and all of them vanish where the text has a
       comma between two digits anywhere: "1,000-2,000" is "10002000", and "left/right" two words.
    2. The first 32 full stops that no digit follows vanish. The script means to pass a flag, and
       passes a count. One after a digit goes as well: "5." is "5".
    3. The text is put into lower case and cut at white space; "none" to "ten" become digits, and
       a, an and the are dropped.
    4. Words that lack an apostrophe get it back: "dont", and also "wont", "hes" and "ow's'at".
       "Im" and "Ive" are in the table with capitals, so that they are never met.

No step looks at ' : $ % & * # ~ |, so that "2:30", "50%" and "'stop'" stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

# The references that released files have for each question.
NUM_REFERENCES = 10

_MARKS = ';/[]"{}()=+\\_->,<@`?!'
_COMMA = re.compile(r"\d,\d")
# Its (?!<=\d) only looks like a look-behind: it looks ahead for the text "<=" and a digit.
_PERIOD = re.compile(r"\.(?!\d)")
_MAX_PERIODS = 32
_ARTICLES = {"a", "an", "the"}
_DIGITS = {"none": "0"} | {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
}
# Each is met with one of its apostrophes left out.
_WITH_APOSTROPHES = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's I'd've I'm I've isn't it'd it'd've it'll ma'am
mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't
she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd
there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've
we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've
who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll
y'all'd've you'd you'd've you'll you're you've
"""
CONTRACTIONS: Mapping[str, str] = {
    word[:place] + word[place + 1 :]: word
    for word in _WITH_APOSTROPHES.split()
    for place, letter in enumerate(word)
    if letter == "'"
    # Two that change nothing, and one that goes the other way.
} | {"let's": "let's", "she's": "she's", "somebody'd": "somebodyd"}


def _curly(table: Mapping[str, str]) -> dict[str, str]:
    """VizWiz's table, in which a few words have kept their straight apostrophes."""
    straight_keys = {"couldn'tve", "hadn'tve"}
    straight_words = {"ain't", "aren't", "can't", "could've", "couldn't", "we've", "where's"}
    straight_words |= {"who've"}
    return {
        key if key in straight_keys else key.replace("'", "’"): word
        if word in straight_words
        else word.replace("'", "’")
        for key, word in table.items()
    }


VIZWIZ_CONTRACTIONS: Mapping[str, str] = _curly(CONTRACTIONS)


def official(text: str) -> str:
    """An answer as VQA's script rewrites it."""
    return _words(_punctuated(one_line(text)), CONTRACTIONS)


def vizwiz(text: str) -> str:
    """An answer as VizWiz's script rewrites it."""
    return _words(_punctuated(one_line(text)), VIZWIZ_CONTRACTIONS)


def evalai(text: str) -> str:
    """An answer as EvalAI's processor rewrites it.

    Beforehand it drops every comma and question mark, and parts "'s" from its word, so that "dog's"
    is "dog 's", and "let's" and "ow's'at" are no contractions any more.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return _words(_punctuated(one_line(text)), CONTRACTIONS)


def one_line(text: str) -> str:
    """A text with line breaks and tabs as blanks, and none around it."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def leave_one_out(said: str, references: Sequence[str]) -> float:
    """VQA's accuracy: the mean, over the references left out, of min(1, matches among others / 3).

    Of ten references 0, 1, 2, 3 and 4 equal ones give 0, 0.3, 0.6, 0.9 and 1. References count by
    their place, as in TextVQA's and VizWiz's scripts; VQA's leaves out all that are alike in every
    field, which in its released files, where each has a number, is one as well.
    """
    num, same = len(references), sum(said == one for one in references)
    # Where a match is left out, one fewer is left among the others.
    return (same * min(3, max(same - 1, 0)) + (num - same) * min(3, same)) / (3 * num)


def short(answer: str, max_words: int) -> bool:
    """Whether an answer is a short one: a single line of 1 to so many words."""
    lines = [line for line in answer.split("\n") if line.strip()]
    return len(lines) == 1 and 1 <= len(lines[0].split()) <= max_words


def _punctuated(text: str) -> str:
    comma_in_number = _COMMA.search(text) is not None
    found = text
    for mark in _MARKS:
        beside_blank = f"{mark} " in text or f" {mark}" in text
        found = found.replace(mark, "" if beside_blank or comma_in_number else " ")
    return _PERIOD.sub("", found, count=_MAX_PERIODS)


def _words(text: str, contractions: Mapping[str, str]) -> str:
    words = [_DIGITS.get(word, word) for word in text.lower().split()]
    return " ".join(contractions.get(word, word) for word in words if word not in _ARTICLES)
