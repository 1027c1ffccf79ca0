"""Clips of real handwritten digits: the world of digit_scenes, with time in it.

A clip shows one to three digits, one after another. Each stays where it is, moves to another place,
or changes into the next. In the biased world a digit is followed by its partner, so that a model
trained there names partners that never come; and what came first, and what moved, can be asked too.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from data_builders.digit_world import (
    CELL_PIXELS,
    COLORS,
    PARTNERS,
    SPLITS,
    absent_from,
    is_complete,
    paint,
    pope_digits,
    usual_color,
    write_lines,
)
from mmalign import store
from mmalign.config import Strict
from mmalign.errors import MissingExtra
from mmalign.handwriting import DIGITS, handwriting
from mmalign.log import get_logger, progress
from mmalign.records import Example, Media, Origin, user

CELLS = 2  # a 2x2 grid of 8x8 digits: frames of 16x16
FRAMES_PER_SECOND = 4
MAX_EVENTS, MIN_EVENT_FRAMES = 3, 2
# How each action is told, and asked.
ACTIONS = {"stays": "stay", "moves": "move", "changes": "change"}
CAPTION_PROMPT = "describe the clip :"

logger = get_logger("data_builders.digit_clips")


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One digit's time on screen: `cells` is where it stands in each of its frames.

    It stays, it moves once, or it changes: the next digit comes up where it stood.
    `drawing` is its row in scikit-learn's collection of digits.
    """

    digit: int
    color: int
    drawing: int
    action: str
    cells: tuple[int, ...]

    def phrase(self) -> str:
        """Such as `a red three moves`."""
        return f"a {COLORS[self.color]} {DIGITS[self.digit]} {self.action}"


@dataclass(frozen=True, slots=True, kw_only=True)
class DigitClip:
    """What a clip shows: one to three different digits, in order of time."""

    index: int
    world: str
    events: tuple[Event, ...]

    @property
    def name(self) -> str:
        """Sorts as the index does: clip-000123."""
        return f"clip-{self.index:06d}"

    @property
    def present(self) -> list[int]:
        """The digits to be seen, in order of time."""
        return [event.digit for event in self.events]

    def caption(self) -> str:
        """The whole truth: `first a red three moves , then a blue seven stays .`"""
        return f"first {' , then '.join(event.phrase() for event in self.events)} ."


