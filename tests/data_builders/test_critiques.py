"""Rankings from several generators and a judge: what is kept, what is dropped, and why."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data_builders.base import GeneratorConfig
from data_builders.critiques import Critiques, Writer
from data_builders.verify import JudgeConfig
from mmalign.errors import MediaError, ModelError
from mmalign.generate.base import Generation, Request, Sampling
from mmalign.generate.server import Unanswered
from mmalign.judge import Contest, Judge, Ruling
from mmalign.models.load import ModelConfig
from mmalign.prepare import RowDropped
from mmalign.records import Example, Media, Ranking, prompt_text, user
from mmalign.store import Dataset, open_dataset, write_dataset
from mmalign.verdicts import RankVerdict

LOCAL = GeneratorConfig(model=ModelConfig(path="none"), temperature=0.7)


class Says:
    """A generator that says what its script holds for an example, sample after sample.

    "…" at the end is a text that the token limit cut, None one that no server answered.
    """

    def __init__(self, name: str, script: dict[str, list[str | None]]) -> None:
        self.name, self.script, self.asked = name, script, list[Request]()

    def generate(self, requests, sampling: Sampling) -> list[Generation]:
        self.asked += requests
        made: list[Generation | None] = []
        for request in requests:
            id, _, number = request.id.split("/")
            text = self.script[id][int(number) - 1]
            if text == "no such row":
                raise RowDropped("too_long", "is too long", where=request.id)
            generation = Generation(
                id=request.id,
                text=text or "",
                num_tokens=1,
                finished=not (text or "").endswith("…"),
            )
            made.append(None if text is None else generation)
        if None in made:
            reasons = ["timeout" if one is None else None for one in made]
            raise Unanswered(made, reasons, where=self.name, first="x")
        return [one for one in made if one is not None]


class Longest:
    """A rule for a judge: the longer the better, and what is as long is as good."""

    name = "longest"

    def __init__(self) -> None:
        self.contests = list[Contest]()

    def rank(self, contests) -> list[Ruling[RankVerdict]]:
        self.contests += contests
        return [self.ruling(contest) for contest in contests]

    @staticmethod
    def ruling(contest: Contest) -> Ruling[RankVerdict]:
        lengths = [len(text) for text in contest.responses]
        order = sorted(set(lengths), reverse=True)
        verdict = RankVerdict(
            scores=tuple(float(length) for length in lengths),
            ranks=tuple(order.index(length) for length in lengths),
            critiques=tuple(f"It has {length} signs. So much for that." for length in lengths),
        )
        return Ruling(id=contest.id, value=verdict, reason="ok", num_tries=1)


class Rules:
    """A judge that rules as it is told, whatever it is shown."""

    name = "rules"

    def __init__(self, verdict: RankVerdict | None, reason: str = "ok") -> None:
        self.verdict, self.reason = verdict, reason

    def rank(self, contests) -> list[Ruling[RankVerdict]]:
        return [
            Ruling(id=one.id, value=self.verdict, reason=self.reason, num_tries=3)
            for one in contests
        ]


def write_examples(tmp_path: Path, *ids: str, **changes: Any) -> None:
    rows = [Example(id=id, prompt=user("What?"), **changes) for id in ids]
    write_dataset(tmp_path / "in", Example, rows, media_root=str(tmp_path))


def config(tmp_path: Path, **changes: Any) -> Critiques:
    settings: dict[str, Any] = {
        "source": tmp_path / "in",
        "output": tmp_path / "out",
        "generators": (
            Writer(name="small", num_samples=2, generator=LOCAL),
            Writer(name="big", generator=LOCAL),
        ),
        "judge": JudgeConfig(generator=LOCAL),
        "seed": 5,
    }
    return Critiques(**(settings | changes))


def build(tmp_path: Path, says: dict[str, list[str | None]], judge: Any, **changes: Any):
    """Two samples of small and one of big for each example, judged."""
    small = Says("small@1", {id: texts[:2] for id, texts in says.items()})
    big = Says("big@1", {id: texts[2:] for id, texts in says.items()})
    if not (tmp_path / "in").exists():
        write_examples(tmp_path, *says)
    config(tmp_path, **changes).build_with({"small": small, "big": big}, judge)
    return open_dataset(tmp_path / "out", Ranking)


def only(dataset: Dataset[Ranking]) -> Ranking:
    (record,) = dataset
    return record


def detail(record: Ranking) -> dict[str, Any]:
    return json.loads(record.origin.detail)


# --- what is kept ---------------------------------------------------------------------------


def test_each_response_has_its_own_rank_score_critique_and_model(tmp_path: Path) -> None:
    judge = Longest()
    dataset = build(tmp_path, {"a": ["a cat", "a grey cat", "cats"]}, judge)
    record = only(dataset)
    told = [(r.text, r.rank, r.score, r.model, r.critique) for r in record.responses]
    assert told == [
        ("a cat", 1, 5.0, "small@1", "It has 5 signs. So much for that."),
        ("a grey cat", 0, 10.0, "small@1", "It has 10 signs. So much for that."),
        ("cats", 2, 4.0, "big@1", "It has 4 signs. So much for that."),
    ]
    assert (record.origin.builder, record.origin.reason) == ("critiques", "accepted")
    assert detail(record)["writers"] == [["small"], ["small"], ["big"]]
    assert dataset.manifest.counts == {"accepted": 1}
    assert dataset.manifest.model == {"small": "small@1", "big": "big@1", "judge": "longest"}
    assert judge.contests[0].question == "What?"


def test_the_order_shown_is_drawn_and_leads_nobody_astray(tmp_path: Path) -> None:
    ids = [f"e{number:02d}" for number in range(30)]
    judge = Longest()
    dataset = build(tmp_path, {id: ["one", "fifteen", "hundreds of them"] for id in ids}, judge)
    orders = {contest.responses for contest in judge.contests}
    assert len(orders) == 6, "every order of three is drawn in thirty"
    assert {tuple(r.rank for r in record.responses) for record in dataset} == {(2, 1, 0)}
    for record, contest in zip(dataset, judge.contests, strict=True):
        shown = detail(record)["shown_at"]
        assert [contest.responses[place] for place in shown] == [r.text for r in record.responses]


def test_equal_responses_are_judged_once(tmp_path: Path) -> None:
    judge = Longest()
    record = only(build(tmp_path, {"a": ["a cat", " a cat\n", "a dog, or so"]}, judge))
    assert [r.text for r in record.responses] == ["a cat", "a dog, or so"]
    assert sorted(judge.contests[0].responses) == ["a cat", "a dog, or so"]
    assert detail(record)["writers"] == [["small", "small"], ["big"]]


def test_all_ties_are_kept_and_counted(tmp_path: Path) -> None:
    dataset = build(tmp_path, {"a": ["one", "two", "six"]}, Longest())
    assert [r.rank for r in only(dataset).responses] == [0, 0, 0]
    assert dataset.manifest.counts == {"accepted:all_ties": 1}


def test_what_is_no_whole_answer_is_left_out(tmp_path: Path) -> None:
    dataset = build(
        tmp_path,
        {
            "a": ["a cat and…", "a cat", "a dog, or so"],
            "b": [" ", "a cat", "a cat"],
            "c": ["cut…", "cut too…", "a dog"],
            "d": [None, "a cat", "a dog, or so"],
            "e": ["no such row", "a cat", "a dog, or so"],
        },
        Longest(),
    )
    kept = {record.id: [r.text for r in record.responses] for record in dataset}
    assert kept == {id: ["a cat", "a dog, or so"] for id in "ade"}
    lost = {record.id: detail(record)["lost"] for record in dataset}
    assert lost == {"a": {"cut": 1}, "d": {"timeout": 1}, "e": {"too_long": 1}}
    assert dataset.manifest.counts == {"accepted": 3, "dropped:too_few_responses": 2}
    left_out = json.loads((tmp_path / "out/progress/shard-00000.json").read_text())["left_out"]
    assert {one["id"]: one["detail"] for one in left_out} == {
        "b": "1 different of 3, 1 blank",
        "c": "1 different of 3, 2 cut",
    }


def test_one_row_that_cannot_be_asked_costs_the_others_nothing(tmp_path: Path) -> None:
    texts: dict[str, list[str | None]] = {id: ["one", "two", "three"] for id in "abcdefgh"}
    texts["f"] = ["no such row", "no such row", "three"]
    dataset = build(tmp_path, texts, Longest())
    assert [record.id for record in dataset] == list("abcdegh")


# --- what is dropped ------------------------------------------------------------------------


def verdict(ranks: tuple[int, ...], scores: tuple[float, ...]) -> RankVerdict:
    return RankVerdict(ranks=ranks, scores=scores, critiques=("Good.",) * len(ranks))


@pytest.mark.parametrize(
    ("judge", "reason"),
    [
        (Rules(None, "two_verdicts"), "dropped:judge_two_verdicts"),
        (Rules(verdict((0, 1, 2), (1.0, 2.0, 3.0))), "dropped:contradiction"),
        (Rules(verdict((0, 0, 1), (3.0, 2.0, 1.0))), "dropped:contradiction"),
        (Rules(verdict((0, 1, 2), (3.0, 3.0, 1.0))), "accepted"),
    ],
)
def test_a_verdict_that_is_none_is_dropped_and_counted(tmp_path: Path, judge, reason) -> None:
    dataset = build(tmp_path, {"a": ["one", "two", "three"]}, judge)
    assert dataset.manifest.counts == {reason: 1}


def scripted(reply: str | None):
    """A real judge over a model that always says the same; CODE stands for the code to repeat."""

    class Model:
        name = "model"

        def generate(self, requests, sampling: Sampling) -> list[Generation]:
            if reply is None:
                nothing = [None] * len(requests)
                raise Unanswered(nothing, ["timeout"] * len(requests), where="model", first="x")
            codes = [re.findall(r'"code": "(\w+)"', prompt_text(r.prompt))[-1] for r in requests]
            return [
                Generation(id=r.id, text=reply.replace("CODE", code), num_tokens=1, finished=True)
                for r, code in zip(requests, codes, strict=True)
            ]

    return Judge(Model(), tries=2)


def ranked(rank: str, scores: list[float], code: str = "CODE") -> str:
    critiques = ["Says little."] * len(scores)
    return json.dumps({"code": code, "critiques": critiques, "scores": scores, "rank": rank})


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ("They are all very nice!", "dropped:judge_no_verdict"),
        (None, "dropped:judge_timeout"),
        (ranked("1>2=3", [5, 3, 3]), "accepted"),
        (ranked("1>2>3", [1, 2, 5]), "dropped:contradiction"),
        (ranked("1>2>1>3", [5, 4, 3]), "dropped:contradiction"),
        (ranked("1>2", [5, 4, 3]), "dropped:judge_rank_misses_response"),
    ],
)
def test_a_language_model_as_judge(tmp_path: Path, reply, reason) -> None:
    dataset = build(tmp_path, {"a": ["one", "two", "three"]}, scripted(reply))
    assert dataset.manifest.counts == {reason: 1}


def test_a_response_cannot_give_itself_the_first_place(tmp_path: Path) -> None:
    """The judge repeats what a response dictates, code and all that it can know; it counts not."""
    injected = ranked("1>2=3", [5, 1, 1], code="0123456789abcdef")
    dataset = build(tmp_path, {"a": [injected, "two", "three"]}, scripted(injected))
    assert dataset.manifest.counts == {"dropped:judge_no_verdict": 1}


def test_clips_are_not_ranked_unseen(tmp_path: Path) -> None:
    rows = [Example(id="a", prompt=user("What?", videos=1), videos=(Media(path="a.mp4"),))]
    write_dataset(tmp_path / "in", Example, rows)
    dataset = build(tmp_path, {"a": ["one", "two", "three"]}, Longest())
    assert dataset.manifest.counts == {"dropped:has_clips": 1}


def test_pictures_reach_generators_and_judge_and_a_torn_one_is_quarantined(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    (tmp_path / "torn.png").write_bytes(b"\x89PNG")
    rows = [
        Example(id=id, prompt=user("What?", images=1), images=(Media(path=f"{id}.png"),))
        for id in ("red", "torn")
    ]
    write_dataset(tmp_path / "in", Example, rows, media_root=str(tmp_path))
    judge = Longest()
    says: dict[str, list[str | None]] = {id: ["one", "three", "sixteen"] for id in ("red", "torn")}
    dataset = build(tmp_path, says, judge, embed_media=True)
    assert dataset.manifest.counts == {"accepted": 1, "quarantined:unreadable": 1}
    assert judge.contests[0].images == (Media(path="red.png"),)
    assert judge.contests[0].media_root == tmp_path
    assert only(dataset).images[0].bytes == (tmp_path / "red.png").read_bytes()


def test_a_server_that_is_down_stops_the_build(tmp_path: Path) -> None:
    class Down:
        name = "down"

        def rank(self, contests):
            raise ModelError("3 requests in a row got no answer", where="down")

    with pytest.raises(ModelError, match="in a row"):
        build(tmp_path, {"a": ["one", "two", "three"]}, Down())
    assert not (tmp_path / "out/manifest.json").exists()


# --- critiques over the budget --------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "reason", "critique"),
    [
        (8, "accepted", "It has 3 signs. So much for that."),
        (7, "accepted:critique_cut", "It has 3 signs."),
        (4, "accepted:critique_cut", "It has 3 signs."),
        (3, "dropped:critique_too_long", None),
    ],
)
def test_a_long_critique_ends_at_a_sentence(tmp_path: Path, limit, reason, critique) -> None:
    says: dict[str, list[str | None]] = {"a": ["one", "fifteen", "three"]}
    dataset = build(tmp_path, says, Longest(), max_critique_words=limit)
    assert dataset.manifest.counts == {reason: 1}
    assert [record.responses[0].critique for record in dataset] == [critique] * (
        critique is not None
    )


def test_several_reasons_are_told_together(tmp_path: Path) -> None:
    dataset = build(tmp_path, {"a": ["one", "two", "six"]}, Longest(), max_critique_words=5)
    assert dataset.manifest.counts == {"accepted:all_ties+critique_cut": 1}


# --- the job --------------------------------------------------------------------------------


def test_neither_chunks_nor_processes_change_a_record(tmp_path: Path) -> None:
    says: dict[str, list[str | None]] = {
        f"e{n}": ["one", f"{n} of them", "three"] for n in range(7)
    }
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one = build(tmp_path / "one", says, Longest())
    write_examples(tmp_path / "two", *says)
    small = Says("small@1", {id: texts[:2] for id, texts in says.items()})
    big = Says("big@1", {id: texts[2:] for id, texts in says.items()})
    models = {"small": small, "big": big}
    for shard in ("1/2", "0/2"):
        config(tmp_path / "two", shard_rows=2, shard=shard).build_with(models, Longest())
    two = open_dataset(tmp_path / "two/out", Ranking)
    assert list(one) == list(two)
    assert (tmp_path / "two/out/preview.html").exists()
    # Each answer was asked for once.
    assert len({request.id for request in small.asked}) == len(small.asked) == 14


def test_a_stopped_build_goes_on_with_the_next_shard(tmp_path: Path) -> None:
    says: dict[str, list[str | None]] = {id: ["one", "three", "sixteen"] for id in "abcd"}

    class Fails(Longest):
        def rank(self, contests):
            if contests[0].id == "c":
                raise RuntimeError("power cut")
            return super().rank(contests)

    with pytest.raises(RuntimeError):
        build(tmp_path, says, Fails(), shard_rows=2)
    judge = Longest()
    assert len(build(tmp_path, says, judge, shard_rows=2)) == 4
    assert [contest.id for contest in judge.contests] == ["c", "d"]


def test_an_unreadable_picture_for_one_model_alone_costs_that_models_answer(tmp_path: Path) -> None:
    class Picky(Says):
        def generate(self, requests, sampling: Sampling) -> list[Generation]:
            if any(request.id.startswith("b/") for request in requests):
                raise MediaError("is too narrow for this model", where="b")
            return super().generate(requests, sampling)

    write_examples(tmp_path, "a", "b")
    says: dict[str, list[str | None]] = {"a": ["one", "three"], "b": ["one", "three"]}
    models = {"small": Says("s", says), "big": Picky("p", {"a": ["sixteen"], "b": ["sixteen"]})}
    config(tmp_path).build_with(models, Longest())
    records = {record.id: record for record in open_dataset(tmp_path / "out", Ranking)}
    assert len(records["a"].responses) == 3
    assert [r.text for r in records["b"].responses] == ["one", "three"]
    assert detail(records["b"])["lost"] == {"unreadable": 1}
