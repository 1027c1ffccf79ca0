"""Look into a dataset directory: what is wrong with its rows, and what its numbers are."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_builders.picture_pairs import PicturePairs, numbers_text, same_picture
from mmalign.answers import yes_no
from mmalign.errors import DataError, MediaError
from mmalign.log import progress
from mmalign.media import media_key, open_image, resolve
from mmalign.records import (
    Example,
    ImagePreference,
    Media,
    Preference,
    Ranking,
    Record,
    Verifiable,
    check,
    media_of,
)
from mmalign.store import Dataset, content_hash
from mmalign.verify import VERIFIERS, truth_problem


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing wrong with a dataset; `row` counts from 0 and is None for the whole directory."""

    row: int | None
    id: str = ""
    column: str
    what: str
    fix: str

    def __str__(self) -> str:
        where = "dataset" if self.row is None else f"row {self.row} (id {self.id})"
        return f"{where}: {self.column} {self.what}; {self.fix}"


def validate(dataset: Dataset[Any], *, skip_media: bool = False) -> Iterator[Finding]:
    """Yield what is wrong: in the shards, the rows, the ids, and the pictures' files and hashes."""
    if content_hash(dataset.path, dataset.manifest.shards) != dataset.manifest.content_hash:
        yield Finding(
            row=None,
            column="content_hash",
            what="is not that of the shards: they changed after the manifest was written",
            fix="build the dataset again",
        )
    first_row: dict[str, int] = {}
    media_errors: dict[tuple[str, str | None], MediaError | None] = {}
    for row in progress(range(len(dataset)), label="validating"):
        try:
            record = dataset[row]
        except DataError as error:
            yield Finding(row=row, column="row", what=error.what, fix="build the dataset again")
            continue
        for problem in check(record):
            yield Finding(
                row=row, id=record.id, column=problem.column, what=problem.what, fix=problem.fix
            )
        if first_row.setdefault(record.id, row) != row:
            yield Finding(
                row=row,
                id=record.id,
                column="id",
                what=f"is that of row {first_row[record.id]} too",
                fix="give every row an id of its own",
            )
        if isinstance(record, Verifiable) and (unusable := truth_problem(record)):
            yield Finding(
                row=row,
                id=record.id,
                column="answer" if record.verifier in VERIFIERS else "verifier",
                what=f"cannot be checked: {unusable}",
                fix="mend the row, or drop it",
            )
        if isinstance(record, ImagePreference) and same_picture(record):
            yield Finding(
                row=row,
                id=record.id,
                column="rejected",
                what="is the chosen picture",
                fix="drop the row: it teaches nothing",
            )
        for column, media in () if skip_media else media_of(record):
            key = (media_key(media), media.path)
            if key not in media_errors:
                media_errors[key] = _media_error(column, media, dataset.media_root)
            if error := media_errors[key]:
                yield Finding(
                    row=row,
                    id=record.id,
                    column=column,
                    what=f"{media.path or 'embedded image'} {error.what}",
                    fix=error.fix or "replace the file or drop the row",
                )


def stats(dataset: Dataset[Any]) -> dict[str, Any]:
    """The numbers of a dataset, as plain values: lengths, bias, duplicates, sizes, reasons."""
    lengths: dict[str, list[tuple[int, int]]] = {}
    answers: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    rows: Counter[Any] = Counter()
    found: dict[str, bool] = {}
    num_equal = 0
    pairs = PicturePairs()
    for record in progress(dataset, label="counting", total=len(dataset)):
        for name, text in _texts(record):
            lengths.setdefault(name, []).append((len(text.split()), len(text)))
            if name in ("chosen", "answer"):
                answers[yes_no(text) or "other"] += 1
        media = [item for _, item in media_of(record)]
        for path in (item.path for item in media if item.bytes is None and item.path):
            if path not in found:
                found[path] = _exists(path, dataset.media_root)
        num_equal += isinstance(record, Preference) and record.chosen == record.rejected
        if isinstance(record, ImagePreference):
            num_equal += same_picture(record)
            pairs.add(record, dataset.media_root)
        reasons[record.origin.reason or "none given"] += 1
        rows[record.prompt, tuple(map(media_key, media))] += 1
    return {
        "kind": dataset.manifest.kind,
        "num_records": len(dataset),
        "lengths": {name: _summary(values) for name, values in lengths.items()},
        "length_bias": _length_bias(lengths),
        "duplicates": {
            "same_prompt_and_media": sum(rows.values()) - len(rows),
            "chosen_is_rejected": num_equal,
        },
        "yes_no": {"yes": answers["yes"], "no": answers["no"], "other": answers["other"]},
        "missing_media": sorted(path for path, exists in found.items() if not exists),
        "picture_pairs": pairs.numbers(),
        "reasons": by_reason(reasons),
    }


