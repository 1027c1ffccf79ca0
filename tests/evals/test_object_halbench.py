import base64
import json
import random

import pytest

from evals.benchmarks.object_halbench import ObjectHalBench, read_words, score_answers_file
from evals.compare import compare
from evals.config import EvalRecipe
from evals.known import RULES
from evals.run import evaluate
from mmalign.config import validate
from mmalign.errors import ConfigError, DataError
from mmalign.generate.base import Generation

SYNONYMS = """\
person, man, woman, people
dog, puppy
cat
hot dog
potted plant, houseplant
laptop, laptop computer
train
chair, seat
toilet
tie, bow, bow tie
"""
PICTURE = base64.b64encode(b"GIF89a, and no picture" * 20).decode()
ROWS = [
    {"image_id": 7, "question": "Describe it.", "image": PICTURE},
    {"image_id": "9", "question": "What is there?", "image": "nine.jpg"},
    {"image_id": 7, "question": "And now?", "image": PICTURE},
]


def instances(*images, boxes=()):
    names = ["person", "dog", "cat", "hot dog", "potted plant", "laptop", "train"]
    return {
        "images": [{"id": number, "file_name": f"{number}.jpg"} for number in images],
        "categories": [{"id": i, "name": name} for i, name in enumerate(names)],
        "annotations": [{"image_id": n, "category_id": names.index(name)} for n, name in boxes],
    }


@pytest.fixture
def files(tmp_path):
    """The question file and COCO's, small: 7 has a dog and a man, 9 a cat and a potted plant."""
    written = {
        "val.json": instances(7, 8, boxes=[(7, "dog"), (8, "train"), (7, "dog")]),
        "train.json": instances(9, boxes=[(9, "cat")]),
        "captions.json": {
            "annotations": [
                {"image_id": 7, "caption": "A man with a puppy."},
                {"image_id": 9, "caption": "A houseplant"},
                {"image_id": 8, "caption": "A laptop"},
            ]
        },
    }
    for name, data in written.items():
        (tmp_path / name).write_text(json.dumps(data))
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "synonyms.txt").write_text(SYNONYMS)
    (tmp_path / "pictures").mkdir()
    return tmp_path


def settings(folder, **changes):
    return {
        "name": "object_halbench",
        "data": str(folder / "questions.jsonl"),
        "images": str(folder / "pictures"),
        "instances": [str(folder / "val.json"), str(folder / "train.json")],
        "captions": [str(folder / "captions.json")],
        "synonyms": str(folder / "synonyms.txt"),
    } | changes


def bench(folder, **changes):
    return ObjectHalBench.model_validate(settings(folder, **changes))


def values(suite):
    return {name: metric.value for name, metric in suite.metrics.items()}


@pytest.mark.parametrize(
    ("text", "categories"),
    [
        ("Hot dogs and a dog", ["hot dog", "dog"]),
        ("a laptop computer on a train track", ["laptop"]),
        ("trains on home plate", ["train"]),
        ("potted plants, a baby dog, a bow tie", ["potted plant", "dog", "tie"]),
        ("the seat of the toilet", ["toilet"]),
        ("a passenger train", ["train"]),
        # A pair of CHAIR's list that is in no line here is two words: the list says what is one.
        ("a teddy bear, a cell phone", []),
    ],
)
def test_words_are_those_of_the_synonym_file(files, text, categories):
    found = read_words(files / "synonyms.txt").mentions(text)
    assert [mention.category for mention in found] == categories


