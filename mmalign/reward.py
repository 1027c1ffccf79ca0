"""Reward models at work: what a response is worth, and the critique that says why.

    model = RewardModel.from_checkpoint("runs/reward/model")
    for judged in model.judge([Judgement(id="7", prompt=…, images=…, response="A cat.")]):
        print(judged.reward, judged.critiques)

A critique is written by the model itself ("self"), given with the response ("given"), or left out
("none"). In every case the reward is read at the last token of prompt and critique as training has
them: the prompt is the checkpoint's own, and a written critique is tokenised again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import PositiveFloat, PositiveInt, model_validator

from mmalign.config import Strict
from mmalign.errors import DataError, ModelError
from mmalign.generate.base import Generation, Request, Sampling
from mmalign.models.load import ModelConfig, Policy, base_model
from mmalign.models.reward_head import RewardHeadConfig, head_of, stored_config
from mmalign.records import Media, Message, prompt_text, user

if TYPE_CHECKING:
    from mmalign.clips import Clip
    from mmalign.scoring.candidates import Candidate, Condition

CritiqueSource = Literal["self", "given", "none"]


class Critics(Strict):
    """Where the critiques come from.

    critiques: "self", written by the reward model; "given" with the responses; or "none".
    num_critics: critiques that the model writes of each response, over which rewards are averaged.
        One is greedy; more are drawn at `temperature`.
    max_new_tokens: where a critique is cut. It is scored as it stands, without an end of turn, as
        training scores one that its token limit cuts.
    """

    critiques: CritiqueSource = "self"
    num_critics: PositiveInt = 1
    temperature: PositiveFloat = 1.0
    max_new_tokens: PositiveInt = 1024

    @model_validator(mode="after")
    def _more_are_written(self) -> Critics:
        if self.num_critics > 1 and self.critiques != "self":
            raise ValueError("num_critics above 1 means critiques that the model writes: self")
        return self

    def sampling(self, seed: int) -> Sampling:
        """How critiques are decoded, with this seed."""
        return Sampling(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature if self.num_critics > 1 else 0.0,
            seed=seed,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """One response to judge: to which prompt, under which media, with which critique if given.

    media_root: the folder that media paths are relative to.
    """

    id: str
    prompt: tuple[Message, ...]
    response: str
    images: tuple[Media, ...] = ()
    videos: tuple[Media | Clip, ...] = ()
    media_root: Path | None = None
    critique: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """What a response is worth. critiques: those that were scored, none under "none".

    num_tokens: tokens that the model wrote; num_cut: critiques that the token limit cut.
    """

    id: str
    reward: float
    critiques: tuple[str, ...] = ()
    num_tokens: int = 0
    num_cut: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Read:
    """A critique to be read with its response; `cut` where its end is missing."""

    of: Judgement
    critique: str | None
    cut: bool = False


def critic_turn(template: str, prompt: Sequence[Message], response: str) -> tuple[Message, ...]:
    """What a critic is asked about a response: one user turn, media first, as the prompt has them.

    A conversation of several turns becomes text, each turn after the name of its role.
    """
    places = [block.type for message in prompt for block in message.content]
    turns = [f"{message.role}: {prompt_text([message])}" for message in prompt]
    question = prompt_text(prompt) if len(prompt) == 1 else "\n".join(turns)
    text = template.format(question=question, response=response)
    return user(text, images=places.count("image"), videos=places.count("video"))


class RewardModel:
    """A policy with a reward head. Raises ModelError where it has none."""

    def __init__(self, policy: Policy, *, name: str = "reward model", batch_size: int = 16) -> None:
        from mmalign.generate.local import LocalGenerator
        from mmalign.scoring.scorer import Scorer

        self.policy, self.name, self.batch_size = policy, name, batch_size
        self.config = reward_config(policy, name)
        self._writer = LocalGenerator(policy, name=name, batch_size=batch_size)
        self._scorer = Scorer(policy.model, policy.family).eval()

    @classmethod
    def from_checkpoint(
        cls, config: ModelConfig | str, *, batch_size: int = 16, device: str | None = None
    ) -> RewardModel:
        """Load a checkpoint or an adapter folder, onto the GPU if there is one."""
        from mmalign.generate.local import LocalGenerator

        loaded = LocalGenerator.from_checkpoint(config, batch_size=batch_size, device=device)
        return cls(loaded.policy, name=loaded.name, batch_size=batch_size)

    def judge(
        self, items: Sequence[Judgement], critics: Critics = Critics(), *, seed: int = 0
    ) -> list[Judged]:
        """The reward of every response, in the order asked; ids are unique.

        seed: of critiques that are drawn, each from (seed, its response's id).
        Raises MediaError for a picture or clip that cannot be read, RowDropped for a row that
        cannot be used, and DataError where a critique is to be given and is not.
        """
        match critics.critiques:
            case "self":
                return self._judge_by_own(items, critics, seed)
            case "given":
                read = [_Read(of=item, critique=_given(item)) for item in items]
            case "none":
                read = [_Read(of=item, critique=None) for item in items]
        return [
            Judged(
                id=one.of.id,
                reward=reward,
                critiques=() if one.critique is None else (one.critique,),
            )
            for one, reward in zip(read, self._rewards(read), strict=True)
        ]

    def _judge_by_own(
        self, items: Sequence[Judgement], critics: Critics, seed: int
    ) -> list[Judged]:
        n = critics.num_critics
        requests = [
            Request(
                id=f"{item.id}/critic{number}",
                prompt=critic_turn(self.config.prompt, item.prompt, item.response),
                images=item.images,
                videos=item.videos,
                media_root=item.media_root,
            )
            for item in items
            for number in range(n)
        ]
        written = self._writer.generate(requests, critics.sampling(seed))
        read = [
            _Read(of=items[place // n], critique=one.text, cut=not one.finished)
            for place, one in enumerate(written)
        ]
        rewards = self._rewards(read)
        return [
            _averaged(item, written[i * n : (i + 1) * n], rewards[i * n : (i + 1) * n])
            for i, item in enumerate(items)
        ]

    def _rewards(self, read: Sequence[_Read]) -> list[float]:
        """The reward of each, in order; batches hold texts of like length."""
        import torch

        from mmalign.scoring.candidates import CandidateBatch
        from mmalign.scoring.plan import make_plan

        preparer = self.policy.preparer
        device = next(self.policy.model.parameters()).device
        lengths = [len(one.of.response) + len(one.critique or "") for one in read]
        order = sorted(range(len(read)), key=lambda i: (lengths[i], i))
        rewards = [0.0] * len(read)
        for start in range(0, len(order), self.batch_size):
            some = order[start : start + self.batch_size]
            made = [self._candidate(read[i], place) for place, i in enumerate(some)]
            plan = make_plan(
                CandidateBatch(conditions=[c for c, _ in made], candidates=[c for _, c in made]),
                self.policy.family,
                "padded",
                image_token_id=preparer.image_token_id,
                video_token_id=preparer.video_token_id,
                pad_token_id=preparer.pad_token_id,
            )
            with torch.inference_mode():
                found = self._scorer.rewards(plan.to(device)).tolist()
            for i, reward in zip(some, found, strict=True):
                rewards[i] = reward
        return rewards

    def _candidate(self, read: _Read, place: int) -> tuple[Condition, Candidate]:
        from mmalign.scoring.candidates import Candidate

        item, critique = read.of, read.critique
        condition, (ids,) = self.policy.preparer.fit(
            critic_turn(self.config.prompt, item.prompt, item.response),
            item.images,
            [critique if critique and critique.strip() else None],
            item.media_root,
            videos=item.videos,
            id=item.id,
        )
        ids = ids[:-1] if read.cut and len(ids) > 1 else ids
        return condition, Candidate(condition=place, response_ids=ids)


def reward_config(policy: Policy, where: str) -> RewardHeadConfig:
    """What a reward model remembers of its training. Raises ModelError where it is none."""
    base = base_model(policy.model)
    config = stored_config(base.config, where)
    if config is None or head_of(base) is None:
        raise ModelError(
            "has no reward head",
            where=where,
            fix="train one: configs/train/reward_llava_onevision.yaml",
        )
    return config


def _given(item: Judgement) -> str:
    if not (item.critique or "").strip():
        raise DataError(
            "no critique is given with the response",
            where=item.id,
            fix="let the model write its own (critiques: self), or judge without (critiques: none)",
        )
    return item.critique or ""


def _averaged(item: Judgement, written: Sequence[Generation], rewards: Sequence[float]) -> Judged:
    return Judged(
        id=item.id,
        reward=sum(rewards) / len(rewards),
        critiques=tuple(one.text for one in written),
        num_tokens=sum(one.num_tokens for one in written),
        num_cut=sum(not one.finished for one in written),
    )
