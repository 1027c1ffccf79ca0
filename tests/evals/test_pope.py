import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evals.benchmarks.pope import Pope, official, read_questions, score_answers_file
from mmalign.errors import DataError

PNG = b"\x89PNG\r\n\x1a\n"
NASTY = [
    "No.", "nope", "Yes, no", "NO", "not sure", "", "There is no dog, I think.", ",no", "yes\nno",
    "no\tyes", "Yes. No.", "no, not", "n,o", " No ", "No!", "none", ".no", "cannot", "Nothing.",
]  # fmt: skip


@pytest.fixture(scope="session", params=["random", "popular"])
def real_questions(request):
    shared = Path(__file__).resolve().parents[2].parent / "shared" / "real"
    path = shared / "pope" / f"coco_pope_{request.param}.json"
    if not path.exists():
        pytest.skip(f"{path} is absent")
    return path


def released_script(labels, answers):
    """The published scoring, typed anew as the loop that it is."""
    tp = fp = tn = fn = 0
    for label, text in zip(labels, answers, strict=True):
        if text.find(".") != -1:
            text = text.split(".")[0]
        text = text.replace(",", "")
        words = text.split(" ")
        predicted_yes = not ("No" in words or "not" in words or "no" in words)
        if predicted_yes and label != "no":
            tp += 1
        elif predicted_yes:
            fp += 1
        elif label == "no":
            tn += 1
        else:
            fn += 1
    precision = float(tp) / float(tp + fp)
    recall = float(tp) / float(tp + fn)
    return {
        "tp": tp,
        "fp": fp,
        "tn": tn,
        "fn": fn,
        "accuracy": (tp + tn) / (tp + tn + fp + fn),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall),
        "yes_ratio": (tp + fp) / len(labels),
    }


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def questions(tmp_path, labels, **extra):
    return write_jsonl(
        tmp_path / "questions.json",
        [
            {"question_id": i, "image": f"{i // 2}.jpg", "text": "Is there a dog?", "label": label}
            | extra
            for i, label in enumerate(labels, start=1)
        ],
    )


def pope(path, **kwargs):
    return Pope(split="random", questions=path, images=Path("pictures"), **kwargs)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    answers=st.lists(
        st.one_of(
            st.sampled_from(NASTY),
            st.text(alphabet="noNOtyes., \n", max_size=12),
            st.text(max_size=8),
        ),
        min_size=60,
        max_size=60,
    )
)
@pytest.mark.real
def test_files_score_as_the_released_script_does(tmp_path, real_questions, answers):
    answers[0] = "yes"  # The script divides by zero without a true positive.
    rows = [json.loads(line) for line in real_questions.read_text().splitlines()[:60]]
    asked = write_jsonl(tmp_path / "asked.json", rows)
    given = write_jsonl(tmp_path / "given.json", [{"answer": answer} for answer in answers])
    expected = released_script([row["label"] for row in rows], answers)
    assert score_answers_file(asked, given) == pytest.approx(expected, rel=1e-14, abs=0)


@pytest.mark.real
def test_whole_real_file_scores_as_the_released_script_does(tmp_path, real_questions):
    rows = [json.loads(line) for line in real_questions.read_text().splitlines()]
    answers = [[*NASTY, "yes", "Yes, it is."][i * 5 % 21] for i in range(len(rows))]
    given = write_jsonl(
        tmp_path / "given.json",
        [
            {"question_id": row["question_id"], "answer": answer}
            for row, answer in zip(rows, answers, strict=True)
        ],
    )
    expected = released_script([row["label"] for row in rows], answers)
    assert score_answers_file(real_questions, given) == pytest.approx(expected, rel=1e-14)
    suite = pope(real_questions).score(
        {str(row["question_id"]): answer for row, answer in zip(rows, answers, strict=True)}
    )
    for name in ("accuracy", "precision", "recall", "f1"):
        assert suite.metrics[f"official/{name}"].value == pytest.approx(expected[name], rel=1e-14)
    assert suite.metrics["yes_ratio"].value == expected["yes_ratio"]


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("No.", "no"),
        ("not sure", "no"),
        ("Yes, no", "no"),
        (",no", "no"),
        ("", "yes"),
        ("NO", "yes"),
        ("nope", "yes"),
        ("yes\nno", "yes"),
        ("Yes. No.", "yes"),
        (".no", "yes"),
    ],
)
def test_official_rule(answer, verdict):
    assert official(answer) == verdict


