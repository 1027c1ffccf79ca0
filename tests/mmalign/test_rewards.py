"""Rewards by hand."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import yaml

from mmalign.config import validate
from mmalign.errors import ConfigError, DataError, MissingExtra, RewardError
from mmalign.records import Verifiable, user
from mmalign.rewards import LengthReward, Rewards, RewardsConfig, Rollout, Undecided
from mmalign.verify import Verifiers

FORM = "Answer as <think> </think> <answer> </answer>."
ROW = Verifiable(id="q1", prompt=user(FORM), answer="12", verifier="number")


def rollout(text: str, row: Verifiable = ROW, tokens: int = 10, finished: bool = True) -> Rollout:
    return Rollout(id="q1/0", row=row, text=text, num_tokens=tokens, finished=finished)


@pytest.fixture
def specs() -> Iterator[Rewards]:
    with RewardsConfig().load() as rewards:
        yield rewards


@pytest.mark.parametrize(
    ("text", "total", "parts"),
    [
        ("<think>5+7</think>\n<answer>12</answer>", 1.5, (1, 1)),
        ("<think>5+7</think>\n<answer>$\\boxed{12}$</answer>\n", 1.5, (1, 1)),
        ("<think>5+7</think><answer>13</answer>", 0.5, (1, 0)),
        ("5+7, so \\boxed{12}", 1.0, (0, 1)),
        ("<think>5+7</think> \\boxed{12}", 1.0, (0, 1)),
        ("<think>a</think><think>b</think><answer>12</answer>", 1.0, (0, 1)),
        ("5+7 is 12", 0.0, (0, 0)),
        ("\\boxed{12", 0.0, (0, 0)),
        ("", 0.0, (0, 0)),
        # What the prompt says of the form, said again.
        (FORM, 0.0, (0, 0)),
        (FORM + "<think>5+7</think><answer>13</answer>", 0.0, (0, 0)),
        ("<think>" + FORM + "</think><answer>13</answer>", 0.0, (0, 0)),
        # Two answers, of which one is right.
        ("<think>a</think><answer>11</answer><answer>12</answer>", 0.0, (0, 0)),
    ],
)
def test_specs_reward_is_0_or_half_or_1_or_1_and_a_half(specs, text, total, parts):
    (scored,) = specs.score([rollout(text)])
    assert scored.total == total
    assert scored.parts == dict(zip(("format", "accuracy"), parts, strict=True))
    assert not scored.undecided
    assert scored.reasons == {}


def test_a_response_that_was_cut_off_has_no_form(specs):
    text = "<think>a</think><answer>12</answer>" + "\n" * 50
    (scored,) = specs.score([rollout(text, finished=False)])
    assert scored.parts == {"format": 0.0, "accuracy": 1.0}


def test_what_a_verifier_cannot_tell_is_not_correct_and_says_why(specs):
    texts = ("12 or 13", "9" * 1_000_000)
    found = specs.score([rollout(f"<think>a</think><answer>{text}</answer>") for text in texts])
    assert [scored.total for scored in found] == [0.5, 0.5]
    assert all(scored.undecided for scored in found)
    assert [scored.reasons["accuracy"] for scored in found] == ["unread", "too_long"]


@pytest.mark.parametrize(
    ("tokens", "penalty"),
    [(1, 0), (80, 0), (81, -0.05), (90, -0.5), (99, -0.95), (100, -1), (101, -1), (9999, -1)],
)
def test_the_overlong_penalty_is_linear_in_its_buffer(tokens, penalty):
    reward = LengthReward(max_tokens=100, buffer_tokens=20)
    with Verifiers() as verifiers:
        assert reward(rollout("", tokens=tokens), verifiers) == pytest.approx(penalty, abs=1e-12)


def test_weights_multiply_the_sum_and_not_the_parts():
    config = validate(
        {
            "functions": [
                {"name": "format", "weight": 0.25},
                {"name": "accuracy", "weight": 2},
                {"name": "length", "weight": 0.5, "max_tokens": 100, "buffer_tokens": 20},
            ]
        },
        RewardsConfig,
        "recipe",
    )
    with config.load() as rewards:
        (scored,) = rewards.score([rollout("<think>a</think><answer>12</answer>", tokens=90)])
    assert scored.parts == {"format": 1, "accuracy": 1, "length": -0.5}
    assert scored.total == 0.25 + 2 - 0.25


@pytest.mark.parametrize(
    ("functions", "told"),
    [
        ([], "at least 1"),
        ([{"name": "formt"}], "functions.0.name: is 'formt'; one of"),
        ([{"name": "format"}, {"name": "format"}], "format is named twice"),
        ([{"name": "format", "weight": float("nan")}], "finite"),
        ([{"name": "length", "max_tokens": 10, "buffer_tokens": 20}], "20 is more than max_tokens"),
    ],
)
def test_a_wrong_config_is_told(functions, told):
    with pytest.raises(ConfigError, match=told):
        validate({"functions": functions}, RewardsConfig, "recipe")


@dataclass
class Own:
    """A reward function of a user."""

    gives: Any
    name: str = "own"
    weight: float = 2.0

    def __call__(self, rollout: Rollout, verifiers: Verifiers) -> Any:
        if isinstance(self.gives, Exception):
            raise self.gives
        return self.gives


def score(*functions: Own, row: Verifiable = ROW) -> Any:
    with Rewards(functions, Verifiers()) as rewards:
        return rewards.score([rollout("<answer>13</answer>", row)])


def test_a_function_of_ones_own_is_one_among_others():
    (scored,) = score(Own(0.5), Own(Undecided("no_server"), "other"))
    assert (scored.total, scored.parts) == (1.0, {"own": 0.5, "other": 0.0})
    assert (scored.undecided, scored.reasons) == (True, {"other": "no_server"})
    with pytest.raises(RewardError, match="two rewards have the name own"):
        score(Own(0.5), Own(0.5))


@pytest.mark.parametrize(
    "gives", [ZeroDivisionError("by zero"), DataError("no such thing"), None, "1", float("nan")]
)
def test_a_reward_that_fails_stops_the_run_and_names_itself_and_the_row(gives):
    with pytest.raises(RewardError, match="the reward own") as caught:
        score(Own(1.0, "other"), Own(gives))
    told = str(caught.value)
    assert told.startswith("row q1, rollout q1/0: the reward own")
    assert "'<answer>13</answer>'" in told
    if isinstance(gives, Exception):
        assert gives.args[0] in told


def test_a_row_that_cannot_be_checked_stops_the_run(specs):
    bad = Verifiable(id="q2", prompt=user("Many?"), answer="many", verifier="number")
    with pytest.raises(
        RewardError, match=r"row q2, rollout q1/0: the reward accuracy failed: .*many"
    ):
        specs.score([rollout("\\boxed{12}", bad)])


def test_a_missing_extra_is_told_as_such(specs, monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    row = Verifiable(id="q3", prompt=user("?"), answer="12", verifier="math")
    with pytest.raises(MissingExtra):
        specs.score([rollout("\\boxed{x}", row)])


def test_the_examples_of_the_page_run(repo_root):
    text = (repo_root / "docs/rewards.md").read_text()
    (config,) = re.findall(r"^```yaml\n(.*?)^```", text, re.M | re.S)
    assert len(validate(yaml.safe_load(config), RewardsConfig, "page").functions) == 3
    (code,) = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    names: dict[str, Any] = {"rollouts": [rollout("please")]}
    exec(code, names)
    assert names["scored"][0].total == 0.1
