"""The page: text stays text, nothing comes from outside, figures follow the page's colours."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from mmalign.report import page as page_module
from mmalign.report.figures import bars_with_intervals, curves
from mmalign.report.page import Card, Marked, Page, difference, thumbnail

HOSTILE = '<script>alert("x")</script> & \'quotes\' "><img src=x onerror=y> Ünïcode 猫 🐈 {{ 7*7 }}'


class Text(HTMLParser):
    """Collects what a reader sees, and the tags and attributes that are there."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.tags, self.attributes = "", [], []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def picture() -> str:
    return thumbnail(Image.new("RGB", (8, 8), "red"))


def page_with(text: str, picture: str) -> Page:
    """A page with every kind of block, `text` and the slot's name in each of its slots."""
    page = Page(f"{text} title", f"{text} subtitle")
    for number in range(3):
        page.heading(f"{text} heading {number}")
    page.paragraph(f"{text} paragraph")
    page.paragraph(
        Marked(
            (
                (f"{text} bad", "bad"),
                (f"{text} unmarked", None),
                (f"{text} quiet", "quiet"),
                (f"{text} strong", "strong"),
            )
        )
    )
    page.table(
        [f"{text} column", "b"],
        [[f"{text} row", Marked(((f"{text} marked", None),))]],
        caption=f"{text} caption",
    )
    series = {text: [(0, 1), (1, 2)], "b": [(0, 1)]}
    page.figure(curves(series, "x", "y", f"{text} curves"), caption=f"{text} figcaption")
    page.figure(bars_with_intervals([text], [1.0], [(0.5, 1.5)], title=f"{text} bars"))
    page.code(f"{text} code", label=f"{text} summary")
    texts = [(f"{text} term", f"{text} text"), ("same", difference(f"{text} same", f"{text} same"))]
    named = Card(f"{text} pair", [picture], [], under=(f"{text} under",))
    page.gallery([Card(f"{text} card", [picture], texts, note=f"{text} note"), named])
    return page


SLOTS = [
    *["title", "subtitle", "heading 0", "heading 1", "heading 2", "paragraph"],
    *["bad", "unmarked", "quiet", "strong", "column", "row", "marked", "caption"],
    *["curves", "figcaption", "bars", "code", "summary"],
    *["card", "term", "text", "same", "note", "under"],
]


def test_hostile_text_is_shown_and_never_run_in_any_slot(picture):
    hostile = Text(page_with(HOSTILE, picture).html())
    harmless = Text(page_with("harmless words", picture).html())
    assert [slot for slot in SLOTS if f"{HOSTILE} {slot}" not in hostile.text] == []
    # Axis ticks move with the width of the labels, so the drawings are compared by kind only.
    assert set(hostile.tags) == set(harmless.tags)
    for tag in ("img", "p", "a", "td", "small", "strong", "dd"):
        assert hostile.tags.count(tag) == harmless.tags.count(tag)
    assert not [name for name, _ in hostile.attributes if name.startswith("on")]


def test_attributes_keep_quotes(picture):
    attributes = Text(page_with(HOSTILE, picture).html()).attributes
    assert ("alt", f"{HOSTILE} card") in attributes
    labels = [value for name, value in attributes if name == "aria-label"]
    assert labels == [
        "Contents",
        f"{HOSTILE} caption",
        f"{HOSTILE} curves over x",
        f"{HOSTILE} bars",
    ]


def test_nothing_comes_from_outside(picture):
    html = page_with("text", picture).html()
    links = re.findall(r"(?:src|href)\s*=\s*[\"']?([^\"'\s>]+)", html)
    assert links
    assert {link[:11] for link in links if not link.startswith("#")} == {"data:image/"}
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", html))
    assert not re.search(r"@import|<link|<script|<iframe", html)
    with pytest.raises(ValueError, match="not a data URI"):
        Page("t").gallery([Card("c", ["https://example.org/cat.png"], [])])


def test_numbers_are_right_aligned_and_absence_is_a_dash():
    page = Page("t")
    page.table(
        ["run", "score", "mixed", "p"],
        [
            ["base", 0.41234, "n/a", None],
            ["dpo", -3, 2, Marked((("−1.5 *", "good"), ("\np < 0.001", "quiet")))],
        ],
    )
    html = page.html()
    heads = re.findall(r'<th scope="col"( class="number")?>(\w+)', html)
    assert heads == [
        ("", "run"),
        (' class="number"', "score"),
        ("", "mixed"),
        (' class="number"', "p"),
    ]
    cells = re.findall(r"<td[^>]*>(.*?)</td>", html, re.DOTALL)
    assert cells[:5] == ["0.4123", "n/a", "–", "−3", "2"]
    assert cells[5] == '<mark class="good">−1.5 *</mark><small>\np &lt; 0.001</small>'
    assert re.findall(r'<th scope="row">(\w+)</th>', html) == ["base", "dpo"]


def test_a_row_of_the_wrong_length_is_refused():
    with pytest.raises(ValueError, match="row 1 has 1 cells for 2 columns"):
        Page("t").table(["a", "b"], [[1, 2], [3]])


