"""Multimodal RewardBench (arXiv 2502.14191): triplets of a prompt, a better and a worse response.

    acc        share of pairs with r(chosen) > r(rejected); equal rewards are wrong
    macro_acc  the mean of acc over the six areas

Areas are the released file's: correctness, preference, knowledge, reasoning, safety, vqa; as in the
released script, reasoning is math where an id begins with "math", else coding, and safety is bias
where it begins with "pairs", else toxicity. The released script and the leaderboard of its
repository have acc ("Overall") and no mean over areas; macro_acc is ours. Hateful Memes, part of
the paper's safety, is not in the release: published numbers of safety, and overall ones that hold
it, do not compare.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from evals.base import Row, text_field
from evals.reward_pairs import READ, Pair, RewardPairs, accuracies, macro, numbered
from evals.rules import Metric, Rules
from evals.sources import media_of, read_rows
from evals.stats import Ratio
from mmalign.errors import DataError
from mmalign.records import user

# An area by the file's Category.
AREAS = {
    "open_generation/correctness_task": "correctness",
    "open_generation/preference_task": "preference",
    "knowledge": "knowledge",
    "reasoning": "reasoning",
    "safety": "safety",
    "vqa": "vqa",
}
# The two parts of an area: how the ids of the first begin, its name, and the name of the second.
PARTS = {"reasoning": ("math", "math", "coding"), "safety": ("pairs", "bias", "toxicity")}


class MultimodalRewardBench(RewardPairs):
    """The pairs of Multimodal RewardBench.

    data: all_data.json, as the released 0_download_data.py completes it, beside its folder
        `images`; or a copy of its rows in parquet, in a file or on the hub.
    """

    name: Literal["multimodal_reward_bench"] = "multimodal_reward_bench"
    data: str

    method: ClassVar[str] = (
        "acc: pairs with the higher reward for the better response; macro_acc: mean over areas"
    )

    def load(self) -> list[Pair]:
        """The pairs, in the file's order."""
        return numbered(_pair(row, where) for where, row in read_rows(self.data))

    def metrics(self, items: Sequence[Row]) -> dict[str, Ratio]:
        """acc, of each area and part too, and macro_acc."""
        return metrics(items)


def categories(id: str, area: str) -> tuple[str, ...]:
    """An area, and the part of it that the id tells."""
    if area not in PARTS:
        return (area,)
    beginning, first, second = PARTS[area]
    return (area, first if id.lower().startswith(beginning) else second)


def metrics(items: Sequence[Row]) -> dict[str, Ratio]:
    """acc, over all and for each area and part, macro_acc, and cut_rate of critiques."""
    return accuracies(items) | {"macro_acc": macro(items)}


def _pair(row: Row, where: str) -> Pair:
    id = text_field(row, "ID", where)
    area = AREAS.get(text_field(row, "Category", where))
    if area is None:
        got, wanted = row["Category"], ", ".join(AREAS)
        raise DataError("field Category is wrong", where=where, got=got, wanted=wanted)
    better = row.get("Better")
    if better not in ("Output1", "Output2"):
        wanted = "Output1 or Output2"
        raise DataError("field Better is wrong", where=where, got=repr(better), wanted=wanted)
    text = row.get("Text")
    if not isinstance(text, str) or not text.strip():
        raise DataError(
            "has no prompt",
            where=where,
            got=f"Text {text!r}",
            fix="run the released scripts/0_download_data.py, which writes all_data.json",
        )
    return Pair(
        id=id,
        prompt=user(text.replace("<image>", "").strip(), images=1),
        images=(media_of(row.get("Image"), where),),
        chosen=text_field(row, better, where),
        rejected=text_field(row, "Output2" if better == "Output1" else "Output1", where),
        categories=categories(id, area),
    )


RULES = Rules(
    metrics=metrics,
    read=READ,
    same=("image", "question", "categories"),
    compared={"acc": "mcnemar", "macro_acc": "bootstrap"},
    shown=(Metric("acc", "Acc", "higher"), Metric("macro_acc", "macro Acc", "higher")),
    items="pairs",
    meaning="Multimodal RewardBench asks a reward model which of two responses is better. Acc is "
    "the share of pairs that it orders rightly, macro Acc the mean of that share over six areas.",
)