def test_score_by_hand(tmp_path):
    path = questions(tmp_path, ["yes", "yes", "yes", "no", "no", "no"])
    suite = pope(path).score(
        {"6": "no", "1": "Yes", "2": "No", "3": "a dog", "4": "no", "5": "NO one"}
    )
    values = {name: metric.value for name, metric in suite.metrics.items()}
    # Official: yes no yes no yes no. Strict: yes no ? no ? no, where each ? is a wrong answer.
    assert values == pytest.approx(
        {
            "official/accuracy": 4 / 6,
            "official/precision": 2 / 3,
            "official/recall": 2 / 3,
            "official/f1": 2 / 3,
            "strict/accuracy": 3 / 6,
            "strict/precision": 1 / 2,
            "strict/recall": 1 / 3,
            "strict/f1": 2 / 5,
            "yes_ratio": 3 / 6,
            "unparsed_rate": 2 / 6,
        }
    )
    assert suite.num_unparsed == 2
    assert suite.items[2] == {
        "id": "3",
        "image": "1.jpg",
        "prompt": "Is there a dog?\nAnswer with a single word or phrase.",
        "answer": "a dog",
        "label": "yes",
        "official": "yes",
        "strict": None,
        "correct_official": True,
        "correct_strict": False,
    }


def test_missing_answer_is_wrong_under_both_readings(tmp_path):
    suite = pope(questions(tmp_path, ["yes", "no"])).score({"1": "yes"})
    assert suite.items[1]["official"] is None
    assert suite.metrics["official/accuracy"].value == 0.5
    assert suite.metrics["official/precision"].value == 0.5
    assert suite.metrics["yes_ratio"].value == 0.5
    assert suite.num_unparsed == 1


def test_empty_answer_is_yes_to_the_script_and_nothing_to_us(tmp_path):
    suite = pope(questions(tmp_path, ["yes"])).score({"1": ""})
    assert (suite.items[0]["official"], suite.items[0]["strict"]) == ("yes", None)


def test_nothing_predicted_yes_is_zero_not_a_crash(tmp_path):
    path = questions(tmp_path, ["yes", "no"])
    given = write_jsonl(tmp_path / "given.json", [{"answer": "no"}, {"answer": "no"}])
    found = score_answers_file(path, given)
    assert (found["precision"], found["recall"], found["f1"]) == (0.0, 0.0, 0.0)
    assert found["accuracy"] == 0.5


def test_requests_hold_picture_and_prompt(tmp_path):
    benchmark = pope(questions(tmp_path, ["yes", "no", "yes"]), prompt="{question}!", limit=2)
    requests = benchmark.requests()
    assert [request.id for request in requests] == ["1", "2"]
    assert [request.images[0].path for request in requests] == ["0.jpg", "1.jpg"]
    assert [block.type for block in requests[0].prompt[0].content] == ["image", "text"]
    assert requests[0].prompt[0].content[1].text == "Is there a dog?!"
    assert benchmark.key == "pope-random"


