"""CHAIR (Rohrbach et al., 2018, arXiv 1809.02156): objects that a caption makes up.

Always read with recall and length: a short caption hallucinates less and says less.
"""

from __future__ import annotations

import difflib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from evals.base import OverMedia, Row, Split, Suite, check_known, read_jsonl, text_field
from evals.rules import Metric, Rules
from evals.stats import Ratio, ratio
from mmalign.errors import DataError
from mmalign.generate.base import Request
from mmalign.records import Media

METHOD = "released rules; plurals by the synonym list's own words, not pattern.en and nltk"

# fmt: off
_PAIRS = (
    "motor bike", "motor cycle", "air plane", "traffic light", "street light", "traffic signal",
    "stop light", "fire hydrant", "stop sign", "parking meter", "suit case", "sports ball",
    "baseball bat", "baseball glove", "tennis racket", "wine glass", "hot dog", "cell phone",
    "mobile phone", "teddy bear", "hair drier", "potted plant", "laptop computer", "home plate",
    "train track",
)
_ANIMALS = (
    "bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe",
    "animal", "cub",
)
# fmt: on

# The released script's pairs of words that are read as one, and what each is read as.
DOUBLE_WORDS: dict[str, str] = {
    **{pair: pair for pair in _PAIRS},
    # A baby bird is no person, and neither is a passenger train.
    **{f"{age} {animal}": animal for age in ("baby", "adult") for animal in _ANIMALS},
    "passenger jet": "jet",
    "passenger train": "train",
    "bow tie": "tie",
    "toilet seat": "toilet",
    "wine glas": "wine glass",
}


class Chair(OverMedia):
    """Captions of images or clips whose objects are known.

    images: the folder of the pictures. Their objects come from COCO's `instances` file, joined with
    those named in its reference `captions` as the paper does, or from `objects`: JSON lines of
    image and objects. videos: a folder of clips instead, with `objects` as lines of video and
    objects, in the order in which they come.
    synonyms: one line per category, comma separated, its name first.
    limit: only the first so many images, by file name or in the order of `objects`.
    """

    name: Literal["chair"] = "chair"
    split: Split | None = None
    instances: Path | None = None
    captions: Path | None = None
    objects: Path | None = None
    synonyms: Path
    double_words: dict[str, str] = DOUBLE_WORDS
    prompt: str = "Please describe this image in detail."
    limit: int | None = Field(default=None, ge=1)
    max_new_tokens: int = Field(default=512, ge=1)

    @model_validator(mode="after")
    def _one_truth(self) -> Chair:
        if (self.instances is None) == (self.objects is None):
            raise ValueError("give either instances or objects")
        if self.captions is not None and self.instances is None:
            raise ValueError("captions belong to instances")
        if self.videos is not None and self.instances is not None:
            raise ValueError("instances are of pictures: give the objects of clips in objects")
        return self

    @property
    def key(self) -> str:
        """`chair`, or `chair-<split>`."""
        return "chair" if self.split is None else f"chair-{self.split}"

    def requests(self) -> list[Request]:
        """One request per image or clip; its file's name is the id."""
        return [
            self.request(file, self.prompt, Media(path=file)) for file in self._truth(self._words())
        ]

    def score(self, answers: Mapping[str, str]) -> Suite:
        """Score captions by image; an image without a caption counts in `num_unparsed` alone."""
        words = self._words()
        truth = self._truth(words)
        check_known(answers, set(truth), self.key)
        items = [self._read(file, answers.get(file), words, truth[file]) for file in truth]
        return Suite(
            key=self.key,
            benchmark=self.name,
            split=self.split,
            images=self.images,
            videos=self.videos,
            method=METHOD,
            items=items,
            metrics=metrics(items),
            num_unparsed=sum(row["answer"] is None for row in items),
        )

    def _words(self) -> ObjectWords:
        return ObjectWords.read(self.synonyms, self.double_words)

    def _truth(self, words: ObjectWords) -> dict[str, list[str]]:
        """The categories in each image, for the images that are asked about."""
        if self.objects is not None:
            return _truth_from_objects(self.objects, self.medium, self.limit, words)
        assert self.instances is not None  # _one_truth
        truth = _truth_from_coco(self.instances, self.captions, self.limit, words)
        return {name: sorted(objects) for name, objects in truth.items()}

    def _read(self, file: str, answer: str | None, words: ObjectWords, truth: list[str]) -> Row:
        """One item; `spans` are the characters of the answer that each of `mentioned` stands at."""
        mentions = words.mentions(answer or "")
        mentioned = [mention.category for mention in mentions]
        row = {
            "id": file,
            self.medium: file,
            "prompt": self.prompt,
            "answer": answer,
            "mentioned": mentioned,
            "spans": [[mention.start, mention.end] for mention in mentions],
            "hallucinated": [name for name in mentioned if name not in truth],
            "truth": sorted(truth),
            "recalled": sorted(set(truth).intersection(mentioned)),
            "num_words": len((answer or "").split()),
        }
        if self.medium == "video":
            row["pairs"], row["in_order"] = _order(mentioned, truth)
        return row


