"""The page as a file: it loads nothing, runs nothing, and reads well in the dark and on paper."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from PIL import Image

from evals.report import ReportRecipe, collect
from evals.report_page import write

HOSTILE = [
    "<script>alert(1)</script>",
    "</style><style>*{display:none}</style>",
    "<img src=x onerror=alert(1)>",
    "&amp; \"quoted\" 'too'",
    "</title></head><base href=http://evil.example/>",
    "{{ 7 * 7 }}{% raw %}",
    "]]><![CDATA[",
    "--><!--",
]
LOADING = {"src", "href", "xlink:href", "srcset", "action", "formaction", "data", "poster", "ping"}


class Reader(HTMLParser):
    """What a page consists of."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    reader.close()
    return reader


@pytest.fixture
def hostile(suites: Any) -> str:
    """A page in which everything that people or models may name is hostile."""
    for name, said in (("base", "B"), ("run", "A")):
        rows = [
            suites.question(
                i, "A", said, id=f"{text}{i}", answer=f"{said} {text}", prompt=f"Is {text} there?",
                categories=[text], label=["A", text], image="0.png", official=text,
            )
            for i, text in enumerate(HOSTILE)
        ]  # fmt: skip
        suites.add(name, "mvbench", rows, images=str(suites.root), split=HOSTILE[0])
        suites.add(name, "tvbench", rows, images=str(suites.root), split=HOSTILE[1])
        path = suites.root / name / "results.json"
        results = json.loads(path.read_text())
        results |= {"model": HOSTILE[2], "config": {"prompt": HOSTILE[0]}, "versions": {}}
        path.write_text(json.dumps(results))
    Image.new("RGB", (8, 8)).save(suites.root / "0.png")
    train = suites.root / "train"
    train.mkdir()
    (train / "metrics.jsonl").write_text('{"step": 1, "train/loss": 1.0}\n')
    (train / "recipe.yaml").write_text(f"loss: {json.dumps(HOSTILE[0])}\n")
    settings = {
        "title": HOSTILE[4],
        "note": HOSTILE[1],
        "output": suites.root / "out",
        "base": suites.root / "base",
        "base_name": HOSTILE[2],
        "runs": [{"name": HOSTILE[0], "eval": suites.root / "run", "train": train}],
        "gallery": 2 * len(HOSTILE),
    }
    return write(collect(ReportRecipe.model_validate(settings))).read_text()


def test_hostile_words_are_shown_and_never_markup(hostile):
    page = read(hostile)
    assert "script" not in page.tags
    assert "base" not in page.tags
    assert page.tags.count("style") == 1
    assert page.tags.count("html") == page.tags.count("head") == page.tags.count("body") == 1
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    shown = "\n".join(page.text)
    for text in HOSTILE:
        # On a card of each of two suites.
        assert shown.count(f"Is {text} there?") == 2
        assert f"A {text}" in shown


def test_nothing_is_loaded_from_anywhere(hostile, style):
    page = read(hostile)
    loaded = [(name, value) for name, value in page.attributes if name in LOADING]
    assert {value.partition(";")[0][:10] for _, value in loaded if value[0] != "#"} == {
        "data:image"
    }
    for _, value in page.attributes:
        assert not re.search(r"url\((?!['\"]?#)", value)
    assert "url(" not in style
    assert "@import" not in style
    assert not {"link", "iframe", "object", "embed", "form", "audio", "video"} & set(page.tags)
    (policy,) = [v for _, v in page.attributes if v.startswith("default-src")]
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'")


@pytest.fixture
def style(hostile: str) -> str:
    (found,) = re.findall(r"<style>(.*?)</style>", hostile, re.DOTALL)
    return found


def block(style: str, media: str) -> str:
    """The rules inside one @media."""
    rest = style.split(f"@media {media} {{")[1]
    depth = 1
    for place, char in enumerate(rest):
        depth += {"{": 1, "}": -1}.get(char, 0)
        if depth == 0:
            return rest[:place]
    raise AssertionError("the block never ends")


def colours(rules: str) -> dict[str, str]:
    return dict(re.findall(r"(--[\w-]+): (#[0-9a-f]+);", rules))


def test_every_colour_has_a_dark_one_and_paper_takes_none_of_them(style):
    light = colours(style.split("@media")[0])
    dark, paper = (colours(block(style, m)) for m in ("(prefers-color-scheme: dark)", "print"))
    assert light.keys() == dark.keys() == paper.keys()
    assert not {name for name in light if light[name] == dark[name]}
    assert not {name for name in light if paper[name] == dark[name]}
    # Outside those lists, colours go by name.
    bare = re.sub(r"--[\w-]+: #[0-9a-f]+;", "", style)
    assert re.findall(r"#[0-9a-f]{3,6}\b", bare) == []


def test_drawings_take_the_colours_of_the_page(hostile):
    drawings = re.findall(r"<svg.*?</svg>", hostile, re.DOTALL)
    assert drawings
    for svg in drawings:
        left = re.sub(r"var\(--[\w-]+, #[0-9a-f]+\)", "", svg)
        painted = re.findall(r"(?:fill|stroke|color)\s*[:=]\s*\"?(#[0-9a-f]+|black|white)", left)
        assert painted == []
        assert "var(--" in svg


def test_a_phone_scrolls_tables_by_themselves(hostile, style):
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in hostile
    assert hostile.count("<table>") == hostile.count('<div class="scroll"')
    assert re.search(r"\.scroll \{\s*overflow-x: auto;", style)


def test_on_paper_nothing_is_folded_or_cut(style):
    paper = block(style, "print")
    for rule in (
        r"details::details-content \{[^}]*content-visibility: visible;",
        r"\.scroll,\s*pre \{[^}]*overflow: visible;",
        r"pre \{[^}]*white-space: pre-wrap;",
        r"article,\s*figure,\s*tr \{[^}]*break-inside: avoid;",
        r"th:first-child \{[^}]*position: static;",
        r"print-color-adjust: exact;",
    ):
        assert re.search(rule, paper), rule
