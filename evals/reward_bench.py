"""A reward model's accuracy: does it give the chosen response the higher reward?

    acc       share of pairs with r(chosen) > r(rejected); equal rewards are wrong
    acc_plus  share of questions of which every pair is right

(MM-RLHF-RewardBench, arXiv 2502.10391.) A pair's question is its id in the official file; in a
dataset of ours, what the pair was made of. Where critiques come from is part of the result: with
given ones the verdict may stand in the text, so `self` is what the model can do.

Deviation from the released script: a category's acc_plus counts the same questions above and below
the line, where the script's two counts differ for paths that hold two categories' names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, PositiveInt, model_validator

from evals.base import Row, Suite, check_known, read_jsonl, text_field
from evals.frames import with_frames
from evals.rules import Metric, Rules
from evals.stats import Ratio, mean, ratio
from mmalign.config import Strict
from mmalign.errors import DataError
from mmalign.generate.base import Generation, Request, Sampling, request_for
from mmalign.media import media_key
from mmalign.records import Media, Origin, Preference, user
from mmalign.reward import Critics, CritiqueSource, Judgement
from mmalign.store import MANIFEST, open_dataset

if TYPE_CHECKING:
    from mmalign.reward import RewardModel

# The first of these that a path holds is its category, in the released script's order.
CATEGORIES = ("mcq", "long", "short", "safety", "video")
SIDES = ("chosen", "rejected")
METHOD = "acc: pairs with the higher reward for chosen; acc_plus: questions with every pair right"


class RewardBench(Strict):
    """Pairs to be told apart by a reward model.

    data: a dataset folder of preferences, or MM-RLHF-RewardBench's own JSON lines (id, prompt,
        image or video, chosen, rejected, chosen_reason, rejected_reason). media_root: where the
        paths of the latter start; by default the file's folder.
    split: a name of your own, where two suites would share a key.
    critiques: written by the model itself, `given` with the pairs, or `none`; num_critics and
        max_new_tokens are of its own, as in mmalign.reward.Critics.
    limit: only the first so many pairs.
    """

    name: Literal["reward_bench"] = "reward_bench"
    split: str | None = None
    data: Path
    media_root: Path | None = None
    critiques: CritiqueSource = "self"
    num_critics: PositiveInt = 1
    max_new_tokens: PositiveInt = 1024
    limit: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _only_own_critics_are_several(self) -> RewardBench:
        self.critics()
        return self

    @property
    def key(self) -> str:
        """`reward_bench-<split>-<critiques>`, and the number of critics where it is not one."""
        number = str(self.num_critics) if self.num_critics > 1 else None
        return "-".join(filter(None, (self.name, self.split, self.critiques, number)))

    def critics(self) -> Critics:
        """Where critiques come from."""
        return Critics(
            critiques=self.critiques,
            num_critics=self.num_critics,
            max_new_tokens=self.max_new_tokens,
        )

    def requests(self) -> list[Request]:
        """Two for each pair; the response to be judged is the prefill, with its critique if given.

        Raises DataError where critiques are to be given and a pair lacks one.
        """
        root = self._root()
        return [
            replace(
                request_for(pair, id=f"{pair.id}/{side}", media_root=root),
                prefill=json.dumps([getattr(pair, side), self._critique(pair, side)]),
            )
            for pair in self._pairs()
            for side in SIDES
        ]

    def score(self, answers: Mapping[str, str]) -> Suite:
        """Score what RewardAnswers gave, by request id; a pair without a reward is wrong."""
        pairs = self._pairs()
        check_known(answers, {f"{pair.id}/{side}" for pair in pairs for side in SIDES}, self.key)
        items = [_item(pair, answers) for pair in pairs]
        return Suite(
            key=self.key,
            benchmark=self.name,
            split=self.key.removeprefix(f"{self.name}-"),
            images=self._root(),
            method=METHOD,
            items=items,
            metrics=metrics(items),
            num_unparsed=0,
        )

    def answering(self, model: RewardModel) -> RewardAnswers:
        """The model, as what answers this benchmark's requests."""
        return RewardAnswers(model, self.critics())

    def _critique(self, pair: Preference, side: str) -> str | None:
        if self.critiques != "given":
            return None
        critique: str | None = getattr(pair, f"{side}_critique")
        if not (critique or "").strip():
            raise DataError(
                f"no critique of the {side} response is there to be given",
                where=f"{self.data}, {pair.id}",
                fix="use critiques: self or none",
            )
        return critique

    def _root(self) -> Path:
        if (self.data / MANIFEST).exists():
            return open_dataset(self.data, Preference).media_root
        return self.media_root or self.data.parent

    def _pairs(self) -> list[Preference]:
        if not self.data.is_dir():
            return _official(self.data)[: self.limit]
        pairs = list(open_dataset(self.data, Preference))[: self.limit]
        if not pairs:
            raise DataError("holds no pair", where=str(self.data))
        return pairs


