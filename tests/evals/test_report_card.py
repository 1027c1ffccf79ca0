"""The model card's part: metadata as the hub reads it, and Markdown that nothing can break."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from evals.report import Report, ReportRecipe, collect
from evals.report_card import model_card
from evals.report_page import write
from evals.report_tables import plain
from mmalign.errors import DataError

HOSTILE = "a|b <script>alert(1)</script> `x` *y* [z](http://w) &amp;\n---\n# h"


def report(suites: Any, *, name: str = "run", **changes: Any) -> Report:
    train = suites.root / "train"
    runs = [{"name": name, "eval": suites.root / "run"}]
    if train.exists():
        runs[0]["train"] = train
    settings = {"output": suites.root / "out", "base": suites.root / "base", "runs": runs}
    return collect(ReportRecipe.model_validate(settings | changes))


def evaluated(suites: Any, model: str = "owner/base@" + "a" * 40, **config: Any) -> None:
    for name, right in (("base", 10), ("run", 34)):
        rows = [suites.question(i, "A", "A" if i < right else "B") for i in range(40)]
        suites.add(name, "mvbench", rows, videos="clips", split="x")
        path = suites.root / name / "results.json"
        results = json.loads(path.read_text())
        results["model"] = model if name == "base" else "/home/me/runs/dpo/model@" + "b" * 16
        results |= {"config": {"name": name, "seed": 7} | config, "versions": {"torch": "2.8"}}
        path.write_text(json.dumps(results))


def train(root: Path, recipe: str | bytes) -> None:
    (root / "train").mkdir()
    (root / "train/metrics.jsonl").write_text('{"step": 1, "train/loss": 1.0}\n')
    text = recipe if isinstance(recipe, bytes) else recipe.encode()
    (root / "train/recipe.yaml").write_bytes(text)


def rendered(card: str) -> str:
    """The card below its metadata as HTML, raw HTML let through as on the hub."""
    return MarkdownIt("commonmark").enable("table").render(ModelCard(card).text)


def test_the_hub_reads_what_was_measured(suites):
    evaluated(suites)
    data: Any = ModelCard(model_card(report(suites))).data
    assert data.base_model == "owner/base"
    assert data.model_name == "run"
    results = {one.metric_name: one for one in data.eval_results}
    assert list(results) == ["accuracy (%)", "accuracy, strict (%)", "unparsed (%)", "tokens"]
    one = results["accuracy (%)"]
    assert (one.metric_type, one.metric_value) == ("accuracy", 85.0)
    assert (one.task_type, one.dataset_type) == ("video-text-to-text", "mvbench")
    assert (one.dataset_name, one.dataset_split) == ("MVBench x", "x")
    assert results["tokens"].metric_value == 2.0


def test_it_says_what_was_compared_how_it_was_trained_and_how_evaluated(suites):
    asked = {"name": "mvbench", "data": "/home/me/mvbench.json", "prompt": "{question}"}
    evaluated(suites, benchmarks=[asked])
    train(
        suites.root, "model: {path: /home/me/llava}\nloss: {name: rdpo, beta: 0.1}\nrun: {a: 1}\n"
    )
    card = model_card(report(suites, title="LLaVA, aligned"))
    page = rendered(card)
    assert "<h2>LLaVA, aligned</h2>" in page
    assert f"run (model@{'b' * 16}) against base (owner/base@{'a' * 40})." in page
    assert re.search(r"<td>25\.0 ± \d+\.\d</td>\s*<td>85\.0 ± \d+\.\d \*</td>", page)
    assert "corrected by Holm's method over the 3 tests of a run" in page
    assert "run: better in MVBench x accuracy (25.0 → 85.0 %)" in page
    assert "run, trained by rdpo:" in page
    blocks = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", card, re.DOTALL)]
    assert blocks[0] == {"model": {"path": "llava"}, "loss": {"name": "rdpo", "beta": 0.1}}
    shared = asked | {"data": "mvbench.json"}
    read = {"mvbench": {"method": "by hand"}}
    told = {"seed": 7, "benchmarks": [shared], "read": read, "versions": {"torch": "2.8"}}
    assert blocks[1:] == [told]
    assert "<p>base and run:</p>" in page
    assert "/home/me" not in card


def test_paths_are_cut_to_their_last_part(suites):
    """`~`, addresses of files, and a + inside a folder's name, as paths alone have it."""
    asked = {
        "data": "~/secret/q.json",
        "images": "file:///home/me/secret/p/",
        "also": r"C:\\secret\\x",
    }
    hashes = "a" * 16, "b" * 40
    evaluated(
        suites,
        model=f"/home/me/a+b/secret-x/base@{hashes[0]}+/home/me/secret/lora@{hashes[1]}",
        benchmarks=[asked],
    )
    card = model_card(report(suites))
    page = rendered(card)
    assert f"against base (base@{hashes[0]} + lora@{hashes[1]})." in page
    (told,) = (yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", card, re.DOTALL))
    assert told["benchmarks"] == [{"data": "q.json", "images": "p", "also": "x"}]
    assert "secret" not in card


def test_without_training_and_hub_nothing_is_said_of_either(suites):
    evaluated(suites, model="runs/base@" + "c" * 16)
    card = model_card(report(suites))
    assert "base_model" not in card
    assert "Training" not in card


def test_names_break_neither_metadata_nor_markdown(suites):
    evaluated(suites, benchmarks=[{"name": "mvbench", "prompt": "````\n{question}\n---\n# no"}])
    train(suites.root, yaml.safe_dump({"loss": {"name": HOSTILE}}))
    made = report(suites, name=HOSTILE, base_name="<b>base", title=HOSTILE)
    card = ModelCard(model_card(made))
    assert card.data.to_dict()["model-index"][0]["name"] == HOSTILE
    page = rendered(str(card.content))
    assert "<script" not in page
    assert "<b>" not in page
    assert "<a " not in page
    assert "<em>" not in page
    assert page.count("<table>") == 1
    assert re.findall("<h1>.*?</h1>", page) == []
    assert (
        "<h2>a|b &lt;script&gt;alert(1)&lt;/script&gt; `x` *y* [z](http://w) &amp;amp; --- #"
        in page
    )
    # The table's head holds both names whole.
    assert len(re.findall("<th>", page)) == 3
    assert page.count("<pre>") == 2


def test_every_run_has_an_entry(suites):
    evaluated(suites)
    runs = [{"name": name, "eval": suites.root / "run"} for name in ("a", "b")]
    metadata = yaml.safe_load(model_card(report(suites, runs=runs)).split("---\n")[1])
    assert [entry["name"] for entry in metadata["model-index"]] == ["a", "b"]


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (b"\xff\xfe bad", r"recipe\.yaml: cannot be read \(.*utf-8"),
        ("a: [", r"recipe\.yaml: cannot be read \("),
        ("- 1", r"recipe\.yaml: is no recipe; got list"),
    ],
)
def test_a_broken_training_recipe_is_told_before_anything_is_written(suites, recipe, message):
    evaluated(suites)
    train(suites.root, recipe)
    with pytest.raises(DataError, match=message):
        write(report(suites))
    assert not (suites.root / "out").exists()


def test_plain_shows_text_as_it_is():
    for text in (
        HOSTILE,
        "__init__",
        "1. one",
        "~~a~~",
        "> q",
        "$x$",
        "a_b_c",
        "https://a.b",
        "+ a",
    ):
        html = MarkdownIt("commonmark").enable(["table", "strikethrough"]).renderInline(plain(text))
        assert "<" not in html
        shown = html.replace("&lt;", "<").replace("&gt;", ">").replace("&quot;", '"')
        assert shown.replace("&amp;", "&") == " ".join(text.split())
