"""A reward model's accuracy: does it give the chosen response the higher reward?

    Acc   share of pairs with r(chosen) > r(rejected); a tie is wrong
    Acc+  share of questions of which every pair is right

(MM-RLHF-RewardBench, arXiv 2502.10391.) A pair's question is its id in the official file; in a
dataset of ours, its id up to the last "/". Where critiques come from is part of the result: with
given ones the verdict may stand in the text, so `self` is what the model can do.

Deviations from the released script: a category's Acc+ counts the same questions above and below the
line, where the script's two counts differ for paths that hold two categories' names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, PositiveInt

from evals.base import Row, Suite, check_known, read_jsonl, text_field
from evals.stats import Ratio, mean, ratio
from mmalign.config import Strict
from mmalign.errors import DataError
from mmalign.generate.base import Generation, Request, Sampling
from mmalign.records import Media, Preference, user
from mmalign.reward import Critics, CritiqueSource, Judgement
from mmalign.store import MANIFEST, open_dataset

if TYPE_CHECKING:
    from mmalign.reward import RewardModel

# The first of these that a path holds is its category, in the released script's order.
CATEGORIES = ("mcq", "long", "short", "safety", "video")
SIDES = ("chosen", "rejected")
FRAMES = 10  # of a clip that is a folder of frames, as the released loader takes them
METHOD = "Acc: pairs with the higher reward for chosen; Acc+: questions with every pair right"


class RewardBench(Strict):
    """Pairs to be told apart by a reward model.

    data: a dataset folder of preferences, or MM-RLHF-RewardBench's own JSON lines (id, prompt,
        image or video, chosen, rejected, chosen_reason, rejected_reason). media_root: where the
        paths of the latter start; by default the file's folder.
    critiques: written by the model itself, `given` with the pairs, or `none`.
    """

    name: Literal["reward_bench"] = "reward_bench"
    data: Path
    media_root: Path | None = None
    critiques: CritiqueSource = "self"
    num_critics: PositiveInt = 1
    max_new_tokens: PositiveInt = 1024
    limit: int | None = Field(default=None, ge=1)

    @property
    def key(self) -> str:
        """`reward_bench-<critiques>`."""
        return f"{self.name}-{self.critiques}"

    def requests(self) -> list[Request]:
        """Two for each pair; the response to be judged is the prefill, with its critique."""
        root = self._root()
        return [
            Request(
                id=f"{pair.id}/{side}",
                prompt=pair.prompt,
                images=pair.images,
                videos=pair.videos,
                media_root=root,
                prefill=json.dumps(
                    [getattr(pair, side), getattr(pair, f"{side}_critique"), self.num_critics]
                ),
            )
            for pair in self._pairs()
            for side in SIDES
        ]

    def score(self, answers: Mapping[str, str]) -> Suite:
        """Score rewards, as texts, by request id; a pair with a missing one is wrong."""
        pairs = self._pairs()
        check_known(answers, {f"{pair.id}/{side}" for pair in pairs for side in SIDES}, self.key)
        items = [_item(pair, answers) for pair in pairs]
        return Suite(
            key=self.key,
            benchmark=self.name,
            split=self.critiques,
            images=self._root(),
            method=METHOD,
            items=items,
            metrics=metrics(items),
            num_unparsed=0,
        )

    def answering(self, model: RewardModel) -> RewardAnswers:
        """The model, as what answers this benchmark's requests."""
        critics = Critics(
            critiques=self.critiques,
            num_critics=self.num_critics,
            max_new_tokens=self.max_new_tokens,
        )
        return RewardAnswers(model, critics)

    def _root(self) -> Path:
        if (self.data / MANIFEST).exists():
            return open_dataset(self.data, Preference).media_root
        return self.media_root or self.data.parent

    def _pairs(self) -> list[Preference]:
        if (self.data / MANIFEST).exists():
            return list(open_dataset(self.data, Preference))[: self.limit]
        return _official(self.data, self._root())[: self.limit]