class RewardAnswers:
    """A reward model behind the generator's protocol: what comes back is the reward, as JSON."""

    def __init__(self, model: RewardModel, critics: Critics) -> None:
        self.model, self.critics = model, critics

    @property
    def name(self) -> str:
        """The reward model's."""
        return self.model.name

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Generation]:
        """The reward of each request's response, with the critiques it was read after."""
        items = []
        for request in requests:
            response, critique = json.loads(request.prefill)
            request = with_frames(request, self.model.policy.family)
            items.append(
                Judgement(
                    id=request.id,
                    prompt=request.prompt,
                    response=response,
                    images=request.images,
                    videos=request.videos,
                    media_root=request.media_root,
                    critique=critique,
                )
            )
        own = self.critics.critiques == "self"
        return [
            Generation(
                id=judged.id,
                text=json.dumps(
                    {
                        "reward": judged.reward,
                        "critiques": judged.critiques,
                        "num_written": len(judged.critiques) if own else 0,
                        "num_cut": judged.num_cut,
                    }
                ),
                num_tokens=judged.num_tokens,
                finished=not judged.num_cut,
            )
            for judged in self.model.judge(items, self.critics)
        ]


def metrics(items: Sequence[Row]) -> dict[str, Ratio]:
    """acc and acc_plus, over all and for each category; cut_rate of critiques the model wrote."""
    result = {"acc": mean([row["correct"] for row in items]), "acc_plus": _acc_plus(items)}
    for category in CATEGORIES:
        inside = [row["category"] == category for row in items]
        if any(inside):
            right = [row["correct"] and row["category"] == category for row in items]
            result[f"acc/{category}"] = ratio(right, inside)
            result[f"acc_plus/{category}"] = _acc_plus(items, category)
    if any(row["num_written"] for row in items):
        cut = [row["num_cut"] for row in items]
        result["cut_rate"] = ratio(cut, [row["num_written"] for row in items])
    return result


def _acc_plus(items: Sequence[Row], category: str | None = None) -> Ratio:
    """Every question counts once, at its first pair in the category."""
    inside = [category is None or row["category"] == category for row in items]
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


def _item(pair: Preference, answers: Mapping[str, str]) -> Row:
    """One pair. `image` names what it shows, whose pairs are drawn together in intervals."""
    names = [f"{pair.id}/{side}" for side in SIDES]
    found = [_read(answers[name], name) if name in answers else None for name in names]
    chosen, rejected = (None if one is None else one["reward"] for one in found)
    known = chosen is not None and rejected is not None
    media = [*pair.images, *pair.videos]
    place = " ".join(one.path or "" for one in media).strip() or pair.id
    return {
        "id": pair.id,
        "requests": names,
        "question": _question(pair),
        "image": media_key(media[0]) if media else _question(pair),
        "category": next((name for name in CATEGORIES if name in place), None),
        "answer": f"{chosen:.4f} against {rejected:.4f}" if known else None,
        "chosen_reward": chosen,
        "rejected_reward": rejected,
        "chosen_critiques": found[0]["critiques"] if found[0] else [],
        "rejected_critiques": found[1]["critiques"] if found[1] else [],
        "num_written": sum(one["num_written"] for one in found if one),
        "num_cut": sum(one["num_cut"] for one in found if one),
        "correct": chosen is not None and rejected is not None and chosen > rejected,
    }


def _read(answer: str, name: str) -> dict[str, Any]:
    try:
        found = json.loads(answer)
        return {**found, "reward": float(found["reward"])}
    except (ValueError, TypeError, KeyError):
        raise DataError(
            "is no reward",
            where=name,
            got=repr(answer[:60]),
            fix="evaluate a reward model; other models answer with words",
        ) from None


def _question(pair: Preference) -> str:
    """What pairs of one question share: the record they were made of, or MM-RLHF's own id."""
    if not pair.origin.builder.startswith("import:"):
        return pair.origin.source or pair.id
    # Of an imported row, the source is the row's own place.
    try:
        return str(json.loads(pair.origin.detail)["id"])
    except (ValueError, TypeError, KeyError):
        return pair.id


def _official(file: Path) -> list[Preference]:
    """MM-RLHF-RewardBench's own file. Ids are made unique: several pairs may share a question's."""
    pairs: list[Preference] = []
    counts: dict[str, int] = {}
    for where, row in read_jsonl(file):
        name = str(row.get("id", ""))
        if not name:
            raise DataError("has no id", where=where, fix="repair the line, or delete it")
        number = counts[name] = counts.get(name, -1) + 1
        images = (Media(path=str(row["image"])),) if row.get("image") else ()
        videos = (Media(path=str(row["video"])),) if row.get("video") and not images else ()
        text = text_field(row, "prompt", where).replace("<image>", "").strip()
        pair = Preference(
            id=f"{name}/{number}",
            prompt=user(text, images=len(images), videos=len(videos)),
            images=images,
            videos=videos,
            chosen=text_field(row, "chosen", where),
            rejected=text_field(row, "rejected", where),
            chosen_critique=row.get("chosen_reason") or None,
            rejected_critique=row.get("rejected_reason") or None,
            origin=Origin(source=name),
        )
        pairs.append(pair)
    if not pairs:
        raise DataError("holds no pair", where=str(file))
    return pairs


RULES = Rules(
    metrics=metrics,
    read=("answer", "correct", "category", "num_written", "num_cut"),
    same=("image", "question"),
    compared={"acc": "mcnemar", "acc_plus": "bootstrap"},
    shown=(Metric("acc", "Acc", "higher"), Metric("acc_plus", "Acc+", "higher")),
    items="pairs",
)