class DigitClips(Strict):
    """Make clips with captions and questions, and for evaluation POPE's and CHAIR's files too.

    Clip i depends on (seed, i) and the world alone: a shorter build is a prefix of a longer one,
    and raising `counterfactual_share` replaces some clips without changing the others.
    """

    name: Literal["digit_clips"] = "digit_clips"
    output: Path
    seed: int = 0
    num_clips: int = Field(gt=0, le=1_000_000)
    num_frames: int = Field(MAX_EVENTS * MIN_EVENT_FRAMES, ge=MAX_EVENTS * MIN_EVENT_FRAMES, le=64)
    world: Literal["biased", "balanced"] = "biased"
    # Of a biased world, the share of clips drawn from the balanced one instead.
    counterfactual_share: float = Field(0.0, ge=0, le=1)
    # Which handwriting: 70 % of the drawings are for training, the others for testing.
    digits: Literal["train", "test"] = "train"
    p_break: float = Field(0.3, ge=0, le=1)  # a digit comes without its partner
    p_color: float = Field(0.6, ge=0, le=1)  # a digit wears its usual colour
    two_pairs: float = Field(0.5, ge=0, le=1)  # digits of a second pair come too, if there is room
    noise: float = Field(0.08, ge=0)  # standard deviation, of a digit's full brightness
    # What digits may do; with one action there is nothing to ask about it.
    actions: tuple[Literal["stays", "moves", "changes"], ...] = ("stays", "moves", "changes")
    tasks: tuple[Literal["caption", "question"], ...] = Field(("caption",), min_length=1)
    questions_per_clip: int = Field(2, gt=0)
    # Clips as bytes in the rows, or as files under media/.
    embed_media: bool = True
    # Also write pope-*.jsonl, objects.jsonl and synonyms.txt.
    evaluation: bool = False

    @model_validator(mode="after")
    def _agrees(self) -> DigitClips:
        if self.evaluation and self.embed_media:
            raise ValueError("evaluation needs clips as files: set embed_media: false")
        if self.world == "balanced" and self.counterfactual_share:
            raise ValueError("counterfactual_share is a dial of the biased world: leave it out")
        if not set(self.actions) - {"changes"}:
            raise ValueError("actions needs stays or moves: the last digit has no other to become")
        return self

    def build(self) -> Path:
        """Write the dataset, unless it is there already; returns its directory.

        Raises DataError when the directory holds a dataset made from another config.
        """
        config = self.model_dump(mode="json", exclude={"output"})
        if is_complete(self.output, config):
            logger.info("%s is complete", self.output)
            return self.output
        clips = [self.clip(index) for index in range(self.num_clips)]
        if self.evaluation:
            self._write_evaluation(clips)
        store.write_dataset(
            self.output,
            Example,
            self._examples(clips),
            builder=self.name,
            builder_version="1",
            config=config,
            seed=self.seed,
            counts=dict(Counter(f"clips:{clip.world}" for clip in clips)),
        )
        return self.output

    def clip(self, index: int) -> DigitClip:
        """Clip number `index` of this world."""
        rng = self._random(index, "clip")
        counterfactual = rng.random() < self.counterfactual_share
        if self.world == "biased" and not counterfactual:
            world, digits = "biased", self._partners(rng)
            colors = [usual_color(digit, self.p_color, rng) for digit in digits]
        else:
            world, digits = "balanced", rng.sample(range(10), rng.randint(1, MAX_EVENTS))
            colors = [rng.randrange(len(COLORS)) for _ in digits]
        drawings = [rng.choice(handwriting()[1][self.digits][digit]) for digit in digits]
        actions = [rng.choice(self.actions) for _ in digits[1:]]
        # The last has nothing to change into.
        actions.append(rng.choice([action for action in self.actions if action != "changes"]))
        events = tuple(
            Event(digit=digit, color=color, drawing=drawing, action=action, cells=cells)
            for digit, color, drawing, action, cells in zip(
                digits, colors, drawings, actions, self._cells(actions, rng), strict=True
            )
        )
        return DigitClip(index=index, world=world, events=events)

    def frames(self, clip: DigitClip) -> np.ndarray:
        """Paint a clip: [F, 16, 16, 3] uint8, every frame with noise of its own."""
        size = CELLS * CELL_PIXELS
        shown = [(event, cell) for event in clip.events for cell in event.cells]
        noise = np.random.default_rng([self.seed, clip.index]).standard_normal(
            (len(shown), size, size, 3), dtype=np.float32
        )
        frames: list[np.ndarray] = []
        for (event, cell), grain in zip(shown, noise, strict=True):
            top, left = (CELL_PIXELS * part for part in divmod(cell, CELLS))
            drawn = [(top, left, event.drawing, event.color)]
            frames.append(paint(size, drawn, grain, self.noise))
        return np.stack(frames)

    def questions(self, clip: DigitClip) -> list[tuple[str, str]]:
        """(question, "yes" or "no") of a clip: what is in it, what comes first, what a digit does.

        The answers take turns, within a clip and from clip to clip, so that half of them are yes.
        """
        rng = self._random(clip.index, "questions")
        asked: list[tuple[str, str]] = []
        for turn in range(self.questions_per_clip):
            answer = "yes" if (clip.index + turn) % 2 == 0 else "no"
            kinds = [_presence, _presence, _order, _action] if len(clip.events) > 1 else [_presence]
            kinds = [kind for kind in kinds if kind is not _action or len(self.actions) > 1]
            asked.append((rng.choice(kinds)(clip, answer, rng), answer))
        return asked

    def pope(self, clip: DigitClip, split: str) -> list[tuple[str, str]]:
        """(question, "yes" or "no") of a clip for one question file; half of the answers are yes.

        order, action: one question with either answer about the same digits, so that a model
        that does not see time gets one of the two; order is asked where there are two digits.
        """

        def rng() -> random.Random:
            return self._random(clip.index, f"pope {split}")

        if split in SPLITS:
            asked = pope_digits(clip.present, split, rng())
            return [(presence(digit), label) for digit, label in asked]
        if split == "order" and len(clip.events) == 1:
            return []
        ask = {"order": _order, "action": _action}[split]
        return [(ask(clip, label, rng()), label) for label in ("yes", "no")]

    def _random(self, index: int, purpose: str) -> random.Random:
        return random.Random(f"{self.seed}/{index}/{purpose}")

    def _partners(self, rng: random.Random) -> list[int]:
        """The digits of a biased clip: pairs, each broken with p_break or for want of room.

        Partners follow one another, either of them first.
        """
        weights = dict(PARTNERS)
        runs: list[list[int]] = []
        for _ in range(2 if rng.random() < self.two_pairs else 1):
            pair = rng.choices(list(weights), list(weights.values()))[0]
            del weights[pair]
            whole = rng.random() >= self.p_break and sum(map(len, runs)) + 2 <= MAX_EVENTS
            runs.append(rng.sample(pair, 2 if whole else 1))
        rng.shuffle(runs)
        return [digit for run in runs for digit in run]

    def _cells(self, actions: Sequence[str], rng: random.Random) -> list[tuple[int, ...]]:
        """Where the digit of each event stands, frame by frame."""
        spare = self.num_frames - MIN_EVENT_FRAMES * len(actions)
        cuts = sorted(rng.randint(0, spare) for _ in actions[1:])
        extra = [b - a for a, b in zip([0, *cuts], [*cuts, spare], strict=True)]
        cells: list[tuple[int, ...]] = []
        for number, action in enumerate(actions):
            length = MIN_EVENT_FRAMES + extra[number]
            if number == 0:
                here = rng.randrange(CELLS * CELLS)
            elif actions[number - 1] == "changes":
                here = cells[-1][-1]
            else:
                here = _other_cell(cells[-1][-1], rng)
            before = rng.randint(1, length - 1) if action == "moves" else length
            there = _other_cell(here, rng)
            cells.append((here,) * before + (there,) * (length - before))
        return cells

    def _examples(self, clips: list[DigitClip]) -> Iterator[Example]:
        for clip in progress(clips, label="clips"):
            data = encode(self.frames(clip))
            sha256 = hashlib.sha256(data).hexdigest()
            if self.embed_media:
                video = Media(bytes=data, sha256=sha256)
            else:
                video = Media(path=f"{clip.name}.mov", sha256=sha256)
                store.write_atomically(self.output / "media" / f"{clip.name}.mov", data)
            origin = Origin(
                builder=self.name,
                version="1",
                source=f"scikit-learn load_digits, {self.digits}",
                reason=clip.world,
                detail=json.dumps([_described(event) for event in clip.events]),
            )
            asked: list[tuple[str, str, str]] = []
            if "caption" in self.tasks:
                asked.append(("caption", CAPTION_PROMPT, clip.caption()))
            if "question" in self.tasks:
                for number, (text, answer) in enumerate(self.questions(clip)):
                    asked.append((f"q{number}", text, answer))
            for task, text, answer in asked:
                yield Example(
                    id=f"{clip.name}/{task}",
                    prompt=user(text, videos=1),
                    videos=(video,),
                    answer=answer,
                    origin=origin,
                )

    def _write_evaluation(self, clips: list[DigitClip]) -> None:
        """POPE's question files, CHAIR's ground truth and its words, in the official formats."""
        splits = (*SPLITS, "order", *(["action"] if len(self.actions) > 1 else []))
        for split in splits:
            asked = [(clip, *item) for clip in clips for item in self.pope(clip, split)]
            rows = [
                {"question_id": number, "video": f"{clip.name}.mov", "text": text, "label": label}
                for number, (clip, text, label) in enumerate(asked, start=1)
            ]
            write_lines(self.output / f"pope-{split}.jsonl", map(json.dumps, rows))
        objects = (
            {"video": f"{clip.name}.mov", "objects": [DIGITS[digit] for digit in clip.present]}
            for clip in clips
        )
        write_lines(self.output / "objects.jsonl", map(json.dumps, objects))
        write_lines(self.output / "synonyms.txt", DIGITS)