def test_score_by_hand(files):
    suite = bench(files).score(
        {
            "0": "Assistant: A man, two men, a dog, a puppy, a cat and cats.",
            "1": "A cat.",
            "2": "It is nice ",
        }
    )
    first, second, third = suite.items
    assert first["truth"] == ["dog", "person"]
    assert second["truth"] == ["cat", "potted plant"]
    assert first["answer"] == "A man, two men, a dog, a puppy, a cat and cats."
    assert first["mentioned"] == ["person", "person", "dog", "dog", "cat", "cat"]
    assert first["hallucinated"] == ["cat", "cat"]
    start, end = first["spans"][-1]
    assert first["answer"][start:end] == "cats"
    # man, dog, puppy and cat once each: "men" is man again, a puppy is another word for a dog.
    assert (first["num_mentioned_once"], first["num_hallucinated_once"]) == (4, 1)
    assert third["recalled"] == []
    assert [row["cluster"] for row in suite.items] == ["7", "9", "7"]
    assert values(suite) == pytest.approx(
        {
            "response_hall": 1 / 2,  # the third names no object
            "object_hall": 2 / 7,
            "object_hall_once": 1 / 5,
            "recall": (2 + 1 + 0) / 6,
            "num_words": (12 + 2 + 3) / 3,
            "mentions": 7 / 3,
        }
    )
    assert suite.num_unparsed == 0
    assert suite.method.startswith("objects by CHAIR's words in the whole answer")


def test_a_missing_answer_counts_in_nothing(files):
    suite = bench(files).score({"1": "A dog and a cat and an elephant"})
    assert suite.num_unparsed == 2
    assert values(suite)["recall"] == 1 / 2
    assert values(suite)["object_hall"] == 1 / 2
    assert values(suite)["num_words"] == 8


def test_no_objects_are_no_division_by_zero(files):
    found = values(bench(files).score({"0": "", "1": "", "2": ""}))
    assert found.pop("num_words") == 1.0  # as the script parts an empty answer
    assert set(found.values()) == {0.0}


