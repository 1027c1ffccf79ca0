"""RRPO's JSON: a clip, a question, and two answers, each once clean and once with tagged phrases.

`answer` is preferred over `pred`. `answer_masked` and `pred_masked` are the same texts with
`<MASK>` and `</MASK>` around the phrases that differ. The clip is under `video` (as the
documentation has it) or `media_path` (as the released loaders have it), and stands where the
question says `<image>`. Other columns: `src`, `sample_id`.

Spans are read off the tags, as characters of the clean text, so no tokenizer is asked. The released
code compares tokens instead, and trains on no phrase at all where tags change how a word is cut.
Phrases count from 1; phrase k of `answer` stands against phrase k of `pred`. A phrase that the
other side lacks, or where the tags hold nothing, is one-sided: it is kept, and counted in the
origin's detail. The released code skips a row with no phrase on one side; here only a row without
any phrase is bad.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_builders.importers.common import (
    Bad,
    Row,
    Unusable,
    import_rows,
    media,
    messages,
    required,
    text,
    with_places,
)
from mmalign.log import get_logger
from mmalign.records import Origin, Preference, Span

logger = get_logger("data_builders.importers.rrpo")

START, END = "<MASK>", "</MASK>"


def read(source: Path) -> Iterator[Preference | Bad]:
    """Preferences over clips, with spans, from a JSON list or JSON lines.

    Rows are named by their place, since nothing says that `sample_id` is unique over sources.
    """
    num_rows = num_phrases = 0
    for record in import_rows(source, _preference, "import:rrpo"):
        yield record
        if isinstance(record, Preference):
            one_sided = json.loads(record.origin.detail)["one_sided"]
            num_rows += one_sided > 0
            num_phrases += one_sided
    if num_rows:
        logger.info("%d one-sided phrases in %d rows; they are kept", num_phrases, num_rows)


def untag(tagged: str, clean: str) -> tuple[tuple[Span, ...], int]:
    """Where the tagged phrases lie in the clean text, and how many tag pairs there are.

    `tagged` without its tags must be `clean`, but for the width of blanks, and for blanks beside a
    tag, which it may have too many or too few of. Spans have no blanks at their ends; a pair of
    tags around nothing counts and has none.
    Raises Unusable for tags that are nested or unbalanced, and for texts that differ.
    """
    marked, num_phrases = _marked_characters(tagged)
    places = [match.start() for match in re.finditer(r"\S", clean)]
    if len(marked) != len(places):
        raise _differ(f"{len(marked)} characters for {len(places)}")
    bounds: dict[int, tuple[int, int]] = {}
    for index, (mark, place) in enumerate(zip(marked, places, strict=True)):
        parted = index > 0 and place > places[index - 1] + 1
        if mark.character != clean[place] or (index > 0 and mark.parted not in (None, parted)):
            raise _differ(f"at character {place} of the clean text: {clean[place : place + 20]!r}")
        if mark.phrase:
            start, _ = bounds.get(mark.phrase, (place, place))
            bounds[mark.phrase] = (start, place + 1)
    spans = tuple(Span(start=a, end=b, phrase=phrase) for phrase, (a, b) in bounds.items())
    return spans, num_phrases


@dataclass(frozen=True, slots=True, kw_only=True)
class _Marked:
    """A character that is no blank, its phrase or 0, and whether blanks part it from the last one.

    `parted` is None beside a tag, where it cannot be known whose the blanks are.
    """

    character: str
    phrase: int
    parted: bool | None


def _marked_characters(tagged: str) -> tuple[list[_Marked], int]:
    marked: list[_Marked] = []
    num_phrases, inside = 0, False
    parted: bool | None = False
    for part in re.split(f"({START}|{END})", tagged):
        if part in (START, END):
            if (part == START) == inside:
                what = "inside another" if inside else "before any start"
                raise Unusable("bad_tags", f"a {part} stands {what}: {tagged[:80]!r}")
            inside = not inside
            num_phrases += inside
            parted = None
            continue
        for character in part:
            if character.isspace():
                parted = None if parted is None else True
                continue
            phrase = num_phrases if inside else 0
            marked.append(_Marked(character=character, phrase=phrase, parted=parted))
            parted = False
    if inside:
        raise Unusable("bad_tags", f"the last {START} is never ended: {tagged[:80]!r}")
    return marked, num_phrases


def _differ(where: str) -> Unusable:
    return Unusable("tags_do_not_align", f"without its tags, the tagged text is another: {where}")


def _preference(row: Row) -> Preference:
    values = row.values
    chosen, rejected = text(values, "answer"), text(values, "pred")
    chosen_spans, num_chosen = _spans(values, "answer_masked", chosen)
    rejected_spans, num_rejected = _spans(values, "pred_masked", rejected)
    if not chosen_spans and not rejected_spans:
        raise Unusable("no_phrases", "no phrase is tagged in answer_masked or pred_masked")
    on_both = {span.phrase for span in chosen_spans} & {span.phrase for span in rejected_spans}
    column = "media_path" if values.get("video") is None else "video"
    videos = media(required(values, column))
    turn = {"role": "user", "content": text(values, "question")}
    prompt = messages([turn], places={"<image>": "video", "<video>": "video"})
    detail = {
        "sample_id": values.get("sample_id"),
        "src": values.get("src"),
        "one_sided": max(num_chosen, num_rejected) - len(on_both),
    }
    return Preference(
        id=row.place,
        prompt=with_places(prompt, "video", len(videos)),
        videos=videos,
        chosen=chosen,
        rejected=rejected,
        chosen_spans=chosen_spans,
        rejected_spans=rejected_spans,
        origin=Origin(detail=json.dumps(detail, default=str)),
    )


def _spans(values: dict[str, Any], column: str, clean: str) -> tuple[tuple[Span, ...], int]:
    tagged = text(values, column)
    try:
        return untag(tagged, clean)
    except Unusable as error:
        raise Unusable(error.reason, f"{column}: {error.detail}") from None
