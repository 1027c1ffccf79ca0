"""Exports are read back as the other harnesses read them, and scored again."""

import json
from pathlib import Path

import pandas
import pytest
from typer.testing import CliRunner

from evals.base import Suite
from evals.config import EvalRecipe
from evals.eval_cli import app
from evals.export import NO_ANSWER, export_run
from evals.known import RULES
from evals.run import evaluate, write_results
from evals.stats import mean
from mmalign.config import validate
from mmalign.errors import ConfigError, DataError, MediaError
from mmalign.generate.base import Generation

# What may be lost between files: quotes, tabs, line ends of all kinds, other scripts, nothing.
ANSWERS = [
    "Yes.", "No.", '"No", it\tsaid', "no\nyes", "yes\r\nno", "Hmm\u2028no\u0085", "是", "", "nan",
]  # fmt: skip


class Parrot:
    name = "models/some parrot"

    def generate(self, requests, sampling):
        if any(request.images[0].path == "5.jpg" for request in requests):
            raise MediaError("cannot be decoded", where="5.jpg")
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        number = int(Path(request.images[0].path).stem)
        text = ANSWERS[number % len(ANSWERS)]
        return Generation(id=request.id, text=text, num_tokens=number, finished=True)


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("p").mkdir()
    rows = [
        {"question_id": f"q{i}", "image": f"{i}.jpg", "text": f'Is there a "{i}"?\tSay.'}
        | {"label": "no" if i % 3 else "yes"}
        for i in range(20)
    ]
    Path("questions.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("synonyms.txt").write_text("dog, puppy\ncat\n")
    rows = [{"image": f"{i}.jpg", "objects": ["dog"]} for i in range(6)]
    Path("objects.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {
        "name": "trial",
        "model": {"path": "none/such"},
        "output": "runs/base",
        "bootstrap_samples": 20,
        "benchmarks": [
            {"name": "pope", "split": "a", "questions": "questions.json", "images": "p"},
            {"name": "chair", "images": "p", "objects": "objects.jsonl"}
            | {"synonyms": "synonyms.txt"},
        ],
    }
    return validate(data, EvalRecipe, "recipe")


@pytest.fixture
def run(recipe):
    return evaluate(recipe, Parrot())


def metrics_in(run, number):
    """What the answers' words alone give: lengths in tokens are the run's own."""
    metrics = json.loads((run / "results.json").read_text())["suites"][number]["metrics"]
    return {name: value for name, value in metrics.items() if name != "answer_tokens"}


def test_samples_of_lmms_eval_score_again_to_the_same(recipe, run):
    done = export_run(run, "lmms-eval", "out")
    assert done.left_out == {}
    assert [str(path) for path in done.written] == [
        "out/base/mmalign_samples_pope-a.jsonl",
        "out/base/mmalign_samples_chair.jsonl",
        "out/base/mmalign_results.json",
    ]
    for number, path in enumerate(done.written[:2]):
        # As its readers do: by lines, of which U+2028 ends none.
        with open(path, encoding="utf-8") as file:
            lines = [json.loads(line) for line in file]
        assert [line["doc_id"] for line in lines] == list(range(len(lines)))
        answers = {
            line["doc"]["id"]: line["filtered_resps"]
            for line in lines
            if line["filtered_resps"] is not None
        }
        assert len(answers) == len(lines) - 1  # One picture could not be read.
        again = recipe.benchmarks[number].score(answers)
        assert {k: m.value for k, m in again.metrics.items()} == metrics_in(run, number)
        # And from what each line tells of its answer, without reading that again.
        rows = [{**line, **line["doc"], "answer": line["filtered_resps"]} for line in lines]
        told = RULES[again.benchmark].metrics(rows)
        assert {k: m.value for k, m in told.items()} == metrics_in(run, number)


def test_a_line_of_lmms_eval_by_hand(run):
    path = export_run(run, "lmms-eval", "out", suites=["pope-a"]).written[0]
    line = json.loads(path.read_text().split("\n")[3])
    # Image 3: no word "no" to the released script, so yes; two answers to the strict reading.
    assert line.pop("doc_hash")
    assert line == {
        "doc_id": 3,
        "doc": {"id": "q3", "image": "3.jpg", "label": "yes"},
        "target": "yes",
        "resps": ["no\nyes"],
        "filtered_resps": "no\nyes",
        "token_counts": [{"output_tokens": 3}],
        "input_media": ["3.jpg"],
        "score": 1.0,
        "input": 'Is there a "3"?\tSay.\nAnswer with a single word or phrase.',
        "official": "yes",
        "strict": None,
        "correct_official": True,
        "correct_strict": False,
    }
    missing = json.loads(path.read_text().split("\n")[5])
    assert (missing["resps"], missing["filtered_resps"], missing["score"]) == (None, None, 0.0)


def test_results_of_lmms_eval(run):
    told = json.loads(export_run(run, "lmms-eval", "out", name="my/model").written[-1].read_text())
    pope = told["results"]["pope-a"]
    assert pope["official/accuracy,none"] == metrics_in(run, 0)["official/accuracy"]
    assert pope["official/accuracy_stderr,none"] == "N/A"
    assert told["n-samples"]["chair"] == {"original": 6, "effective": 6}
    assert told["higher_is_better"]["pope-a"]["official/accuracy"] is True
    assert told["higher_is_better"]["chair"]["chair_i"] is False
    assert told["model_name"] == "models/some parrot"
    assert told["model_name_sanitized"] == "my__model"


def test_predictions_of_vlmevalkit_score_again_to_the_same(recipe, run):
    done = export_run(run, "vlmevalkit", "out")
    assert [str(path) for path in done.written] == [
        "out/base/base_pope-a.tsv",
        "out/base/base_chair.tsv",
    ]
    for number, path in enumerate(done.written):
        # Its loader, but for "nan" and "", which pandas takes for nothing if it is let.
        table = pandas.read_csv(path, sep="\t", keep_default_na=False)
        assert list(table.columns) == [
            "index", "image_path", "question", "answer", "category", "l2-category", "prediction",
        ]  # fmt: skip
        given = dict(zip(table["index"], table["prediction"], strict=True))
        answers = {id: text for id, text in given.items() if text != NO_ANSWER}
        assert len(given) - len(answers) == 1
        again = recipe.benchmarks[number].score(answers)
        assert {k: m.value for k, m in again.metrics.items()} == metrics_in(run, number)


def test_yes_and_no_have_the_letters_that_vlmevalkit_compares(run):
    """Its exact matching by hand: Yes or No where one word of the two is there, else unknown."""
    pope, chair = export_run(run, "vlmevalkit", "out").written
    table = pandas.read_csv(pope, sep="\t").set_index("index")
    assert table.loc["q0", ["answer", "prediction"]].tolist() == ["Yes", "Yes."]
    assert table.loc["q1", ["answer", "prediction"]].tolist() == ["No", "No."]
    assert set(table["answer"]) == {"Yes", "No"}
    assert pandas.read_csv(chair, sep="\t")["answer"].tolist() == ['["dog"]'] * 6


def test_the_same_run_gives_the_same_bytes(run):
    for form in ("lmms-eval", "vlmevalkit"):
        first = [path.read_bytes() for path in export_run(run, form, "one").written]
        again = [path.read_bytes() for path in export_run(run, form, "two").written]
        assert first == again


def written(recipe, key, rows):
    """A finished run of one suite with these rows."""
    suite = Suite(
        key=key,
        benchmark="other",
        split=None,
        method="",
        items=rows,
        metrics={"answered": mean([row["answer"] is not None for row in rows])},
        num_unparsed=0,
    )
    return write_results(recipe.output, recipe, {"name": "m", "fingerprint": "f"}, [suite])


def test_several_right_answers_categories_and_soft_credit(recipe):
    row = {"id": "a", "image": "a.jpg", "prompt": "What?", "answer": "cat", "num_tokens": 1}
    row |= {"label": ["cat", "a cat"], "categories": ["animals", "pets", "all"]}
    run = written(recipe, "vqa", [row | {"correct_official": 0.3}])
    (path,) = export_run(run, "vlmevalkit", "out").written
    (told,) = pandas.read_csv(path, sep="\t").to_dict("records")
    assert (told["category"], told["l2-category"]) == ("animals", "pets")
    assert eval(told["answer"]) == ["cat", "a cat"]  # As its scorers of questions do.
    line = json.loads(export_run(run, "lmms-eval", "out").written[0].read_text())
    assert (line["score"], line["target"]) == (0.3, '["cat", "a cat"]')
    assert line["doc"]["categories"] == ["animals", "pets", "all"]


def test_questions_beside_descriptions(recipe):
    row = {"id": "a", "image": "a.jpg", "prompt": "Is it?", "answer": "yes", "label": "yes"}
    told = {"id": "b", "image": "b.jpg", "prompt": "Describe.", "answer": "A dog."}
    told |= {"label": None, "truth": ["dog"]}
    run = written(recipe, "both", [{**one, "num_tokens": 1} for one in (row, told)])
    (path,) = export_run(run, "vlmevalkit", "out").written
    assert pandas.read_csv(path, sep="\t")["answer"].tolist() == ["Yes", '["dog"]']
    lines = export_run(run, "lmms-eval", "out").written[0].read_text().splitlines()
    assert [json.loads(line)["target"] for line in lines] == ["yes", '["dog"]']


def test_what_is_no_question_with_an_answer_is_left_out(recipe):
    run = written(recipe, "pairs", [{"id": "a", "image": "a.jpg", "answer": "0.1 against 0.2"}])
    with pytest.raises(DataError, match="nothing to export; got items of other are no questions"):
        export_run(run, "lmms-eval", "out")
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"format": "csv"}, "unknown format; got csv; wanted lmms-eval or vlmevalkit"),
        ({"name": ".."}, r"name: names no folder; got \.\.; wanted a word"),
        ({"suites": ["pope"]}, r"no such suite; got pope; wanted \['pope-a', 'chair'\]"),
    ],
)
def test_wrong_arguments_are_told(run, arguments, match):
    with pytest.raises(ConfigError, match=match):
        export_run(run, **({"format": "lmms-eval", "output": "out"} | arguments))


def test_two_suites_are_not_written_into_one_file(run):
    results = json.loads((run / "results.json").read_text())
    pope = results["suites"][0]
    results["suites"] = [pope | {"key": "pope-a/b"}, pope | {"key": "pope-a|b"}]
    (run / "results.json").write_text(json.dumps(results))
    for form in ("lmms-eval", "vlmevalkit"):
        with pytest.raises(ConfigError, match=r"got pope-a/b, pope-a\|b, both pope-a__b"):
            export_run(run, form, "out")
    assert not Path("out").exists()


def test_an_unfinished_run_is_refused(run):
    (run / "results.json").unlink()
    with pytest.raises(DataError, match="no finished evaluation"):
        export_run(run, "lmms-eval", "out")


def test_the_verb(run):
    words = ["export", "runs/base", "--format", "vlmevalkit", "--output", "out", "--suite", "chair"]
    shown = CliRunner().invoke(app, [*words, "--name", "dpo"])
    assert shown.exit_code == 0
    assert shown.stdout.splitlines() == ["out/dpo/dpo_chair.tsv"]
