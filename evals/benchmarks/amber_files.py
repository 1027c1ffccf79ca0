"""AMBER's released files: annotations, and rows that belong to them by id."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from evals.base import Row, text_field
from evals.sources import of_kind, read_json
from mmalign.errors import DataError

GENERATIVE = "generative"
# What each type of annotation counts under; the two of relations are one to the script.
KINDS: dict[str, tuple[str, ...]] = {
    GENERATIVE: (),
    "discriminative-hallucination": ("existence",),
    "discriminative-attribute-state": ("attribute", "state"),
    "discriminative-attribute-number": ("attribute", "number"),
    "discriminative-attribute-action": ("attribute", "action"),
    "discriminative-relation": ("relation",),
    "relation": ("relation",),
}
DIMENSIONS = ("existence", "attribute", "state", "number", "action", "relation")


def read_annotations(path: Path, relations: Mapping[str, object]) -> dict[int, Row]:
    """What is annotated, by id: type, and label of a question, truth and hallu of a description.

    Raises DataError, naming the row, on anything broken, and on a word that is in no relation.
    """
    found: dict[int, Row] = {}
    for place, row in enumerate(read_json(path, list), start=1):
        where = f"{path}, row {place}"
        id = _number(of_kind(row, dict, where), where)
        kind = text_field(row, "type", where)
        if kind not in KINDS:
            raise DataError("type is unknown", where=where, got=kind, wanted=", ".join(KINDS))
        if id in found:
            raise DataError("id appears twice", where=where, got=id)
        if kind != GENERATIVE:
            if row.get("truth") not in ("yes", "no"):
                got = row.get("truth")
                raise DataError("truth is wrong", where=where, got=got, wanted="yes or no")
            found[id] = {"type": kind, "label": row["truth"], "truth": [], "hallu": []}
            continue
        for field in ("truth", "hallu"):
            for word in of_kind(row.get(field), list, f"{where}, {field}"):
                if not isinstance(word, str) or word not in relations:
                    what = f"{field} has a word without relations"
                    raise DataError(what, where=where, got=repr(word))
        found[id] = {"type": kind, "label": None, "truth": row["truth"], "hallu": row["hallu"]}
    return found


def read_answered(
    path: Path, annotated: Collection[int], fields: tuple[str, ...]
) -> Iterator[tuple[int, Row]]:
    """The id and the row of each annotated thing that a JSON file lists, with these texts.

    Raises DataError, naming the row, on an id that is not annotated or appears twice.
    """
    seen: set[int] = set()
    for place, row in enumerate(read_json(path, list), start=1):
        where = f"{path}, row {place}"
        id = _number(of_kind(row, dict, where), where)
        if id not in annotated:
            raise DataError("is not annotated", where=where, got=f"id {id}")
        if id in seen:
            raise DataError("id appears twice", where=where, got=id)
        seen.add(id)
        yield id, {name: text_field(row, name, where) for name in fields}


def _number(row: Row, where: str) -> int:
    id = row.get("id")
    if not isinstance(id, int) or isinstance(id, bool):
        raise DataError("field id is no whole number", where=where, got=repr(id))
    return id