@dataclass(frozen=True, slots=True, kw_only=True)
class Mention:
    """An object that a text names: its category, and where the words for it stand.

    Example: Mention(category="dog", start=2, end=7) for "puppy" in "A puppy".
    """

    category: str
    start: int
    end: int


@dataclass(frozen=True, kw_only=True)
class ObjectWords:
    """Finds the objects that a text names.

    category: each object word or pair, such as "puppy" or "cell phone", to its category.
    double_words: pairs of words to what they are read as. vocabulary: every word of the two.
    """

    category: dict[str, str]
    double_words: dict[str, str]
    vocabulary: frozenset[str]

    @classmethod
    def read(cls, synonyms: Path, double_words: Mapping[str, str]) -> ObjectWords:
        """From a synonym file. Raises DataError when it is missing or empty."""
        try:
            lines = synonyms.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot be read ({error})", where=str(synonyms)) from None
        category: dict[str, str] = {}
        for line in filter(str.strip, lines):
            # One blank belongs to the comma. The released list has entries with two, and one in
            # capitals; its script never meets them in a caption, and so neither do we.
            names = [name.removeprefix(" ") for name in line.strip().split(",")]
            category |= dict.fromkeys(names, names[0])
        if not category:
            raise DataError("holds no categories", where=str(synonyms))
        vocabulary = {word for text in (*category, *double_words) for word in text.split()}
        return cls(
            category=category, double_words=dict(double_words), vocabulary=frozenset(vocabulary)
        )

    def mentions(self, text: str) -> list[Mention]:
        """Every mention of an object, in order and with repeats, by the released rules.

        Differs from the released script in two steps that it leaves to other packages. Words are
        runs of letters and digits, which hyphens join; nltk also keeps "couch/sofa" as one.
        Plurals are undone by `singular`, from the vocabulary; pattern.en goes by English endings.
        """
        words = [(self.singular(found[0].lower()), *found.span()) for found in _WORD.finditer(text)]
        read: list[tuple[str, int, int]] = []
        while words:
            pair = " ".join(word for word, _, _ in words[:2])
            size = 2 if pair in self.double_words else 1
            word, start, _ = words[0]
            read.append((self.double_words.get(pair, word), start, words[size - 1][2]))
            words = words[size:]
        if any(word == "toilet" for word, _, _ in read):
            read = [found for found in read if found[0] != "seat"]
        return [
            Mention(category=self.category[word], start=start, end=end)
            for word, start, end in read
            if word in self.category
        ]

    def singular(self, word: str) -> str:
        """The word of the vocabulary that `word` is or is the plural of, else `word` itself."""
        if word in self.vocabulary:
            return word
        for ending, singular in _PLURALS:
            if word.endswith(ending):
                stem = word.removesuffix(ending) + singular
                if stem in self.vocabulary:
                    return stem
        return word

    def known(self, name: str, where: str) -> str:
        """The category of an object named in ground truth. Raises DataError on an unknown one."""
        if name not in self.category:
            near = difflib.get_close_matches(name, self.category, n=1)
            raise DataError(
                "object is in no line of the synonym file",
                where=where,
                got=repr(name),
                fix=f"did you mean {near[0]!r}" if near else "add a line for it",
            )
        return self.category[name]


_WORD = re.compile(r"[^\W_]+(?:-[^\W_]+)*|\S")
_PLURALS = (
    ("s", ""),
    ("es", ""),
    ("ies", "y"),
    ("ves", "f"),
    ("ves", "fe"),
    ("men", "man"),
    ("children", "child"),
    ("mice", "mouse"),
    ("geese", "goose"),
)


def metrics(items: Sequence[Row]) -> dict[str, Ratio]:
    """CHAIR_i, CHAIR_s, recall, length and mentions of the captions that there are; order of clips.

    chair_i = hallucinated mentions / mentions, chair_s = captions with one / captions,
    recall = objects of the image that are mentioned / objects of the image,
    num_words and mentions are means per caption. 0.0 where nothing is mentioned.
    order = of every two objects of a clip that its caption mentions, those in the clip's order.
    """
    present = [row["answer"] is not None for row in items]
    mentioned = [len(row["mentioned"]) for row in items]
    hallucinated = [len(row["hallucinated"]) for row in items]
    recalled = [len(row["recalled"]) for row in items]
    truth = [len(row["truth"]) * there for row, there in zip(items, present, strict=True)]
    result = {
        "chair_i": ratio(hallucinated, mentioned),
        "chair_s": ratio([count > 0 for count in hallucinated], present),
        "recall": ratio(recalled, truth),
        "num_words": ratio([row["num_words"] for row in items], present),
        "mentions": ratio(mentioned, present),
    }
    if all("pairs" in row for row in items):
        pairs = [row["pairs"] for row in items]
        result["order"] = ratio([row["in_order"] for row in items], pairs)
    return result