def test_difference_marks_the_words_that_are_not_shared():
    marked = difference("a brown dog  on the\nold mat.", "a dog on the mat.")
    assert [text for text, kind in marked.parts if kind] == ["brown", "old"]
    assert str(marked) == "a brown dog  on the\nold mat."
    assert difference("same", "same").parts == (("same", None),)
    assert difference("", "b").parts == ()
    assert str(difference("  lead and trail ", "x")) == "  lead and trail "
    assert difference("new", "", kind="good").parts == (("new", "good"),)


@pytest.mark.parametrize(
    ("size", "shown", "kind"),
    [
        ((8, 8), (192, 192), "PNG"),
        ((60, 40), (180, 120), "PNG"),
        ((150, 100), (150, 100), "JPEG"),
        ((640, 480), (192, 144), "JPEG"),
        ((1000, 1), (192, 1), "JPEG"),
    ],
)
def test_thumbnails_are_small_and_tiny_pictures_are_enlarged(size, shown, kind):
    uri = thumbnail(Image.new("RGBA", size, (200, 30, 30, 255)))
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as image:
        assert (image.size, image.format) == (shown, kind)
        assert uri.startswith(f"data:image/{kind.lower()};base64,")
        red, green, blue = image.convert("RGB").getpixel((0, 0))
        assert red > 150 > green
        assert blue < 150


def test_enlarging_keeps_pixels_square():
    image = Image.new("RGB", (2, 1))
    image.putpixel((1, 0), (255, 255, 255))
    uri = thumbnail(image, max_side=8)
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as large:
        assert set(large.getdata()) == {(0, 0, 0), (255, 255, 255)}


def test_write_holds_text_that_utf8_cannot(tmp_path: Path):
    page = Page("half a pair: \ud83d")
    page.write(tmp_path / "deep" / "page.html")
    assert "half a pair: ?" in (tmp_path / "deep" / "page.html").read_text(encoding="utf-8")


def test_the_same_blocks_give_the_same_bytes(picture):
    assert page_with("text", picture).html() == page_with("text", picture).html()


def test_figures_draw_in_the_colours_of_the_page():
    svg = curves(
        {"a": [(0, 1), (10, 2)], "b": [(0, 2), (10, float("nan"))]}, "step", "loss", "Loss"
    )
    assert "var(--series-1, " in svg
    assert "var(--series-2, " in svg
    assert "var(--quiet, " in svg
    colours = set(re.findall(r"(?<!, )#[0-9a-f]{6}\b", svg))
    assert colours == set(), "a colour of matplotlib's own stays the same in the dark"
    assert "<style" not in svg
    assert "<metadata" not in svg
    assert svg.startswith('<svg role="img" aria-label="Loss over step"')
    assert {"Loss", "step", "loss", "a", "b"} <= set(re.findall(r">([^<>\n]+)</text>", svg))


def test_figures_share_no_element_id():
    first = curves({"a": [(0, 1), (1, 2)]}, "step", "loss", "Loss")
    second = curves({"a": [(0, 1), (1, 2)]}, "step", "margin", "Margin")
    ids = [set(re.findall(r' id="([^"]+)"', svg)) for svg in (first, second)]
    assert ids[0]
    assert not ids[0] & ids[1]


def test_bars_write_their_values_and_keep_the_order():
    svg = bars_with_intervals(["base", "_dpo", "$x$"], [41.25, 0.0, 7], [(38, 45), None, (6, 9)])
    words = [word.strip("\u200b") for word in re.findall(r">([^<>\n]+)</text>", svg)]
    assert words[-3:] == ["41.2", "0.0", "7.0"]
    heights = {
        name.strip("\u200b"): float(y)
        for y, name in re.findall(r' y="([\d.]+)"[^>]*>([^<>\n]+)</text>', svg)
    }
    assert heights["base"] < heights["_dpo"] < heights["$x$"]


def test_drawing_leaves_matplotlib_as_it_was():
    import matplotlib

    before = dict(matplotlib.rcParams)
    curves({"a": [(0, 1)]}, "x", "y")
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_are_readable(scheme):
    css = (Path(page_module.__file__).parent / "style.css").read_text()
    light, dark = re.findall(r":root \{(.*?)\}", css, re.DOTALL)[:2]
    color = dict(re.findall(r"--([\w-]+): (#\w{6});", light))
    if scheme == "dark":
        color |= dict(re.findall(r"--([\w-]+): (#\w{6});", dark))
    text = [(ink, on) for ink in ("ink", "quiet", "accent") for on in ("paper", "raised")]
    text += [("ink", "bad"), ("ink", "good")]
    lines = [(f"series-{i}", "paper") for i in range(1, 9)]
    # WCAG 2.1: 4.5 for text (1.4.3), 3 for what a drawing needs to be understood (1.4.11).
    assert [pair for pair in text if contrast(color[pair[0]], color[pair[1]]) < 4.5] == []
    assert [pair for pair in lines if contrast(color[pair[0]], color[pair[1]]) < 3] == []


def contrast(first: str, second: str) -> float:
    """WCAG contrast ratio of two hex colours."""

    def luminance(color: str) -> float:
        channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (
            c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels
        )
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)
