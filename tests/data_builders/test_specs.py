"""SPECS's pairs: what is chosen, what is rejected, what is left out, and why."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from data_builders.base import GeneratorConfig
from data_builders.malform import KINDS
from data_builders.specs import Specs
from data_builders.verify import JudgeConfig
from mmalign.errors import MediaError
from mmalign.generate.base import Generation, Request, Sampling
from mmalign.generate.server import Unanswered
from mmalign.instruct import FORM, instructed
from mmalign.judge import Judge
from mmalign.models.load import ModelConfig
from mmalign.prepare import RowDropped
from mmalign.records import Media, Message, Preference, Verifiable, prompt_text, user
from mmalign.store import Dataset, open_dataset, write_dataset
from mmalign.think import final_answer, parts_of

LOCAL = GeneratorConfig(model=ModelConfig(path="none"), temperature=0.7)
PICTURE = (Media(path="a.png"),)

GOOD = "<think>3 and 4 make 7</think>\n<answer>It is \\boxed{7}</answer>"
BARE = "3 and 4 make 7. It is \\boxed{7}."
COMPLETED = "<think> 3 and 4 make 7. </think>\n<answer> It is \\boxed{7}. </answer>"
WRONG = GOOD.replace("7", "8")
UNBOXED = "<think>3 and 4 make 7</think><answer>7</answer>"


class Says:
    """Says what its script holds for a row, try after try.

    "…" at the end: cut by the token limit. None: no server answered. An error is raised.
    """

    def __init__(self, script: dict[str, list], name: str = "policy") -> None:
        self.name, self.script = name, script
        self.asked, self.samplings = list[Request](), list[Sampling]()

    def generate(self, requests, sampling: Sampling) -> list[Generation]:
        self.asked += requests
        self.samplings.append(sampling)
        texts = [self.said(request) for request in requests]
        for text in texts:
            if isinstance(text, Exception):
                raise text
        made = [
            None
            if text is None
            else Generation(id=request.id, text=text, num_tokens=1, finished=not text.endswith("…"))
            for request, text in zip(requests, texts, strict=True)
        ]
        if None in made:
            reasons = ["timeout" if one is None else None for one in made]
            raise Unanswered(made, reasons, where=self.name, first="x")
        return [one for one in made if one is not None]

    def said(self, request: Request):
        row, _, label = request.id.rpartition("/")
        return self.script[row][int(label.strip("trybase")) - 1]


class Rules:
    """A judge's model, for which an argument is consistent unless it says "but"."""

    name = "rules"

    def __init__(self) -> None:
        self.prompts: list[str] = []

    def generate(self, requests, sampling: Sampling) -> list[Generation]:
        made = []
        for request in requests:
            prompt = prompt_text(request.prompt)
            self.prompts.append(prompt)
            code = prompt.partition("[BEGIN question ")[2].partition("]")[0]
            verdict = "inconsistent" if "but" in prompt.partition("[BEGIN")[2] else "consistent"
            text = "Hm." if "hm" in prompt else json.dumps({"code": code, "verdict": verdict})
            made.append(Generation(id=request.id, text=text, num_tokens=1, finished=True))
        return made


def row(id: str, **changes) -> Verifiable:
    fields = {
        "prompt": user("What is the sum?", images=1),
        "images": PICTURE,
        "answer": "7",
        "verifier": "number",
    }
    return Verifiable(id=id, **(fields | changes))


def build(
    tmp_path: Path, script: dict[str, list], *, rows=None, base=None, judge=None, **changes
) -> Dataset[Preference]:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    rows = [row(id) for id in script] if rows is None else rows
    write_dataset(tmp_path / "in", Verifiable, rows, media_root=str(tmp_path))
    settings = {
        "source": tmp_path / "in",
        "output": tmp_path / "out",
        "generator": LOCAL,
        "tries": max(map(len, script.values())),
        "seed": 5,
    }
    generators = {"generator": script if isinstance(script, Says) else Says(script)}
    if base is not None:
        generators["base_generator"] = base
        settings["base_generator"] = LOCAL
    Specs(**(settings | changes)).build_with(generators, judge)
    return open_dataset(tmp_path / "out", Preference)