def test_braces_in_a_question_are_only_text(tmp_path):
    path = questions(tmp_path, ["yes"], text="Is {x} here?")
    assert pope(path, prompt="{question}").requests()[0].prompt[0].content[1].text == "Is {x} here?"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", "line 2: is not JSON"),
        ("[1]", "line 2: is no JSON object; got list"),
        (
            '{"question_id": 2, "image": "a", "text": "t", "label": "Yes"}',
            "label is wrong; got Yes",
        ),
        ('{"question_id": 2, "image": "a", "text": "t"}', "line 2: label is wrong"),
        ('{"question_id": 1, "image": "a", "text": "t", "label": "no"}', "appears twice; got 1"),
        ('{"question_id": 2, "image": "a", "label": "no"}', "line 2: field text is missing"),
        ('{"question_id": 2, "image": 7, "text": "t", "label": "no"}', "image is no text; got 7"),
        ('{"image": "a", "text": "t", "label": "no"}', "field question_id is missing"),
    ],
)
def test_broken_question_line_is_named(tmp_path, line, message):
    path = questions(tmp_path, ["yes"])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(DataError, match=r"questions.json, line 2") as error:
        pope(path).requests()
    assert message in str(error.value)


def test_absent_and_empty_question_files(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        pope(tmp_path / "absent.json").requests()
    with pytest.raises(DataError, match="holds no questions"):
        pope(write_jsonl(tmp_path / "empty.json", [])).requests()


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([{"answer": "no"}], "got 1 answers; wanted 2"),
        ([{"answer": "no"}] * 3, "got 3 answers; wanted 2"),
        ([{"question_id": n, "answer": "no"} for n in (2, 1)], "line 1.*out of order"),
        ([{"question_id": n, "answer": "no"} for n in (1, 1)], "line 2.*got question_id 1"),
        ([{"answer": "no"}, {"text": "no"}], "line 2: field answer is missing; got fields text"),
        ([{"answer": "no"}, {"answer": None}], "line 2: field answer is no text"),
    ],
)
def test_bad_answer_files_are_refused(tmp_path, answers, message):
    path = questions(tmp_path, ["yes", "no"])
    given = write_jsonl(tmp_path / "given.json", answers)
    with pytest.raises(DataError, match=message):
        score_answers_file(path, given)


def test_answers_to_other_questions_are_refused(tmp_path):
    with pytest.raises(DataError, match="1 answers are to questions it does not ask, such as 9"):
        pope(questions(tmp_path, ["yes"])).score({"1": "yes", "9": "no"})


def test_prompt_needs_a_place_for_the_question(tmp_path):
    with pytest.raises(ValueError, match=r"no place for the \{question\}"):
        pope(questions(tmp_path, ["yes"]), prompt="Is there a dog?")


def test_files_on_other_sources_are_one_list(tmp_path):
    rows = [{"question_id": n, "image": "a.jpg", "text": "Dog?", "label": "no"} for n in (1, 2)]
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=2))
    (tmp_path / "lines.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_questions(tmp_path / "list.json")
    assert found == read_questions(tmp_path / "lines.json")
    assert [row["id"] for row in found] == ["1", "2"]
    (tmp_path / "bad.json").write_text(json.dumps([rows[0], rows[1] | {"label": "maybe"}]))
    with pytest.raises(DataError, match=r"bad.json, row 2: label is wrong; got maybe"):
        read_questions(tmp_path / "bad.json")


def test_the_hub_s_rows_hold_pictures_and_all_splits(tmp_path):
    rows = [
        {"id": str(n), "question_id": str(n % 2), "question": "Dog?", "answer": "yes"}
        | {"image_source": f"COCO_{n}", "category": ("random", "popular")[n // 2]}
        | {"image": {"bytes": PNG + bytes([n]), "path": None}}
        for n in range(4)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "test-00000-of-00001.parquet")
    bench = Pope(split="popular", questions=tmp_path)
    asked = bench.requests()
    assert [one.id for one in asked] == ["0", "1"]
    assert [one.images[0].bytes for one in asked] == [PNG + bytes([2]), PNG + bytes([3])]
    suite = bench.score({"0": "Yes.", "1": "No."})
    assert suite.metrics["official/accuracy"].value == 0.5
    assert [row["image"] for row in suite.items] == ["COCO_2", "COCO_3"]
    with pytest.raises(DataError, match=r"of the split; got popular, random; wanted easy"):
        Pope(split="easy", questions=tmp_path).requests()
    with pytest.raises(ValueError, match="give either images or videos"):
        Pope(split="easy", questions=tmp_path / "q.json")
