"""Rollouts from a server are those of the policy itself: same tokens, same weights, same steps."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from trainers.loop import Saved, Stepped, train

LORA = {"rank": 4, "alpha": 8}
# As far as scores of one checkpoint by two routes may be apart.
ROUNDING = 1e-4


@pytest.mark.parametrize("lora", [None, LORA], ids=["weights", "adapter"])
def test_a_server_that_samples_what_the_policy_would_trains_the_same_bits(
    recipe, trained, server, lora
):
    sections: dict[str, Any] = {"lora": lora, "rollouts": {"steps": 2, "redraw": 1}}
    sections["optim"] = {"steps": 4, "micro_batch_size": 1}
    here, weights = trained(recipe("here", **sections))
    there, again = trained(recipe("there", generator={"base_url": server.url}, **sections))
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    for one, other in zip(here, there, strict=True):
        for name in ("loss", "reward", "ratio", "old_kl", "response_tokens", "off_policy_steps"):
            assert one[f"train/{name}"] == other[f"train/{name}"]
        assert 0 <= other["train/sampler_gap"] < ROUNDING
    assert [line["train/off_policy_steps"] for line in there] == [0, 1, 0, 1]


def test_what_a_server_is_asked(recipe, trained, server):
    trained(recipe(generator={"base_url": server.url, "extra": {"priority": 1}}, lora=LORA))
    asked = server.asked[0]
    assert asked["return_token_ids"] is asked["logprobs"] is True
    assert (asked["top_k"], asked["min_p"], asked["repetition_penalty"]) == (-1, 0, 1)
    assert asked["logit_bias"]
    assert set(asked["logit_bias"].values()) == {-100}
    assert asked["stop_token_ids"]
    assert asked["priority"] == 1
    assert len({body["seed"] for body in server.asked}) == len(server.asked) == 18


def test_one_version_is_served_at_a_time_and_named_by_step_and_weights(
    recipe, trained, server, tmp_path: Path
):
    made = recipe(generator={"base_url": server.url}, lora=LORA)
    trained(made)
    models = [body["model"] for body in server.asked]
    assert [name[:11] for name in dict.fromkeys(models)] == [
        "step-000000", "step-000001", "step-000002",
    ]  # fmt: skip
    assert all(models.count(name) == 6 for name in models)
    # The last one alone is left, there and here.
    assert [name for name in server.policies if name != "base"] == [models[-1]]
    assert [folder.name for folder in (made.run.output / "weights").iterdir()] == [models[-1]]
    assert server.calls["/pause"] == 0


def test_weights_are_replaced_while_the_server_is_paused(recipe, trained, server, tmp_path: Path):
    folder = tmp_path / "seen by both"
    trained(recipe(generator={"base_url": server.url, "folder": str(folder)}))
    assert server.calls["/pause"] == server.calls["/collective_rpc"] == server.calls["/resume"] == 3
    assert not server.paused
    assert [one.name for one in folder.iterdir()] == [server.version]
    assert server.version.startswith("step-000002-")


def test_the_next_batch_is_sampled_while_this_one_is_learnt_from(recipe, server):
    """The server holds the second batch back until a step of the first has been taken."""
    stepped = threading.Event()

    def answering(number: int, reply: dict[str, Any]) -> dict[str, Any]:
        if number > 12:
            assert stepped.wait(20)
        return reply

    server.answering = answering
    made = recipe(
        generator={"base_url": server.url, "overlap": True},
        lora=LORA,
        rollouts={"steps": 2},
        optim={"steps": 4},
    )
    lines = []
    for event in train(made):
        if isinstance(event, Stepped):
            lines.append(event.metrics)
            if event.step == 1:
                stepped.set()
    assert len(lines) == 4
    assert len(server.asked) == 24  # No third batch: nobody would learn from it.


@pytest.mark.parametrize("lora", [None, LORA], ids=["weights", "adapter"])
def test_a_stale_batch_is_scored_by_the_weights_that_sampled_it(recipe, trained, server, lora):
    """The server's log-probabilities are those of its own weights, and ours equal them."""
    made = recipe(
        generator={"base_url": server.url, "overlap": True}, lora=lora, optim={"steps": 4}
    )
    metrics, _ = trained(made)
    assert [line["train/off_policy_steps"] for line in metrics] == [0, 1, 1, 1]
    assert metrics[0]["train/ratio"] == 1
    for line in metrics[1:]:
        assert abs(line["train/ratio"] - 1) > 10 * ROUNDING
        assert line["train/old_kl"] != 0
        assert line["train/sampler_gap"] < ROUNDING
    assert len(list((made.run.output / "rollouts").iterdir())) == 4


@pytest.mark.parametrize(("steps", "stop"), [(1, 2), (2, 1), (2, 2)])
def test_a_run_killed_while_a_batch_is_sampled_ends_in_the_same_bits(
    recipe, trained, server, steps, stop
):
    """A checkpoint keeps that batch: the server is asked nothing a second time."""
    sections: dict[str, Any] = {
        "generator": {"base_url": server.url, "overlap": True},
        "lora": LORA,
        "rollouts": {"steps": steps},
        "optim": {"steps": 5, "micro_batch_size": 1},
        "run": {"save_every_steps": 1},
    }
    whole, weights = trained(recipe("whole", **sections))
    asked = len(server.asked)
    killed = recipe("killed", **sections)
    events: Any = train(killed)
    for event in events:
        if isinstance(event, Saved) and event.step == stop:
            break
    events.close()
    metrics, again = trained(killed)
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert metrics[-1]["train/loss"] == whole[-1]["train/loss"]
    assert len(server.asked) == 2 * asked
    seeds = [body["seed"] for body in server.asked]
    assert sorted(seeds[:asked]) == sorted(seeds[asked:])


def test_written_rollouts_hold_the_text_of_the_tokens(recipe, trained, server):
    """Not the server's text: a reasoning parser there would have taken a part of it away."""
    made = recipe(generator={"base_url": server.url}, optim={"steps": 1})
    trained(made)
    lines = (made.run.output / "rollouts" / "step-000001.jsonl").read_text().splitlines()
    assert all(json.loads(line)["response"] != "?" for line in lines)
