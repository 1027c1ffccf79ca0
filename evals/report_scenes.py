"""The scenes of the report: the pictures whose answers changed most, better and worse."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evals.report import Report, suite_title
from mmalign.errors import MediaError
from mmalign.report.page import Card, Kind, Marked, Page, Strip, thumbnail

# Frames of a clip on its card, evenly spread.
CLIP_FRAMES = 6


def add_scenes(page: Page, report: Report) -> None:
    """Where answers changed most: half of the cards got better, half got worse."""
    key = _suite(report)
    half = report.recipe.gallery // 2
    if key is None or half == 0:
        return
    evaluations = [e for e in report.evaluations if key in e.suites]
    items = {e.name: e.items(key) for e in evaluations}
    answered = ({id for id, row in rows.items() if row["answer"]} for rows in items.values())
    shared = sorted(set.intersection(*answered))
    before = items[report.base.name]
    change = {
        id: sum(_errors(rows[id]) for rows in items.values()) - len(items) * _errors(before[id])
        for id in shared
    }
    fixed = sorted((id for id in shared if change[id] < 0), key=lambda id: (change[id], id))
    broken = sorted((id for id in shared if change[id] > 0), key=lambda id: (-change[id], id))
    if not fixed and not broken:
        return
    page.heading("Scenes")
    page.paragraph(
        f"{suite_title(report.suites[key])}: over all runs, {len(fixed):,} of {len(shared):,} "
        f"answered items have fewer errors than under base, {len(broken):,} have more, and "
        f"{len(shared) - len(fixed) - len(broken):,} as many. Below are the largest changes "
        "each way, not a random sample; what is not in the picture, or is wrong, is highlighted."
    )
    suite = report.base.suites[key]
    root = Path(suite["videos"] if "videos" in suite else suite["images"])
    for verdict, ids in (("Fixed", fixed[:half]), ("Broken", broken[:half])):
        if ids:
            page.gallery([_card(verdict, id, items, root) for id in ids])


def _suite(report: Report) -> str | None:
    """The first suite of captions that base and a run share, else the first of questions."""
    shared = [
        key
        for key in report.suites
        if key in report.base.suites and any(key in run.suites for run in report.runs)
    ]
    for benchmark in ("chair", "pope"):
        for key in shared:
            if report.suites[key]["benchmark"] == benchmark:
                return key
    return None


def _card(verdict: str, id: str, items: Mapping[str, dict[str, Any]], root: Path) -> Card:
    from mmalign.media import open_image
    from mmalign.records import Media

    first = next(iter(items.values()))[id]
    medium = "clip" if "video" in first else "picture"
    texts: list[tuple[str, str | Marked]] = []
    if "truth" in first:
        texts.append((f"in the {medium}", ", ".join(first["truth"]) or "none of the known objects"))
    if "label" in first:
        texts.append(("question", f"{first['prompt']} (right answer: {first['label']})"))
    for name, rows in items.items():
        row = rows[id]
        if "hallucinated" in row:
            absent = ", ".join(sorted(set(row["hallucinated"]))) or "nothing"
            listed = (f"\nNot in the {medium}: {absent}.", "quiet")
            texts.append((name, Marked((*_caption(row), listed))))
        else:
            wrong = Marked(((row["answer"], "bad" if _errors(row) else None),))
            texts.append((f"{name} · {'wrong' if _errors(row) else 'right'}", wrong))
    try:
        if medium == "clip":
            return Card(f"{verdict}: {id}", [], texts, strips=(_strip(first["video"], root),))
        picture = open_image(Media(path=first["image"]), root)
        return Card(f"{verdict}: {id}", [thumbnail(picture, max_side=320)], texts)
    except MediaError as error:
        # The scene is still worth reading without its picture, and the card says what is missing.
        return Card(f"{verdict}: {id}", [], texts, f"The {medium} is not shown: {error}")


def _strip(file: str, root: Path) -> Strip:
    """Frames of a clip, evenly spread, with their times."""
    from PIL import Image

    from mmalign.clips import FrameSampling, open_clip
    from mmalign.records import Media

    clip = open_clip(Media(path=file), root, FrameSampling(num_frames=CLIP_FRAMES))
    frames = (thumbnail(Image.fromarray(frame), max_side=160) for frame in clip.frames)
    times = (f"{seconds:.2f} s" for seconds in clip.timestamps)
    return Strip("clip", tuple(zip(frames, times, strict=True)))


def _caption(row: Mapping[str, Any]) -> list[tuple[str, Kind | None]]:
    """The answer, the words for what is not in the picture highlighted."""
    parts: list[tuple[str, Kind | None]] = []
    position = 0
    for category, (start, end) in zip(row["mentioned"], row["spans"], strict=True):
        if category in row["hallucinated"]:
            parts += [(row["answer"][position:start], None), (row["answer"][start:end], "bad")]
            position = end
    return [*parts, (row["answer"][position:], None)]


def _errors(row: Mapping[str, Any]) -> int:
    if "hallucinated" in row:
        return len(set(row["hallucinated"]))
    return 0 if row.get("correct_official", True) else 1
