"""Config files: every problem at once, each with the key that was meant."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field, PositiveFloat, model_validator

from mmalign.config import Strict, apply_overrides, dump_yaml, load_config, read_yaml
from mmalign.errors import ConfigError


class DPO(Strict):
    name: Literal["dpo"] = "dpo"
    beta: PositiveFloat = 0.1


class RRPO(Strict):
    name: Literal["rrpo"] = "rrpo"
    beta: PositiveFloat = 0.1
    alpha: float = 0.01


class Adapter(Strict):
    rank: int = 8
    targets: tuple[str, ...] = ()


class Model(Strict):
    path: str
    adapter: Adapter | None = None


class Filter(Strict):
    min_words: int = 1


class Recipe(Strict):
    model: Model
    loss: Annotated[DPO | RRPO, Field(discriminator="name")] = DPO()
    learning_rate: float = 1e-5
    filters: list[Filter] = []

    @model_validator(mode="after")
    def _rates_are_sane(self) -> Recipe:
        if self.learning_rate > 1:
            raise ValueError("Learning_rate above 1 cannot be meant")
        return self


def recipe(tmp_path: Path, text: str, *overrides: str) -> Recipe:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    return load_config(file, Recipe, overrides)


def problem(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        recipe(tmp_path, text, *overrides)
    return str(caught.value)


def test_a_recipe_is_read_whole(tmp_path: Path) -> None:
    config = recipe(tmp_path, "model: {path: m, adapter: {rank: 4}}\nloss: {name: rrpo, alpha: 1}")
    assert config.model.adapter == Adapter(rank=4)
    assert config.loss == RRPO(alpha=1.0)


# --- unknown keys ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: {path: m}\nmodle: 1", "modle: did you mean model?"),
        (
            "model: {path: m, adapter: {rnak: 4}}",
            "model.adapter.rnak: did you mean model.adapter.rank?",
        ),
        (
            "model: {path: m}\nzzzz: 1",
            "zzzz: unknown key; known here: filters, learning_rate, loss",
        ),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest_known_one(
    tmp_path: Path, text: str, expected: str
) -> None:
    assert expected in problem(tmp_path, text)


def test_a_typo_inside_a_discriminated_union_is_answered_by_its_own_branch(tmp_path: Path) -> None:
    typo = problem(tmp_path, "model: {path: m}\nloss: {name: rrpo, alhpa: 0.1}")
    assert "did you mean" in typo
    assert "alpha?" in typo
    foreign = problem(tmp_path, "model: {path: m}\nloss: {name: dpo, gamma_ratio: 0.1}")
    assert "known here: beta, name" in foreign


def test_a_typo_inside_a_list_is_answered(tmp_path: Path) -> None:
    text = "model: {path: m}\nfilters: [{min_words: 2}, {min_word: 3}]"
    assert "filters.1.min_word: did you mean filters.1.min_words?" in problem(tmp_path, text)


def test_an_unknown_loss_name_lists_the_known_ones(tmp_path: Path) -> None:
    message = problem(tmp_path, "model: {path: m}\nloss: {name: pdo}")
    assert "'dpo'" in message
    assert "'rrpo'" in message


# --- several problems -----------------------------------------------------------------------


def test_all_problems_of_a_file_are_told_at_once(tmp_path: Path) -> None:
    text = "model: {adapter: {rank: many}}\nloss: {name: dpo, beta: -1}\nlearning_rte: 1e-5"
    lines = problem(tmp_path, text).split("\n  - ")
    assert lines[0].endswith("recipe.yaml: 4 problems")
    assert "model.path: field required" in lines
    assert "learning_rte: did you mean learning_rate?" in lines
    assert any("model.adapter.rank: input should be a valid integer" in line for line in lines)
    assert any("beta: input should be greater than 0 (got -1)" in line for line in lines)


def test_a_rule_over_several_keys_reads_as_a_sentence(tmp_path: Path) -> None:
    message = problem(tmp_path, "model: {path: m}\nlearning_rate: 2")
    assert message.endswith("config: learning_rate above 1 cannot be meant")


# --- numbers --------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["5e-5", "5E-5", "5.0e-5", "0.00005"])
def test_numbers_mean_what_they_look_like(tmp_path: Path, text: str) -> None:
    """YAML 1.1 reads 5e-5, which has no dot, as a string."""
    in_file = recipe(tmp_path, f"model: {{path: m}}\nlearning_rate: {text}")
    override = recipe(tmp_path, "model: {path: m}", f"learning_rate={text}")
    assert in_file.learning_rate == override.learning_rate == 5e-5


# --- overrides ------------------------------------------------------------------------------


def test_overrides_are_parsed_as_yaml_and_do_not_touch_their_input() -> None:
    data = {"a": {"b": 1, "c": [1]}, "d": {"e": 2}}
    changed = apply_overrides(
        data, ["a.b=0.5", "a.c=[1, 2]", "d=null", "f.g.h=yes", "i=x=y", "j="], "here"
    )
    assert changed == {
        "a": {"b": 0.5, "c": [1, 2]},
        "d": None,
        "f": {"g": {"h": True}},
        "i": "x=y",
        "j": None,
    }
    assert data == {"a": {"b": 1, "c": [1]}, "d": {"e": 2}}


def test_an_override_reaches_into_a_section_the_file_left_out(tmp_path: Path) -> None:
    overrides = ["loss.name=rrpo", "loss.beta=0.2", "model.adapter.rank=2"]
    config = recipe(tmp_path, "model: {path: m}", *overrides)
    assert config.loss == RRPO(beta=0.2)
    assert config.model.adapter == Adapter(rank=2)


@pytest.mark.parametrize("text", ["loss.beta", "=3"])
def test_an_override_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    message = problem(tmp_path, "model: {path: m}", text)
    assert f"cannot read the override {text!r}; wanted dotted.key=value" in message


def test_a_typo_in_an_override_is_answered(tmp_path: Path) -> None:
    message = problem(tmp_path, "model: {path: m}", "model.adapter.rnk=2")
    assert "did you mean model.adapter.rank?" in message


# --- files ----------------------------------------------------------------------------------


def test_a_missing_file_is_answered_with_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "dpo.yaml").write_text("a: 1")
    with pytest.raises(ConfigError, match=r"no such config file\. Did you mean .*/dpo\.yaml\?"):
        read_yaml(tmp_path / "dop.yaml")
    with pytest.raises(ConfigError, match="does not exist either"):
        read_yaml(tmp_path / "nowhere" / "dpo.yaml")
    with pytest.raises(ConfigError, match="is a directory"):
        read_yaml(tmp_path)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"a: [1, 2", "is not valid YAML"),
        (b"\xff\xfe\x00", "is not valid YAML"),
        (b"- a\n- b", "must hold a mapping; got list"),
        (b"", "must hold a mapping; got NoneType"),
    ],
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, data: bytes, expected: str) -> None:
    (tmp_path / "a.yaml").write_bytes(data)
    with pytest.raises(ConfigError, match=expected) as caught:
        read_yaml(tmp_path / "a.yaml")
    assert "\n" not in str(caught.value)


def test_the_resolved_config_loads_back_equal(tmp_path: Path) -> None:
    config = recipe(tmp_path, "model: {path: m}\nloss: {name: rrpo}\nlearning_rate: 5e-7")
    assert recipe(tmp_path, dump_yaml(config)) == config


def test_a_text_that_looks_like_a_number_stays_a_text() -> None:
    made = apply_overrides({}, ["revision='12e4567'"], "here")
    assert made == {"revision": "12e4567"}


def test_overrides_reach_into_lists() -> None:
    data = {"benchmarks": [{"limit": 1}, {"limit": 2}]}
    made = apply_overrides(data, ["benchmarks.1.limit=5"], "here")
    assert made == {"benchmarks": [{"limit": 1}, {"limit": 5}]}
    with pytest.raises(ConfigError, match="0 to 1"):
        apply_overrides(data, ["benchmarks.7.limit=5"], "here")
