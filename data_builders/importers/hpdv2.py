"""HPDv2's rankings of pictures made for one prompt, and sets like it.

A row is `prompt`, the pictures (`image_path`; in older files `file_path`; embedded, `image`), and
what people said of them, in one of two columns:

- `rank`, as in test.json: a number for each picture, the lowest the best, equal numbers a tie.
- `human_preference`, as in train.json: of two pictures 1 for the preferred one and 0 for the other.

Sets like it also write ranks into `human_preference`. Bits and ranks run in opposite directions, so
they are told apart by what can be only one of them. Two pictures: bits, and what is neither 0 nor 1
is refused. More: ranks, counted from 0 or 1 up to at most the number of pictures; a list of zeros
and ones alone could be either and is refused. Both columns at once must agree.

Each two pictures of different rank become one pair, its id `row/better-worse`, both counted from 0:
12/0-3 prefers picture 0 of row 12 to its picture 3. Two pictures of one rank are none (`tie`).
`raw_annotations`, each annotator's own ranks, are not read.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_builders.importers.common import Bad, Row, Unusable, import_each, required, side, text
from mmalign.records import ImagePreference, Origin

PICTURES = ("image", "image_path", "file_path")
SAID = ("rank", "human_preference")


def read(source: Path) -> Iterator[ImagePreference | Bad]:
    """Image preferences from a JSON list, JSON lines or parquet.

    HPDv2's paths start in its folders train/ and test/, which is what a media root is for.
    """
    columns = ("id", "prompt", *PICTURES, *SAID)
    return import_each(source, _pairs, "import:hpdv2", columns=columns)


def levels_of(values: dict[str, Any], num_pictures: int) -> list[int]:
    """Each picture's level, 0 the best and equal levels ties.

    Raises Unusable: `missing_column`, or `bad_ranking` for what fits neither form.
    """
    found = []
    if values.get("rank"):
        found.append(_dense(_numbers(values, "rank", num_pictures)))
    if values.get("human_preference"):
        found.append(_preferred(_numbers(values, "human_preference", num_pictures)))
    if not found:
        raise Unusable("missing_column", "the row has neither rank nor human_preference")
    if found[0] != found[-1]:
        raise Unusable("bad_ranking", "rank and human_preference say different things")
    return found[0]


def _preferred(said: list[float]) -> list[int]:
    """Levels from bits of two pictures, or from ranks of more."""
    only_bits = set(said) <= {0, 1}
    if len(said) == 2 and only_bits:
        return _dense([-bit for bit in said])
    whole = all(number == int(number) for number in said)
    counted = min(said) in (0, 1) and max(said) - min(said) < len(said)
    if len(said) == 2:
        raise _bad(said, "is no 0 and 1 for two pictures; ranks belong into the column rank")
    if only_bits:
        raise _bad(said, "may be preferences or ranks; ranks belong into the column rank")
    if not (whole and counted):
        raise _bad(said, f"holds no ranks of {len(said)} pictures, counted from 0 or 1")
    return _dense(said)


def _dense(numbers: list[float]) -> list[int]:
    """The numbers' own order: 1, 4, 4, 9 gives 0, 1, 1, 2."""
    order = sorted(set(numbers))
    return [order.index(number) for number in numbers]


def _numbers(values: dict[str, Any], column: str, num_pictures: int) -> list[float]:
    said = values[column]
    if not isinstance(said, list) or len(said) != num_pictures:
        raise Unusable("wrong_length", f"{column} is no list of {num_pictures}, one a picture")
    for number in said:
        known = isinstance(number, int | float) and not isinstance(number, bool)
        if not known or not math.isfinite(number):
            raise Unusable("bad_ranking", f"{column} holds {str(number)[:80]!r}, no number")
    return said


def _bad(said: list[float], what: str) -> Unusable:
    return Unusable("bad_ranking", f"human_preference {str(said)[:80]} {what}")


def _pairs(row: Row) -> Iterator[ImagePreference | Bad]:
    values = row.values
    column = next((name for name in PICTURES if values.get(name)), "image_path")
    listed = required(values, column)
    if not isinstance(listed, list) or len(listed) < 2:
        raise Unusable("wrong_length", f"{column} is no list of two pictures or more")
    pictures = [side(picture, f"{column}[{index}]") for index, picture in enumerate(listed)]
    levels = levels_of(values, len(pictures))
    prompt = text(values, "prompt")
    for i, j in itertools.combinations(range(len(pictures)), 2):
        better, worse = (i, j) if levels[i] <= levels[j] else (j, i)
        id = f"{row.id}/{better}-{worse}"
        if levels[i] == levels[j]:
            detail = f"pictures {i} and {j} have one rank"
            yield Bad(where=row.where, id=id, reason="tie", detail=detail)
            continue
        ranks = {"levels": [levels[better], levels[worse]], "pictures": len(pictures)}
        yield ImagePreference(
            id=id,
            prompt=prompt,
            chosen=pictures[better],
            rejected=pictures[worse],
            origin=Origin(detail=json.dumps(ranks)),
        )
