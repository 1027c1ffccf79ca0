"""The nouns of a response that AMBER counts, and what they say of its picture.

The released script drops every noun that is not in the benchmark's vocabulary: the words of
relation.json. So who looks for the vocabulary alone loses nothing; what differs is told below.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from evals.sources import read_json
from mmalign.errors import DataError, MissingExtra

# Where the nouns of a text stand, in order, each undone of its plural: (noun, start, end).
Noun = tuple[str, int, int]
Nouns = Callable[[str], list[Noun]]
# Whether two words are near-synonyms.
Alike = Callable[[str, str], bool]
NounRule = Literal["vocabulary", "nltk"]


@dataclass(frozen=True, kw_only=True)
class Counted:
    """What one response says, by the released rules.

    mentioned: its nouns of the vocabulary, with repeats. spans: the characters where each stands.
    hallucinated: those that are neither safe nor true. covered, foreseen: the places, in the
    annotation's lists, of true objects and of likely hallucinations that it names.
    """

    mentioned: list[str]
    spans: list[tuple[int, int]]
    hallucinated: list[str]
    covered: list[int]
    foreseen: list[int]


@dataclass(frozen=True, kw_only=True)
class AmberWords:
    """AMBER's vocabulary and what its words stand for.

    relations: each object to the words that also name it. safe: words that are never hallucinated.
    nouns: finds the nouns of a text. alike: near-synonyms, None to match words exactly.
    """

    relations: Mapping[str, tuple[str, ...]]
    safe: frozenset[str]
    nouns: Nouns
    alike: Alike | None = None

    @classmethod
    def read(
        cls,
        relations: Path,
        safe_words: Path,
        *,
        nouns: NounRule = "vocabulary",
        similarity: str | None = None,
        threshold: float = 0.8,
    ) -> AmberWords:
        """From relation.json and safe_words.txt.

        nouns, similarity, threshold: see amber.Amber. Raises DataError on broken files,
        MissingExtra where nltk, spaCy or the model of either is not installed.
        """
        related: dict[str, tuple[str, ...]] = {}
        for word, others in read_json(relations, dict).items():
            if not isinstance(others, list) or not all(isinstance(one, str) for one in others):
                raise DataError("is no list of words", where=f"{relations}, {word}", got=others)
            related[word] = tuple(others)
        try:
            lines = safe_words.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot be read ({error})", where=str(safe_words)) from None
        vocabulary = frozenset(related).union(*related.values())
        find = functools.partial(vocabulary_nouns, vocabulary=vocabulary)
        return cls(
            relations=related,
            safe=frozenset(filter(None, lines)),
            nouns=_nltk_nouns() if nouns == "nltk" else find,
            alike=None if similarity is None else _spacy_alike(similarity, threshold),
        )

    @functools.cached_property
    def vocabulary(self) -> frozenset[str]:
        """Every word that can count."""
        return frozenset(self.relations).union(*self.relations.values())

    def count(self, text: str, truth: Sequence[str], hallu: Sequence[str]) -> Counted:
        """What a response says of a picture with these true objects and likely hallucinations.

        A noun names the first object of the list that has it among its related words, or else the
        first that it is itself: of an object that is listed twice only the first can be named.
        A near-synonym of a true object is true, and may name a likely hallucination as well.
        """
        true, false = self._named(truth), self._named(hallu)
        found = [noun for noun in self.nouns(text) if noun[0] in self.vocabulary]
        covered: set[int] = set()
        foreseen: set[int] = set()
        hallucinated: list[str] = []
        for word, _, _ in found:
            if word in self.safe:
                continue
            if word in true:
                covered.add(true[word])
                continue
            foreseen.update(false[one] for one in {word, self._near(word, false)} if one in false)
            near = self._near(word, true)
            if near is None:
                hallucinated.append(word)
            else:
                covered.add(true[near])
        return Counted(
            mentioned=[word for word, _, _ in found],
            spans=[(start, end) for _, start, end in found],
            hallucinated=hallucinated,
            covered=sorted(covered),
            foreseen=sorted(foreseen),
        )

    def _named(self, objects: Sequence[str]) -> dict[str, int]:
        """The words for some objects, each to the place of the one it names, in script order."""
        places: dict[str, int] = {}
        for place, name in enumerate(objects):
            for word in self.relations[name]:
                places.setdefault(word, place)
        for place, name in enumerate(objects):
            places.setdefault(name, place)
        return places

    def _near(self, word: str, named: Mapping[str, int]) -> str | None:
        """The first word for some objects that is alike."""
        if self.alike is None:
            return None
        return next((other for other in named if self.alike(word, other)), None)


# What nltk's tokenizer parts from a word, full stops within one aside.
_TOKEN = re.compile(r"""[^\s,;:@#$%&?!()\[\]{}<>"“”‘’`]+""")
_CLITIC = re.compile(r"(?:'(?:s|m|d|ll|re|ve)|n't|['.])+$", re.IGNORECASE)
# Endings of plurals as WordNet undoes them, then the irregular plurals of AMBER's vocabulary.
_ENDINGS = (
    *(("s", ""), ("ses", "s"), ("ves", "f"), ("xes", "x"), ("zes", "z"), ("ches", "ch")),
    *(("shes", "sh"), ("men", "man"), ("ies", "y")),
    *(("children", "child"), ("geese", "goose"), ("mice", "mouse"), ("knives", "knife")),
    *(("scarves", "scarf"), ("potatoes", "potato"), ("tomatoes", "tomato"), ("fishes", "fish")),
    *(("busses", "bus"), ("camerae", "camera")),
)
# fmt: off
# What WordNet 3.0 makes of these is not in the vocabulary: "men" (a workforce) stays as it is, and
# "leaves" is "leaf", "vases" "vas", "slippers" "slipper". It does not know the singular of the
# others. So none of them counts.
_LOST = frozenset({
    "men", "leaves", "vases", "chopsticks", "earrings", "slippers", "sunglasses",
    "TVs", "air-conditionings", "baconics", "bedsheets", "canns", "catholes", "closestools",
    "cooktops", "dogholes", "e-books", "earings", "ebooks", "electrombiles", "hots", "kiwifruits",
    "paragliders", "pissoirs", "rpoes", "sanitizers", "scoons", "seegulls", "showerpuffs",
    "streetlamps", "waterfonts",
})
# Not nouns, as they stand in descriptions: "a hot drink", "people leave".
_NEVER = frozenset({"hot", "leave"})
# Verbs as well: no nouns after a word that wants a verb.
_VERBS = frozenset({
    "book", "brush", "drink", "fish", "light", "line", "lock", "lounge", "pack", "paddle", "plug",
    "ring", "shovel", "skate", "ski", "sled", "sound", "spray", "support", "switch", "tie",
    "watch",
})
_WANT_VERB = frozenset({
    "to", "can", "could", "will", "would", "may", "might", "must", "should", "not", "who",
    "they", "we", "you", "They", "We", "You", "I",
})
# Before "can" as a noun. All else, as in "people can be seen", makes it a verb.
_BEFORE_CAN = frozenset({
    "a", "an", "the", "The", "A", "one", "another", "each", "its", "his", "her", "their", "trash",
    "garbage", "rubbish", "waste", "recycling", "soda", "beer", "cola", "drink", "tin", "metal",
    "aluminum", "watering", "spray", "paint", "open", "empty", "red", "green", "blue", "black",
    "white", "silver", "small", "large",
})
# fmt: on


def vocabulary_nouns(text: str, *, vocabulary: frozenset[str]) -> list[Noun]:
    """The words of a vocabulary in a text, plurals undone, where they can be nouns.

    The released script tags parts of speech with nltk and undoes plurals with WordNet; neither
    lowers case, so that "Trees" at the start of a sentence does not count. Here plurals are undone
    as WordNet does it to this vocabulary, and case is kept. There is no tagger: words of the
    vocabulary count wherever they stand, but for "hot", "leave", "can" as a verb, and verbs after
    "to", "can", "they" and the like. "Orange shirt" thus counts an orange (a safe word).
    """
    found: list[Noun] = []
    before = ""
    for match in _TOKEN.finditer(text):
        start = match.start() + len(match[0]) - len(match[0].lstrip("'"))
        token = _CLITIC.sub("", text[start : match.end()])
        noun = _singular(token, vocabulary)
        if noun is not None and _may_be_noun(token, before):
            found.append((noun, start, start + len(token)))
        before = token
    return found


def _singular(token: str, vocabulary: frozenset[str]) -> str | None:
    """The word of the vocabulary that a token is or is the plural of."""
    if token in _LOST:
        return None
    if token in vocabulary:
        return token
    for ending, singular in _ENDINGS:
        if token.endswith(ending):
            stem = token.removesuffix(ending) + singular
            if stem in vocabulary:
                return stem
    return None


def _may_be_noun(token: str, before: str) -> bool:
    if token == "can":
        return before in _BEFORE_CAN
    return token not in _NEVER and not (token in _VERBS and before in _WANT_VERB)


def _nltk_nouns() -> Nouns:
    """The released script's own nouns. Raises MissingExtra without nltk and its data."""
    fix = (
        "install it (pip install nltk) and its data (python -m nltk.downloader punkt_tab "
        "averaged_perceptron_tagger_eng wordnet), or take nouns: vocabulary"
    )
    try:
        import nltk  # pyright: ignore[reportMissingImports]
        from nltk.stem import WordNetLemmatizer  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise MissingExtra("nouns: nltk needs the package nltk", fix=fix) from None
    lemmatizer = WordNetLemmatizer()

    def nouns(text: str) -> list[Noun]:
        found: list[Noun] = []
        position = 0
        for token, tag in nltk.pos_tag(nltk.word_tokenize(text)):
            # Quotation marks come back as others, and only they: a noun stands in the text.
            start = text.find(token, position)
            if start < 0:
                continue
            position = start + len(token)
            if tag.startswith("NN"):
                found.append((lemmatizer.lemmatize(token), start, position))
        return found

    try:
        nouns("A dog.")
    except LookupError as error:
        told = str(error).strip(" *\n").partition("\n")[0].strip()
        raise MissingExtra(f"nouns: nltk lacks its data ({told})", fix=fix) from None
    return nouns


def _spacy_alike(model: str, threshold: float) -> Alike:
    """Similarity above the threshold by a spaCy model's vectors, as in the released script."""
    try:
        import spacy  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise MissingExtra(
            f"similarity: {model} needs the package spacy",
            fix=f"install it: pip install spacy && python -m spacy download {model}",
        ) from None
    try:
        nlp = spacy.load(model)
    except OSError:
        raise MissingExtra(
            f"similarity: spaCy has no model {model}",
            fix=f"install it: python -m spacy download {model}",
        ) from None
    read = functools.cache(nlp)

    @functools.cache
    def alike(one: str, other: str) -> bool:
        return bool(read(one).similarity(read(other)) > threshold)

    return alike