def counts(dataset: Dataset[Preference]) -> dict[str, int]:
    return dataset.manifest.counts


def test_the_first_correct_and_well_formed_response_is_chosen(tmp_path: Path):
    script = {"a": [GOOD, "never asked"], "b": [WRONG, GOOD], "c": [WRONG, WRONG]}
    dataset = build(tmp_path, script)
    pairs = {pair.id: pair for pair in dataset}
    assert set(pairs) == {"a", "b"}
    assert {pair.chosen for pair in pairs.values()} == {GOOD}
    assert [json.loads(pairs[id].origin.detail)["tries"] for id in "ab"] == [1, 2]
    assert pairs["a"].images == PICTURE
    assert counts(dataset) == {"accepted:sampled": 2, "dropped:chosen_wrong": 1}
    assert dataset.manifest.model == {"generator": "policy"}
    assert "accepted:sampled, kind " in (tmp_path / "out/preview.html").read_text()


def test_what_is_asked_is_what_is_stored(tmp_path: Path):
    policy = Says({"a": [GOOD]})
    settings = {"generator": LOCAL, "source": tmp_path / "in", "output": tmp_path / "out"}
    write_dataset(tmp_path / "in", Verifiable, [row("a", images=(), prompt=user("Sum?"))])
    Specs(**settings).build_with({"generator": policy}, None)
    [pair] = open_dataset(tmp_path / "out", Preference)
    assert pair.prompt == policy.asked[0].prompt == instructed(user("Sum?"), FORM)
    assert policy.samplings[0].temperature == 0.7
    Specs(**(settings | {"output": tmp_path / "as_it_is", "instruction": None})).build_with(
        {"generator": policy}, None
    )
    [pair] = open_dataset(tmp_path / "as_it_is", Preference)
    assert pair.prompt == policy.asked[-1].prompt == user("Sum?")


def test_rejected_is_chosen_with_its_form_broken(tmp_path: Path):
    ids = [f"r{number:02d}" for number in range(40)]
    dataset = build(tmp_path, {id: [GOOD] for id in ids})
    kinds = set()
    for pair in dataset:
        kinds.add(json.loads(pair.origin.detail)["kind"])
        assert parts_of(pair.chosen).well_formed
        assert not parts_of(pair.rejected).well_formed
        assert final_answer(pair.rejected) == "7"
        assert pair.chosen_spans or pair.rejected_spans
        # What is marked is tags, and nothing between them.
        for text, spans in (
            (pair.chosen, pair.chosen_spans),
            (pair.rejected, pair.rejected_spans),
        ):
            words = {
                word for span in spans for word in re.findall(r"\w+", text[span.start : span.end])
            }
            assert words <= {"think", "answer", "Answer"}
    assert kinds == set(KINDS)


def test_kinds_depend_on_seed_and_id_alone(tmp_path: Path):
    script = {f"r{number:02d}": [GOOD] for number in range(20)}
    made = {}
    for name, changes in (
        ("one", {}),
        ("chunks", {"shard_rows": 3}),
        ("few", {"limit": 7}),
        ("other", {"seed": 6}),
    ):
        (tmp_path / name).mkdir()
        made[name] = [pair.rejected for pair in build(tmp_path / name, script, **changes)]
    assert made["chunks"] == made["one"]
    assert made["few"] == made["one"][:7]
    assert made["other"] != made["one"]


def test_a_kind_that_loses_the_answer_gives_way_to_another(tmp_path: Path):
    script = {f"r{number:02d}": [UNBOXED] for number in range(20)}
    kinds = {json.loads(pair.origin.detail)["kind"] for pair in build(tmp_path, script)}
    # Without its tags and without a box, an answer is not found.
    assert kinds == {"shifted_tags", "unclosed_think"}


def test_where_no_kind_keeps_the_answer_the_row_is_dropped(tmp_path: Path):
    dataset = build(tmp_path, {"a": [UNBOXED], "b": [GOOD]}, kinds=("strip_all_tags",))
    assert [pair.id for pair in dataset] == ["b"]
    assert counts(dataset)["dropped:answer_lost"] == 1


