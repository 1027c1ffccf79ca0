"""How many questions a difference needs, and several seeds on each side of a comparison."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from evals.compare import Matched, compare
from evals.eval_cli import app
from evals.power import design_effect, detectable, num_needed, plans, power_of
from evals.seeds import compare_pooled
from evals.stats import mcnemar, mean, paired_difference, pooled_difference, ratio
from mmalign.errors import ConfigError, DataError


@pytest.mark.parametrize(
    ("difference", "discordance", "needed"),
    [
        # (1.959964 sqrt(0.1) + 0.841621 sqrt(0.0996))^2 / 0.0004 = 0.885407^2 / 0.0004 = 1959.9
        (0.02, 0.1, 1960),
        # (1.959964 sqrt(0.1) + 0.841621 sqrt(0.09))^2 / 0.01 = 0.872281^2 / 0.01 = 76.1
        (0.1, 0.1, 77),
        # (1.959964 sqrt(0.3) + 0.841621 sqrt(0.29))^2 / 0.01 = 1.526743^2 / 0.01 = 233.1
        (0.1, 0.3, 234),
    ],
)
def test_needed_by_hand(difference, discordance, needed):
    assert num_needed(difference, discordance) == needed


def test_as_many_items_find_it_in_four_of_five_trials():
    """Against the exact test, which is a little slower than the formula's."""
    rng, trials = np.random.default_rng(0), 600
    found = 0
    for _ in range(trials):
        chance = rng.random(num_needed(0.1, 0.3))
        found += mcnemar(chance < 0.1, (chance >= 0.1) & (chance < 0.3)) < 0.05
    assert 0.73 < found / trials < 0.84


def test_more_power_and_stricter_levels_need_more():
    assert num_needed(0.02, 0.1, power=0.9) > 1960
    assert num_needed(0.02, 0.1, level=0.01) > 1960


@pytest.mark.parametrize(("difference", "discordance"), [(0.2, 0.1), (0, 0.1), (-0.1, 0.2)])
def test_a_difference_above_the_disagreement_is_refused(difference, discordance):
    with pytest.raises(ConfigError, match="differ by no more than the share"):
        num_needed(difference, discordance)


@pytest.mark.parametrize("discordance", [0, 1.5, -1])
def test_a_disagreement_is_a_share(discordance):
    with pytest.raises(ConfigError, match="is no share of items"):
        num_needed(0.01, discordance)


def test_detectable_is_the_inverse():
    assert detectable(1960, 0.1) == pytest.approx(0.02, abs=2e-5)
    # Of ten items not even one-sided disagreement is enough.
    assert detectable(10, 0.1) == pytest.approx(0.1)


def test_design_effect_by_hand():
    gaps = np.array([1.0, 1.0, -1.0, -1.0])
    assert design_effect(gaps, ["a", "a", "b", "b"]) == 2.0  # (2^2 + 2^2) / 4
    assert design_effect(gaps, ["a", "b", "a", "b"]) == 0.0
    assert design_effect(gaps, [1, 2, 3, 4]) == 1.0
    assert design_effect(np.zeros(4), [1, 1, 2, 2]) == 1.0


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "items/pope-adversarial.jsonl").open()]


def test_power_of_two_runs(evaluations):
    base, good = evaluations / "base", evaluations / "good"
    (found,) = power_of(base, good, 0.05)
    assert (found.suite, found.metric) == ("pope-adversarial", "official/accuracy")
    gaps = [
        b["correct_official"] - a["correct_official"]
        for a, b in zip(rows_of(base), rows_of(good), strict=True)
    ]
    assert found.num_items == len(gaps) == 120
    assert found.discordance == sum(map(abs, gaps)) / 120
    assert found.design >= 1
    assert found.needed == pytest.approx(num_needed(0.05, found.discordance) * found.design, abs=1)
    assert detectable(120, found.discordance) <= found.detectable <= found.discordance
    # More than they disagree on: all of it one-sided.
    (large,) = power_of(base, good, 0.9)
    assert large.needed == pytest.approx(num_needed(0.9, 0.9) * found.design, abs=1)
    assert power_of(base, base, 0.05) == []


def test_power_on_the_command_line(evaluations):
    def told(*words: object) -> str:
        done = CliRunner().invoke(app, ["power", *map(str, words)], catch_exceptions=False)
        return done.stdout

    assert told("--discordance", 0.1).startswith("1960 questions")
    lines = told(evaluations / "base", evaluations / "good", "--points", 5).splitlines()
    assert "needed for 5" in lines[0]
    assert lines[1].split()[:3] == ["pope-adversarial", "official/accuracy", "120"]
    with pytest.raises(ConfigError, match="either two runs or --discordance"):
        told(evaluations / "base")
    with pytest.raises(ConfigError, match="either two runs or --discordance"):
        told(evaluations / "base", "--discordance", 0.1)
    for points in (0, 100, 200, "nan"):
        with pytest.raises(ConfigError, match=r"--points: is no difference.* below 100"):
            told("--discordance", 0.1, "--points", points)


