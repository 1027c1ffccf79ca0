"""A server that dies, lies or was started otherwise stops the run, which says what to do."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmalign.clips import Clip
from mmalign.errors import ConfigError, TrainingError
from mmalign.generate.base import Request, Sampling
from mmalign.models.load import ModelConfig, load_policy
from mmalign.records import user
from trainers.loop import Saved, train
from trainers.objectives.base import PreparedRow
from trainers.rollout_server import ServerSampler, VllmServer
from trainers.setup import new_accelerator

LORA = {"rank": 4, "alpha": 8}


@pytest.mark.parametrize("overlap", [False, True])
def test_a_server_that_dies_in_the_middle_leaves_a_checkpoint_to_go_on_from(
    recipe, trained, server, overlap
):
    """The second batch breaks off; with the server back, the run ends as if nothing had been."""
    sections: dict[str, Any] = {
        "generator": {"base_url": server.url, "overlap": overlap},
        "lora": LORA,
        "run": {"save_every_steps": 1},
    }
    _, weights = trained(recipe("whole", **sections))
    # Twelve of eighteen requests belong to the first two batches.
    server.asked.clear()
    server.answering = lambda number, reply: reply if number <= 14 else None
    killed = recipe("killed", **sections)
    saved: list[int] = []
    events = train(killed)
    with pytest.raises(TrainingError) as caught:
        saved.extend(event.step for event in events if isinstance(event, Saved))
    told = str(caught.value)
    assert told.startswith(server.url)
    assert f"the server failed in rollouts of step {2 if overlap else 3}" in told
    assert "got no answer" in told
    assert "nothing was learnt from this batch" in told
    assert "start the same command again: the run goes on from its last checkpoint" in told
    assert saved == ([1] if overlap else [1, 2])
    server.answering = lambda number, reply: reply
    _, again = trained(killed)
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_a_server_that_is_gone_is_told_before_the_weights_are_touched(recipe):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
    made = recipe(generator={"base_url": url, "ready_seconds": 0.5})
    with pytest.raises(TrainingError, match=r"not ready within 0\.5 seconds") as caught:
        list(train(made))
    assert "ready_seconds" in str(caught.value)
    assert "weights for step 1" in str(caught.value)


def test_a_server_that_never_becomes_ready(recipe, server):
    server.healthy = False
    made = recipe(generator={"base_url": server.url, "ready_seconds": 0.5})
    with pytest.raises(TrainingError, match=r"not ready within 0\.5 seconds; .*got status 503"):
        list(train(made))
    assert server.calls["/health"] > 1
    assert not server.asked


@pytest.mark.parametrize("lora", [None, LORA], ids=["weights", "adapter"])
def test_a_server_that_keeps_its_old_weights_and_says_otherwise(recipe, server, lora):
    """Names and versions are in order; the log-probabilities of the second batch are not."""
    server.stale = True
    made = recipe(generator={"base_url": server.url}, lora=lora, optim={"lr": 0.1})
    told = "gives the rollouts of step 2 other log-probabilities than the policy"
    with pytest.raises(TrainingError, match=told):
        list(train(made))
    assert len(server.asked) == 12


def test_a_gap_may_be_let_be_and_is_logged(recipe, trained, server):
    server.stale = True
    made = recipe(generator={"base_url": server.url, "max_gap": None}, optim={"lr": 0.1})
    metrics, _ = trained(made)
    assert metrics[0]["train/sampler_gap"] < 1e-3 < metrics[1]["train/sampler_gap"]


def test_weights_that_another_run_replaced(recipe, server):
    def answering(number: int, reply: dict[str, Any]) -> dict[str, Any]:
        if number == 8:
            server.version = "somebody else's"
        return reply

    server.answering = answering
    with pytest.raises(TrainingError, match=r"other weights .*got somebody else's; wanted step-"):
        list(train(recipe(generator={"base_url": server.url})))


@pytest.mark.parametrize("lost_at", [3, 6])
def test_an_adapter_that_a_restarted_server_has_lost(recipe, trained, server, lost_at):
    """In the middle of a batch that is an error; between two, the next one is loaded anyway."""

    def answering(number: int, reply: dict[str, Any]) -> dict[str, Any]:
        if number == lost_at:
            for name in [name for name in server.policies if name != "base"]:
                del server.policies[name]
        return reply

    server.answering = answering
    made = recipe(generator={"base_url": server.url, "concurrency": 1}, lora=LORA)
    if lost_at == 6:
        assert len(trained(made)[0]) == 3
        return
    with pytest.raises(TrainingError, match=r"refuses request .* \(status 404\).*step-000000"):
        list(train(made))


def choice(**changes: Any) -> Any:
    return lambda reply: {**reply, "choices": [{**reply["choices"][0], **changes}]}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (choice(token_ids=None), "returns no token ids"),
        (choice(token_ids=[]), "returns no token ids"),
        (choice(logprobs=None), "returns no token ids and log-probabilities"),
        (choice(finish_reason="abort"), "broke off a response; got finish_reason abort"),
        (lambda r: {**r, "model": "base"}, "other weights than it was given; got base"),
        (lambda r: {**r, "prompt_token_ids": None}, "another prompt, from token 0 on"),
        (
            lambda r: {**r, "prompt_token_ids": [*r["prompt_token_ids"][:-1], 7, 7]},
            "saw another prompt, from token",
        ),
    ],
    ids=["no_ids", "empty", "no_logps", "aborted", "base", "no_prompt", "other_prompt"],
)
def test_what_a_server_may_not_answer(recipe, server, change, told):
    server.answering = lambda number, reply: change(reply)
    made = recipe(generator={"base_url": server.url}, lora=LORA)
    with pytest.raises(TrainingError, match=told) as caught:
        list(train(made))
    assert server.url in str(caught.value)
    if "other weights" not in told:
        assert re.search(r"row row-\d", str(caught.value))


@pytest.mark.parametrize("kind", ["banned", "early", "unended"])
def test_tokens_that_no_response_of_ours_would_hold(recipe, server, tiny_model: Path, kind):
    from mmalign.generate.local import banned_ids, end_ids

    policy = load_policy(ModelConfig(path=str(tiny_model)))
    (end, *_), (banned, *_) = end_ids(policy), banned_ids(policy)
    ids, reason, told = {
        "banned": ([banned, end], "stop", "may not hold"),
        "early": ([end, 9, 9, 9, 9], "length", "ends turns by other tokens"),
        "unended": ([9, 9], "stop", "ends turns by other tokens"),
    }[kind]
    logps = {"content": [{"token": "", "logprob": -1.0}] * len(ids)}
    change = choice(token_ids=ids, finish_reason=reason, logprobs=logps)
    server.answering = lambda number, reply: change(reply)
    with pytest.raises(TrainingError, match=told):
        list(train(recipe(generator={"base_url": server.url}, lora=LORA)))


def test_a_server_started_without_what_it_needs(recipe, server, monkeypatch):
    control = type(server).control

    def without(self: Any, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        gone = ("/v1/load_lora_adapter", "/pause")
        return (404, {"detail": "Not Found"}) if path in gone else control(self, path, body)

    monkeypatch.setattr(type(server), "control", without)
    for lora, told in ((LORA, "VLLM_ALLOW_RUNTIME_LORA_UPDATING"), (None, "VLLM_SERVER_DEV_MODE")):
        made = recipe(f"run {told}", generator={"base_url": server.url}, lora=lora)
        with pytest.raises(TrainingError, match=told):
            list(train(made))


def test_a_clip_is_refused(server, tiny_model: Path, tmp_path: Path):
    policy = load_policy(ModelConfig(path=str(tiny_model)))
    config = VllmServer(base_url=server.url, model="base")
    sampler = ServerSampler(config, policy, new_accelerator(), folder=tmp_path, adapter=False)
    sampler.sync(0)
    frames = np.zeros((2, 8, 8, 3), dtype=np.uint8)
    times = {"indices": (0, 1), "timestamps": (0.0, 1.0), "duration_seconds": 2.0}
    clip = Clip(frames=frames, source_fps=1.0, num_source_frames=2, key="k", **times)
    request = Request(id="1", prompt=user("What?", videos=1), videos=(clip,))
    row = PreparedRow(id="row-1", conditions=(), candidates=(), pairs=())
    with pytest.raises(TrainingError, match="row row-1: a clip would be sent"):
        sampler.generate([request], [row], Sampling())


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"lora": LORA, "model": {"train": {"vision": True}}}, "no adapter with whole modules"),
        ({"generator": {"base_url": "localhost:8000"}}, "wanted an address"),
        ({"generator": {"base_url": "http://me:secret@h/v1"}}, "holds a password"),
        ({"generator": {"extra": {"logit_bias": {}}}}, "logit_bias cannot be set here"),
        ({"generator": {"extra": {"n": 4}}}, "n cannot be set here"),
        ({"generator": {"engine": "policy"}}, "base_url"),
    ],
)
def test_recipes_that_cannot_be(recipe, sections, told):
    generator = {"base_url": "http://localhost:8000/v1"} | sections.get("generator", {})
    with pytest.raises(ConfigError, match=told) as caught:
        recipe(**(sections | {"generator": generator}))
    assert "secret" not in str(caught.value)
