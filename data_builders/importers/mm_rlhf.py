"""MM-RLHF's two files: `dpo_pairs.jsonl` becomes preferences, `data.jsonl` rankings.

A pair is `prompt`, `chosen`, `rejected`, with `image`, `video` or neither. `chosen_reason` and
`rejected_reason` become critiques. `is_tie` makes `p_target` 0.5; `mixed_up_image`, a picture under
which the chosen response is wrong, becomes the contrast picture. `ls_factor`, the released
trainer's own factor of beta, stays in the origin's detail: it is no score gap.

An annotated row is `question`, `models_output` (3 to 5 responses) and `final_ranking`, and for each
response `helpfulness`, `faithfulness`, `ethical` (1 to 5) and `score_reasons`. The ranking is a
number for each response, 1 the best and equal numbers a tie, or a text such as "1>2=3>4", which
orders the responses, numbered from 1. A response's score is the mean of its three, and missing
where one of them is; its reason becomes its critique. `answer`, `ranking_reason` and the three
scores stay in the origin's detail.

As in the released loader, `<image>` is taken out of the prompt and the media go to its front. A
`video` of this set is a folder of frames, which data_builders.convert imports as pictures.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_builders.importers.common import (
    Bad,
    Row,
    Unusable,
    import_rows,
    media,
    required,
    text,
)
from mmalign.records import Media, Message, Origin, Preference, RankedResponse, Ranking, user

SCORES = ("helpfulness", "faithfulness", "ethical")


def read(source: Path) -> Iterator[Preference | Ranking | Bad]:
    """Preferences or rankings from JSON lines, JSON or parquet; a file holds one or the other.

    Several pairs of one question share its `id`: theirs is `id/place`, such as 17/dpo_pairs-3.
    """
    return import_rows(source, _record, "import:mm_rlhf")


def ranks_of(ranking: Any, num_responses: int) -> list[int]:
    """Each response's rank, 0 the best and equal ranks ties, from either form of `final_ranking`.

    "1>2=3>4" gives 0, 1, 1, 2, and so do [1, 2, 2, 3] and [1, 2, 2, 4].
    Raises Unusable for what does not name every response once.
    """
    if isinstance(ranking, str):
        places = _places(ranking, num_responses)
    elif isinstance(ranking, list) and len(ranking) == num_responses:
        places = [_number(value) for value in ranking]
    else:
        raise _bad_ranking(ranking, f"is no list of {num_responses} ranks")
    known = [place for place in places if place is not None]
    if len(known) < num_responses:
        raise _bad_ranking(ranking, "holds what is no number")
    order = sorted(set(known))
    return [order.index(place) for place in known]


def _places(ranking: str, num_responses: int) -> list[float | None]:
    """Where "1>2=3>4" puts each response."""
    if not re.fullmatch(r"\s*[0-9]{1,4}(\s*[>=]\s*[0-9]{1,4})*\s*", ranking):
        raise _bad_ranking(ranking, "is not of the form 1>2=3>4")
    places: list[float | None] = [None] * num_responses
    for place, equals in enumerate(ranking.split(">")):
        for number in map(int, equals.split("=")):
            if not 1 <= number <= num_responses:
                raise _bad_ranking(ranking, f"names response {number} of {num_responses}")
            if places[number - 1] is not None:
                raise _bad_ranking(ranking, f"names response {number} twice: a cycle")
            places[number - 1] = place
    if None in places:
        raise _bad_ranking(ranking, f"leaves out response {places.index(None) + 1}")
    return places


def _bad_ranking(ranking: Any, what: str) -> Unusable:
    return Unusable("bad_ranking", f"final_ranking {str(ranking)[:80]!r} {what}")


def _record(row: Row) -> Preference | Ranking:
    return _ranking(row) if "models_output" in row.values else _preference(row)


def _preference(row: Row) -> Preference:
    values = row.values
    images, videos, prompt = _prompt(values, "prompt")
    is_tie = values.get("is_tie") or False
    if not isinstance(is_tie, bool):
        raise Unusable("wrong_type", f"is_tie is {type(is_tie).__name__}, wanted true or false")
    kept = {name: values[name] for name in ("id", "ls_factor") if values.get(name) is not None}
    return Preference(
        id=row.id if row.id == row.place else f"{row.id}/{row.place}",
        prompt=prompt,
        images=images,
        videos=videos,
        chosen=text(values, "chosen"),
        rejected=text(values, "rejected"),
        contrast_images=media(values.get("mixed_up_image") or None),
        chosen_critique=_critique(values.get("chosen_reason"), "chosen_reason"),
        rejected_critique=_critique(values.get("rejected_reason"), "rejected_reason"),
        p_target=0.5 if is_tie else 1.0,
        origin=Origin(detail=json.dumps(kept, default=str)),
    )


def _ranking(row: Row) -> Ranking:
    values = row.values
    images, videos, prompt = _prompt(values, "question")
    texts = required(values, "models_output")
    if not isinstance(texts, list) or not all(isinstance(one, str) for one in texts):
        raise Unusable("wrong_type", "models_output is no list of texts")
    ranks = ranks_of(required(values, "final_ranking"), len(texts))
    reasons = _column(values, "score_reasons", len(texts))
    scores = {name: _column(values, name, len(texts)) for name in SCORES}
    detail = {
        "answer": values.get("answer"),
        "ranking_reason": values.get("ranking_reason"),
        "scores": scores,
    }
    return Ranking(
        id=row.id,
        prompt=prompt,
        images=images,
        videos=videos,
        responses=tuple(
            RankedResponse(
                text=texts[index],
                rank=ranks[index],
                score=_mean([scores[name][index] for name in SCORES]),
                critique=_critique(reasons[index], "score_reasons"),
            )
            for index in range(len(texts))
        ),
        origin=Origin(detail=json.dumps(detail, default=str)),
    )


def _prompt(
    values: dict[str, Any], column: str
) -> tuple[tuple[Media, ...], tuple[Media, ...], tuple[Message, ...]]:
    """The media and the prompt with their places at its front."""
    images, videos = media(values.get("image") or None), media(values.get("video") or None)
    tagged = text(values, column)
    if "<image>" in tagged and not (images or videos):
        raise Unusable("no_media", f"{column} has <image>, but the row has no image and no video")
    words = text({column: tagged.replace("<image>", "").strip()}, column)
    return images, videos, user(words, images=len(images), videos=len(videos))


def _column(values: dict[str, Any], name: str, num_responses: int) -> list[Any]:
    """One value for each response; none at all is a column of None."""
    column = values.get(name)
    if column is None:
        return [None] * num_responses
    if not isinstance(column, list) or len(column) != num_responses:
        raise Unusable("wrong_length", f"{name} is no list of {num_responses}, one a response")
    return column


def _critique(value: Any, column: str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise Unusable("wrong_type", f"{column} is {type(value).__name__}, wanted text")
    return value if value and value.strip() else None


def _mean(values: list[Any]) -> float | None:
    numbers = [number for number in map(_number, values) if number is not None]
    return math.fsum(numbers) / len(numbers) if len(numbers) == len(values) else None


def _number(value: Any) -> float | None:
    """A finite number, also one written as text; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