def test_one_run_on_each_side_is_the_paired_bootstrap():
    a, b = ratio([1, 0, 2, 1], [2, 2, 3, 1]), ratio([1, 1, 2, 1], [1, 2, 3, 2])
    clusters = ["x", "x", "y", "z"]
    assert pooled_difference([a], [b], clusters) == paired_difference(a, b, clusters)


def test_runs_are_drawn_by_enumeration():
    # One item; a's runs say 0 and 1, so that its draws are 0, 1/2, 1 with chances 1/4, 1/2, 1/4.
    found = pooled_difference([mean([0]), mean([1])], [mean([1])], samples=20_000)
    assert found.difference == 0.5
    assert found.interval == (0.0, 1.0)
    assert found.p_value == pytest.approx(2 / 4, abs=0.02)


def test_a_method_that_varies_by_seed_is_less_sure():
    rng = np.random.default_rng(0)
    items = rng.random(300)
    steady = [mean(items < 0.5)] * 3
    varying = [mean(items < share) for share in (0.45, 0.6, 0.75)]
    same = [mean(items < 0.6)] * 3
    narrow, wide = pooled_difference(steady, same), pooled_difference(steady, varying)
    assert wide.difference == pytest.approx(narrow.difference, abs=0.02)
    assert wide.p_value > narrow.p_value
    widths = [high - low for low, high in (narrow.interval, wide.interval)]
    assert widths[1] > 1.5 * widths[0]


def test_a_side_without_runs_is_refused():
    with pytest.raises(DataError, match="each side needs a run; got 1 and 0"):
        pooled_difference([mean([1])], [])


def test_seeds_of_a_method_are_compared_together(evaluations, tmp_path):
    base, same, good = (evaluations / name for name in ("base", "same", "good"))
    found = {(c.suite, c.metric): c for c in compare_pooled([base, same], [good])}
    one = found["pope-adversarial", "official/accuracy"]
    right = [sum(row["correct_official"] for row in rows_of(f)) / 120 for f in (base, same, good)]
    assert one.a_runs == pytest.approx(right[:2])
    assert one.b_runs == pytest.approx(right[2:])
    assert one.a == pytest.approx(sum(right[:2]) / 2)
    assert one.difference == pytest.approx(right[2] - one.a)
    assert one.test == "bootstrap"
    # Counts pool, not rates: hallucinated mentions of both runs over mentions of both.
    chair = found["chair", "chair_i"]
    lines = [json.loads(x) for f in (base, same) for x in (f / "items/chair.jsonl").open()]
    hallucinated = sum(len(row["hallucinated"]) for row in lines)
    assert chair.a == pytest.approx(hallucinated / sum(len(row["mentioned"]) for row in lines))
    # Side by side with itself, pooled or not, nothing is found.
    assert all(c.difference == 0 for c in compare_pooled([base, same], [same, base]))
    plain = {(c.suite, c.metric): c for c in compare(base, good)}
    assert plain.keys() == found.keys()
    with pytest.raises(ConfigError, match="base: is one run, and given twice"):
        compare_pooled([base, base.parent / "good" / ".." / "base"], [good])
    other = tmp_path / "other"
    shutil.copytree(good, other)
    items = other / "items/pope-adversarial.jsonl"
    items.write_text("".join(items.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(DataError, match="asked different questions: 1 differ"):
        compare_pooled([base], [good, other])


def test_seeds_on_the_command_line(evaluations):
    base, same, good = (str(evaluations / name) for name in ("base", "same", "good"))
    done = CliRunner().invoke(app, ["compare", base, good, "--also-a", same])
    heads, *lines = done.stdout.splitlines()
    assert heads.endswith("runs of a  runs of b")
    accuracy = next(line.split() for line in lines if "official/accuracy" in line)
    assert len(accuracy) >= 3
    assert accuracy[-4] == "bootstrap"
    done = CliRunner().invoke(app, ["compare", base, good, "--also-a", same, "--json"])
    assert len(json.loads(done.stdout)[0]["a_runs"]) == 2


def test_a_metric_of_groups_is_planned_in_groups(tmp_path):
    """40 groups of two questions; the runs disagree on 8 groups, at one question of each."""
    from evals.questions import question_rules, together

    rules = question_rules(lambda rows: {"official/accuracy": together(rows, "official")})
    rows = [
        [
            {
                "group": str(n // 2),
                "correct_official": not (n % 2 and n < 16 and side),
                "label": "A",
            }
            for n in range(80)
        ]
        for side in (0, 1)
    ]
    suite = Matched(key="k", rules=rules, items=rows, clusters=[str(n // 2) for n in range(80)])
    (found,) = plans([suite], 0.02)
    assert (found.num_items, found.discordance) == (40, pytest.approx(8 / 40))
    assert found.needed == num_needed(0.02, 8 / 40)
