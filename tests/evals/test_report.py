"""The before/after report: its numbers, its words, its choice of scenes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from typer.testing import CliRunner

from evals.report import ReportRecipe, collect, holm
from evals.report_cli import app
from evals.report_figures import _points
from evals.report_page import write
from evals.report_tables import difference_tables, value_tables
from evals.report_words import sentences
from mmalign.config import load_config
from mmalign.errors import ConfigError, DataError


def recipe(evaluations: Path, output: Path, **changes: object) -> ReportRecipe:
    runs = [
        {"name": name, "eval": evaluations / name, "train": evaluations / f"train-{name}"}
        for name in ("good", "same")
    ]
    settings = {"output": output, "base": evaluations / "base", "runs": runs, "gallery": 6}
    return ReportRecipe.model_validate(settings | changes)


def build_report(recipe: ReportRecipe) -> Path:
    return write(collect(recipe))


@pytest.fixture(scope="module")
def built(evaluations, tmp_path_factory) -> Path:
    return build_report(recipe(evaluations, tmp_path_factory.mktemp("report"), note="One seed."))


@pytest.fixture(scope="module")
def html(built) -> str:
    return built.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def numbers(built) -> dict:
    return json.loads(built.with_name("results.json").read_text())


def metrics(evaluations: Path, name: str, suite: str) -> dict[str, float]:
    results = json.loads((evaluations / name / "results.json").read_text())
    return next(s["metrics"] for s in results["suites"] if s["key"] == suite)


def section(html: str, heading: str) -> str:
    """The page from one heading to the next."""
    return re.split(r"<h2[^>]*>", html.split(f">{heading}</h2>")[1])[0]


def words(html: str) -> str:
    return " ".join(re.sub(r"<[^>]+>", " ", html).split())


def test_tables_hold_the_numbers_of_the_evaluations(evaluations, html, numbers):
    table = words(section(html, "Before and after"))
    for name in ("base", "good", "same"):
        expected = metrics(evaluations, name, "chair")
        shown = [100 * expected[key] for key in ("chair_i", "chair_s", "recall")]
        cells = " ".join(f"{value:.1f} ± {value / 10:.1f}" for value in shown)
        length = expected["num_words"]
        assert f"{name} {cells} {length:.1f} ± {length / 10:.1f}" in table
        assert numbers["runs"][name]["chair"] == expected
    accuracy = 100 * metrics(evaluations, "good", "pope-adversarial")["official/accuracy"]
    assert f"good {accuracy:.1f} ± {accuracy / 10:.1f}" in table
    assert "CHAIR: 60 pictures" in table
    assert "POPE adversarial: 120 questions" in table


def test_summary_says_what_is_better_and_what_is_not_significant(built, html, numbers):
    summary = words(html.split("</header>")[1].split("<h2")[0])
    good, same = summary.split(" same : ")
    assert good.startswith("good : better in CHAIR_i (40.9 → 13.8 %) and CHAIR_s")
    assert good.endswith("no significant difference in the other 4 measures.")
    assert same == "no significant difference from base in any of 7 measures. One seed."
    verdicts = {c["metric"]: c["verdict"] for c in numbers["comparisons"]["good"]}
    assert verdicts["chair_i"] == "better"
    assert verdicts["num_words"] == "changed"
    assert verdicts["recall"] == "not significant"
    assert "- same: no significant difference" in built.with_name("report.md").read_text()


def test_a_worse_run_is_called_worse(evaluations, tmp_path):
    swapped = {"base": evaluations / "good", "runs": [{"name": "b", "eval": evaluations / "base"}]}
    report = collect(recipe(evaluations, tmp_path, **swapped))
    assert sentences(report)["b"].startswith("worse in CHAIR_i (13.8 → 40.9 %)")
    differences = difference_tables(report)[0].rows[0]
    assert differences[1].parts[0] == ("+27.2 *", "bad")


def test_only_differences_that_survive_the_correction_are_starred(html, numbers):
    starred = re.findall(r"([+−]\d+\.\d) \*", words(section(html, "Differences from base")))
    supported = [
        c
        for run in numbers["comparisons"].values()
        for c in run
        if c["verdict"] != "not significant"
    ]
    assert len(starred) == len(supported) == 3
    assert all(c["p_holm"] < 0.05 for c in supported)
    # Significant alone, not among seven: the correction must be the one that decides.
    accuracy = next(c for c in numbers["comparisons"]["good"] if c["metric"] == "official/accuracy")
    assert accuracy["p_value"] < 0.05 <= accuracy["p_holm"]
    assert accuracy["verdict"] == "not significant"


def test_holm_against_a_worked_example():
    # By hand: 0.01 * 4, then max(0.04, 0.02 * 3), then 0.03 * 2, then max(0.06, 0.04 * 1).
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


def test_gallery_shows_as_many_broken_as_fixed_scenes(evaluations, html):
    scenes = section(html, "Scenes")
    titles = re.findall(r"<h3>(Fixed|Broken): (scene-\d+)</h3>", scenes)
    assert [verdict for verdict, _ in titles] == ["Fixed"] * 3 + ["Broken"] * 3
    count = {
        name: {
            row["id"]: len(row["hallucinated"])
            for row in map(json.loads, (evaluations / name / "items/chair.jsonl").open())
        }
        for name in ("base", "good", "same")
    }
    for verdict, scene in titles:
        change = count["good"][scene] + count["same"][scene] - 2 * count["base"][scene]
        assert (change < 0) == (verdict == "Fixed")
    assert scenes.count("<img src=") == 6


def test_gallery_marks_what_is_made_up_in_the_words_of_the_answer(evaluations, html, written):
    seen = set()
    for card in section(html, "Scenes").split("<article>")[1:]:
        scene = re.search(r": (scene-\d+)", card)[1]
        for name in ("base", "good", "same"):
            rows = map(json.loads, (evaluations / name / "items/chair.jsonl").open())
            row = next(row for row in rows if row["id"] == scene)
            answer = re.search(rf"<dt>{name}</dt><dd>(.*?)</dd>", card, re.DOTALL)[1]
            marked = re.findall(r'<mark class="bad">(.*?)</mark>', answer)
            assert marked == [written.get(word, word) for word in row["hallucinated"]]
            assert re.sub("<[^>]+>", "", answer).startswith(row["answer"])
            absent = ", ".join(row["hallucinated"]) or "nothing"
            assert f"Not in the picture: {absent}." in answer
            seen.update(marked)
        assert f"<dt>in the picture</dt><dd>{', '.join(row['truth'])}</dd>" in card
    assert seen >= set(written.values())


def test_a_word_inside_the_name_of_another_object_is_not_marked(evaluations, tmp_path):
    report = collect(recipe(evaluations, tmp_path, gallery=2, suites=["chair"]))
    folder = tmp_path / "bears"
    (folder / "items").mkdir(parents=True)
    rows = [json.loads(line) for line in (evaluations / "base/items/chair.jsonl").open()]
    for row in rows:
        row |= {"answer": "A teddy bear and a bear.", "mentioned": ["teddy bear", "bear"]}
        row |= {"spans": [[2, 12], [19, 23]], "hallucinated": ["bear"]}
    (folder / "items/chair.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = write(replace(report, base=replace(report.base, folder=folder))).read_text()
    assert 'A teddy bear and a <mark class="bad">bear</mark>.' in section(page, "Scenes")


def test_a_report_on_questions_alone_shows_right_and_wrong_answers(evaluations, tmp_path):
    path = build_report(recipe(evaluations, tmp_path, suites=["pope-adversarial"], gallery=2))
    html = path.read_text()
    assert "CHAIR" not in html.split("How it was run</h2>")[0].split("<body>")[1]
    # One of each for either run.
    cards = section(html, "Fixed and broken answers").split("<article>")[1:]
    assert [re.findall(r"(?:base|good|same) · \w+", card) for card in cards] == [
        ["base · wrong", "good · right"],
        ["base · right", "good · wrong"],
        ["base · wrong", "same · right"],
        ["base · right", "same · wrong"],
    ]
    assert re.search(r"<dd>Is there a \w+ in the image\?</dd>", cards[0])
    assert re.search(r"<dt>right answer</dt><dd>(yes|no)</dd>", cards[0])
    assert all(card.count("<img") == 1 for card in cards)


def test_a_run_keeps_its_colour_in_figures_that_not_all_runs_are_in(evaluations, tmp_path):
    names = ("sft", "dpo")
    for name in names:
        (tmp_path / name).mkdir()
        row = {"step": 1, "train/loss": 1.0} | ({"train/margin": 0.5} if name == "dpo" else {})
        lines = [json.dumps(row | {"step": step}) + "\n" for step in (1, 2)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(lines))
    runs = [{"name": n, "eval": evaluations / "same", "train": tmp_path / n} for n in names]
    page = build_report(recipe(evaluations, tmp_path / "out", runs=runs)).read_text()
    loss, margin = section(page, "Training").split("<svg")[1:]
    assert "var(--series-1" in loss
    assert "var(--series-2" in loss
    assert "var(--series-1" not in margin
    assert "var(--series-2" in margin


def test_unanswered_pictures_are_counted_by_suite_and_model(evaluations, tmp_path, html):
    assert "Unanswered" not in html
    report = collect(recipe(evaluations, tmp_path))
    results = json.loads(json.dumps(report.base.results))
    results["suites"][0]["num_missing"] = 3
    page = write(replace(report, base=replace(report.base, results=results))).read_text()
    told = section(page, "Before and after")
    assert "a server was silent: 3 of CHAIR by base. A question without an answer" in told


def test_curves_cover_every_run(html):
    training = section(html, "Training")
    assert training.count("<svg") == 4
    for label in ("Loss", "good", "same"):
        assert f">{label}</text>" in training


@pytest.mark.parametrize("lost", [None, float("nan")])
def test_a_step_without_a_number_is_left_out_of_its_curve(evaluations, tmp_path, lost):
    """300 steps in 100 points, three steps each."""
    shutil.copytree(evaluations / "train-good", tmp_path / "train")
    path = tmp_path / "train/metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[5]["train/loss"] = lost
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    runs = [{"name": "good", "eval": evaluations / "good", "train": tmp_path / "train"}]
    made = collect(recipe(evaluations, tmp_path / "out", runs=runs))
    points = _points(made.histories["good"], "train/loss")
    assert [step for step, _ in points] == [*range(1, 6), *range(7, 301)]
    assert "nan" not in re.findall(r'<path d="[^"]*"', write(made).read_text())


@pytest.mark.parametrize("name", ["half \ud800", "two\nlines", "bell\a"])
def test_a_name_that_cannot_be_drawn_is_refused(evaluations, tmp_path, name):
    for names in ({"base_name": name}, {"runs": [{"name": name, "eval": evaluations / "good"}]}):
        with pytest.raises(ConfigError, match=r"name: holds no text; got '(half|two|bell)"):
            build_report(recipe(evaluations, tmp_path / "out", **names))
    assert not (tmp_path / "out").exists()


def test_names_are_no_markup_in_the_text(evaluations, tmp_path):
    runs = [{"name": "`good`| *x*: [y](z)", "eval": evaluations / "good"}]
    words = {"title": "# <b>T</b>\n---", "base_name": "<script>", "note": "<img src=x>"}
    page = build_report(recipe(evaluations, tmp_path, runs=runs, **words))
    text = page.with_name("report.md").read_text()
    shown = MarkdownIt("commonmark").enable("table").render(text)
    assert not re.search("<(script|b|img|em|code|a) ?", shown)
    assert "<h1># &lt;b&gt;T&lt;/b&gt; ---</h1>" in shown
    assert '<th style="text-align:right">`good`| *x*: [y](z)</th>' in shown


def test_probes_are_drawn_with_their_factor_for_each_run_that_has_them(evaluations, tmp_path, html):
    assert "Form and accuracy during training" not in html
    for name in ("probed", "bare"):
        (tmp_path / name).mkdir()
        rows: list[dict[str, float]] = [{"step": step, "train/loss": 1.0} for step in (1, 2)]
        if name == "probed":
            for row, rate in zip(rows, (0.25, 0.5), strict=True):
                row |= {"probe/id/format": rate, "probe/ood/format": 0.25, "gf/raw": 0.25}
                row |= {"gf/relative": 0.0, "probe/id/accuracy": rate, "probe/ood/accuracy": 0.5}
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    runs = [
        {"name": name, "eval": evaluations / "same", "train": tmp_path / name}
        for name in ("probed", "bare")
    ]
    page = build_report(recipe(evaluations, tmp_path / "out", runs=runs)).read_text()
    form, accuracy = section(page, "Form and accuracy during training").split("<svg")[1:]
    for label in ("Answers in form, %: probed", "Generalization Factor", "of the gains",
                  "in distribution", "out of distribution"):  # fmt: skip
        assert f">{label}</text>" in form
    assert ">Right answers, %: probed</text>" in accuracy
    assert ">in distribution</text>" in accuracy
    assert ">Generalization Factor</text>" not in accuracy


def test_a_step_that_a_resumed_run_repeated_counts_once_as_it_went_last(evaluations, tmp_path):
    straight = [{"step": step, "train/loss": step / 2, "train/lr": 0.1} for step in (1, 2, 3)]
    stale = {"step": 2, "train/loss": 9.0}
    resumed = [straight[0], stale, straight[1], {"step": 2, "eval/loss": 1.0}, straight[2]]
    drawn = []
    for name, rows in (("straight", straight), ("resumed", resumed)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        runs = [{"name": "run", "eval": evaluations / "same", "train": folder}]
        page = build_report(recipe(evaluations, tmp_path / "out", runs=runs)).read_text()
        drawn.append(section(page, "Training"))
    assert drawn[0].count("<svg") == 1
    assert drawn[0] == drawn[1]


def test_scenes_that_a_model_left_unanswered_are_not_called_fixed(evaluations, tmp_path, html):
    first = re.search(r"Fixed: (scene-\d+)", section(html, "Scenes"))[1]
    report = collect(recipe(evaluations, tmp_path, gallery=6, suites=["chair"]))
    folder = tmp_path / "silent"
    (folder / "items").mkdir(parents=True)
    rows = [json.loads(line) for line in (evaluations / "good/items/chair.jsonl").open()]
    for row in rows:
        if row["id"] == first:
            row |= {"answer": None, "mentioned": [], "spans": [], "hallucinated": []}
    (folder / "items/chair.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    silent = replace(report.runs[0], folder=folder)
    page = write(replace(report, runs=[silent, report.runs[1]])).read_text()
    assert "of 59 answered items" in section(page, "Scenes")
    assert first not in section(page, "Scenes")


def test_configs_and_recipes_are_there_to_read(html):
    how = section(html, "How it was run")
    assert how.count("<details>") == 5
    assert "fingerprint: good00000000" in how
    assert "beta: 0.1" in how


def test_the_same_directories_give_the_same_bytes(evaluations, built, tmp_path):
    again = build_report(recipe(evaluations, tmp_path, note="One seed."))
    for name in ("report.html", "report.md", "model_card.md", "results.json"):
        assert again.with_name(name).read_bytes() == built.with_name(name).read_bytes()


def test_hostile_answers_and_missing_pictures_are_only_shown(evaluations, tmp_path):
    report = collect(recipe(evaluations, tmp_path, gallery=2))
    folder = tmp_path / "hostile"
    (folder / "items").mkdir(parents=True)
    for path in ("results.json", "items/chair.jsonl", "items/pope-adversarial.jsonl"):
        text = (evaluations / "base" / path).read_text()
        text = text.replace("There is", "<script>alert(1)</script>")
        (folder / path).write_text(text.replace(".png", ".missing.png"))
    base = replace(report.base, folder=folder)
    page = write(replace(report, base=base)).read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; a" in section(page, "Scenes")
    assert "The picture is not shown: " in section(page, "Scenes")


def test_undefined_numbers_are_dashes_and_null(evaluations, tmp_path):
    report = collect(recipe(evaluations, tmp_path))
    suites = json.loads(json.dumps(report.base.results["suites"]))
    suites[0]["metrics"] |= {"chair_i": float("nan"), "recall": None}
    suites[0]["intervals"].pop("chair_s")
    report = replace(report, base=replace(report.base, results={"suites": suites}))
    assert value_tables(report)[0].rows[0][1] is None
    assert value_tables(report)[0].rows[0][3] is None
    assert value_tables(report)[0].rows[0][2] == "86.7"
    page = write(report)
    numbers = json.loads(page.with_name("results.json").read_text(), parse_constant=pytest.fail)
    assert numbers["runs"]["base"]["chair"]["chair_i"] is None
    assert "| base  |          – |" in page.with_name("report.md").read_text()


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        (
            {"base": "nowhere"},
            DataError,
            "nowhere: is no folder, so no finished evaluation. Correct",
        ),
        ({"suites": ["chiar"]}, ConfigError, "got chiar; wanted chair, pope-adversarial"),
    ],
)
def test_mistakes_are_told_with_the_way_out(evaluations, tmp_path, changes, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        collect(recipe(evaluations, tmp_path, **changes))


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (None, "holds no results.json, so no finished evaluation. Run its recipe again; it"),
        ("{", "results.json: cannot be read (Expecting"),
        ("[]", "results.json: is not what an evaluation writes. Write it anew with `mmalign eval"),
        ('{"suites": [{}]}', "results.json: is not what an evaluation writes."),
    ],
)
def test_an_evaluation_without_results_says_what_to_run(evaluations, tmp_path, written, message):
    folder = tmp_path / "half"
    folder.mkdir()
    if written is not None:
        (folder / "results.json").write_text(written)
    with pytest.raises(DataError, match=re.escape(message)):
        collect(recipe(evaluations, tmp_path, base=folder))


def test_a_training_folder_without_metrics_is_told_before_anything_is_written(
    evaluations, tmp_path
):
    runs = [{"name": "a", "eval": evaluations / "same", "train": evaluations / "base"}]
    with pytest.raises(DataError, match=r"base: holds no metrics.jsonl.* or leave `train` out"):
        build_report(recipe(evaluations, tmp_path / "out", runs=runs))
    runs[0]["train"] = tmp_path
    (tmp_path / "metrics.jsonl").write_text('{"train/loss": 1.0}\n')
    with pytest.raises(DataError, match=r"metrics.jsonl, line 1: is of no step; got fields train"):
        build_report(recipe(evaluations, tmp_path / "out", runs=runs))
    assert not (tmp_path / "out").exists()


def test_a_benchmark_without_tests_is_shown_and_said_to_be_left_out(evaluations, tmp_path, caplog):
    report = collect(with_benchmark(evaluations, tmp_path, "unheard"))
    assert "unheard-adversarial is left out: no benchmark here is called unheard" in caplog.text
    page = write(report).read_text()
    assert "UNHEARD adversarial: 120 items" in page
    assert "UNHEARD" not in section(page, "Differences from base")
    alone = report.recipe.model_copy(update={"suites": ["unheard-adversarial"]})
    page = build_report(alone).read_text()
    assert "good</strong>: no measure could be tested against base." in page
    assert "Scenes</h2>" not in page


def with_benchmark(evaluations: Path, tmp_path: Path, name: str) -> ReportRecipe:
    """The evaluations, their questions asked by a benchmark of another name."""
    for run in ("base", "good"):
        shutil.copytree(evaluations / run, tmp_path / run)
        text = (tmp_path / run / "results.json").read_text()
        (tmp_path / run / "results.json").write_text(text.replace("pope", name))
        items = tmp_path / run / "items"
        (items / "pope-adversarial.jsonl").rename(items / f"{name}-adversarial.jsonl")
    runs = [{"name": "good", "eval": tmp_path / "good"}]
    return recipe(evaluations, tmp_path / "out", base=tmp_path / "base", runs=runs)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (None, "items/chair.jsonl: is missing. Write it anew with `mmalign eval rescore`"),
        ("{}", "items/chair.jsonl, line 1: field id is missing. Write it anew"),
        ('{"id": "a", "image": "a"}', "items/chair.jsonl, line 1: field truth is missing. Write"),
    ],
)
def test_damaged_items_say_how_to_mend_them(evaluations, tmp_path, rows, message):
    shutil.copytree(evaluations / "good", tmp_path / "good")
    (tmp_path / "good/items/chair.jsonl").unlink()
    if rows is not None:
        (tmp_path / "good/items/chair.jsonl").write_text(rows + "\n")
    with pytest.raises(DataError, match=re.escape(message)):
        collect(recipe(evaluations, tmp_path, runs=[{"name": "a", "eval": tmp_path / "good"}]))


def test_suites_that_are_not_asked_for_need_not_match(evaluations, tmp_path):
    shutil.copytree(evaluations / "good", tmp_path / "good")
    questions = tmp_path / "good/items/pope-adversarial.jsonl"
    questions.write_text("".join(questions.read_text().splitlines(keepends=True)[1:]))
    runs = [{"name": "good", "eval": tmp_path / "good"}]
    differ = r"base and .*good, pope-adversarial: the runs asked different questions: 1 differ"
    with pytest.raises(DataError, match=differ):
        collect(recipe(evaluations, tmp_path, runs=runs))
    report = collect(recipe(evaluations, tmp_path, runs=runs, suites=["chair"]))
    assert len(report.findings["good"]) == 4


def test_two_runs_of_one_name_are_refused(evaluations, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "output: out\nbase: b\nruns: [{name: base, eval: x}, {name: a, eval: y}]\ngalery: 3\n"
    )
    with pytest.raises(ConfigError, match="galery: did you mean gallery"):
        load_config(path, ReportRecipe)
    path.write_text(path.read_text().replace("galery: 3", ""))
    with pytest.raises(ConfigError, match="every run needs its own name; repeated: base"):
        load_config(path, ReportRecipe)


def test_the_example_recipe_is_valid():
    example = Path(__file__).parents[2] / "configs" / "eval" / "report_example.yaml"
    assert [run.name for run in load_config(example, ReportRecipe).runs] == ["dpo", "realign"]


def test_the_command_prints_the_tables_and_where_the_page_is(evaluations, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"output: {tmp_path / 'a'}\nbase: {evaluations / 'base'}\n"
        f"runs: [{{name: good, eval: {evaluations / 'good'}}}]\n"
    )
    result = CliRunner().invoke(app, [str(path), f"output={tmp_path / 'b'}", "gallery=0"])
    assert result.exit_code == 0, result.output
    assert re.search(r"\| good +\| 13.8 ± 1.4 \|", result.output)
    assert "good: better in CHAIR_i" in result.output
    assert str(tmp_path / "b" / "report.html") in result.output
    assert (tmp_path / "b" / "report.html").exists()
    assert "\x1b" not in result.output


def test_importing_the_command_and_the_report_loads_nothing_heavy():
    code = (
        "import sys, evals.report_cli; light = 'evals.report' not in sys.modules; "
        "import evals.report; print(light, 'torch' in sys.modules, 'matplotlib' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["True", "False", "False"]


def test_a_report_may_not_replace_a_run_s_results(evaluations):
    with pytest.raises(ValueError, match="output is the folder of a run"):
        recipe(evaluations, evaluations / "good")


def test_runs_that_were_asked_in_other_words_are_told(evaluations, tmp_path, html):
    assert "Asked in other words" not in html
    other = tmp_path / "other"
    shutil.copytree(evaluations / "good", other)
    items = other / "items" / "pope-adversarial.jsonl"
    items.write_text(items.read_text().replace("Is there a", "Do you see a"))
    runs = [{"name": "good", "eval": other}]
    page = build_report(recipe(evaluations, tmp_path / "out", runs=runs)).read_text()
    assert "Asked in other words than by base, which may make a difference: POPE" in page
