"""Rows on their way to the model: prepared, counted before training, cached, cut into batches."""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Generic, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import DataLoader

from mmalign.errors import MediaError, TrainingError
from mmalign.log import progress
from mmalign.media import read_bytes
from mmalign.prepare import RowDropped
from mmalign.records import Media, media_of
from mmalign.scores import PairTable, RolloutTable, Totals
from mmalign.scoring.candidates import EncodedMedia
from mmalign.scoring.plan import Plan
from mmalign.scoring.planner import Planner
from mmalign.store import Dataset
from trainers.config import DataConfig
from trainers.feature_store import PictureFeatures
from trainers.memory import RowSize, row_size
from trainers.objectives.base import Objective, PreparedRow, collate, table

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """What was found in a dataset before training. Lists run over the rows that can be used.

    rows: their numbers in the dataset. chosen_tokens, tokens: their sizes; see PreparedRow.
    kinds: which media they hold, in the words of `trainers.balance.KINDS`.
    dropped: ids of the other rows, by reason.
    pictures: tokens of each row's pictures by digest, where their features are to be stored.
    """

    rows: list[int]
    ids: list[str]
    chosen_tokens: list[float]
    tokens: list[int]
    kinds: list[str]
    dropped: dict[str, list[str]]
    pictures: list[dict[str, int]] = field(default_factory=list)

    def totals(self, places: Iterable[int]) -> Totals:
        """The loss's denominators for an optimizer step made of these places."""
        counts = [self.chosen_tokens[place] for place in places]
        return Totals(num_pairs=len(counts), num_chosen_tokens=sum(counts))

    def num_tokens(self, places: Iterable[int]) -> int:
        """All tokens of an optimizer step: prompts once, and every response."""
        return sum(self.tokens[place] for place in places)

    def describe(self) -> str:
        """Used and dropped rows as a phrase for the log."""
        reasons = Counter({reason: len(ids) for reason, ids in self.dropped.items()})
        told = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())
        return f"{len(self.rows)} rows used, {reasons.total()} dropped" + (
            f" ({told})" * bool(told)
        )

    def as_json(self) -> dict[str, Any]:
        """Plain values; `Survey(**values)` reads them back."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One micro-batch: places in the survey, the plan of its candidates, and its pairs or rollouts.

    digests, sizes: of each row, what tells its tokens from others', and its candidates' lengths.
    num_pairs: of each row, or its rollouts; they follow one another in the table.
    tokens: of each row, what it is made of; tells what would fit where memory runs out.
    """

    places: list[int]
    plan: Plan
    table: PairTable | RolloutTable
    digests: list[str]
    sizes: list[list[int]]
    num_pairs: list[int]
    tokens: list[RowSize]

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`."""
        columns = {f.name: getattr(self.table, f.name) for f in fields(self.table)}
        moved = {name: column.to(device) for name, column in columns.items() if column is not None}
        return replace(self, plan=self.plan.to(device), table=replace(self.table, **moved))


class Rows:
    """A dataset's rows as an objective prepares them, the latest ones kept in memory.

    pictures: where their pictures' features are stored, if they are.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        objective: Objective,
        planner: Planner,
        config: DataConfig,
        pictures: PictureFeatures | None = None,
    ) -> None:
        self.dataset, self.objective = dataset, objective
        self.planner, self.pictures = planner, pictures
        self.limit, self.workers = config.limit, config.workers
        self._cache: OrderedDict[int, PreparedRow] = OrderedDict()
        self._free = config.cache_mb * 2**20
        self._files: dict[int, str] = {}

    def prepared(self, row: int) -> PreparedRow:
        """Row `row` of the dataset in tokens. Raises RowDropped or MediaError."""
        if row in self._cache:
            self._cache.move_to_end(row)
            return self._cache[row]
        made = self.objective.prepare(self.dataset[row])
        if self.pictures is not None:
            made = self.pictures.slim(made)
        self._cache[row] = made
        self._free -= made.num_bytes
        while self._free < 0:
            self._free += self._cache.popitem(last=False)[1].num_bytes
        return made

    def survey(self, accelerator: Accelerator) -> Survey:
        """Prepare every row once, so that training meets no surprise; processes share the work.

        Raises TrainingError where no row is left.
        """
        mine = range(accelerator.process_index, self._count(), accelerator.num_processes)
        examined = _load(self._examine, mine, self.workers)
        mine_found = list(progress(examined, label="rows", total=len(mine)))
        found = sorted(gather_object(mine_found), key=lambda row: row.number)
        used = [row for row in found if row.dropped is None]
        dropped: dict[str, list[str]] = {}
        for row in found:
            if row.dropped is not None:
                dropped.setdefault(row.dropped, []).append(row.id)
        survey = Survey(
            rows=[row.number for row in used],
            ids=[row.id for row in used],
            chosen_tokens=[row.chosen_tokens for row in used],
            tokens=[row.tokens for row in used],
            kinds=[row.kind for row in used],
            dropped=dropped,
            pictures=[row.pictures for row in used],
        )
        if not used:
            raise TrainingError(
                "no row can be trained on",
                where=str(self.dataset.path),
                got=survey.describe(),
                fix="raise data.max_tokens, or look at the rows with `mmalign data`",
            )
        return survey

    def media(self, accelerator: Accelerator) -> str:
        """A hash over the files that rows name by path, which the dataset's own leaves out.

        Processes share the reading. A file that cannot be read counts as such.
        """
        found: dict[str, str] = {}
        by_row: dict[int, list[str]] = {}
        mine = range(accelerator.process_index, self._count(), accelerator.num_processes)
        for row in progress(mine, label="media"):
            for _, media in media_of(self.dataset[row]):
                path = media.path
                if media.bytes is not None or path is None:
                    continue
                if path not in found:
                    found[path] = self._digest(media)
                by_row.setdefault(row, []).append(found[path])
        self._files = {row: " ".join(its) for row, its in gather_object(list(by_row.items()))}
        everywhere = sorted(set(gather_object(list(found.items()))))
        return hashlib.sha256(repr(everywhere).encode()).hexdigest()

    def files_of(self, row: int) -> str:
        """Digests of the files that row `row` names by path, in order, as `media` met them."""
        return self._files.get(row, "")

    def batch(self, survey: Survey, places: list[int]) -> Batch:
        """The micro-batch of these places, on the CPU."""
        return self.batch_of(places, [self.prepared(survey.rows[place]) for place in places])

    def batch_of(self, places: list[int], rows: list[PreparedRow]) -> Batch:
        """The micro-batch of rows that stand at these places, on the CPU."""
        batch = collate(rows)
        if self.pictures is not None:
            batch = self.pictures.attach(batch)
        return Batch(
            places=places,
            plan=self.planner(batch),
            table=table(rows),
            digests=[row.digest for row in rows],
            sizes=[[len(c.response_ids) for c in row.candidates] for row in rows],
            num_pairs=[len(row.pairs) for row in rows],
            tokens=[row_size(row) for row in rows],
        )

    def records(self, survey: Survey, places: list[int]) -> list[Any]:
        """The dataset's records at these places."""
        return [self.dataset[survey.rows[place]] for place in places]

    def batches(self, survey: Survey, cuts: Iterable[list[int]]) -> Iterator[Batch]:
        """A batch for each list of places, in order, made ahead of time where workers > 0."""
        return _load(lambda places: self.batch(survey, places), cuts, self.workers)

    def encodable(self, wanted: Iterable[tuple[int, str]]) -> Iterator[EncodedMedia]:
        """A picture with its pixels for each (row, digest), in order."""
        return _load(self._picture, wanted, self.workers)

    def drop_pixels(self) -> None:
        """Forget the pixels of kept rows' pictures whose features are stored."""
        assert self.pictures is not None
        for row, made in self._cache.items():
            self._cache[row] = self.pictures.slim(made)
            self._free += made.num_bytes - self._cache[row].num_bytes

    def _picture(self, item: tuple[int, str]) -> EncodedMedia:
        assert self.pictures is not None
        row, digest = item
        return self.pictures.find(self.prepared(row), digest)

    def _examine(self, row: int) -> _Examined:
        try:
            made = self.prepared(row)
        except RowDropped as drop:
            return _Examined(number=row, id=self._id(row), dropped=drop.reason)
        except MediaError:
            return _Examined(number=row, id=self._id(row), dropped="unreadable_media")
        return _Examined(
            number=row,
            id=made.id,
            chosen_tokens=made.num_chosen_tokens,
            tokens=made.num_tokens,
            kind=made.kind,
            pictures={} if self.pictures is None else self.pictures.sizes(made),
        )

    def _count(self) -> int:
        return min(len(self.dataset), self.limit or len(self.dataset))

    def _digest(self, media: Media) -> str:
        try:
            return hashlib.sha256(read_bytes(media, self.dataset.media_root)).hexdigest()
        except MediaError:
            return "unreadable"

    def _id(self, row: int) -> str:
        return self.dataset[row].id


@dataclass(frozen=True, slots=True, kw_only=True)
class _Examined:
    """What the survey finds in one row. dropped: why it cannot be used, if so."""

    number: int
    id: str
    chosen_tokens: float = 0
    tokens: int = 0
    kind: str = "text"
    pictures: dict[str, int] = field(default_factory=dict)
    dropped: str | None = None


class _Mapped(torch.utils.data.Dataset[T], Generic[T]):
    """A function as a torch dataset, so that a DataLoader's processes can call it."""

    def __init__(self, function: Callable[[Any], T]) -> None:
        self.function = function

    def __getitem__(self, item: Any) -> T:
        return self.function(item)


def _load(function: Callable[[Any], T], items: Iterable[Any], workers: int) -> Iterator[T]:
    """`map(function, items)`, in order, by `workers` processes; by this one where 0."""
    if workers == 0:
        return map(function, items)
    loader = DataLoader(
        _Mapped(function),
        sampler=items,
        batch_size=None,
        num_workers=workers,
        # A generator of its own: the loader must not draw from the run's random numbers.
        generator=torch.Generator(),
    )
    return iter(loader)