def test_a_form_is_completed_only_where_no_try_is_good(tmp_path: Path):
    script = {"a": [BARE, GOOD], "b": [BARE, WRONG], "c": ["It is 7.", "It is 7."]}
    dataset = build(tmp_path, script)
    assert {pair.id: pair.chosen for pair in dataset} == {"a": GOOD, "b": COMPLETED}
    detail = json.loads(list(dataset)[1].origin.detail)
    assert (detail["tries"], detail["response"]) == (1, BARE)
    assert counts(dataset) == {
        "accepted:sampled": 1,
        "accepted:supplemented": 1,
        "dropped:chosen_no_answer": 1,
    }


def test_without_supplement_a_form_counts_as_it_is(tmp_path: Path):
    dataset = build(tmp_path, {"a": [BARE], "b": [GOOD]}, supplement=False)
    assert [pair.id for pair in dataset] == ["b"]
    assert counts(dataset)["dropped:chosen_no_tags"] == 1


@pytest.mark.parametrize(
    ("says", "reason"),
    [
        (["<think></think><answer>7</answer>"], "chosen_empty_think"),
        ([f"<think>a</think>{GOOD}"], "chosen_two_thinks"),
        ([f"{GOOD}…"], "chosen_cut"),
        ([" \n"], "chosen_blank"),
        ([None], "chosen_timeout"),
        (["<think>3 and 4</think><answer>7 or 8</answer>"], "chosen_undecided"),
        # By the try that came furthest.
        ([f"{GOOD}…", WRONG, f"<think>a</think>{GOOD}", WRONG], "chosen_two_thinks"),
    ],
)
def test_what_is_no_chosen_response_is_counted_by_reason(tmp_path: Path, says, reason):
    dataset = build(tmp_path, {"a": says, "b": [GOOD] * len(says)})
    assert counts(dataset) == {"accepted:sampled": 1, f"dropped:{reason}": 1}


def test_how_every_try_ended_is_told(tmp_path: Path):
    build(tmp_path, {"a": [WRONG, f"{GOOD}…", "It is 7."]})
    marker = json.loads((tmp_path / "out/progress/shard-00000.json").read_text())
    assert marker["left_out"][0]["detail"] == "wrong, cut, no_answer"


def test_another_response_is_rejected_as_it_is_or_broken(tmp_path: Path):
    script = {"a": [GOOD], "b": [GOOD], "c": [GOOD], "d": [WRONG]}
    base = Says({"a": [BARE], "b": [UNBOXED], "c": [WRONG], "d": ["never asked"]}, "base")
    dataset = build(tmp_path, script, base=base, rejected_from="base")
    pairs = {pair.id: pair for pair in dataset}
    details = {id: json.loads(pair.origin.detail) for id, pair in pairs.items()}
    assert pairs["a"].rejected == BARE
    assert details["a"]["kind"] == "as_sampled"
    assert details["b"]["kind"] in KINDS
    assert final_answer(pairs["b"].rejected) == "7"
    assert not parts_of(pairs["b"].rejected).well_formed
    assert counts(dataset) == {
        "accepted:sampled": 2,
        "dropped:chosen_wrong": 1,
        "dropped:rejected_wrong": 1,
    }
    assert {request.id for request in base.asked} == {"a/base1", "b/base1", "c/base1"}
    assert base.asked[0].prompt == pairs["a"].prompt
    assert dataset.manifest.model == {"generator": "policy", "base_generator": "base"}


def test_without_a_base_generator_the_generator_answers_again(tmp_path: Path):
    dataset = build(tmp_path, {"a": [GOOD]}, rejected_from="base")
    assert dataset.manifest.model == {"generator": "policy"}
    assert len(dataset) == 1


