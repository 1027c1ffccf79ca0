"""Benchmarks of reward models: does it give the chosen of two responses the higher reward?

    acc             share of pairs with r(chosen) > r(rejected); equal rewards are wrong
    acc/<category>  the same, of each category's pairs
    cut_rate        of critiques that the model wrote, the share that its token limit cut

A benchmark reads its own files into `Pair`s; asking, scoring and the row of a pair are here. A pair
without two finite rewards is wrong. Models that judge two responses in one prompt, in words, are
left out.
"""

from __future__ import annotations

import json
import math
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import Field, PositiveInt, model_validator

from evals.base import Row, Split, Suite, check_known
from evals.frames import with_frames
from evals.questions import by_category, over_categories
from evals.stats import Ratio, mean, ratio
from mmalign.config import Strict
from mmalign.errors import DataError
from mmalign.generate.base import Generation, Request, Sampling
from mmalign.media import media_key
from mmalign.records import Media, Message
from mmalign.reward import Critics, CritiqueSource, Judgement

if TYPE_CHECKING:
    from mmalign.reward import RewardModel

SIDES = ("chosen", "rejected")
# Fields of a pair's row that its metrics, and those alone, are made of.
READ = ("answer", "correct", "categories", "num_written", "num_cut")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two responses to one prompt, of which people, or an answer key, chose one.

    question: what pairs share that are right only together; by default a pair stands for itself.
    categories: what it counts under; means over categories take the first.
    """

    id: str
    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    images: tuple[Media, ...] = ()
    videos: tuple[Media, ...] = ()
    chosen_critique: str | None = None
    rejected_critique: str | None = None
    question: str = ""
    categories: tuple[str, ...] = ()

    def response(self, side: str) -> str:
        """The response of one of SIDES."""
        return self.chosen if side == "chosen" else self.rejected

    def critique(self, side: str) -> str | None:
        """What was said of the response of one of SIDES."""
        return self.chosen_critique if side == "chosen" else self.rejected_critique


class RewardPairs(Strict):
    """What benchmarks of reward models have in common.

    data: the pairs, in a form of the benchmark's own.
    split: a name of your own, where two suites would share a key.
    media_root: where the paths of pictures and clips start; by default the data's folder.
    critiques: written by the model itself, `given` with the pairs, or `none`; num_critics and
        max_new_tokens are of its own, as in mmalign.reward.Critics.
    limit: only the first so many pairs. method: what counts as right, in words.
    """

    data: str | Path
    split: Split | None = None
    media_root: Path | None = None
    critiques: CritiqueSource = "self"
    num_critics: PositiveInt = 1
    max_new_tokens: PositiveInt = 1024
    limit: int | None = Field(default=None, ge=1)

    method: ClassVar[str]

    @model_validator(mode="after")
    def _only_own_critics_are_several(self) -> RewardPairs:
        self.critics()
        return self

    @abstractmethod
    def load(self) -> list[Pair]:
        """All pairs, in the files' order. Raises DataError on files missing or wrong."""

    @abstractmethod
    def metrics(self, items: Sequence[Row]) -> dict[str, Ratio]:
        """The benchmark's numbers, from rows alone."""

    @property
    def folder(self) -> Path | None:
        """Where files of pictures and clips lie: the one given, or that of the data; None for the
        hub, whose rows hold pictures.
        """
        return self.media_root or folder_of(str(self.data))

    @property
    def label(self) -> str:
        """The benchmark's name, as recipes write it."""
        return type(self).model_fields["name"].default

    @property
    def key(self) -> str:
        """`<name>-<split>-<critiques>`, and the number of critics where it is not one."""
        number = str(self.num_critics) if self.num_critics > 1 else None
        return "-".join(filter(None, (self.label, self.split, self.critiques, number)))

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
        root = self.folder
        return [
            Request(
                id=f"{pair.id}/{side}",
                prompt=pair.prompt,
                images=pair.images,
                videos=pair.videos,
                media_root=root,
                prefill=json.dumps([pair.response(side), self._critique(pair, side)]),
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
            benchmark=self.label,
            split=self.key.removeprefix(f"{self.label}-"),
            images=self.folder,
            method=self.method,
            items=items,
            metrics=self.metrics(items),
            num_unparsed=0,
        )

    def answering(self, model: RewardModel) -> RewardAnswers:
        """The model, as what answers this benchmark's requests."""
        return RewardAnswers(model, self.critics())

    def _critique(self, pair: Pair, side: str) -> str | None:
        if self.critiques != "given":
            return None
        critique = pair.critique(side)
        if not (critique or "").strip():
            raise DataError(
                f"no critique of the {side} response is there to be given",
                where=f"{self.key}, {pair.id}",
                fix="use critiques: self or none",
            )
        return critique

    def _pairs(self) -> list[Pair]:
        pairs = self.load()
        if not pairs:
            raise DataError("holds no pair", where=self.key, fix="check its data")
        twice = [id for id, n in Counter(pair.id for pair in pairs).items() if n > 1]
        if twice:
            raise DataError("two pairs share an id", where=self.key, got=twice[0])
        return pairs[: self.limit]


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


def accuracies(items: Sequence[Row]) -> dict[str, Ratio]:
    """acc, over all and for each category; cut_rate where the model wrote critiques."""
    whole = mean([row["correct"] for row in items])
    result = {"acc": whole, **by_category(items, "acc", whole)}
    if any(row["num_written"] for row in items):
        cut = [row["num_cut"] for row in items]
        result["cut_rate"] = ratio(cut, [row["num_written"] for row in items])
    return result


def macro(items: Sequence[Row]) -> Ratio:
    """The mean of the accuracies of the first categories, those without a pair left out.

    Each pair weighs 1 / (the pairs of its category). Intervals keep these weights.
    """
    right = np.array([row["correct"] for row in items], float)
    return ratio(*over_categories(items, right, np.ones(len(items))))


def numbered(pairs: Iterable[Pair]) -> list[Pair]:
    """The pairs, with a number behind the id of the second and later ones of an id."""
    counts = Counter[str]()
    found: list[Pair] = []
    for pair in pairs:
        number = counts[pair.id]
        counts[pair.id] += 1
        found.append(replace(pair, id=f"{pair.id}/{number}") if number else pair)
    return found


def folder_of(data: str) -> Path | None:
    """The folder of a file, or the folder itself; None for a dataset of the hub."""
    path = Path(data)
    if path.is_dir():
        return path
    return path.parent if path.exists() else None


def _item(pair: Pair, answers: Mapping[str, str]) -> Row:
    """One pair. `image` names what it shows, whose pairs are drawn together in intervals."""
    names = [f"{pair.id}/{side}" for side in SIDES]
    found = [_read(answers[name], name) if name in answers else None for name in names]
    chosen, rejected = (None if one is None else one["reward"] for one in found)
    known = chosen is not None and rejected is not None
    media = [*pair.images, *pair.videos]
    question = pair.question or pair.id
    return {
        "id": pair.id,
        "requests": names,
        "question": question,
        "image": media_key(media[0]) if media else question,
        "categories": list(pair.categories),
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
        reward = float(found["reward"])
        # A weight gone wrong rewards nothing: "nan against 0.0" would count as an answer.
        return {**found, "reward": reward if math.isfinite(reward) else None}
    except (ValueError, TypeError, KeyError):
        raise DataError(
            "is no reward",
            where=name,
            got=repr(answer[:60]),
            fix="evaluate a reward model; other models answer with words",
        ) from None
