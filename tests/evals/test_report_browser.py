"""The report as a browser draws it: on a desk, on a phone, in the dark."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from evals.report import ReportRecipe, collect
from evals.report_page import write

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs a headless Chromium, and none is installed"),
]
PHONE, DESK = 390, 1200
HOSTILE = "<img src=x onerror='parent.ran=1'><script>parent.ran=1</script></style>"

# The page in a frame of each width, measured from outside: the page itself runs no script.
MEASURE = """
<!doctype html><meta charset="utf-8"><style>body { margin: 0 } iframe { border: 0 }</style>
%s
<pre id="measured"></pre>
<script>
window.onload = () => {
  const frames = [...document.querySelectorAll("iframe")].map((frame) => {
    const page = frame.contentDocument, root = page.documentElement;
    const all = (selector) => [...page.querySelectorAll(selector)];
    return {
      visible: root.clientWidth,
      needed: root.scrollWidth,
      wide: all("main > *, article, img, svg, dd, h1, p")
        .filter((e) => e.getBoundingClientRect().right > root.clientWidth + 1)
        .map((e) => e.tagName + "." + e.className),
      images: all("img").map((e) => [e.complete, e.naturalWidth, e.clientWidth]),
      figures: all("svg").map((e) => e.clientWidth),
      smallest: Math.min(...all("svg text").map((e) => e.getBoundingClientRect().height)),
      rows: all("tbody tr").map((row) => [...row.cells].map((cell) => cell.innerText)),
      closed: all("details").filter((e) => !e.open).length,
      ran: window.ran ?? 0,
    };
  });
  document.querySelector("#measured").textContent = JSON.stringify(frames);
};
</script>
"""


def chromium(profile: Path, url: Path, *options: str) -> str:
    """Run a headless Chromium on one file; returns what it prints."""
    quiet = "no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
    flags = [f"--{flag}" for flag in f"headless {quiet} disable-component-update".split()]
    flags += ["--disable-sync", "--hide-scrollbars", "--virtual-time-budget=2000"]
    command = [str(CHROMIUM), *flags, f"--user-data-dir={profile}", *options, url.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


@pytest.fixture(scope="module")
def page(evaluations, suites_in, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("report")
    suites = suites_in(output)
    for name, right in (("base", 10), ("good", 30), ("same", 12)):
        shutil.copytree(evaluations / name, output / name)
        rows = [
            suites.question(
                i, "A", "A" if i < right else "B", id=f"{'long' * 20}{i}", image=f"{i}-of-the-data",
                answer=f"{HOSTILE} {'unbroken' * 40}", categories=[f"{HOSTILE} {i % 20}"],
            )
            for i in range(40)
        ]  # fmt: skip
        suites.add(name, "mvbench", rows)
    runs = [
        {"name": name, "eval": output / name, "train": evaluations / f"train-{name}"}
        for name in ("good", "same")
    ]
    settings = {"output": output / "out", "base": output / "base", "runs": runs, "gallery": 4}
    return write(collect(ReportRecipe.model_validate(settings)))


@pytest.fixture(scope="module")
def measured(page, tmp_path_factory) -> dict[int, dict]:
    folder = tmp_path_factory.mktemp("browser")
    source = html.escape(page.read_text(encoding="utf-8"))
    frames = "".join(
        f'<iframe width="{width}" height="2000" srcdoc="{source}"></iframe>'
        for width in (PHONE, DESK)
    )
    (folder / "frames.html").write_text(MEASURE % frames, encoding="utf-8")
    dom = chromium(folder / "profile", folder / "frames.html", "--dump-dom")
    found = re.search(r'<pre id="measured">(.+?)</pre>', dom, re.DOTALL)
    assert found, "the page never finished loading"
    phone, desk = json.loads(html.unescape(found[1]))
    return {PHONE: phone, DESK: desk}


@pytest.mark.parametrize("width", [PHONE, DESK])
def test_nothing_runs_over_the_edge(measured, width):
    assert measured[width]["visible"] == width
    assert measured[width]["needed"] <= width
    assert measured[width]["wide"] == []


@pytest.mark.parametrize("width", [PHONE, DESK])
def test_pictures_load_and_drawings_have_room(measured, width):
    # Four scenes, and of POPE two fixed and two broken answers of either run.
    assert [natural for _, natural, _ in measured[width]["images"]] == [288] * 4 + [192] * 8
    for complete, _, shown in measured[width]["images"]:
        assert complete
        assert shown >= 150
    assert len(measured[width]["figures"]) == 6
    assert min(measured[width]["figures"]) >= 300
    assert measured[width]["smallest"] >= 9, "labels of a drawing are too small to read"


def test_tables_show_the_numbers(measured, evaluations):
    rows = measured[DESK]["rows"]
    for name in ("base", "good", "same"):
        results = json.loads((evaluations / name / "results.json").read_text())
        chair = next(s["metrics"] for s in results["suites"] if s["key"] == "chair")
        row = next(row for row in rows if row[0] == name)
        shown = [float(cell.split(" ± ")[0]) for cell in row[1:]]
        expected = [100 * chair[key] for key in ("chair_i", "chair_s", "recall")]
        assert shown == pytest.approx([*expected, chair["num_words"]], abs=0.051)
    # Three evaluations, two recipes, and the numbers by category.
    assert measured[DESK]["closed"] == 6


@pytest.mark.parametrize("width", [PHONE, DESK])
def test_what_a_model_says_is_never_run(measured, width):
    assert measured[width]["ran"] == 0


@pytest.mark.parametrize(
    ("width", "scheme", "paper"),
    [
        (DESK, "light", (253, 253, 251)),
        (DESK, "dark", (23, 25, 29)),
        (PHONE, "light", (253, 253, 251)),
    ],
)
def test_it_is_painted(page, tmp_path, width, scheme, paper):
    shot = tmp_path / "shot.png"
    dark = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    size = f"--window-size={width},12000"
    chromium(tmp_path / "profile", page, size, f"--screenshot={shot}", *dark)
    with Image.open(shot) as image:
        assert image.width == width
        colors = Counter(image.convert("RGB").getdata())
    assert colors.most_common(1)[0][0] == paper
    ink = sum(colors.values()) - colors[paper]
    assert ink > 0.05 * sum(colors.values())
    # The dots of the scenes, which only the embedded pictures hold.
    dots = [(192, 57, 43), (41, 128, 185), (39, 174, 96), (243, 156, 18), (142, 68, 173)]
    assert sum(colors[dot] for dot in dots) > 1000
