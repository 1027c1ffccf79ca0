import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock
from typer.testing import CliRunner

from evals.answer_files import Answer, appending, line_of, read_answers
from evals.compare import compare
from evals.config import EvalRecipe
from evals.eval_cli import app
from evals.report import ReportRecipe, collect
from evals.report_page import write
from evals.run import evaluate, rescore
from evals.shards import answer_shard, merge, parse_shard
from evals.standing import standing
from mmalign.config import load_config, validate
from mmalign.errors import ConfigError, DataError, MediaError, ModelError
from mmalign.generate.base import Generation
from mmalign.standing import Standing

ROOT = Path(__file__).resolve().parents[2]
NUM_QUESTIONS = 30


class Parrot:
    """Answers from the question's hash, and stops, skips or refuses where told to."""

    def __init__(self, name="parrot", *, stop_after=None, unreadable=(), always=None):
        self.name, self.stop_after, self.unreadable = name, stop_after, unreadable
        self.always, self.asked, self.limits = always, [], set()

    def generate(self, requests, sampling):
        if self.stop_after is not None and len(self.asked) >= self.stop_after:
            raise KeyboardInterrupt
        for request in requests:
            if request.images[0].path in self.unreadable:
                raise MediaError("cannot be decoded", where=request.id)
        self.asked += [request.id for request in requests]
        self.limits.add(sampling.max_new_tokens)
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        pick = hashlib.sha256(f"{self.name}{request.id}".encode()).digest()[0]
        texts = ["Yes.", "No.", "A dog, a “cat” and\na bird", "a dog", "Hmm\u2028no"]
        text = self.always or texts[pick % len(texts)]
        return Generation(id=request.id, text=text, num_tokens=pick, finished=pick > 9)


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("p").mkdir()
    rows = [
        {"question_id": i, "image": f"{i // 3}.jpg", "text": f"Is there a {i}?"}
        | {"label": "yes" if i % 2 else "no"}
        for i in range(NUM_QUESTIONS)
    ]
    Path("questions.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("synonyms.txt").write_text("dog, puppy\ncat\nbird\n")
    rows = [{"image": f"{i}.jpg", "objects": ["dog"] if i % 3 else ["cat"]} for i in range(12)]
    Path("objects.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return make_recipe()


def make_recipe(**changes):
    data = {
        "name": "trial",
        "model": {"path": "none/such"},
        "output": "out",
        "batch_size": 2,
        "bootstrap_samples": 200,
        "benchmarks": [
            {"name": "pope", "split": "adversarial", "questions": "questions.json", "images": "p"},
            {"name": "chair", "images": "p", "objects": "objects.jsonl"}
            | {"synonyms": "synonyms.txt", "max_new_tokens": 99},
        ],
    }
    return validate(data | changes, EvalRecipe, "recipe")


def written(folder):
    """Every result file, by name, to the byte."""
    files = [folder / "results.json", *sorted((folder / "items").iterdir())]
    return {file.name: file.read_bytes() for file in files}


def reported():
    """Every file of the report of out against base, by name, to the byte."""
    data = {"base": "base", "output": "report", "runs": [{"name": "trial", "eval": "out"}]}
    page = write(collect(validate(data, ReportRecipe, "report")))
    return {file.name: file.read_bytes() for file in page.parent.iterdir()}


def read_lines(path):
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def test_results_hold_what_readers_rely_on(recipe, tmp_path):
    parrot = Parrot()
    folder = evaluate(recipe, parrot)
    results = json.loads((folder / "results.json").read_text())
    assert results["name"] == "trial"
    assert results["model"] == "parrot"
    assert results["config"]["benchmarks"][1]["max_new_tokens"] == 99
    assert results["versions"]["mmalign"]
    pope, chair = results["suites"]
    assert (pope["key"], pope["benchmark"], pope["split"]) == (
        "pope-adversarial",
        "pope",
        "adversarial",
    )
    assert (pope["num_items"], chair["num_items"], chair["key"]) == (NUM_QUESTIONS, 12, "chair")
    assert pope["images"] == str(tmp_path / "p")
    assert list(chair["metrics"]) == ["chair_i", "chair_s", "recall", "num_words", "mentions"]
    tokens = [row["num_tokens"] for row in read_lines(folder / pope["items"])]
    assert pope["metrics"]["answer_tokens"] == pytest.approx(sum(tokens) / NUM_QUESTIONS)
    for suite in results["suites"]:
        assert suite["metrics"].keys() == suite["intervals"].keys()
        for name, (low, high) in suite["intervals"].items():
            assert low <= suite["metrics"][name] <= high
        assert len(read_lines(folder / suite["items"])) == suite["num_items"]
    rows = read_lines(folder / pope["items"])
    right = sum(row["correct_official"] for row in rows) / NUM_QUESTIONS
    assert pope["metrics"]["official/accuracy"] == right
    assert pope["num_unparsed"] == sum(row["strict"] is None for row in rows)
    answers = read_lines(folder / "answers.jsonl")
    assert list(answers[0]) == ["key", "benchmark", "id", "text", "num_tokens", "finished"]
    assert [row["num_tokens"] for row in rows] == [a["num_tokens"] for a in answers[:NUM_QUESTIONS]]
    assert parrot.limits == {16, 99}


def test_two_runs_write_the_same_bytes(recipe, tmp_path, monkeypatch):
    first = written(evaluate(recipe, Parrot()).absolute())
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    assert written(evaluate(recipe, Parrot())) == first


@pytest.mark.parametrize("stop_after", [0, 8, 24, 30, 38])
def test_a_killed_run_continues_to_the_same_result(recipe, tmp_path, stop_after):
    evaluate(make_recipe(name="base", output="base"), Parrot("another"))
    whole, report = written(evaluate(recipe, Parrot())), reported()
    (tmp_path / "out").rename(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        evaluate(recipe, killed := Parrot(stop_after=stop_after))
    assert not Path("out/results.json").exists()
    with open("out/answers.jsonl", "a") as file:
        file.write('{"key": "torn by the ki')
    resumed = Parrot()
    assert written(evaluate(recipe, resumed)) == whole
    assert reported() == report
    assert len(killed.asked) + len(resumed.asked) == NUM_QUESTIONS + 12
    assert len(read_lines(Path("out/answers.jsonl"))) == NUM_QUESTIONS + 12


def test_reading_answers_leaves_a_line_that_is_being_written(recipe):
    """As `rescore` and `merge` read while the run itself goes on."""
    lines = [
        line_of(
            Answer(key=f"k{n}", benchmark="b", id=str(n), text="x", num_tokens=1, finished=True)
        )
        for n in range(4)
    ]
    recipe.output.mkdir()
    with appending(recipe.output / "answers.jsonl") as file:
        file.write(lines[0] + lines[1][:20])
        file.flush()
        assert list(read_answers(recipe.output)) == ["k0"]
        file.write(lines[1][20:] + lines[2] + lines[3][:-5])
    assert list(read_answers(recipe.output)) == ["k0", "k1", "k2"]
    with appending(recipe.output / "answers.jsonl") as file:
        file.write(lines[3])
    assert (recipe.output / "answers.jsonl").read_text() == "".join(lines)


@pytest.mark.parametrize("split", ["../../esc", "a/b", "a\\b", "..", ".", "", "a b", "a\n"])
def test_a_split_is_a_word(split):
    with pytest.raises(ConfigError, match="split: wanted a name of letters"):
        make_recipe(
            benchmarks=[{"name": "pope", "split": split, "questions": "q.json", "images": "p"}]
        )


def test_a_finished_run_asks_nothing_again(recipe):
    evaluate(recipe, Parrot())
    evaluate(recipe, again := Parrot())
    assert again.asked == []


def test_what_changes_no_answer_asks_nothing_again(recipe):
    evaluate(recipe, Parrot())
    change = {"bootstrap_samples": 300, "seed": 4, "batch_size": 5, "name": "other"}
    evaluate(make_recipe(**change), again := Parrot())
    assert again.asked == []


def test_the_results_of_another_model_are_not_replaced(recipe):
    evaluate(recipe, Parrot())
    before = written(recipe.output)
    other = make_recipe(model={"path": "none/such", "dtype": "bfloat16"})
    told = r"out: holds the results of another model.*model.dtype=float32; wanted model.dtype=bfl"
    with pytest.raises(DataError, match=told):
        evaluate(other, Parrot())
    assert written(recipe.output) == before
    (recipe.output / "results.json").unlink()
    evaluate(other, again := Parrot())
    assert len(again.asked) == NUM_QUESTIONS + 12


def test_two_runs_do_not_answer_into_one_folder(recipe):
    recipe.output.mkdir()
    told = "another run is answering into this folder"
    lock = FileLock(recipe.output / ".answering.lock")
    with lock, pytest.raises(DataError, match=told):
        evaluate(recipe, idle := Parrot())
    assert idle.asked == []
    evaluate(recipe, Parrot())


def test_results_go_when_answers_are_asked_anew(recipe):
    evaluate(recipe, Parrot())
    pope = recipe.benchmarks[0].model_copy(update={"max_new_tokens": 3})
    with pytest.raises(KeyboardInterrupt):
        evaluate(recipe.model_copy(update={"benchmarks": [pope]}), Parrot(stop_after=4))
    with pytest.raises(DataError, match=r"holds no results.json, so no finished evaluation"):
        compare(recipe.output, recipe.output)


def test_many_unanswered_questions_are_told_of_in_few_lines(recipe, caplog):
    evaluate(recipe, Parrot(unreadable={"0.jpg", "1.jpg", "2.jpg"}))
    lines = [line for line in caplog.messages if "stays unanswered" in line]
    assert len(lines) == 5
    # Nine questions and three captions.
    assert "7 more stay unanswered" in caplog.text
    compare(recipe.output, recipe.output, samples=20)
    assert "pope-adversarial: 9 of 30 questions are unanswered" in caplog.text
    assert "the strict reading finds no answer in" in caplog.text


def test_a_share_of_nothing_is_undefined(recipe, capsys):
    """One run names no object: its CHAIR_i has no interval, and no test against the other's."""
    a = evaluate(recipe, Parrot(always="Nothing at all."))
    b = evaluate(make_recipe(output="other"), Parrot(always="A dog and a cat."))
    results = json.loads((a / "results.json").read_text())
    assert results["suites"][1]["intervals"]["chair_i"] == [None, None]
    (found,) = [one for one in compare(a, b, samples=50) if one.metric == "chair_i"]
    assert not found.testable
    done = CliRunner().invoke(app, ["compare", str(a), str(b)])
    assert re.search(r"chair_i .* undefined", done.output)
    done = CliRunner().invoke(app, ["compare", str(a), str(b), "--json"])
    told = json.loads(done.output[done.output.index("[") :])
    assert [one["interval"] for one in told if one["metric"] == "chair_i"] == [[None, None]]
    data = {"base": str(a), "output": "r", "runs": [{"name": "trial", "eval": str(b)}]}
    report = collect(validate(data, ReportRecipe, "report"))
    assert "chair_i" not in {one.metric.key for one in report.findings["trial"]}
    assert "chair_s" in {one.metric.key for one in report.findings["trial"]}
    write(report)


def test_another_prompt_limit_or_model_asks_again(recipe):
    evaluate(recipe, Parrot())
    pope, chair = recipe.benchmarks
    prompt = pope.model_copy(update={"prompt": "{question}"})
    longer = chair.model_copy(update={"max_new_tokens": 100})
    changed = recipe.model_copy(update={"benchmarks": [prompt, chair]})
    evaluate(changed, parrot := Parrot())
    assert len(parrot.asked) == NUM_QUESTIONS
    evaluate(recipe.model_copy(update={"benchmarks": [pope, longer]}), parrot := Parrot())
    assert len(parrot.asked) == 12
    evaluate(recipe, parrot := Parrot("trained parrot"))
    assert len(parrot.asked) == NUM_QUESTIONS + 12


def test_unreadable_pictures_are_counted_and_asked_again(recipe):
    bad = {"0.jpg", "7.jpg"}
    folder = evaluate(recipe, parrot := Parrot(unreadable=bad))
    pope, chair = json.loads((folder / "results.json").read_text())["suites"]
    assert (pope["num_missing"], chair["num_missing"]) == (6, 2)
    assert len(parrot.asked) == NUM_QUESTIONS - 6 + 10
    rows = read_lines(folder / pope["items"])
    for row in rows:
        assert (row["answer"] is None) == (row["image"] in bad)
        assert (row["num_tokens"] == 0) >= (row["image"] in bad)
    rescored = written(rescore(folder, recipe))
    assert rescored == written(folder)
    evaluate(recipe, mended := Parrot())
    assert len(mended.asked) == 8
    suites = json.loads((folder / "results.json").read_text())["suites"]
    assert [suite["num_missing"] for suite in suites] == [0, 0]


def test_a_wrong_picture_folder_is_no_score_of_zero(recipe):
    bad = {f"{i}.jpg" for i in range(12)}
    with pytest.raises(DataError, match=r"none of its 30 questions was answered.*p holds 0.jpg"):
        evaluate(recipe, Parrot(unreadable=bad))
    assert not Path("out/results.json").exists()
    Path("p").rmdir()
    with pytest.raises(DataError, match=r"folder of pictures does not exist; got p"):
        evaluate(recipe, parrot := Parrot())
    assert parrot.asked == []


def test_rescore_needs_no_model_and_changes_nothing(recipe):
    folder = evaluate(recipe, Parrot())
    before = written(folder)
    (folder / "results.json").unlink()
    for file in (folder / "items").iterdir():
        file.unlink()
    assert written(rescore(folder, recipe)) == before


def test_rescore_says_how_many_answers_are_missing(recipe):
    with pytest.raises(KeyboardInterrupt):
        evaluate(recipe, Parrot(stop_after=8))
    with pytest.raises(DataError, match=r"pope-adversarial: 22 of 30 answers are missing.*Run the"):
        rescore("out", recipe)
    with pytest.raises(DataError, match=r"holds no readable model.json. Run the recipe first"):
        rescore("elsewhere", recipe)


def test_parts_answered_apart_merge_to_one_run(recipe):
    """In any order, over what is there already; to the bytes of a run in one piece."""
    evaluate(recipe, Parrot())
    whole = written(recipe.output)
    asked = []
    for index in range(3):
        parrot = Parrot()
        part = recipe.model_copy(update={"output": Path(f"part{index}")})
        answer_shard(part, index, 3, parrot)
        assert not (part.output / "results.json").exists()
        asked += parrot.asked
    assert sorted(asked) == sorted(all_ids(recipe))
    merged = recipe.model_copy(update={"output": Path("merged")})
    assert merge(merged.output, [Path("part2"), Path("part0")]) == 28
    with pytest.raises(DataError, match="10 of 30 answers are missing"):
        rescore(merged.output, merged)
    assert merge(merged.output, [Path("part1"), Path("part2")]) == 42
    rescore(merged.output, merged)
    found = written(merged.output)
    # The recipe names its output.
    found["results.json"] = found["results.json"].replace(b'"merged"', b'"out"')
    assert found == whole


def all_ids(recipe):
    return [request.id for benchmark in recipe.benchmarks for request in benchmark.requests()]


def test_an_answer_takes_the_place_of_none(recipe):
    """Whichever folder comes first; a picture may be on one machine and not on the other."""
    for name, lost in (("a", ("0.jpg",)), ("b", ("1.jpg",))):
        evaluate(recipe.model_copy(update={"output": Path(name)}), Parrot(unreadable=lost))
    merge(Path("ab"), [Path("a"), Path("b")])
    merge(Path("ba"), [Path("b"), Path("a")])
    for name in ("ab", "ba"):
        folder = rescore(name, recipe.model_copy(update={"output": Path(name)}))
        suites = json.loads((folder / "results.json").read_text())["suites"]
        assert [suite["num_missing"] for suite in suites] == [0, 0]


def test_merge_refuses_other_models_and_other_answers(recipe):
    parts = [recipe.model_copy(update={"output": Path(name)}) for name in ("a", "b", "c")]
    answer_shard(parts[0], 0, 1, Parrot())
    answer_shard(parts[1], 0, 1, Parrot("owl"))
    answer_shard(parts[2], 0, 1, Parrot())
    with pytest.raises(DataError, match=r"a and b: the answers are of different models"):
        merge(Path("out"), [Path("a"), Path("b")])
    file = Path("c/answers.jsonl")
    file.write_text(file.read_text().replace("a dog", "a frog"))
    with pytest.raises(
        DataError, match=r"a and c: answer .* differently; got 'a dog' and 'a frog'"
    ):
        merge(Path("out"), [Path("a"), Path("c")])
    assert not Path("out").exists()
    with pytest.raises(DataError, match=r"nowhere: holds no readable model\.json"):
        merge(Path("out"), [Path("nowhere")])
    for text in ("{}", "[]", '{"name": "parrot"}'):
        Path("b/model.json").write_text(text)
        with pytest.raises(DataError, match=r"b: holds no readable model\.json"):
            merge(Path("out"), [Path("a"), Path("b")])


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "a/b", "1/4/2", "-1/4"])
def test_a_shard_is_one_of_so_many(text):
    assert parse_shard("1/4") == (0, 4)
    with pytest.raises(ConfigError, match="is no part of a whole"):
        parse_shard(text)


def test_the_later_of_two_answers_counts(recipe):
    folder = evaluate(recipe, Parrot(always="No."))
    first = (folder / "answers.jsonl").read_text().split("\n")[1]
    assert json.loads(first)["id"] == "1"  # labelled yes
    with open(folder / "answers.jsonl", "a") as file:
        file.write(first.replace("No.", "Yes.") + "\n")
    before = json.loads((folder / "results.json").read_text())["suites"][0]["metrics"]
    rescore(folder, recipe)
    after = json.loads((folder / "results.json").read_text())["suites"][0]["metrics"]
    assert before["official/accuracy"] == 0.5
    assert after["official/accuracy"] == pytest.approx(16 / 30)


@pytest.mark.parametrize("line", ['{"key": "k"}', "[]", "{"])
def test_a_broken_line_inside_the_answers_is_named(recipe, line):
    folder = evaluate(recipe, Parrot())
    path = folder / "answers.jsonl"
    path.write_text(line + "\n" + path.read_text())
    with pytest.raises(DataError, match=r"answers.jsonl, line 1"):
        rescore(folder, recipe)


def test_a_generator_that_skips_a_request_is_refused(recipe):
    class Lazy(Parrot):
        def generate(self, requests, sampling):
            return super().generate(requests, sampling)[1:]

    with pytest.raises(ModelError, match="parrot: did not answer each request once"):
        evaluate(recipe, Lazy())


def two_runs(recipe):
    a = evaluate(recipe, Parrot(always="No."))
    b = evaluate(recipe.model_copy(update={"output": Path("b")}), Parrot("b"))
    return a, b


def test_compare_by_hand(recipe):
    a, b = two_runs(recipe)
    found = {(one.suite, one.metric): one for one in compare(a, b, samples=499)}
    assert len(found) == 8
    b_rows = read_lines(b / "items/pope-adversarial.jsonl")
    # a says no to all: right on the 15 even questions.
    gained = sum(row["correct_official"] for row in b_rows if row["label"] == "yes")
    lost = sum(not row["correct_official"] for row in b_rows if row["label"] == "no")
    accuracy = found["pope-adversarial", "official/accuracy"]
    assert (accuracy.a, accuracy.test) == (0.5, "mcnemar")
    assert accuracy.difference == pytest.approx((gained - lost) / 30)
    assert accuracy.relative == pytest.approx((gained - lost) / 15)
    assert accuracy.interval[0] <= accuracy.difference <= accuracy.interval[1]
    assert accuracy.p_value == pytest.approx(binomial_two_sided(gained, lost))
    f1 = found["pope-adversarial", "official/f1"]
    assert (f1.a, f1.relative, f1.relative_interval, f1.test) == (0.0, None, None, "bootstrap")
    assert f1.p_value == pytest.approx(2 / 500)
    length = found["pope-adversarial", "answer_tokens"]
    assert length.b == pytest.approx(sum(row["num_tokens"] for row in b_rows) / 30)
    assert length.test == "bootstrap"
    words = found["chair", "num_words"]
    b_rows = read_lines(b / "items/chair.jsonl")
    assert words.a == 1.0
    assert words.b == pytest.approx(sum(row["num_words"] for row in b_rows) / 12)


def binomial_two_sided(gained, lost):
    from scipy.stats import binomtest

    return binomtest(gained, gained + lost).pvalue


def test_a_run_compared_with_itself_differs_nowhere(recipe):
    a, _ = two_runs(recipe)
    for one in compare(a, a, samples=50):
        assert (one.difference, one.p_value) == (0.0, 1.0)
        assert not one.testable or one.interval == (0.0, 0.0)


def test_compare_matches_items_by_id_not_by_order(recipe):
    a, b = two_runs(recipe)
    before = compare(a, b, samples=50)
    path = b / "items/pope-adversarial.jsonl"
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    assert compare(a, b, samples=50) == before


def test_compare_refuses_different_questions(recipe):
    a, b = two_runs(recipe)
    path = b / "items/pope-adversarial.jsonl"
    rows = path.read_text().split("\n")
    path.write_text("\n".join(rows[1:]))
    with pytest.raises(DataError, match="asked different questions: 1 differ, such as 0"):
        compare(a, b)
    path.write_text("\n".join([rows[0].replace('"label": "no"', '"label": "yes"'), *rows[1:]]))
    with pytest.raises(DataError, match=r"pope-adversarial: .*Run both with the same files"):
        compare(a, b)


def test_compare_refuses_what_is_unfinished_or_unlike(recipe):
    a, b = two_runs(recipe)
    (b / "results.json").unlink()
    with pytest.raises(DataError, match=r"b: holds no results.json, so no finished evaluation"):
        compare(a, b)
    chair = make_recipe(output="c", benchmarks=[recipe.benchmarks[1].model_dump()])
    pope = make_recipe(output="d", benchmarks=[recipe.benchmarks[0].model_dump()])
    with pytest.raises(DataError, match="share no suite; got chair and pope-adversarial"):
        compare(evaluate(chair, Parrot()), evaluate(pope, Parrot()))


def test_command_line_prints_tables(recipe, tmp_path):
    from mmalign.config import dump_yaml

    a, b = two_runs(recipe)
    Path("recipe.yaml").write_text(dump_yaml(recipe))
    shown = CliRunner().invoke(app, ["rescore", "recipe.yaml", "bootstrap_samples=50"])
    assert shown.exit_code == 0
    lines = shown.stdout.splitlines()
    assert lines[0] == "trial: parrot"
    assert lines[1].split() == ["suite", "metric", "value", "95%", "interval", "items"]
    accuracy = next(line for line in lines if "official/accuracy" in line)
    assert accuracy.split()[:3] == ["pope-adversarial", "official/accuracy", "50.00"]
    merging = ["merge", "recipe.yaml", "output=merged", "--part", str(a), "--part", "out"]
    shown = CliRunner().invoke(app, merging)
    assert shown.stdout.splitlines()[-1] == "merged/results.json"
    shown = CliRunner().invoke(app, ["compare", str(a), str(b)])
    words = next(line for line in shown.stdout.splitlines() if "num_words" in line)
    assert words.split()[2] == "1.00"
    assert words.endswith("bootstrap")
    shown = CliRunner().invoke(app, ["compare", str(a), str(b), "--json"])
    assert json.loads(shown.stdout)[0]["metric"] == "official/accuracy"


def test_command_line_loads_no_torch():
    code = "import sys, evals.eval_cli, evals.run; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_two_benchmarks_may_not_share_a_key(recipe):
    pope = recipe.benchmarks[0].model_dump()
    with pytest.raises(ConfigError, match="pope-adversarial appears twice"):
        make_recipe(benchmarks=[pope, pope])


def test_a_typo_in_a_benchmark_is_named(recipe):
    pope = recipe.benchmarks[0].model_dump() | {"question": "q"}
    with pytest.raises(ConfigError, match=r"did you mean .*questions"):
        make_recipe(benchmarks=[pope])


@pytest.mark.parametrize("name", ["pope_coco", "chair_coco", "hallucination"])
def test_shipped_recipes_load(name):
    recipe = load_config(ROOT / f"configs/eval/{name}.yaml", EvalRecipe)
    assert recipe.benchmarks


def test_how_far_a_run_is_can_be_asked(recipe, tmp_path, capsys):
    from mmalign.cli import run
    from mmalign.config import dump_yaml

    model = tmp_path / "model"
    model.mkdir()
    recipe = make_recipe(model={"path": str(model)})
    Path("recipe.yaml").write_text(dump_yaml(recipe))

    def asked(*overrides: str) -> str:
        assert run(["eval", "run", "recipe.yaml", "--check", *overrides]) == 0
        return capsys.readouterr().out.split()[0]

    assert asked() == "absent"
    with pytest.raises(KeyboardInterrupt):
        evaluate(recipe, Parrot(stop_after=8))
    assert asked() == "begun"
    evaluate(recipe, Parrot())
    before = written(recipe.output)
    assert asked() == "complete"
    assert asked("seed=1") == "begun"
    # Weights that are newer than the results may be others.
    (model / "model.safetensors").write_text("")
    assert asked() == "begun"
    assert written(recipe.output) == before


def test_an_adapter_or_questions_newer_than_the_results_are_begun(recipe, tmp_path):
    (tmp_path / "adapter").mkdir()
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    weights.write_text("")
    recipe = make_recipe(model={"path": "none/such", "adapter": str(tmp_path / "adapter")})
    evaluate(recipe, Parrot())
    assert standing(recipe) is Standing.COMPLETE
    results = recipe.output / "results.json"
    for file in (weights, Path("questions.json"), Path("synonyms.txt")):
        before = file.stat()
        os.utime(file, ns=(before.st_atime_ns, results.stat().st_mtime_ns + 10**9))
        assert standing(recipe) is Standing.BEGUN
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert standing(recipe) is Standing.COMPLETE


def test_answers_of_one_model_are_not_scored_as_another_s(recipe):
    evaluate(recipe, Parrot())
    before = written(recipe.output)
    other = make_recipe(model={"path": "none/such", "dtype": "bfloat16"})
    with pytest.raises(DataError, match=r"holds answers of another model.*got parrot"):
        rescore(recipe.output, other)
    assert written(recipe.output) == before


def test_another_folder_of_pictures_is_told(recipe, caplog):
    evaluate(recipe, Parrot())
    assert "answers are kept by the pictures' names" not in caplog.text
    Path("q").mkdir()
    pope = recipe.benchmarks[0].model_copy(update={"images": Path("q")})
    evaluate(recipe.model_copy(update={"benchmarks": [pope, recipe.benchmarks[1]]}), Parrot())
    assert "pope-adversarial: answers are kept by the pictures' names" in caplog.text
    assert "chair: answers" not in caplog.text


def test_other_prompts_are_told_when_runs_are_compared(recipe, caplog):
    evaluate(recipe, Parrot())
    pope = recipe.benchmarks[0].model_copy(update={"prompt": "Really? {question}"})
    other = recipe.model_copy(update={"benchmarks": [pope], "output": Path("other")})
    evaluate(other, Parrot())
    assert compare(recipe.output, other.output, samples=50)
    assert "pope-adversarial: the prompts differ" in caplog.text


def test_missing_pictures_are_told_before_a_model_is_loaded(recipe, caplog):
    with pytest.raises(DataError, match=r"10 of 10 pictures are missing, such as p/0.jpg"):
        evaluate(recipe)
    for number in range(10):
        Path(f"p/{number}.jpg").touch()
    with pytest.raises(ModelError):  # There is no such model; all else was looked at before.
        evaluate(recipe)
    assert "chair: 2 of 12 pictures are missing, such as p/10.jpg" in caplog.text
    assert "pope" not in caplog.text
