"""What builders that judge share: budgets in words, questions, one model in memory at a time."""

from __future__ import annotations

import json
import re
import weakref
from pathlib import Path
from typing import Any

import pytest

from data_builders.base import GeneratorConfig
from data_builders.critiques import Critiques, Writer
from data_builders.in_turn import InTurn
from data_builders.judging import asked, question_of, shortened
from data_builders.ranking_page import write_ranking_page
from data_builders.verify import JudgeConfig
from mmalign.cli import run
from mmalign.errors import MediaError
from mmalign.generate.server import ServerConfig
from mmalign.models.load import ModelConfig
from mmalign.models.tiny import TinyModel
from mmalign.records import Example, Message, Origin, RankedResponse, Ranking, user
from mmalign.store import open_dataset, write_dataset

LOCAL = GeneratorConfig(model=ModelConfig(path="none"), temperature=0.7)


def test_a_text_within_the_budget_is_left_as_it_is() -> None:
    text = "Two words. \n And more"
    assert shortened(text, 4) == text
    assert shortened(text, 3) == "Two words."


def test_words_of_scripts_without_blanks_are_counted() -> None:
    assert shortened("猫がいる。犬はいない。", 5) == "猫がいる。"
    assert shortened("猫がいる。犬はいない。", 4) is None
    assert shortened("Good, e.g. the cat. Bad.", 4) == "Good, e.g. the cat."


def test_the_judge_is_told_who_said_what() -> None:
    def turn(role: Any, text: str) -> Message:
        return Message(role=role, content=user(text)[0].content)

    assert question_of(user("What?", images=2)) == "What?"
    turns = (turn("user", "What?"), turn("assistant", "A cat."), turn("user", "Sure?"))
    assert question_of(turns) == "user: What?\nassistant: A cat.\nuser: Sure?"


def test_what_cannot_be_asked_is_found_and_the_rest_is_asked_together() -> None:
    calls: list[list[int]] = []

    def ask(numbers: list[int]) -> list[int]:
        if 5 in numbers:
            raise MediaError("is torn", where="5")
        calls.append(numbers)
        return [10 * number for number in numbers]

    assert asked(ask, list(range(8)), lambda n, _: -n) == [0, 10, 20, 30, 40, -5, 60, 70]
    assert calls == [[0, 1, 2, 3], [4], [6, 7]]


# --- one model at a time --------------------------------------------------------------------


class Model:
    """Stands for some gigabytes."""

    name = "model"

    def generate(self, requests: Any, sampling: Any) -> list[Any]:
        return []


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was loaded, in order; fails where another local model is still there."""
    made: list[str] = []
    alive: list[weakref.ref[Model]] = []

    def load(config: GeneratorConfig) -> Model:
        assert [ref for ref in alive if ref() is not None] == []
        made.append(config.model.path)
        model = Model()
        alive.append(weakref.ref(model))
        return model

    monkeypatch.setattr(GeneratorConfig, "load", load)
    monkeypatch.setattr(ServerConfig, "load", lambda config: made.append(config.model) or Model())
    return made


def local(path: str, temperature: float = 1.0) -> GeneratorConfig:
    return GeneratorConfig(model=ModelConfig(path=path), temperature=temperature)


def test_local_models_take_turns_and_servers_stay(loads: list[str]) -> None:
    server = ServerConfig(model="server", base_url="http://localhost:8000/v1")
    models = InTurn({"a": local("a"), "b": local("b"), "s": server})
    for name in ("a", "a", "s", "b", "s", "a"):
        models.get(name)
    assert loads == ["a", "server", "b", "a"]


def test_one_model_under_two_names_is_loaded_once(loads: list[str]) -> None:
    models = InTurn({"cold": local("a", 0.0), "warm": local("a", 1.0)})
    assert models.get("cold") is models.get("warm")
    assert loads == ["a"]


def test_what_is_loaded_comes_first(loads: list[str]) -> None:
    models = InTurn({name: local(name) for name in "abc"})
    assert models.loaded_first("abc") == ["a", "b", "c"]
    models.get("c")
    assert models.loaded_first("abc") == ["c", "a", "b"]


def test_what_is_given_is_not_loaded(loads: list[str]) -> None:
    given = Model()
    assert InTurn(given={"a": given}).get("a") is given
    assert loads == []


# --- the builder's own config ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("generators", "message"),
    [
        ((Writer(name="a", generator=LOCAL),), "one response cannot be ranked"),
        ((Writer(name="a", generator=LOCAL),) * 2, "a is the name of more than one"),
        ((Writer(name="judge", num_samples=2, generator=LOCAL),), "is the judge's"),
        ((), "at least 1 item"),
    ],
)
def test_mistakes_in_the_config_are_named(generators, message) -> None:
    judge = JudgeConfig(generator=LOCAL)
    with pytest.raises(ValueError, match=message):
        Critiques(source="in", output="out", generators=generators, judge=judge)  # type: ignore[arg-type]


def test_greedy_samples_are_all_the_same() -> None:
    greedy = LOCAL.model_copy(update={"temperature": 0.0})
    with pytest.raises(ValueError, match="needs a temperature above 0"):
        Writer(name="a", num_samples=2, generator=greedy)


def test_the_command_loads_every_model_and_tells_what_was_lost(tmp_path: Path, capsys) -> None:
    """Three real models; random weights end no answer, so that there is nothing to rank."""
    for seed, name in enumerate(("one", "two", "judge")):
        TinyModel(output=str(tmp_path / name), seed=seed).build()
    rows = [Example(id=id, prompt=user("What is it?")) for id in "abc"]
    write_dataset(tmp_path / "in", Example, rows)
    (tmp_path / "critiques.yaml").write_text(f"""
