"""Pick-a-Pic's parquet, and sets made like it: Pick-Style, Pick-Safety.

A row is `caption`, two pictures `jpg_0` and `jpg_1`, and their labels `label_0` and `label_1`: the
share of the preference that each got, 1 and 0, or 0.5 each for a tie. Labels between are kept: at
0.7 and 0.3 picture 0 is chosen, and `p_target` is 0.7.

A tie is left out: equal labels, or `has_label` false. So is a row whose labels are no two numbers
in [0, 1] that add up to 1. The released MaPO script decides by `label_0` alone, under which any
label but 0, also that of a tie, makes picture 0 the winner.

Who made the pictures and their uids stay in the origin's detail. Columns that are not named here,
such as the urls, are not read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_builders.importers.common import Bad, Row, Unusable, import_rows, side, text
from mmalign.records import ImagePreference, Origin

KEPT = ("ranking_id", "model_0", "model_1", "image_0_uid", "image_1_uid")
COLUMNS = ("caption", "jpg_0", "jpg_1", "label_0", "label_1", "has_label", *KEPT)

# Labels may be 32-bit floats, in which 0.7 + 0.3 is not quite 1.
ROUNDING = 1e-6


def read(source: Path) -> Iterator[ImagePreference | Bad]:
    """Image preferences from parquet, a file or a folder; a row group at a time.

    Several pairs of one ranking share its `ranking_id`: theirs is `ranking_id/place`, such as
    17/train-00000-of-00645-3.
    """
    return import_rows(source, _pair, "import:pickapic", columns=COLUMNS)


def decided(values: dict[str, Any]) -> tuple[int, float]:
    """Which picture is preferred, 0 or 1, and its label.

    Raises Unusable: `tie`, or `bad_labels`.
    """
    if values.get("has_label") is False:
        raise Unusable("tie", "has_label is false: neither picture was preferred")
    labels: list[Any] = [values.get("label_0"), values.get("label_1")]
    if not all(map(_is_share, labels)) or abs(sum(labels) - 1) > ROUNDING:
        told = f"label_0 and label_1 are {labels[0]!r} and {labels[1]!r}"
        raise Unusable("bad_labels", f"{told}; wanted two numbers in [0, 1] that add up to 1")
    if labels[0] == labels[1]:
        raise Unusable("tie", "both labels are 0.5")
    winner = int(labels[1] > labels[0])
    return winner, float(labels[winner])


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _pair(row: Row) -> ImagePreference:
    values = row.values
    winner, p_target = decided(values)
    pictures = [side(values.get(name), name) for name in ("jpg_0", "jpg_1")]
    kept = {name: values[name] for name in KEPT if values.get(name) is not None}
    ranking = values.get("ranking_id")
    return ImagePreference(
        id=row.place if ranking is None else f"{ranking}/{row.place}",
        prompt=text(values, "caption"),
        chosen=pictures[winner],
        rejected=pictures[1 - winner],
        p_target=p_target,
        origin=Origin(detail=json.dumps({"chosen": winner} | kept, default=str)),
    )
