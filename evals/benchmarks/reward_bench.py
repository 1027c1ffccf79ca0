"""MM-RLHF-RewardBench (arXiv 2502.10391), and datasets of ours in its form.

    acc       share of pairs with r(chosen) > r(rejected); equal rewards are wrong
    acc_plus  share of questions of which every pair is right

A pair's question is its id in the official file; in a dataset of ours, what the pair was made of.
Where critiques come from is part of the result: with given ones the verdict may stand in the text,
so `self` is what the model can do.

Deviation from the released script: a category's acc_plus counts the same questions above and below
the line, where the script's two counts differ for paths that hold two categories' names.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from evals.base import Row, read_jsonl, text_field
from evals.reward_pairs import READ, Pair, RewardPairs, accuracies
from evals.rules import Metric, Rules
from evals.stats import Ratio, ratio
from mmalign.errors import DataError
from mmalign.records import Media, Preference, user
from mmalign.store import MANIFEST, open_dataset

# The first of these that a path holds is its category, in the released script's order.
CATEGORIES = ("mcq", "long", "short", "safety", "video")


class RewardBench(RewardPairs):
    """Pairs to be told apart by a reward model.

    data: a dataset folder of preferences, or MM-RLHF-RewardBench's own JSON lines (id, prompt,
        image or video, chosen, rejected, chosen_reason, rejected_reason). media_root: where the
        paths of the latter start; by default the file's folder.
    """

    name: Literal["reward_bench"] = "reward_bench"
    data: Path

    method: ClassVar[str] = (
        "acc: pairs with the higher reward for chosen; acc_plus: questions with every pair right"
    )

    def load(self) -> list[Pair]:
        """The pairs of the file, or of the dataset."""
        if not self.data.is_dir():
            return _official(self.data)
        return [_of_ours(pair) for pair in open_dataset(self.data, Preference)]

    def metrics(self, items: Sequence[Row]) -> dict[str, Ratio]:
        """acc and acc_plus, over all and for each category."""
        return metrics(items)

    @property
    def folder(self) -> Path:
        """The dataset's own, the one given, or that of the file."""
        if (self.data / MANIFEST).exists():
            return open_dataset(self.data, Preference).media_root
        return self.media_root or self.data.parent


def metrics(items: Sequence[Row]) -> dict[str, Ratio]:
    """acc and acc_plus, over all and for each category; cut_rate of critiques the model wrote."""
    result = accuracies(items) | {"acc_plus": _acc_plus(items)}
    for category in CATEGORIES:
        if any(category in row["categories"] for row in items):
            result[f"acc_plus/{category}"] = _acc_plus(items, category)
    return result


def _acc_plus(items: Sequence[Row], category: str | None = None) -> Ratio:
    """Every question counts once, at its first pair in the category."""
    inside = [category is None or category in row["categories"] for row in items]
    rows = [row for row, here in zip(items, inside, strict=True) if here]
    wrong = {row["question"] for row in rows if not row["correct"]}
    numerator, denominator = np.zeros(len(items)), np.zeros(len(items))
    seen: set[str] = set()
    for place, row in enumerate(items):
        if inside[place] and row["question"] not in seen:
            seen.add(row["question"])
            denominator[place] = 1
            numerator[place] = row["question"] not in wrong
    return ratio(numerator, denominator)


def _of_ours(pair: Preference) -> Pair:
    return Pair(
        id=pair.id,
        prompt=pair.prompt,
        images=pair.images,
        videos=pair.videos,
        chosen=pair.chosen,
        rejected=pair.rejected,
        chosen_critique=pair.chosen_critique,
        rejected_critique=pair.rejected_critique,
        question=_question(pair),
        categories=_categories([*pair.images, *pair.videos], pair.id),
    )


def _question(pair: Preference) -> str:
    """What pairs of one question share: the record they were made of, or MM-RLHF's own id."""
    if not pair.origin.builder.startswith("import:"):
        return pair.origin.source or pair.id
    # Of an imported row, the source is the row's own place.
    try:
        return str(json.loads(pair.origin.detail)["id"])
    except (ValueError, TypeError, KeyError):
        return pair.id


def _categories(media: Sequence[Media], id: str) -> tuple[str, ...]:
    """The category that the paths tell, or the id where there are no paths; often there is none."""
    place = " ".join(one.path or "" for one in media).strip() or id
    return tuple(name for name in CATEGORIES if name in place)[:1]


def _official(file: Path) -> list[Pair]:
    """MM-RLHF-RewardBench's own file. Ids are made unique: several pairs may share a question's."""
    pairs: list[Pair] = []
    counts: dict[str, int] = {}
    for where, row in read_jsonl(file):
        name = str(row.get("id", ""))
        if not name:
            raise DataError("has no id", where=where, fix="repair the line, or delete it")
        number = counts[name] = counts.get(name, -1) + 1
        images = (Media(path=str(row["image"])),) if row.get("image") else ()
        videos = (Media(path=str(row["video"])),) if row.get("video") and not images else ()
        text = text_field(row, "prompt", where).replace("<image>", "").strip()
        pair = Pair(
            id=f"{name}/{number}",
            prompt=user(text, images=len(images), videos=len(videos)),
            images=images,
            videos=videos,
            chosen=text_field(row, "chosen", where),
            rejected=text_field(row, "rejected", where),
            chosen_critique=row.get("chosen_reason") or None,
            rejected_critique=row.get("rejected_reason") or None,
            question=name,
            categories=_categories([*images, *videos], f"{name}/{number}"),
        )
        pairs.append(pair)
    return pairs


RULES = Rules(
    metrics=metrics,
    read=READ,
    same=("image", "question"),
    compared={"acc": "mcnemar", "acc_plus": "bootstrap"},
    shown=(Metric("acc", "Acc", "higher"), Metric("acc_plus", "Acc+", "higher")),
    items="pairs",
)