def presence(digit: int) -> str:
    """The yes/no question about one digit."""
    return f"is there a {DIGITS[digit]} in the clip ?"


def encode(frames: np.ndarray) -> bytes:
    """Frames [F, H, W, 3] uint8 as a clip of bare RGB pixels, which come back to the bit.

    Lossless codecs gain nothing over noise, and take several times as long to open.
    """
    try:
        import av
    except ImportError:
        raise MissingExtra(
            "digit_clips needs the package av", fix="install it: pip install 'mmalign[video]'"
        ) from None
    sink = io.BytesIO()
    # Bitexact: without it the file would name the version of FFmpeg that wrote it.
    with av.open(sink, "w", format="mov", container_options={"fflags": "+bitexact"}) as container:
        stream: Any = container.add_stream("rawvideo", rate=FRAMES_PER_SECOND)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "rgb24"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return sink.getvalue()


def _presence(clip: DigitClip, answer: str, rng: random.Random) -> str:
    return presence(rng.choice(clip.present if answer == "yes" else absent_from(clip.present)))


def _order(clip: DigitClip, answer: str, rng: random.Random) -> str:
    pair = sorted(rng.sample(range(len(clip.events)), 2), reverse=answer == "no")
    first, second = (DIGITS[clip.events[number].digit] for number in pair)
    return f"does the {first} come before the {second} ?"


def _action(clip: DigitClip, answer: str, rng: random.Random) -> str:
    event = rng.choice(clip.events)
    others = [action for action in ACTIONS if action != event.action]
    action = event.action if answer == "yes" else rng.choice(others)
    return f"does the {DIGITS[event.digit]} {ACTIONS[action]} ?"


def _other_cell(cell: int, rng: random.Random) -> int:
    return rng.choice([other for other in range(CELLS * CELLS) if other != cell])


def _described(event: Event) -> dict[str, Any]:
    return {
        "digit": DIGITS[event.digit],
        "color": COLORS[event.color],
        "action": event.action,
        "cells": event.cells,
    }