def test_random_answers_count_as_the_released_loop_does(files):
    """The released sums, typed anew, over answers whose objects are known."""
    synonyms = {line.split(", ")[0]: line.split(", ") for line in SYNONYMS.splitlines()}
    category = {word: name for name, words in synonyms.items() for word in words}
    del category["seat"], category["bow"]  # which a toilet or a tie beside them would change
    truth = {7: {"dog", "person"}, 9: {"cat", "potted plant"}}
    drawn = random.Random(0)
    lines, sums = [], dict.fromkeys(["words", "bad", "with", "bad answers", "true", "all"], 0)
    for _ in range(300):
        number = drawn.choice([7, 9])
        named = drawn.choices(sorted(category), k=drawn.randrange(5))
        text = "".join(f"There is a {word}. " for word in named)
        lines.append({"image_id": number, "prompt": "?", "text": text + "Good."})
        wrong = [word for word in named if category[word] not in truth[number]]
        sums["words"] += len(named)
        sums["bad"] += len(wrong)
        sums["with"] += bool(named)
        sums["bad answers"] += bool(wrong)
        sums["true"] += len({category[word] for word in named} & truth[number])
        sums["all"] += len(truth[number])
    (files / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shown = score_answers_file(
        files / "answers.jsonl",
        [files / "val.json", files / "train.json"],
        [files / "captions.json"],
        files / "synonyms.txt",
    )
    assert 0 < sums["bad answers"] < sums["with"] < 300
    assert shown == pytest.approx(
        {
            "CHAIRs": sums["bad answers"] / 300,
            "CHAIRs_refine": sums["bad answers"] / sums["with"],
            "CHAIRi": sums["bad"] / sums["words"],
            "obj_rec": sums["true"] / sums["all"],
            "sentence_num": 300,
            "coco_sentence_num": sums["with"],
            "coco_word_count": sums["true"],
            "gt_word_count": sums["all"],
            "avg_word_len": sum(len(line["text"].split(" ")) for line in lines) / 300,
            "correct_rate": 1 - sums["bad answers"] / sums["with"],
            "object_correct_rate": 1 - sums["bad"] / sums["words"],
        }
    )


def test_requests(files):
    first, second, _ = bench(files, prompt="{question} Please.").requests()
    assert (first.id, second.id) == ("0", "1")
    assert first.images[0].bytes == b"GIF89a, and no picture" * 20
    assert second.images[0].path == "nine.jpg"
    assert first.prompt[0].content[1].text == "Describe it. Please."
    assert [request.id for request in bench(files, limit=2).requests()] == ["0", "1"]
    assert bench(files, split="mine").key == "object_halbench-mine"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "?", "image": PICTURE}, "line 1: field image_id is no whole number"),
        ({"image_id": "x", "question": "?", "image": "a"}, "image_id is no whole number; got 'x'"),
        ({"image_id": 7, "image": PICTURE}, "line 1: field question is missing"),
        ({"image_id": 7, "question": "?"}, "line 1, image: holds no picture"),
        ({"image_id": 10, "question": "?", "image": "a"}, "1 images are in none of the instances"),
    ],
)
def test_broken_rows_are_told(files, row, message):
    (files / "questions.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=message):
        bench(files).requests()


def test_wrong_files_are_told(files):
    with pytest.raises(DataError, match="is not an instances file of COCO"):
        bench(files, instances=[str(files / "captions.json")]).requests()
    with pytest.raises(DataError, match="is not a captions file of COCO"):
        bench(files, captions=[str(files / "val.json")]).requests()
    with pytest.raises(DataError, match="images are in none of the instances files, such as 9"):
        bench(files, instances=[str(files / "val.json")]).requests()
    for content in ("[]", '{"categories": [], "annotations": [], "images": ["a.jpg"]}'):
        (files / "odd.json").write_text(content)
        with pytest.raises(DataError, match="is not an instances file of COCO"):
            bench(files, instances=[str(files / "odd.json")]).requests()
    with pytest.raises(DataError, match="to questions it does not ask, such as 5"):
        bench(files).score({"5": "A dog."})
    (files / "questions.jsonl").write_text("\n")
    with pytest.raises(DataError, match="holds no questions"):
        bench(files).requests()
    with pytest.raises(ConfigError, match="captions"):
        validate(settings(files, captions=[]), ObjectHalBench, "recipe")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "holds no answers"),
        ('{"image_id": 7}', "line 1: field answer is missing"),
        ('{"image_id": 7, "text": 3}', "line 1: field text is no text"),
        ('{"text": "A dog."}', "image_id is no whole number"),
    ],
)
def test_broken_answer_files_are_told(files, line, message):
    (files / "answers.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match=message):
        score_answers_file(
            files / "answers.jsonl",
            [files / "val.json"],
            [files / "captions.json"],
            files / "synonyms.txt",
        )


class Speaker:
    """Answers every request alike."""

    def __init__(self, name, text):
        self.name, self.text = name, text

    def generate(self, requests, sampling):
        return [
            Generation(id=request.id, text=self.text, num_tokens=3, finished=True)
            for request in requests
        ]


def test_a_recipe_runs_and_is_compared(files):
    def run(name, text):
        data = {"name": name, "model": {"path": "none"}, "output": str(files / name)}
        data |= {"bootstrap_samples": 200, "benchmarks": [settings(files)]}
        return evaluate(validate(data, EvalRecipe, "recipe"), Speaker(name, text))

    base, better = run("base", "a cat"), run("better", "a dog, a man and a cat")
    found = {one.metric: one for one in compare(base, better, samples=200)}
    # a cat: wrong of 7, twice, right of 9. Then also wrong once of 9, by two words.
    assert list(found) == list(RULES["object_halbench"].compared or ())
    assert (found["object_hall"].a, found["object_hall"].b) == (2 / 3, 4 / 9)
    assert (found["response_hall"].a, found["response_hall"].b) == (2 / 3, 1)
    assert (found["recall"].a, found["recall"].b) == (1 / 6, 5 / 6)


def test_every_measure_shown_is_one_of_the_metrics(files):
    suite = bench(files).score({})
    rules = RULES["object_halbench"]
    assert {metric.key for metric in rules.shown} <= suite.metrics.keys()
    assert all({*rules.read, *rules.same} <= row.keys() for row in suite.items)