name: critiques
source: {tmp_path / "in"}
output: {tmp_path / "out"}
generators:
  - {{name: one, num_samples: 2, generator: {{model: {{path: {tmp_path / "one"}}}}}}}
  - {{name: two, generator: {{model: {{path: {tmp_path / "two"}}}}}}}
judge: {{generator: {{model: {{path: {tmp_path / "judge"}}}}}}}
""")
    cap = [f"generators.{number}.generator.max_new_tokens=5" for number in (0, 1)]
    assert run(["build", str(tmp_path / "critiques.yaml"), *cap]) == 0
    manifest = open_dataset(tmp_path / "out", Ranking).manifest
    assert manifest.counts == {"dropped:too_few_responses": 3}
    left_out = (tmp_path / "out/progress/shard-00000.json").read_text()
    assert left_out.count("0 different of 3, 3 cut") == 3
    assert "3  dropped:too_few_responses" in capsys.readouterr().out
    names = [manifest.model[name] for name in ("one", "two")]
    assert [name.partition("@")[0] for name in names] == [str(tmp_path / n) for n in ("one", "two")]
    assert f"{tmp_path / 'judge'}@" in manifest.model["judge"]


# --- the page -------------------------------------------------------------------------------


def ranking(id: str, ranks: list[int], texts: list[str], **detail: Any) -> Ranking:
    return Ranking(
        id=id,
        prompt=user("What?"),
        responses=tuple(
            RankedResponse(
                text=text, rank=rank, score=5.0 - rank, critique="Five words, no more words."
            )
            for text, rank in zip(texts, ranks, strict=True)
        ),
        origin=Origin(reason="accepted", detail=json.dumps(detail)),
    )


def test_the_page_counts_wins_lengths_and_places(tmp_path: Path) -> None:
    rankings = [
        ranking(
            "a", [0, 1, 1], ["long and good", "short", "so-so one"],
            writers=[["x"], ["y"], ["y", "z"]], shown_at=[2, 0, 1],
        ),
        ranking("b", [1, 0], ["quite a long text", "ok"], writers=[["x"], ["y"]], shown_at=[0, 1]),
    ]  # fmt: skip
    write_dataset(tmp_path, Ranking, rankings, builder="critiques", counts={"accepted": 2})
    html = write_ranking_page(tmp_path).read_text()
    cells = re.sub(r"\s*<[^>]+>\s*", "|", html)
    cells = re.sub(r"\|+", "|", cells)
    # x: 3 and 4 words, first in a; it wins both comparisons there and loses the one in b.
    assert "|x|2|3.5|4.5|50.0 %|66.7 %|" in cells
    # y: 1, 2 and 1 words; loses twice in a, wins in b.
    assert "|y|3|1.3|4.33|33.3 %|33.3 %|" in cells
    assert "|pairs of different rank|3|" in cells
    assert "|of these, best against worst|3|" in cells
    assert "|ties, which are no pairs|1|" in cells
    assert "|the longer response wins|66.7 %|" in cells
    assert "|the response shown to the judge earlier wins|0.0 %|" in cells
    assert "|critiques|5|words of a critique, mean|5|" in cells
    assert html.index("long and good") < html.index("so-so one")
    assert "place 2, tied · score 4 · y · z" in html
