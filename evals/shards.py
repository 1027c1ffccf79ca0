"""Evaluations in parts, without Ray: answer a part of the questions each, merge, score.

mmalign eval run recipe.yaml --shard 1/2 output=part1     # anywhere
mmalign eval run recipe.yaml --shard 2/2 output=part2
mmalign eval merge recipe.yaml --part part1 --part part2
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from evals.answer_files import ANSWERS, Answer, line_of, read_answers, read_model, write_model
from evals.answering import answer, asked_by
from evals.config import EvalRecipe
from mmalign.errors import ConfigError, DataError
from mmalign.generate.base import Generator
from mmalign.store import write_atomically


def parse_shard(text: str) -> tuple[int, int]:
    """ "2/8" to (1, 8): counted from one in words, from zero here. Raises ConfigError."""
    number, _, count = text.partition("/")
    if number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count):
        return int(number) - 1, int(count)
    raise ConfigError(
        "is no part of a whole", where="--shard", got=text, wanted="such as 1/4, up to 4/4"
    )


def answer_shard(
    recipe: EvalRecipe, index: int, count: int, generator: Generator | None = None
) -> Path:
    """Answer part `index` of `count` of every benchmark's requests, and score nothing.

    Parts are runs of neighbours, so that the questions on one picture stay together.
    Returns the output folder.
    """
    parts = [
        (benchmark, requests[len(requests) * index // count : len(requests) * (index + 1) // count])
        for benchmark, requests in asked_by(recipe)
    ]
    answer(recipe, parts, generator)
    return recipe.output


def merge(folder: Path, parts: Sequence[Path]) -> int:
    """Put the answers of several output folders, and those already there, into one folder.

    An answer takes the place of one that was not given, as to a picture that could not be read.
    Returns how many there are. Raises DataError where the folders are of different models, or
    answer one question differently: nothing is written then.
    """
    parts = [one for one in parts if one.absolute() != folder.absolute()]
    if not parts or (folder / ANSWERS).exists():
        parts = [folder, *parts]
    model, merged, origin = read_model(parts[0]), dict[str, Answer](), dict[str, Path]()
    for part in parts:
        other = read_model(part)
        if other["fingerprint"] != model["fingerprint"]:
            raise DataError(
                "the answers are of different models, or of one loaded differently",
                where=f"{parts[0]} and {part}",
                got=f"{model['name']} and {other['name']}",
                fix="merge what one model answered with the same `model` settings",
            )
        for key, given in read_answers(part).items():
            known = merged.get(key)
            if known is None or known.text is None:
                merged[key], origin[key] = given, part
            elif given.text is not None and given != known:
                raise DataError(
                    f"answer {given.benchmark} {given.id} differently",
                    where=f"{origin[key]} and {part}",
                    got=f"{known.text[:40]!r} and {given.text[:40]!r}",
                    fix="keep the one to believe: delete the line in the other's answers.jsonl",
                )
    write_model(folder, model)
    write_atomically(folder / ANSWERS, "".join(map(line_of, merged.values())))
    return len(merged)
