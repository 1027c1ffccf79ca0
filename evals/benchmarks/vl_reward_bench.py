"""VL-RewardBench (arXiv 2411.17451): 1,250 pairs that small models get wrong.

    acc        share of pairs with r(chosen) > r(rejected); equal rewards are wrong
    macro_acc  the mean of acc over general, hallucination and reasoning

The categories are the released script's. It takes the collection that a pair's picture lies in, a
part of `image_path`; the hub's copy has no such field, and there the id's beginning tells, as in
lmms-eval. (The released script's own reading of ids stops at a name that it does not define, and
looks for "povid" where the ids of that collection begin with "hallucination".)

Deviations: the released script is for models that judge in words, takes the majority of several
samples and leaves out undecided pairs; a reward model decides every pair once. It tells pairs
apart by id, query and responses; here the second pair of an id gets a number.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any, ClassVar, Literal, TypeGuard, TypeVar

from evals.base import Row, text_field
from evals.reward_pairs import READ, Pair, RewardPairs, accuracies, macro, numbered
from evals.rules import Metric, Rules
from evals.sources import media_of, read_rows
from evals.stats import Ratio
from mmalign.errors import DataError
from mmalign.records import user

_Kind = TypeVar("_Kind")

# By the folder of a picture, one of its path's parts.
COLLECTIONS: dict[str, str] = {
    "vlfeedback": "general",
    "wildvision-battle": "general",
    "povid": "hallucination",
    "rlhf-v": "hallucination",
    "rlaif-v": "hallucination",
    "reasoning_tasks": "reasoning",
}
# By the id up to its first - or _, in small letters. VLFeedback's ids begin with the names of many
# data sets: all others are its.
BEGINNINGS: dict[str, str] = {
    "hallucination": "hallucination",
    "rlhf": "hallucination",
    "rlaif": "hallucination",
    "mathverse": "reasoning",
    "mmmu": "reasoning",
}


class VlRewardBench(RewardPairs):
    """The pairs of VL-RewardBench.

    data: data.jsonl of the released repository, the hub's parquet file, or its name
        MMInstruction/VL-RewardBench; @ and a revision behind it. Labels were changed since the
        release, so that numbers of two revisions do not compare.
    """

    name: Literal["vl_reward_bench"] = "vl_reward_bench"
    data: str

    method: ClassVar[str] = (
        "acc: pairs with the higher reward for chosen; macro_acc: mean over three categories"
    )

    def load(self) -> list[Pair]:
        """The pairs, in the file's order."""
        return numbered(_pair(row, where) for where, row in read_rows(self.data))

    def metrics(self, items: Sequence[Row]) -> dict[str, Ratio]:
        """acc, of each category too, and macro_acc."""
        return metrics(items)


def category(id: str, image_path: str | None = None) -> str | None:
    """A pair's category; None where a path names no collection that the benchmark has."""
    if image_path is None:
        return BEGINNINGS.get(id.split("-")[0].split("_")[0].lower(), "general")
    found = [COLLECTIONS[part] for part in PurePosixPath(image_path).parts if part in COLLECTIONS]
    return found[0] if found else None


def metrics(items: Sequence[Row]) -> dict[str, Ratio]:
    """acc, over all and for each category, macro_acc, and cut_rate of critiques."""
    return accuracies(items) | {"macro_acc": macro(items)}


def _pair(row: Row, where: str) -> Pair:
    id = text_field(row, "id", where)
    path = row.get("image_path")
    found = category(id, None if path is None else str(path))
    if found is None:
        raise DataError(
            "lies in no collection of VL-RewardBench",
            where=where,
            got=f"image_path {path}",
            wanted=f"one of {', '.join(COLLECTIONS)} in the path",
        )
    responses = row.get("response")
    if not _are(responses, str):
        raise DataError("field response does not hold two texts", where=where, got=repr(responses))
    ranking = row.get("human_ranking")
    if not _are(ranking, int) or sorted(ranking) != [0, 1]:
        raise DataError(
            "field human_ranking is wrong",
            where=where,
            got=repr(ranking),
            wanted="[0, 1] where the first response is better, else [1, 0]",
        )
    query = text_field(row, "query", where).replace("<image>", "").strip()
    return Pair(
        id=id,
        prompt=user(query, images=1),
        images=(media_of(row.get("image") or path, where),),
        chosen=responses[ranking.index(0)],
        rejected=responses[ranking.index(1)],
        categories=(found,),
    )


def _are(values: Any, kind: type[_Kind]) -> TypeGuard[list[_Kind]]:
    """Whether it is a list of two of a kind; True is no number."""
    return isinstance(values, list) and [type(one) for one in values] == [kind, kind]


RULES = Rules(
    metrics=metrics,
    read=READ,
    same=("image", "question", "categories"),
    compared={"acc": "mcnemar", "macro_acc": "bootstrap"},
    shown=(Metric("acc", "Acc", "higher"), Metric("macro_acc", "macro Acc", "higher")),
    items="pairs",
    meaning="VL-RewardBench asks a reward model which of two responses is better. Acc is the share "
    "of pairs that it orders as people do, macro Acc the mean of that share over general, "
    "hallucination and reasoning.",
)