def _order(mentioned: Sequence[str], truth: Sequence[str]) -> tuple[int, int]:
    """Pairs of true objects that are mentioned, and those first mentioned in the truth's order."""
    places = [mentioned.index(name) for name in truth if name in mentioned]
    pairs = list(itertools.combinations(places, 2))
    return len(pairs), sum(earlier < later for earlier, later in pairs)


def _truth_from_objects(
    path: Path, medium: str, limit: int | None, words: ObjectWords
) -> dict[str, list[str]]:
    truth: dict[str, list[str]] = {}
    for where, row in read_jsonl(path):
        file = text_field(row, medium, where)
        objects = row.get("objects")
        if not isinstance(objects, list):
            raise DataError("field objects is no list", where=where, got=repr(objects))
        if file in truth:
            raise DataError(f"{medium} appears twice", where=where, got=file)
        truth[file] = list(dict.fromkeys(words.known(name, where) for name in objects))
    if not truth:
        raise DataError(f"holds no {medium}s", where=str(path))
    return dict(itertools.islice(truth.items(), limit))


def _truth_from_coco(
    instances: Path, captions: Path | None, limit: int | None, words: ObjectWords
) -> dict[str, set[str]]:
    """Objects from COCO's boxes, and from its reference captions where given, by file name."""
    data = read_coco(instances)
    try:
        named = ((image["file_name"], image["id"]) for image in data["images"])
        names = {number: name for name, number in sorted(named)[:limit]}
    except (KeyError, TypeError) as error:
        raise not_coco(instances, "an instances", error) from None
    objects: dict[int, set[str]] = {number: set() for number in names}
    add_boxes(objects, data, words, instances)
    if captions is not None:
        add_captions(objects, captions, words)
    if not objects:
        raise DataError("holds no images", where=str(instances))
    return {name: objects[number] for number, name in names.items()}


def add_boxes(objects: dict[int, set[str]], data: Any, words: ObjectWords, path: Path) -> None:
    """Add the categories of COCO's boxes to the objects of each image, by its number.

    data: what the instances file at `path` holds. Raises DataError when it is none.
    """
    try:
        categories = {
            category["id"]: words.known(category["name"], str(path))
            for category in data["categories"]
        }
        for annotation in data["annotations"]:
            if annotation["image_id"] in objects:
                objects[annotation["image_id"]].add(categories[annotation["category_id"]])
    except (KeyError, TypeError) as error:
        raise not_coco(path, "an instances", error) from None


def add_captions(objects: dict[int, set[str]], path: Path, words: ObjectWords) -> None:
    """Add what COCO's reference captions name to the objects of each image, by its number.

    Raises DataError when the file is no captions file.
    """
    data = read_coco(path)
    try:
        for annotation in data["annotations"]:
            if annotation["image_id"] in objects:
                mentions = words.mentions(annotation["caption"])
                objects[annotation["image_id"]].update(m.category for m in mentions)
    except (KeyError, TypeError, AttributeError) as error:
        raise not_coco(path, "a captions", error) from None


def read_coco(path: Path) -> Any:
    """What a file of COCO holds. Raises DataError when it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot be read ({error})", where=str(path)) from None


def not_coco(path: Path, kind: str, error: Exception) -> DataError:
    """What to raise where a file lacks what COCO's kind of it holds."""
    reason = f"{type(error).__name__}: {error}"
    return DataError(f"is not {kind} file of COCO ({reason})", where=str(path))


RULES = Rules(
    metrics=metrics,
    read=("answer", "mentioned", "spans", "hallucinated", "recalled", "num_words"),
    same=("truth",),
    compared={
        "chair_i": "bootstrap",
        "chair_s": "bootstrap",
        "recall": "bootstrap",
        "num_words": "bootstrap",
        "order": "bootstrap",
    },
    shown=(
        Metric("chair_i", "CHAIR_i", "lower"),
        Metric("chair_s", "CHAIR_s", "lower"),
        Metric("recall", "recall", "higher"),
        Metric("num_words", "words", percent=False),
    ),
    length=False,
    items="pictures",
    meaning="CHAIR looks for objects in captions. CHAIR_i is the share of mentioned objects that "
    "are not in the picture, CHAIR_s the share of captions that mention such an object, recall "
    "the share of the picture's objects that are mentioned, words the mean length of a caption.",
)
