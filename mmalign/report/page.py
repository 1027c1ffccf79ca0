"""One HTML file that explains itself: text, tables, figures, galleries; no network, no scripts.

    page = Page("Before and after", "seven configurations, one seed")
    page.heading("Hallucination")
    page.table(["run", "CHAIR_i"], [["base", 0.41], ["dpo", 0.29]])
    page.write(Path("report.html"))

Everything but a figure's SVG is treated as text: markup in a model's answer is shown, never run.
"""

from __future__ import annotations

import base64
import difflib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jinja2
from markupsafe import Markup

from mmalign.store import write_atomically

if TYPE_CHECKING:
    from PIL.Image import Image

Kind = Literal["bad", "good", "quiet", "strong"]

# "0.31", "−12.5 %", "0.31 ± 0.02", "1,024", "p < 0.001", "0.003 *"
_NUMBER = re.compile(r"(p\s*)?[<>≈~]?\s*[-+−±]?\s*\d[\d.,\s%±×+−e*-]*")
_HERE = Path(__file__).parent
# In order: what is said of phones and of paper comes last.
_STYLES = ("style.css", "media.css")


@dataclass(frozen=True)
class Marked:
    """A text some of whose parts are highlighted; `parts` joined in order are the whole text.

    bad and good tint words; strong is bold; quiet is small and grey, as an interval under a number.
    """

    parts: tuple[tuple[str, Kind | None], ...]

    def __str__(self) -> str:
        return "".join(text for text, _ in self.parts)


@dataclass(frozen=True)
class Strip:
    """Frames of a clip in reading order: a data URI each, and what stands under it."""

    label: str
    frames: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Card:
    """One entry of a gallery: strips, pictures (data URIs), then labelled texts, then a note.

    under: what stands under each picture; empty for nothing.
    """

    title: str
    images: list[str]
    texts: list[tuple[str, str | Marked]]
    note: str = ""
    strips: tuple[Strip, ...] = ()
    under: tuple[str, ...] = ()


class Page:
    """A report under construction: add blocks in reading order, then write it."""

    def __init__(self, title: str, subtitle: str = "") -> None:
        self.title, self.subtitle = title, subtitle
        self._blocks: list[dict[str, Any]] = []

    def heading(self, text: str) -> None:
        """Start a section; the contents at the top of the page list it."""
        self._add("heading", text=text)

    def paragraph(self, text: str | Marked) -> None:
        """A paragraph of prose."""
        self._add("paragraph", text=text)

    def table(
        self,
        columns: Sequence[str],
        rows: Sequence[Sequence[object]],
        caption: str = "",
        *,
        folded: bool = False,
    ) -> None:
        """A table whose first column names the row; columns of numbers are right-aligned.

        folded: whether it opens only when its caption is touched.

        Cells are str, numbers, Marked, or None, which shows as an en dash. A cell of several
        lines counts as a number when its first line is one.
        Raises ValueError when a row is not as long as `columns`.
        """
        for index, row in enumerate(rows):
            if len(row) != len(columns):
                raise ValueError(f"row {index} has {len(row)} cells for {len(columns)} columns")
        numeric = [_is_numeric([row[i] for row in rows]) for i in range(len(columns))]
        cells = [[_shown(cell) for cell in row] for row in rows]
        self._add(
            "table", columns=columns, rows=cells, numeric=numeric, caption=caption, folded=folded
        )

    def figure(self, svg: str, caption: str = "") -> None:
        """A drawing. The SVG goes in as it is, so it must come from mmalign.report.figures."""
        self._add("figure", svg=Markup(svg), caption=caption)

    def code(self, text: str, label: str) -> None:
        """Verbatim text, folded away under its label."""
        self._add("code", text=text, label=label)

    def gallery(self, cards: Sequence[Card], *, narrow: bool = False) -> None:
        """Pictures with the texts that belong to them, one card each.

        narrow: whether cards stand side by side where there is room, for short texts.
        Raises ValueError for a picture that is not a data URI: the page must stand alone.
        """
        for card in cards:
            frames = [uri for strip in card.strips for uri, _ in strip.frames]
            for image in (*card.images, *frames):
                if not image.startswith("data:image/"):
                    raise ValueError(f"card {card.title!r}: {image[:40]!r} is not a data URI")
        self._add("gallery", cards=list(cards), narrow=narrow)

    def html(self) -> str:
        """The whole document."""
        environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(_HERE),
            autoescape=True,
            trim_blocks=True,
            lstrip_blocks=True,
            undefined=jinja2.StrictUndefined,
        )
        environment.tests["marked"] = lambda value: isinstance(value, Marked)
        style = Markup("\n".join((_HERE / name).read_text(encoding="utf-8") for name in _STYLES))
        return environment.get_template("page.html").render(
            title=self.title, subtitle=self.subtitle, blocks=self._blocks, style=style
        )

    def write(self, path: Path) -> None:
        """Write the document, all of it or none of it."""
        # A model can emit half a surrogate pair, which UTF-8 cannot hold.
        write_atomically(Path(path), self.html().encode("utf-8", "replace"))

    def _add(self, block: str, **content: Any) -> None:
        self._blocks.append({"block": block, **content})


def difference(a: str, b: str, *, kind: Kind = "bad") -> Marked:
    """Text `a`, the words that `b` does not share in the same order highlighted."""
    words, others = _words(a), _words(b)
    matcher = difflib.SequenceMatcher(
        None, [w.strip() for w in words], [w.strip() for w in others], autojunk=False
    )
    parts: list[tuple[str, Kind | None]] = []
    for operation, start, end, _, _ in matcher.get_opcodes():
        text = "".join(words[start:end])
        if text:
            parts.append((text, None if operation == "equal" else kind))
    return _trimmed(parts)


def thumbnail(image: Image, max_side: int = 192) -> str:
    """A data URI of the picture at most `max_side` pixels wide and high.

    A picture less than half that size is enlarged by a whole factor, its pixels kept square.
    """
    from PIL import Image as images

    small = image.convert("RGB")
    factor = max_side // max(small.size)
    sink = io.BytesIO()
    if factor >= 2:
        enlarged = (small.width * factor, small.height * factor)
        small = small.resize(enlarged, images.Resampling.NEAREST)
        small.save(sink, format="PNG", optimize=True)
        kind = "png"
    else:
        small.thumbnail((max_side, max_side), images.Resampling.LANCZOS)
        small.save(sink, format="JPEG", quality=88)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(sink.getvalue()).decode()}"


def _shown(cell: object) -> str | Marked:
    if isinstance(cell, Marked):
        return cell
    if cell is None:
        return "–"
    if isinstance(cell, int) and not isinstance(cell, bool):
        return f"{cell:,}".replace("-", "−")
    if isinstance(cell, float):
        return f"{cell:.4g}".replace("-", "−")
    return str(cell)


def _is_numeric(cells: Sequence[object]) -> bool:
    present = [str(_shown(cell)).partition("\n")[0] for cell in cells if cell is not None]
    return bool(present) and all(_NUMBER.fullmatch(text.strip()) for text in present)


def _words(text: str) -> list[str]:
    """Words with the space after them, so that joining them gives the text back."""
    return re.findall(r"\S+\s*|^\s+", text)


def _trimmed(parts: list[tuple[str, Kind | None]]) -> Marked:
    """Highlights end with their last word, not with the space after it."""
    result: list[tuple[str, Kind | None]] = []
    for text, kind in parts:
        word = text.rstrip() if kind else text
        result += [(word, kind), (text[len(word) :], None)]
    return Marked(tuple(part for part in result if part[0]))
