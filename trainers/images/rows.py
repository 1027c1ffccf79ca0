"""Image pairs on their way to the denoiser: found, framed, encoded, drawn noise for, batched."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from mmalign.diffusion.backbones import SIZES, Backbone
from mmalign.diffusion.denoiser import DenoisePlan
from mmalign.diffusion.framing import Frame, frames_of
from mmalign.errors import MediaError, TrainingError
from mmalign.log import progress
from mmalign.media import open_image, read_bytes
from mmalign.records import ImagePreference, Media
from mmalign.scores import PairTable
from mmalign.store import Dataset
from trainers.images.config import ImageRecipe
from trainers.images.store import EncodedStore, picture_digest, prompt_digest
from trainers.rows import Survey


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageBatch:
    """One micro-batch: places in the survey, the plan of its images, and its pairs."""

    places: list[int]
    plan: DenoisePlan
    table: PairTable

    @property
    def num_pairs(self) -> list[int]:
        """Pairs of each row."""
        return [1] * len(self.places)

    def to(self, device: torch.device) -> ImageBatch:
        """The same batch on `device`."""
        columns = {f.name: getattr(self.table, f.name) for f in fields(self.table)}
        moved = {name: column.to(device) for name, column in columns.items() if column is not None}
        return replace(self, plan=self.plan.to(device), table=replace(self.table, **moved))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """What is known of a row: digests of its pictures in each frame, chosen before rejected."""

    id: str
    prompt: str
    frames: list[tuple[str, ...]]


class ImageRows:
    """A dataset of image preferences as the denoiser is asked about it.

    backbone: what is asked, which is told sizes or not.
    with_rejected: whether the loss reads the rejected images; else they are not touched.
    A row's frame, timestep and noise in a step depend on the run's seed, the step and the row's id
    alone, so that cutting a batch into micro-batches or resuming a run changes none of them.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        recipe: ImageRecipe,
        backbone: Backbone,
        *,
        with_rejected: bool,
        num_steps: int,
    ) -> None:
        self.dataset, self.recipe, self.backbone = dataset, recipe, backbone
        self.with_rejected, self.num_steps = with_rejected, num_steps
        self.store: EncodedStore | None = None
        self._rows: dict[int, _Row] = {}

    def survey(self, accelerator: Accelerator) -> Survey:
        """Look at every row once, by all processes, until `data.limit` rows can be trained on.

        The rows after the last one that was looked at are neither used nor dropped.
        Raises TrainingError if no row is left.
        """
        decided, undecided = self._decided()
        limit = self.recipe.data.limit or len(decided)
        used: list[tuple[int, _Row]] = []
        dropped: list[tuple[str, str]] = []
        start = 0
        # As many rows as are still wanted, all processes at once: pictures of rows that are not
        # wanted stay closed, and how many processes there are changes nothing.
        while len(used) < limit and start < len(decided):
            stop = min(start + limit - len(used), len(decided))
            mine = decided[start + accelerator.process_index : stop : accelerator.num_processes]
            found, unfit = self._looked_at(mine)
            used += gather_object(found)
            dropped += gather_object(unfit)
            start = stop
        filled = self.recipe.data.limit is not None and len(used) == limit
        last = decided[start - 1] if filled else len(self.dataset)
        dropped += [(reason, id) for number, reason, id in undecided if number < last]
        used.sort(key=lambda item: item[0])
        self._rows = dict(used)
        by_reason: dict[str, list[str]] = {}
        for reason, id in sorted(dropped):
            by_reason.setdefault(reason, []).append(id)
        survey = self.survey_of([number for number, _ in used], by_reason)
        if not used:
            raise TrainingError(
                "no row can be trained on",
                where=str(self.dataset.path),
                got=survey.describe(),
                fix="look at the rows with `mmalign data`",
            )
        return survey

    def survey_of(self, numbers: list[int], dropped: dict[str, list[str]]) -> Survey:
        """What the loop knows of these rows of the dataset."""
        images = 2 if self.with_rejected else 1
        return Survey(
            rows=numbers,
            ids=[self._rows[number].id for number in numbers],
            chosen_tokens=[1.0] * len(numbers),
            tokens=[images] * len(numbers),
            kinds=["image"] * len(numbers),
            dropped=dropped,
        )

    def media_hash(self) -> str:
        """A hash over all pictures and prompts of the surveyed rows."""
        told = repr([(number, row) for number, row in self._rows.items()])
        return hashlib.sha256(told.encode()).hexdigest()

    def wanted(self) -> tuple[dict[str, tuple[Media, Frame]], dict[str, str]]:
        """Pictures in their frames, and prompts, that must be encoded, by digest."""
        pictures: dict[str, tuple[Media, Frame]] = {}
        prompts: dict[str, str] = {}
        for number, row in self._rows.items():
            record: ImagePreference = self.dataset[number]
            prompts.setdefault(prompt_digest(row.prompt), row.prompt)
            for frame, digests in zip(self._frames(row.id), row.frames, strict=True):
                for media, digest in zip(self._media(record), digests, strict=True):
                    pictures.setdefault(digest, (media, frame))
        return pictures, prompts

    def batches(
        self, survey: Survey, cuts: Iterable[tuple[int, list[int]]]
    ) -> Iterator[ImageBatch]:
        """The micro-batch of each (step, places), in order."""
        return (self.batch(survey, step, places) for step, places in cuts)

    def batch(self, survey: Survey, step: int, places: list[int]) -> ImageBatch:
        """The micro-batch of these places at a step, on the CPU: chosen images, then rejected."""
        assert self.store is not None
        rows = [self._rows[survey.rows[place]] for place in places]
        drawn = [self._drawn(row, step) for row in rows]
        sides = range(2 if self.with_rejected else 1)
        stored = [draw.stored[side] for side in sides for draw in drawn]
        prompts = [self.store.read(prompt_digest(row.prompt)) for row in rows] * len(sides)
        draws = drawn * len(sides)
        latents = [_latent(one, draw) for one, draw in zip(stored, draws, strict=True)]
        # Text encoders may be in 16 bits of another kind than what the backbone computes in.
        conditions = {n: torch.stack([one[n] for one in prompts]).float() for n in prompts[0]}
        if self.backbone.sizes:
            conditions[SIZES] = torch.stack([one[SIZES] for one in stored])
        count = len(rows)
        return ImageBatch(
            places=places,
            plan=DenoisePlan(
                latents=torch.stack(latents),
                noise=torch.stack([draw.noise for draw in draws]),
                steps=torch.tensor([draw.timestep for draw in draws]),
                conditions=conditions,
            ),
            table=PairTable(
                chosen=torch.arange(count),
                rejected=torch.arange(count, 2 * count) if self.with_rejected else None,
            ),
        )

    def _decided(self) -> tuple[list[int], list[tuple[int, str, str]]]:
        """Numbers of the rows whose label says that chosen is better, and (number, reason, id) of
        the others. No picture is opened. Where rejected images are not read, every row is decided.
        """
        if not self.with_rejected:
            return list(range(len(self.dataset))), []
        decided: list[int] = []
        others: list[tuple[int, str, str]] = []
        ids, targets = self.dataset.column("id"), self.dataset.column("p_target")
        for number, (id, target) in enumerate(zip(ids, targets, strict=True)):
            if target is None or target > 0.5:  # A null is the record's default, 1.
                decided.append(number)
            else:
                others.append((number, "tie" if target == 0.5 else "reversed", id))
        return decided, others

    def _looked_at(
        self, numbers: Sequence[int]
    ) -> tuple[list[tuple[int, _Row]], list[tuple[str, str]]]:
        """(number, row) of those that can be trained on, (reason, id) of the others."""
        used: list[tuple[int, _Row]] = []
        dropped: list[tuple[str, str]] = []
        for number in progress(numbers, label="rows"):
            record: ImagePreference = self.dataset[number]
            try:
                used.append((number, self._examined(record)))
            except MediaError:
                dropped.append(("unreadable_media", record.id))
            except _Dropped as reason:
                dropped.append((str(reason), record.id))
        return used, dropped

    def _examined(self, record: ImagePreference) -> _Row:
        root: Path | None = self.dataset.media_root
        data = []
        for media in self._media(record):
            open_image(media, root)  # Readable, before training begins.
            data.append(read_bytes(media, root))
        if len(data) == 2 and data[0] == data[1]:
            raise _Dropped("same_image")
        frames = [
            tuple(picture_digest(picture, frame) for picture in data)
            for frame in self._frames(record.id)
        ]
        return _Row(id=record.id, prompt=record.prompt, frames=frames)

    def _media(self, record: ImagePreference) -> Sequence[Media]:
        return (record.chosen, record.rejected) if self.with_rejected else (record.chosen,)

    def _frames(self, id: str) -> tuple[Frame, ...]:
        data = self.recipe.data
        generator = _generator(self.recipe.run.seed, "frames", id)
        return frames_of(flip=data.flip, random_crops=data.random_crops, generator=generator)

    def _drawn(self, row: _Row, step: int) -> _Drawn:
        assert self.store is not None
        generator = _generator(self.recipe.run.seed, str(step), row.id)
        frame = int(torch.randint(len(row.frames), (1,), generator=generator))
        timestep = int(torch.randint(self.num_steps, (1,), generator=generator))
        stored = [self.store.read(digest) for digest in row.frames[frame]]
        shape = stored[0]["mean"].shape
        noise = torch.randn(shape, generator=generator)
        posterior = torch.randn(shape, generator=generator)
        return _Drawn(
            stored=stored,
            timestep=timestep,
            noise=noise,
            posterior=posterior if self.recipe.denoiser.sample else torch.zeros(shape),
        )


class _Dropped(Exception):
    """A row that cannot be used; its text is the reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Drawn:
    """What chance decides of a row in a step, for both of its images.

    stored: what is stored of each image in the frame that was drawn, chosen first.
    """

    stored: list[dict[str, Tensor]]
    timestep: int
    noise: Tensor
    posterior: Tensor


def _latent(stored: dict[str, Tensor], draw: _Drawn) -> Tensor:
    return stored["mean"] + stored["deviation"] * draw.posterior


def _generator(seed: int, *parts: str) -> torch.Generator:
    digest = hashlib.sha256("/".join([str(seed), *parts]).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