class RewardAnswers:
    """A reward model behind the generator's protocol: the text that comes back is the reward."""

    def __init__(self, model: RewardModel, critics: Critics) -> None:
        self.model, self.critics = model, critics

    @property
    def name(self) -> str:
        """The reward model's."""
        return self.model.name

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Generation]:
        """The reward of each request's response."""
        items = []
        for request in requests:
            response, critique, _ = json.loads(request.prefill)
            items.append(
                Judgement(
                    id=request.id,
                    prompt=request.prompt,
                    response=response,
                    images=request.images,
                    videos=request.videos,  # type: ignore[arg-type]
                    media_root=request.media_root,
                    critique=critique,
                )
            )
        return [
            Generation(
                id=judged.id,
                text=repr(judged.reward),
                num_tokens=judged.num_tokens,
                finished=not judged.num_cut,
            )
            for judged in self.model.judge(items, self.critics)
        ]


def metrics(items: Sequence[Row]) -> dict[str, Ratio]:
    """acc and acc_plus, over all and for each category."""
    result = {"acc": mean([row["correct"] for row in items]), "acc_plus": _acc_plus(items)}
    for category in CATEGORIES:
        some = [row if row["category"] == category else None for row in items]
        if any(some):
            inside = [row is not None for row in some]
            right = [row is not None and row["correct"] for row in some]
            result[f"acc/{category}"] = ratio(right, inside)
            result[f"acc_plus/{category}"] = _acc_plus(items, category)
    return result


def _acc_plus(items: Sequence[Row], category: str | None = None) -> Ratio:
    """Every question counts once, at its first pair in the category."""
    rows = [row for row in items if category is None or row["category"] == category]
    wrong = {row["image"] for row in rows if not row["correct"]}
    numerator, denominator = np.zeros(len(items)), np.zeros(len(items))
    seen: set[str] = set()
    for place, row in enumerate(items):
        inside = category is None or row["category"] == category
        if inside and row["image"] not in seen:
            seen.add(row["image"])
            denominator[place] = 1
            numerator[place] = row["image"] not in wrong
    return ratio(numerator, denominator)


def _item(pair: Preference, answers: Mapping[str, str]) -> Row:
    """One pair; `image` names its question, whose pairs are drawn together in intervals."""
    found = [answers.get(f"{pair.id}/{side}") for side in SIDES]
    chosen, rejected = (None if text is None else float(text) for text in found)
    known = chosen is not None and rejected is not None
    paths = [media.path or "" for media in (*pair.images, *pair.videos)]
    place = f"{pair.id} {' '.join(paths)}"
    return {
        "id": pair.id,
        "image": pair.id.rpartition("/")[0] or pair.id,
        "category": next((name for name in CATEGORIES if name in place), None),
        "answer": f"{chosen:.4f} against {rejected:.4f}" if known else None,
        "chosen_reward": chosen,
        "rejected_reward": rejected,
        "correct": known and chosen > rejected,  # type: ignore[operator]
    }


def _official(file: Path, root: Path) -> list[Preference]:
    """MM-RLHF-RewardBench's own file. Ids are made unique: several pairs may share a question's."""
    pairs: list[Preference] = []
    counts: dict[str, int] = {}
    for where, row in read_jsonl(file):
        name = str(row.get("id", ""))
        if not name:
            raise DataError("has no id", where=where, fix="repair the line, or delete it")
        number = counts[name] = counts.get(name, -1) + 1
        images, videos = _media(row, root, where)
        text = text_field(row, "prompt", where).replace("<image>", "").strip()
        pairs.append(
            Preference(
                id=f"{name}/{number}",
                prompt=user(text, images=len(images), videos=len(videos)),
                images=images,
                videos=videos,
                chosen=text_field(row, "chosen", where),
                rejected=text_field(row, "rejected", where),
                chosen_critique=row.get("chosen_reason") or None,
                rejected_critique=row.get("rejected_reason") or None,
            )
        )
    if not pairs:
        raise DataError("holds no pair", where=str(file))
    return pairs


def _media(
    row: Mapping[str, Any], root: Path, where: str
) -> tuple[tuple[Media, ...], tuple[Media, ...]]:
    """A picture; a clip; or, of a clip that is a folder of frames, ten of them as pictures."""
    if row.get("image"):
        return (Media(path=str(row["image"])),), ()
    if not row.get("video"):
        return (), ()
    path = str(row["video"])
    if not (root / path).is_dir():
        return (), (Media(path=path),)
    frames = sorted(file for file in (root / path).iterdir() if file.is_file())
    if not frames:
        raise DataError("its folder of frames is empty", where=where, got=path)
    places = np.linspace(0, len(frames) - 1, min(FRAMES, len(frames))).astype(int)
    return tuple(Media(path=f"{path}/{frames[i].name}") for i in places), ()
