"""What a builder of rankings shows when it is done: reasons, who wins, and the first rankings."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

import yaml

from data_builders.built_page import PREVIEW
from data_builders.clip_page import ClipArtist, detail_of
from data_builders.inspect import by_reason
from mmalign.errors import MediaError
from mmalign.media import open_image
from mmalign.records import RankedResponse, Ranking, prompt_text
from mmalign.report.page import Card, Kind, Marked, Page, thumbnail
from mmalign.store import Dataset, open_dataset

LONGEST_TITLE = 100  # characters; a longer prompt stands among the texts
READING = """\
Each card has its responses best first; the same place means a tie. Below a response stands its \
critique, and before that the note that it was written from, where there was one."""


def write_ranking_page(path: Path, limit: int = 24) -> Path:
    """Write `preview.html` into a dataset of rankings; returns its path."""
    dataset = open_dataset(path, Ranking)
    manifest = dataset.manifest
    num_inputs = sum(manifest.counts.values())
    inputs = "rankings" if manifest.builder == "expand_critiques" else "examples"
    page = Page(
        f"{manifest.builder}: {len(dataset)} rankings",
        f"from {num_inputs} {inputs}, seed {manifest.seed}, content {manifest.content_hash[:12]}",
    )
    page.heading(f"What became of the {inputs}")
    rows = [[r, n, _share(n, num_inputs)] for r, n in by_reason(manifest.counts).items()]
    page.table(["reason", inputs, "share"], rows)
    tally = _Tally()
    for ranking in dataset:
        tally.add(ranking)
    _numbers(page, tally)
    page.heading("What made the rankings")
    page.table(["part", "value"], [[name, str(value)] for name, value in manifest.model.items()])
    page.code(yaml.safe_dump(manifest.config, sort_keys=False, allow_unicode=True), "its config")
    page.heading("Rankings")
    page.paragraph(f"The first {min(limit, len(dataset))} rankings. {READING}")
    with ClipArtist() as artist:
        page.gallery([_card(one, dataset, artist) for one in itertools.islice(dataset, limit)])
    page.write(path / PREVIEW)
    return path / PREVIEW


@dataclass
class _Writer:
    """What is counted of one writer's responses; wins are over others' in the same ranking."""

    words: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    num_first: int = 0
    num_won: int = 0
    num_compared: int = 0


@dataclass
class _Tally:
    """What is counted over all rankings."""

    writers: dict[str, _Writer] = field(default_factory=dict)
    num_pairs: int = 0
    num_ties: int = 0
    num_best_worst: int = 0
    num_longer_wins: int = 0
    num_of_unequal_length: int = 0
    num_earlier_wins: int = 0
    num_placed: int = 0
    critique_words: list[int] = field(default_factory=list)
    became: Counter[str] = field(default_factory=Counter)

    def add(self, ranking: Ranking) -> None:
        """Count one ranking."""
        detail, responses = detail_of(ranking), ranking.responses
        names = _writers(ranking)
        self.became.update(detail.get("became", ()))
        self.critique_words += [len(r.critique.split()) for r in responses if r.critique]
        best, worst = min(r.rank for r in responses), max(r.rank for r in responses)
        for response, its in zip(responses, names, strict=True):
            for name in its:
                writer = self.writers.setdefault(name, _Writer())
                writer.words.append(len(response.text.split()))
                writer.scores += [] if response.score is None else [response.score]
                writer.num_first += response.rank == best
        if best != worst:
            ends = Counter(r.rank for r in responses)
            self.num_best_worst += ends[best] * ends[worst]
        places = detail.get("shown_at")
        for i, j in itertools.combinations(range(len(responses)), 2):
            if responses[i].rank == responses[j].rank:
                self.num_ties += 1
                continue
            won, lost = (i, j) if responses[i].rank < responses[j].rank else (j, i)
            self.num_pairs += 1
            self._add_lengths(responses[won], responses[lost])
            if places:
                self.num_placed += 1
                self.num_earlier_wins += places[won] < places[lost]
            for name in names[won]:
                self.writers[name].num_won += 1
                self.writers[name].num_compared += 1
            for name in names[lost]:
                self.writers[name].num_compared += 1

    def _add_lengths(self, better: RankedResponse, worse: RankedResponse) -> None:
        gap = len(better.text.split()) - len(worse.text.split())
        self.num_of_unequal_length += gap != 0
        self.num_longer_wins += gap > 0


def _numbers(page: Page, tally: _Tally) -> None:
    """Who wins, what the rankings give, and by what a judge may have been led."""
    if tally.writers:
        page.heading("Who wrote, and how it was ranked")
        page.paragraph(
            "A response that several wrote counts for each. It wins over every response of the "
            "same ranking that has a worse rank; ties are left out."
        )
        columns = ["writer", "responses", "words", "score", "best of its ranking", "wins"]
        page.table(columns, [_row(name, tally.writers[name]) for name in sorted(tally.writers)])
    page.heading("What the rankings give")
    rows: list[list[object]] = [
        ["pairs of different rank", tally.num_pairs],
        ["of these, best against worst", tally.num_best_worst],
        ["ties, which are no pairs", tally.num_ties],
        ["the longer response wins", _share(tally.num_longer_wins, tally.num_of_unequal_length)],
    ]
    if tally.num_placed:
        share = _share(tally.num_earlier_wins, tally.num_placed)
        rows.append(["the response shown to the judge earlier wins", share])
    if tally.critique_words:
        rows.append(["critiques", len(tally.critique_words)])
        rows.append(["words of a critique, mean", round(mean(tally.critique_words), 1)])
    page.table(["of all rankings", "value"], rows)
    if tally.became:
        page.heading("What became of the notes")
        num = tally.became.total()
        counts = by_reason(tally.became)
        rows = [[_told(became), n, _share(n, num)] for became, n in counts.items()]
        page.table(["note of a response", "responses", "share"], rows)


def _row(name: str, writer: _Writer) -> list[object]:
    count = len(writer.words)
    return [
        name,
        count,
        round(mean(writer.words), 1),
        round(mean(writer.scores), 2) if writer.scores else None,
        _share(writer.num_first, count),
        _share(writer.num_won, writer.num_compared),
    ]


def _writers(ranking: Ranking) -> list[tuple[str, ...]]:
    """Who wrote each response: by the builder's short names, else the model's, else nobody."""
    told = detail_of(ranking).get("writers")
    if told:
        return [tuple(dict.fromkeys(names)) for names in told]
    return [(r.model,) if r.model else () for r in ranking.responses]


def _card(ranking: Ranking, dataset: Dataset[Ranking], artist: ClipArtist) -> Card:
    strips, problems = artist.strips(ranking, dataset.media_root)
    images: list[str] = []
    for media in ranking.images:
        try:
            images.append(thumbnail(open_image(media, dataset.media_root)))
        except MediaError as error:
            problems.append(str(error))
    detail, names = detail_of(ranking), _writers(ranking)
    notes = detail.get("notes") or [None] * len(names)
    became = detail.get("became") or [""] * len(names)
    prompt, facts = prompt_text(ranking.prompt).strip(), [ranking.origin.reason, *_facts(detail)]
    texts: list[tuple[str, str | Marked]] = []
    if is_short := 0 < len(prompt) <= LONGEST_TITLE and "\n" not in prompt:
        facts.insert(0, ranking.id)
    else:
        texts.append(("prompt", prompt))
    for i in sorted(range(len(names)), key=lambda i: ranking.responses[i].rank):
        response = ranking.responses[i]
        texts.append((_label(response, ranking, names[i]), _text(response, notes[i], became[i])))
    texts += [("media", problem) for problem in problems]
    return Card(
        title=prompt if is_short else ranking.id,
        images=images,
        texts=texts,
        note=", ".join(facts),
        strips=strips,
    )


def _label(response: RankedResponse, ranking: Ranking, names: Sequence[str]) -> str:
    tied = sum(other.rank == response.rank for other in ranking.responses) > 1
    place = 1 + sum(other.rank < response.rank for other in ranking.responses)
    parts = [f"place {place}{', tied' if tied else ''}"]
    parts += [f"score {response.score:.3g}"] if response.score is not None else []
    # A path or a hub name with its revision is too much for a label.
    return " · ".join([*parts, *(name.rpartition("/")[2].partition("@")[0] for name in names)])


def _text(response: RankedResponse, note: str | None, became: str) -> Marked:
    """The response, its note where a critique was made of it, and the critique."""
    parts: list[tuple[str, Kind | None]] = [(response.text, None)]
    is_kept = became.startswith("note_kept")
    below = {
        "note": None if is_kept else note,
        "note, kept" if is_kept else "critique": response.critique,
    }
    for name, text in below.items():
        if text:
            parts.append((f"\n\n{name}  ", "strong"))
            parts.append((text, "quiet"))
    return Marked(tuple(parts))


def _facts(detail: dict[str, object]) -> Iterator[str]:
    if (tries := detail.get("judge_tries")) not in (None, 1):
        yield f"judge asked {tries} times"
    if isinstance(lost := detail.get("lost"), dict):
        yield from (f"{count} answers {reason}" for reason, count in lost.items())
    if isinstance(became := detail.get("became"), list):
        yield "notes: " + ", ".join(map(_told, became))


def _told(became: str) -> str:
    return became.replace("_", " ").replace(":", ": ")


def _share(part: int, whole: int) -> str | None:
    return f"{100 * part / whole:.1f} %" if whole else None