def by_reason(counts: Mapping[str, int]) -> dict[str, int]:
    """Counts in the order of their reasons, numbers as numbers: rank2 comes before rank10."""
    # Split at its numbers, a reason is text, number, text, …: like meets like.
    parts = {reason: re.split(r"([0-9]+)", reason) for reason in counts}
    keys = {
        reason: [int(part) if i % 2 else part for i, part in enumerate(split)]
        for reason, split in parts.items()
    }
    return {reason: counts[reason] for reason in sorted(counts, key=keys.__getitem__)}


def stats_text(numbers: dict[str, Any]) -> str:
    """`stats` for people."""
    lines = [f"{numbers['num_records']} {numbers['kind']} records"]
    if numbers["lengths"]:
        lines.append(f"\n{'length':<10} {'unit':<10} {'mean':>8} {'median':>8} {'p95':>8}")
    for name, units in numbers["lengths"].items():
        for unit, value in units.items():
            cells = " ".join(f"{value[key]:>8.1f}" for key in ("mean", "median", "p95"))
            lines.append(f"{name:<10} {unit:<10} {cells}")
    if bias := numbers["length_bias"]:
        lines.append(
            f"\nchosen has more words than rejected in {bias['share_chosen_longer']:.1%} of pairs, "
            f"fewer in {bias['share_rejected_longer']:.1%}; "
            f"mean difference {bias['mean_difference_words']:+.1f} words"
        )
    balance = numbers["yes_no"]
    if answered := balance["yes"] + balance["no"]:
        lines.append(
            f"\nyes/no answers: {balance['yes']} yes, {balance['no']} no "
            f"({balance['yes'] / answered:.1%} yes), {balance['other']} other"
        )
    twice = numbers["duplicates"]
    lines.append(f"\nrows whose prompt and media came before: {twice['same_prompt_and_media']}")
    sides = "pictures" if numbers["picture_pairs"] else "responses"
    lines.append(f"pairs whose {sides} are equal: {twice['chosen_is_rejected']}")
    lines += numbers_text(numbers["picture_pairs"])
    missing = numbers["missing_media"]
    shown = f" ({', '.join(missing[:3])}{', …' if len(missing) > 3 else ''})" if missing else ""
    lines.append(f"media files missing: {len(missing)}{shown}")
    lines.append("\nby reason:")
    lines += [f"  {count:>8}  {reason}" for reason, count in numbers["reasons"].items()]
    return "\n".join(lines)


def _media_error(column: str, media: Media, root: Path) -> MediaError | None:
    try:
        if not column.endswith("videos"):
            open_image(media, root, verify=True)
        elif media.bytes is None and not resolve(media, root).is_file():
            return MediaError("is missing", fix="correct the path or the media root")
    except MediaError as error:
        return error
    return None


def _exists(path: str, root: Path) -> bool:
    try:
        return resolve(Media(path=path), root).is_file()
    except (MediaError, OSError):
        return False


def _texts(record: Record) -> list[tuple[str, str]]:
    """The responses of a record with the names they are counted under."""
    match record:
        case Preference():
            return [("chosen", record.chosen), ("rejected", record.rejected)]
        case Ranking():
            return [("response", response.text) for response in record.responses]
        case Example() | Verifiable():
            return [] if record.answer is None else [("answer", record.answer)]
        case ImagePreference():
            return [("prompt", record.prompt)]


def _summary(values: list[tuple[int, int]]) -> dict[str, dict[str, float]]:
    import numpy as np

    return {
        unit: {
            "mean": float(np.mean(column)),
            "median": float(np.median(column)),
            "p95": float(np.percentile(column, 95)),
        }
        for unit, column in zip(("words", "characters"), zip(*values, strict=True), strict=True)
    }


def _length_bias(lengths: dict[str, list[tuple[int, int]]]) -> dict[str, float] | None:
    if "rejected" not in lengths:
        return None
    pairs = zip(lengths["chosen"], lengths["rejected"], strict=True)
    gaps = [chosen - rejected for (chosen, _), (rejected, _) in pairs]
    return {
        "share_chosen_longer": sum(gap > 0 for gap in gaps) / len(gaps),
        "share_rejected_longer": sum(gap < 0 for gap in gaps) / len(gaps),
        "mean_difference_words": sum(gaps) / len(gaps),
    }
