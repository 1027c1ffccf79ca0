"""Memory ran out: which single change would have fitted, by the estimate and by what was seen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch

from mmalign.errors import TrainingError
from mmalign.losses.base import Need
from mmalign.models.quantization import Quantization
from mmalign.scoring.plan import Layout
from trainers.config import Recipe
from trainers.memory import ConditionSize, ModelSizes, RowSize, memory_of, row_tokens
from trainers.rows import Batch

GIB = 2**30
# A change fits if it leaves this share free: blocks do not fill memory without gaps.
HEADROOM = 0.1
# No processor makes a picture smaller than this.
FEWEST_IMAGE_TOKENS = 4
FEWEST_FRAMES = 2
# How torch words it: its own allocator on a CPU, and what fails outside of the GPU's allocator.
OTHER_WORDS = ("DefaultCPUAllocator: can't allocate memory", "CUDA error: out of memory")


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A micro-batch as it was laid out. tokens: with padding, as the model got them.

    packed: whether shared_prefix is one row without padding, with the attention of this run.
    """

    rows: tuple[RowSize, ...]
    layout: Layout
    packed: bool
    tokens: int

    def tokens_of(self, rows: Sequence[RowSize], layout: Layout | None = None) -> int:
        """What other rows would take, laid out as these are, or in another layout."""
        return row_tokens(rows, layout or self.layout, packed=self.packed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A setting, its value that fits by itself (None: no value does), and the bytes that needs.

    Example: Change(setting="optim.micro_batch_size", value="2", total=9_663_676_416)
    """

    setting: str
    value: str | None
    total: int


@dataclass(frozen=True, kw_only=True)
class Watch:
    """What it takes to explain why memory ran out.

    packed: as in Held. token_pixels: pixels of an image token; None where a picture's size does
    not matter.
    """

    recipe: Recipe
    sizes: ModelSizes
    packed: bool
    token_pixels: int | None
    device: torch.device

    @contextmanager
    def told(self, batch: Batch) -> Iterator[None]:
        """Raise TrainingError, with what would fit, where memory does not suffice for `batch`."""
        try:
            yield
        except RuntimeError as error:
            if not ran_out(error):
                raise
            plan = batch.plan
            held = Held(
                rows=tuple(batch.tokens),
                layout=plan.layout,
                packed=self.packed,
                tokens=plan.input_ids.numel(),
            )
            available = available_bytes(self.device)
            memory = memory_of(self.recipe, self.sizes, held.tokens)
            raise TrainingError(
                f"the {'GPU' if self.device.type == 'cuda' else 'machine'}'s memory ran out",
                got=f"a micro-batch of {len(held.rows)} rows, {held.tokens} tokens with their "
                f"padding; by the estimate {memory.standing / GIB:.3g} GiB of weights, gradients, "
                f"moments and reference, {memory.activations / GIB:.3g} GiB of activations"
                + " (too low)"
                * (memory.total <= available),
                wanted=f"at most the {available / GIB:.3g} GiB that there are",
                fix=as_text(advice(self.recipe, self.sizes, held, available, self.token_pixels)),
            ) from error


def ran_out(error: RuntimeError) -> bool:
    """Whether memory did not suffice, by torch's words for it."""
    words = any(word in str(error) for word in OTHER_WORDS)
    return isinstance(error, torch.OutOfMemoryError) or words


def available_bytes(device: torch.device) -> int:
    """What this process holds of a device's memory and what is free, together."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    return psutil.virtual_memory().available + psutil.Process().memory_info().rss


def as_text(changes: Sequence[Change]) -> str:
    """The changes as a phrase: those that fit alone, and those that do not."""
    fit = [f"{change.setting}={change.value}" for change in changes if change.value is not None]
    others = ", ".join(change.setting for change in changes if change.value is None)
    if fit:
        text = f"by the estimate each of these suffices alone: {', '.join(fit)}"
        return f"{text}; and these do not: {others}" if others else text
    if others:
        return f"by the estimate none of these suffices alone, so combine them: {others}"
    return "nothing is left to lower: take a smaller model, or a device with more memory"


def advice(
    recipe: Recipe, sizes: ModelSizes, held: Held, available: int, token_pixels: int | None
) -> list[Change]:
    """Every setting that could lower what `held` needs, each by itself.

    `held` did not fit into `available` bytes. Where the estimate says that it should have, its
    activations are multiplied by what makes up the difference, and so are those of every
    alternative; so this says what is likely, and not what is certain. A micro-batch of fewer rows
    is taken to hold the longest of these.
    """
    search = _Search(recipe, sizes, held, available, token_pixels)
    found = [
        search.fewer_rows(),
        search.smaller_pictures(),
        search.fewer_frames(),
        search.shorter_rows(),
        search.other_layout(),
        *search.other_recipes(),
    ]
    return [change for change in found if change is not None]


class _Search:
    """One method for each setting; None where it has nothing to lower."""

    def __init__(
        self,
        recipe: Recipe,
        sizes: ModelSizes,
        held: Held,
        available: int,
        token_pixels: int | None,
    ) -> None:
        self.recipe, self.sizes, self.held = recipe, sizes, held
        self.token_pixels, self.limit = token_pixels, available * (1 - HEADROOM)
        now = memory_of(recipe, sizes, held.tokens)
        self.factor = max(1.0, (available - now.standing) / max(1, now.activations))
        # Below one where rows have a prompt in common, which is there once.
        self.shared = held.tokens / held.tokens_of(held.rows)

    def fewer_rows(self) -> Change | None:
        rows = sorted(self.held.rows, key=lambda row: self.held.tokens_of([row]))
        # Whole micro-batches make a batch.
        counts = [n for n in range(1, len(rows)) if self.recipe.optim.batch_size % n == 0]
        needs = {n: self.need(rows[-n:]) for n in counts}
        return self.largest("optim.micro_batch_size", needs)

    def smaller_pictures(self) -> Change | None:
        largest = max((n for c in self.conditions() for n in c.images), default=0)
        if self.token_pixels is None:
            return None
        needs = {
            most * self.token_pixels: self.need(self.rows_with(_pictures_of(most)))
            for most in range(FEWEST_IMAGE_TOKENS, largest)
        }
        return self.largest("model.max_pixels", needs)

    def fewer_frames(self) -> Change | None:
        now = self.recipe.model.frames.num_frames
        if now is None or not any(c.clips for c in self.conditions()):
            return None
        needs = {
            frames: self.need(self.rows_with(_frames_of(frames / now)))
            for frames in range(FEWEST_FRAMES, now, 2)
        }
        return self.largest("model.frames.num_frames", needs)

    def shorter_rows(self) -> Change | None:
        setting, shrinks = "data.max_tokens", self.token_pixels is not None
        fewest = self.recipe.data.min_response_tokens
        longest = max(c.prompt + max(c.responses) for c in self.conditions())
        needs = {}
        for most in range(1, longest):
            cut = [_cut(c, most, shrinks=shrinks) for c in self.conditions()]
            # A row whose response gets no room would be dropped, not shortened.
            if all(most - c.prompt >= fewest for c in cut):
                needs[most] = self.need([(condition,) for condition in cut])
        if not needs:
            return Change(setting=setting, value=None, total=int(self.need(self.held.rows)))
        return self.largest(setting, needs)

    def other_layout(self) -> Change | None:
        if self.held.layout == "shared_prefix":
            return None
        total = self.need(self.held.rows, layout="shared_prefix")
        return self.change("scorer.layout", "shared_prefix", total)

    def other_recipes(self) -> Iterator[Change]:
        """What keeps the batch and lowers what it takes, or what stands beside it."""
        recipe, model = self.recipe, self.recipe.model
        if not model.gradient_checkpointing:
            changed = model.model_copy(update={"gradient_checkpointing": True})
            yield self.with_recipe("model.gradient_checkpointing", "true", model=changed)
        if model.lora is not None and model.quantization is None and self.sizes.shards == 1:
            changed = model.model_copy(update={"quantization": Quantization()})
            yield self.with_recipe("model.quantization", "{}", model=changed)
        copied = recipe.reference_kind() == "frozen_copy" and Need.REFERENCE in recipe.loss.needs
        if copied and recipe.data.online is None and Need.KL not in recipe.loss.needs:
            yield self.with_recipe("reference", "cached", reference="cached")

    def with_recipe(self, setting: str, value: str, **update: Any) -> Change:
        total = self.need(self.held.rows, recipe=self.recipe.model_copy(update=update))
        return self.change(setting, value, total)

    def largest(self, setting: str, needs: Mapping[int, float]) -> Change | None:
        """The largest value that fits; None where there is no lower value than now."""
        if not needs:
            return None
        fit = [value for value, total in needs.items() if total <= self.limit]
        best = max(fit, default=min(needs))
        return self.change(setting, str(best), needs[best])

    def change(self, setting: str, value: str, total: float) -> Change:
        fits = total <= self.limit
        return Change(setting=setting, value=value if fits else None, total=int(total))

    def need(
        self,
        rows: Sequence[RowSize],
        *,
        layout: Layout | None = None,
        recipe: Recipe | None = None,
    ) -> float:
        """Bytes in all, calibrated by what was seen."""
        tokens = self.shared * self.held.tokens_of(rows, layout)
        memory = memory_of(recipe or self.recipe, self.sizes, tokens)
        return memory.standing + self.factor * memory.activations

    def conditions(self) -> list[ConditionSize]:
        return [condition for row in self.held.rows for condition in row]

    def rows_with(self, change: Callable[[ConditionSize], ConditionSize]) -> list[RowSize]:
        return [tuple(change(condition) for condition in row) for row in self.held.rows]


def _pictures_of(most: int) -> Callable[[ConditionSize], ConditionSize]:
    return lambda c: replace(c, images=tuple(min(n, most) for n in c.images))


def _frames_of(share: float) -> Callable[[ConditionSize], ConditionSize]:
    return lambda c: replace(c, clips=tuple(int(n * share) for n in c.clips))


def _cut(condition: ConditionSize, most: int, *, shrinks: bool) -> ConditionSize:
    """As mmalign.prepare makes a row fit: smaller pictures first, then shorter responses."""
    over = condition.prompt + max(condition.responses) - most
    images = condition.images
    if shrinks and over > 0 and images:
        share = max(0, sum(images) - over) // len(images)
        images = tuple(min(n, max(FEWEST_IMAGE_TOKENS, share)) for n in images)
    cut = replace(condition, images=images)
    room = most - cut.prompt
    return replace(cut, responses=tuple(min(n, max(0, room)) for n in cut.responses))
