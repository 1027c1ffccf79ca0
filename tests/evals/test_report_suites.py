"""The report over several benchmarks: one table of all, bars by category, what was fixed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from evals.compare import compare
from evals.known import RULES
from evals.questions import yes_ratio
from evals.report import Report, ReportRecipe, categories, collect, evenly, headline
from evals.report_changes import changes, right
from evals.report_figures import MOST_CATEGORIES
from evals.report_page import write
from evals.report_tables import suite_table, value_tables
from mmalign.report.figures import grouped_bars


def report(suites: Any, **changes: Any) -> Report:
    runs = [{"name": "run", "eval": suites.root / "run"}]
    settings = {"output": suites.root / "out", "base": suites.root / "base", "runs": runs}
    return collect(ReportRecipe.model_validate(settings | changes))


def section(html: str, heading: str) -> str:
    return re.split(r"<h2[^>]*>", html.split(f">{heading}</h2>")[1])[0]


def ask(suites: Any, name: str, right_ones: int, benchmark: str = "mvbench", **about: Any) -> None:
    """Forty questions, of which the first so many are right, in two categories of like size."""
    rows = [
        suites.question(
            i, "A", "A" if i < right_ones else "B", categories=["odd" * (i % 2) or "even"]
        )
        for i in range(40)
    ]
    suites.add(name, benchmark, rows, **about)


def spaced(text: object) -> str:
    return str(text).replace("\u00a0", " ")


def test_all_suites_stand_in_one_table_with_stars_of_the_corrected_tests(suites):
    for name, counts in {"base": (10, 20), "run": (34, 21)}.items():
        for benchmark, count in zip(("mvbench", "tvbench"), counts, strict=True):
            ask(suites, name, count, benchmark)
    made = report(suites)
    rows = {spaced(row[0]): list(map(str, row[1:])) for row in suite_table(made).rows}
    assert list(rows) == ["MVBench accuracy ↑", "TVBench accuracy ↑"]
    before, after = rows["MVBench accuracy ↑"]
    assert re.fullmatch(r"25\.0 ± \d+\.\d", before)
    # 24 questions gained and none lost: 2^-23, times four tests, far below 0.05.
    assert re.fullmatch(r"85\.0 ± \d+\.\d \*", after)
    assert re.fullmatch(r"52\.5 ± \d+\.\d", rows["TVBench accuracy ↑"][1])
    page = write(made).read_text()
    table = section(page, "All suites")
    assert table.count("<tr>") == 3
    assert '<mark class="good">85.0</mark>' in table
    assert "by Holm&#39;s method over the 6 tests of a run; * marks p &lt; 0.05" in table
    assert "| MVBench accuracy ↑ |" in spaced((suites.root / "out/report.md").read_text())
    numbers = json.loads((suites.root / "out/results.json").read_text())
    assert numbers["suites"]["tvbench"]["measure"] == "official/accuracy"
    low, high = numbers["intervals"]["run"]["mvbench"]["official/accuracy"]
    assert low <= 0.85 <= high


def test_one_suite_needs_no_table_of_all(suites):
    ask(suites, "base", 10)
    ask(suites, "run", 34)
    assert "All suites" not in write(report(suites)).read_text()


def test_a_suite_that_a_run_lacks_is_a_dash_there(suites):
    ask(suites, "base", 10)
    ask(suites, "run", 34)
    ask(suites, "run", 20, "tvbench")
    rows = suite_table(report(suites)).rows
    assert rows[1][1] is None
    assert str(rows[1][2]).startswith("50.0 ± ")


def test_length_and_yes_ratio_stand_beside_answers_of_yes_and_no(suites):
    said = {"base": ["yes"] * 6 + ["no"] * 2 + [None, "maybe"], "run": ["no"] * 10}
    for name, answers in said.items():
        rows = [
            suites.question(i, "yes" if i % 2 else "no", one, num_tokens=3 * bool(one))
            for i, one in enumerate(answers)
        ]
        suites.add(name, "vidhalluc_binary", rows)
    made = report(suites)
    (table,) = value_tables(made)
    assert table.columns[-2:] == ["yes ratio", "tokens"]
    assert [str(cell).split(" ± ")[0] for cell in table.rows[0][-2:]] == ["60.0", "3.0"]
    assert [str(cell).split(" ± ")[0] for cell in table.rows[1][-2:]] == ["0.0", "3.0"]
    found = {c.metric: c for c in compare(suites.root / "base", suites.root / "run")}
    assert found["yes_ratio"].difference == pytest.approx(-0.6)
    assert found["answer_tokens"].difference == 0
    assert yes_ratio(rows).value == 0


def test_letters_have_no_yes_ratio_and_lengths_are_of_answers_that_there_are(suites):
    rows = [suites.question(0, "A", None), suites.question(1, "A", "A", num_tokens=7)]
    made = RULES["mvbench"].numbers(rows)
    assert "yes_ratio" not in made
    assert made["answer_tokens"].value == 7
    old = [{key: value for key, value in row.items() if key != "num_tokens"} for row in rows]
    assert "answer_tokens" not in RULES["mvbench"].numbers(old)
    assert not RULES["chair"].length
    assert not RULES["verifiable"].length


def test_results_that_hold_no_length_have_no_column_and_no_test_of_it(suites):
    for name in ("base", "run"):
        ask(suites, name, 20)
        path = suites.root / name / "results.json"
        results = json.loads(path.read_text())
        del results["suites"][0]["metrics"]["answer_tokens"]
        path.write_text(json.dumps(results))
    made = report(suites)
    assert "tokens" not in value_tables(made)[0].columns
    assert "answer_tokens" not in {f.metric.key for f in made.findings["run"]}


def test_categories_belong_to_the_measure_that_names_them():
    suite = {
        "benchmark": "mvbench",
        "metrics": dict.fromkeys(
            [
                "official/accuracy",
                "official/accuracy/a/b",
                "official/accuracy/c",
                "strict/accuracy",
            ],
            0.5,
        ),
    }
    found = categories(suite)
    assert {metric.key: names for metric, names in found.items()} == {
        "official/accuracy": ["a/b", "c"]
    }
    assert headline(suite) == RULES["mvbench"].shown[0]
    assert headline({"benchmark": "mvbench", "metrics": {}}) is None


def test_bars_by_category_have_their_numbers_folded_below(suites):
    ask(suites, "base", 10)
    ask(suites, "run", 34)
    part = section(write(report(suites)).read_text(), "By category")
    assert part.count("<svg") == 1
    for label in ("even", "odd", "base", "run", "MVBench accuracy, %"):
        assert f">{label}</text>" in part
    assert "var(--series-1" in part
    assert "var(--series-2" in part
    folded = part.split("<details>")[1].split("</details>")[0]
    assert "<summary>MVBench accuracy by category</summary>" in folded
    # Of the 20 even questions 5 were right, then 17.
    assert re.search(r"even</th>.*?25\.0<small> ± .*?85\.0<small>", folded, re.DOTALL)


def test_very_many_categories_are_a_table_alone(suites):
    for name in ("base", "run"):
        rows = [
            suites.question(i, "A", "A", categories=[f"c{i}"]) for i in range(MOST_CATEGORIES + 1)
        ]
        suites.add(name, "mvbench", rows)
    part = section(write(report(suites)).read_text(), "By category")
    assert "<svg" not in part
    assert "<details>" not in part
    assert part.count("<tr>") == MOST_CATEGORIES + 2


def test_a_bar_stands_where_its_value_is_and_none_where_there_is_none():
    svg = grouped_bars(["a", "b"], {"x": [(50.0, (40.0, 60.0)), None]}, title="t")
    bars = [path for path in re.findall(r"<path [^>]*?>", svg) if "opacity: 0.75" in path]
    assert len(bars) == 1
    assert svg == grouped_bars(["a", "b"], {"x": [(50.0, (40.0, 60.0)), None]}, title="t")


def test_what_a_run_fixed_and_broke_is_counted_and_shown_with_pictures(suites):
    truth = "AAAAAAAA"
    said = {"base": "AABBBBAA", "run": "BBAAABAA"}
    for name, answers in said.items():
        rows = [
            suites.question(i, truth[i], one, answer=f"{one}. Since {name} sees it.")
            for i, one in enumerate(answers)
        ]
        suites.add(name, "mvbench", rows, images=str(suites.root))
    for number in range(7):
        Image.new("RGB", (8, 8)).save(suites.root / f"{number}.png")
    Path(suites.root / "0.png").unlink()
    made = report(suites, gallery=4)
    part = section(write(made).read_text(), "Fixed and broken answers")
    assert (
        "of 8 questions that both answered, fixed 3, broke 2; 2 right under both, 1 under" in part
    )
    cards = part.split("<article>")[1:]
    # Two of q002, q003, q004 and both of q000, q001.
    titles = re.findall(r"<h3>(.*?)</h3>", part)
    assert titles == ["Fixed: q002", "Fixed: q003", "Broke: q000", "Broke: q001"]
    assert "<dt>base · wrong, read as B</dt>" in cards[0]
    assert '<mark class="bad">B. Since base sees it.</mark>' in cards[0]
    assert "<dt>run · right, read as A</dt><dd>A. Since run sees it.</dd>" in cards[0]
    assert "<dd>Question 2?</dd>" in cards[0]
    assert 'src="data:image/' in cards[0]
    assert "The picture is not shown: " in cards[2]
    numbers = json.loads((suites.root / "out/results.json").read_text())
    expected = {"fixed": 3, "broke": 2, "right": 2, "wrong": 1}
    assert numbers["changes"]["run"]["mvbench"] == expected
    assert "- MVBench, run: of 8 questions" in (suites.root / "out/report.md").read_text()


def test_a_gallery_of_none_still_counts(suites):
    ask(suites, "base", 10)
    ask(suites, "run", 34)
    part = section(write(report(suites, gallery=0)).read_text(), "Fixed and broken answers")
    assert "fixed 24, broke 0" in part
    assert "<article>" not in part


def test_unanswered_questions_are_neither_fixed_nor_broken(suites):
    before = [suites.question(0, "A", None), suites.question(1, "A", "A")]
    after = [suites.question(0, "A", "A"), suites.question(1, "A", None)]
    found = changes({r["id"]: r for r in before}, {r["id"]: r for r in after})
    assert found is not None
    assert (found.fixed, found.broke, found.num_right, found.num_wrong) == ([], [], 0, 0)


def test_right_is_by_the_official_reading_and_of_soft_credit_the_half(suites):
    assert right(suites.question(0, "A", "A")) is True
    assert right(suites.question(0, "A", "A", correct_official=0.3)) is False
    assert right(suites.question(0, "A", "A", correct_official=0.6)) is True
    bare = {"prompt": "?", "answer": "No.", "label": "no", "official": "no"}
    assert right(bare) is True
    assert right(bare | {"official": None}) is False
    # Descriptions have no right answer.
    assert right(bare | {"label": None}) is None
    assert changes({"a": bare | {"label": None}}, {"a": bare | {"label": None}}) is None


def test_answers_that_a_judge_gave_points_got_better_or_worse(suites):
    for name, given in (("base", (1, 4, 3)), ("run", (6, 2.5, 3))):
        rows = [
            {k: v for k, v in suites.question(i, "ref", name).items() if "correct" not in k}
            | {"score_official": one, "scores_official": [one], "scores_strict": [one]}
            | {"score_strict": one}
            for i, one in enumerate(given)
        ]
        suites.add(name, "mmhal", rows)
    part = section(write(report(suites)).read_text(), "Fixed and broken answers")
    assert "of 3 answers that both gave, 1 got more points, 1 fewer, 1 as many." in part
    assert re.findall(r"<h3>(.*?)</h3>", part) == ["Better: q000", "Worse: q001"]
    assert "<dt>base · 1 points</dt><dd>base</dd>" in part
    assert "<dt>run · 2.5 points</dt><dd>run</dd>" in part
    numbers = json.loads((suites.root / "out/results.json").read_text())
    assert numbers["changes"]["run"]["mmhal"] == {"fixed": 1, "broke": 1, "same": 1}


def test_pictures_inside_the_data_and_questions_of_words_alone(suites):
    rows = {
        name: [
            suites.question(0, "A", said, image="sha256-of-it"),
            suites.question(1, "A", said, image="q001", label=["A", "a", *"bcdefg"]),
        ]
        for name, said in (("base", "B"), ("run", "A"))
    }
    for name, of_run in rows.items():
        suites.add(name, "mvbench", of_run)
    cards = section(write(report(suites)).read_text(), "Fixed and broken answers").split(
        "<article>"
    )
    assert "The picture is inside the benchmark&#39;s data, and not shown." in cards[1]
    assert "not shown" not in cards[2]
    assert "<dt>right answer</dt><dd>A / a / b / c / d / …</dd>" in cards[2]


def test_how_answers_were_read_and_who_judged_them_stands_with_the_configs(suites):
    for name in ("base", "run"):
        ask(suites, name, 20, judge={"model": "judge-7b"})
    part = section(write(report(suites)).read_text(), "How it was run")
    assert part.count("method: by hand") == 2
    assert part.count("model: judge-7b") == 2
    assert (suites.root / "out/model_card.md").read_text().count("model: judge-7b") == 1


def test_long_answers_are_cut(suites):
    for name, said in (("base", "B"), ("run", "A")):
        row = suites.question(0, "A", said, answer=f"{said} " + "and so on " * 500)
        suites.add(name, "mvbench", [row])
    page = write(report(suites)).read_text()
    shown = re.findall(r"((?:and so on ){5,}[^<]*)", section(page, "Fixed and broken answers"))
    assert len(shown) == 2
    assert all(text.endswith(" …") and len(text) < 620 for text in shown)


def test_what_is_shown_is_spread_evenly():
    assert evenly(list("abcdefgh"), 4) == ["a", "c", "e", "g"]
    assert evenly(["a"], 4) == ["a"]
    assert evenly([], 4) == []
    assert evenly(["a"], 0) == []


def test_descriptions_and_questions_of_one_suite_are_each_shown_where_they_belong(suites):
    named = {"mentioned": ["cat"], "spans": [[2, 5]]}
    for name, hallucinated, said in (("base", ["cat"], "yes"), ("run", [], "no")):
        described = suites.question(0, "", "a cat", label=None, **named)
        described |= {"hallucinated": hallucinated, "truth": ["dog"], "official": None}
        asked = suites.question(1, "no", said, hallucinated=[], mentioned=[], spans=[])
        suites.add(name, "mvbench", [described, asked | {"truth": []}])
    page = write(report(suites)).read_text()
    assert "<h3>Fixed: q000</h3>" in section(page, "Scenes")
    assert "q001" not in section(page, "Scenes")
    part = section(page, "Fixed and broken answers")
    assert "of 1 questions that both answered, fixed 1" in part
    assert "q000" not in part


def test_a_report_grows_with_its_galleries_and_not_with_the_items(suites):
    sizes = []
    for number, count in enumerate((200, 4000)):
        for name, shift in (("base", 0), ("run", 1)):
            rows = [suites.question(i, "A", "AB"[(i + shift) % 2]) for i in range(count)]
            suites.add(f"{name}{number}", "mvbench", rows)
        runs = [{"name": "run", "eval": suites.root / f"run{number}"}]
        base = suites.root / f"base{number}"
        path = write(report(suites, base=base, runs=runs, output=suites.root / f"out{number}"))
        sizes.append(path.stat().st_size)
    assert sizes[1] < 1.05 * sizes[0]