def test_coupled_pairs_are_wrong_in_content_too(tmp_path: Path):
    base = Says({"a": [GOOD, WRONG], "b": ["I do not know.", BARE], "c": [BARE.replace("7", "8")]})
    base.script["c"] *= 2
    script = {id: [GOOD, GOOD] for id in "abc"}
    dataset = build(tmp_path, script, base=base, rejected_from="wrong")
    assert {pair.id for pair in dataset} == {"a", "c"}
    assert all(final_answer(pair.rejected) == "8" for pair in dataset)
    assert not any(parts_of(pair.rejected).well_formed for pair in dataset)
    assert counts(dataset) == {"accepted:sampled": 2, "dropped:rejected_right": 1}


def test_a_judge_drops_reasoning_that_comes_to_another_answer(tmp_path: Path):
    odd = "<think>3 and 4 make 9, but</think> <answer>\\boxed{7}</answer>"
    mute = odd.replace("but", "hm")
    script = {"a": [odd, GOOD], "b": [odd, WRONG], "c": [mute, mute], "d": [odd, BARE]}
    rules = Rules()
    dataset = build(tmp_path, script, judge=Judge(rules, tries=1))
    assert {pair.id: pair.chosen for pair in dataset} == {"a": GOOD, "d": COMPLETED}
    assert counts(dataset) == {
        "accepted:sampled": 1,
        "accepted:supplemented": 1,
        "dropped:chosen_inconsistent": 1,
        "dropped:chosen_judge_no_verdict": 1,
    }
    assert dataset.manifest.model["judge"].startswith("rules judging by ")
    # It sees the thinking and the answer apart, and is not asked about wrong ones.
    assert "make 9, but\n[END reasoning" in rules.prompts[0]
    assert not any("8" in prompt.partition("final answer")[2][:40] for prompt in rules.prompts)


def test_models_are_loaded_from_their_configs_one_after_another(tmp_path: Path, monkeypatch):
    write_dataset(tmp_path / "in", Verifiable, [row("a", images=(), prompt=user("Sum?"))])
    rules = Rules()
    models = {
        "zero": Says({"a": [GOOD]}, "zero"),
        "base": Says({"a": [BARE]}, "base"),
        "judge": rules,
    }
    loaded: list[str] = []

    def load(config: GeneratorConfig):
        loaded.append(config.model.path)
        return models[config.model.path]

    monkeypatch.setattr(GeneratorConfig, "load", load)
    zero, base, judge = (GeneratorConfig(model=ModelConfig(path=name)) for name in models)
    config = Specs(
        source=tmp_path / "in",
        output=tmp_path / "out",
        generator=zero,
        tries=1,
        judge=JudgeConfig(generator=judge),
        rejected_from="base",
        base_generator=base,
    )
    [pair] = open_dataset(config.build(), Preference)
    assert (pair.chosen, pair.rejected) == (GOOD, BARE)
    # First for the manifest's names, then to work.
    assert loaded == ["zero", "base", "judge", "zero", "judge", "base"]
    assert len(rules.prompts) == 1


def test_bad_rows_stay_out_and_stop_nobody(tmp_path: Path):
    rows = [
        row("a"),
        row("b", answer="a cat"),
        row("c", verifier="guess"),
        row("d", prompt=(*user("?", images=1), Message(role="assistant", content=()))),
        row("e"),
        row("f"),
    ]
    script = {
        "a": [GOOD],
        "e": [MediaError("no picture", where="e")],
        "f": [RowDropped("too_long", "is too long", where="f")],
    }
    dataset = build(tmp_path, script, rows=rows)
    assert [pair.id for pair in dataset] == ["a"]
    assert counts(dataset) == {
        "accepted:sampled": 1,
        "dropped:too_long": 1,
        "quarantined:bad_prompt": 1,
        "quarantined:bad_truth": 2,
        "quarantined:unreadable": 1,
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_generator": LOCAL}, "base_generator is not asked"),
        ({"kinds": ("shifted_tags", "shifted_tags")}, "named twice"),
        ({"kinds": ()}, "at least 1"),
        ({"generator": GeneratorConfig(model=ModelConfig(path="x"), temperature=0)}, "temperature"),
        ({"source": {"images": "photos"}}, "verifiable records"),
        ({"instruction": ""}, "at least 1"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Specs(**({"source": "in", "output": "out", "generator": LOCAL} | changes))
