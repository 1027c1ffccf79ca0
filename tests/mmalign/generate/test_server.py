"""The server backend against a server that fails in every way it can."""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from mmalign.config import validate
from mmalign.errors import ConfigError, ModelError
from mmalign.generate.base import MaskImageTokens, Request, Sampling, request_seed
from mmalign.generate.client import ChatClient, Passing
from mmalign.generate.server import DOWN_AFTER, ServerConfig, Unanswered, with_ledger
from mmalign.records import Block, Message, user

SAMPLING = Sampling(max_new_tokens=7, temperature=0.5, top_p=0.9, seed=3)
KEY = "sk-very-secret-0123456789"


def asks(count: int) -> list[Request]:
    return [Request(id=f"r{n}", prompt=user(f"say {n}")) for n in range(count)]


def echo(body, number):
    return {"text": f" {body['messages'][-1]['content']}!\n"}


def test_answers_come_in_the_order_asked(scripted):
    # The earlier a request, the later its answer.
    scripted.script = lambda body, number: echo(body, number) | {"delay": 0.3 / number}
    made = scripted.config(concurrency=5).load().generate(asks(5), SAMPLING)
    assert [(g.id, g.text) for g in made] == [(f"r{n}", f"say {n}!") for n in range(5)]
    assert {(g.num_tokens, g.finished) for g in made} == {(5, True)}


def test_what_is_sent(scripted):
    system = Message(role="system", content=(Block(type="text", text="Be brief."),))
    request = Request(id="x", prompt=(system, *user("Hi")))
    generator = scripted.config(extra={"top_p": None, "top_k": 4}, limit_field="max_tokens").load()
    generator.generate([request], SAMPLING)
    assert scripted.bodies == [
        {
            "model": "m",
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Hi"},
            ],
            "temperature": 0.5,
            "top_k": 4,
            "max_tokens": 7,
            "seed": request_seed(3, "x") & (2**31 - 1),
        }
    ]


def test_the_name_and_the_settings_tell_no_host(scripted):
    config = scripted.config(api_key_env="MY_KEY", concurrency=3)
    assert config.load().name == "server:m"
    assert "127.0.0.1" not in config.model_dump_json()
    assert "MY_KEY" not in config.model_dump_json()
    assert config.sampling(4) == Sampling(max_new_tokens=256, temperature=1.0, top_p=1.0, seed=4)


@pytest.mark.parametrize(
    "trouble",
    [
        {"status": 429},
        {"status": 500, "raw": "<html>out of memory</html>"},
        {"status": 503, "raw": '{"error": "the worker is dead"}'},
        {"raw": "{ no JSON"},
        {"raw": '{"choices": []}'},
        {"raw": '{"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}]}'},
        {"drop": True},
        {"delay": 1.0},
    ],
    ids=["429", "500", "503", "malformed", "no_choice", "no_usage", "dropped", "timeout"],
)
def test_what_passes_is_tried_again(scripted, trouble):
    scripted.script = lambda body, number: trouble if number <= 2 else echo(body, number)
    generator = scripted.config(timeout_seconds=0.5).load()
    assert [g.text for g in generator.generate(asks(1), SAMPLING)] == ["say 0!"]
    assert len(scripted.bodies) == 3
    assert scripted.bodies[0] == scripted.bodies[2]


def test_the_server_says_how_long_to_wait(scripted):
    scripted.script = lambda body, number: (
        {"status": 429, "headers": {"Retry-After": "0.4"}} if number == 1 else {}
    )
    started = time.monotonic()
    scripted.config().load().generate(asks(1), SAMPLING)
    assert time.monotonic() - started > 0.4


def test_a_pause_beyond_reason_is_not_waited_for(scripted):
    scripted.script = lambda body, number: {"status": 503, "headers": {"Retry-After": "86400"}}
    with pytest.raises(Unanswered, match="status 503"):
        scripted.config().load().generate(asks(1), SAMPLING)
    assert len(scripted.bodies) == 1


def test_pauses_double_and_differ(scripted):
    generator = scripted.config(backoff_seconds=1.0).load()
    pauses = [[generator._pause(n, Passing("timeout", "")) for _ in range(50)] for n in (1, 2, 9)]
    for some, most in zip(pauses, (1, 2, 60), strict=True):
        assert most / 2 <= min(some) < max(some) <= most


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_what_does_not_pass_is_told_at_once(scripted, status, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    raw = f'{{"error": {{"message": "Not so: {KEY}\\n  is no good"}}}}'
    scripted.script = lambda body, number: {"status": status, "raw": raw}
    with pytest.raises(ModelError, match=rf"request r0 \(status {status}\)") as caught:
        scripted.config(concurrency=1).load().generate(asks(3), SAMPLING)
    assert "Not so: $OPENAI_API_KEY is no good" in str(caught.value)
    assert len(scripted.bodies) == 1


def test_an_empty_account_is_told_at_once(scripted):
    raw = '{"error": {"message": "You have no money.", "code": "insufficient_quota"}}'
    scripted.script = lambda body, number: {"status": 429, "raw": raw}
    with pytest.raises(ModelError, match="You have no money"):
        scripted.config().load().generate(asks(1), SAMPLING)
    assert len(scripted.bodies) == 1


def test_the_key_is_sent_and_told_to_nobody(scripted, monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("MY_KEY", f" {KEY}\n")
    caplog.set_level(logging.DEBUG)
    raw = f'"{KEY}" is odd'
    scripted.script = lambda body, number: (
        {"status": 500, "raw": raw} if number == 1 else {"raw": raw} if number == 2 else {}
    )
    config = scripted.config(api_key_env="MY_KEY", ledger=tmp_path / "answers.jsonl")
    generator = config.load()
    made = generator.generate(asks(2), SAMPLING)
    assert set(scripted.keys) == {f"Bearer {KEY}"}
    shown = [caplog.text, repr(config), repr(vars(generator)), generator.name, repr(made)]
    shown += [file.read_text() for file in tmp_path.rglob("*") if file.is_file()]
    assert "$MY_KEY" in caplog.text
    assert not any(KEY in text for text in shown)


def test_a_missing_key_is_told_before_anything_is_sent(scripted, monkeypatch):
    monkeypatch.delenv("MY_KEY", raising=False)
    far = ServerConfig(model="m", base_url="https://api.example.com/v1", api_key_env="MY_KEY")
    with pytest.raises(ModelError, match="MY_KEY is not set"):
        far.load()
    scripted.config(api_key_env="MY_KEY").load().generate(asks(1), SAMPLING)
    assert scripted.keys == ["Bearer none"]


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.3.2.1", "[::1]"])
def test_this_machine_needs_no_key_and_no_proxy(host, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("HTTP_PROXY", "http://proxy.example.com:1")
    url = f"http://{host}:9/v1"
    client = ChatClient(url, api_key_env="OPENAI_API_KEY", timeout_seconds=5)
    with pytest.raises(Passing, match=r"refused|assign|reach"):
        client.ask("x", {"model": "m", "messages": []})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base_url": "localhost:8000"}, "wanted an address"),
        ({"base_url": "https://me:secret@example.com/v1"}, "holds a password"),
        ({"base_url": "https://example.com/v1?key=secret"}, "or a query"),
        ({"extra": {"messages": []}}, "messages cannot be set"),
        ({"api_key": KEY}, "not permitted"),
    ],
)
def test_settings_that_cannot_be_meant(settings, message):
    with pytest.raises(ValueError, match=message):
        ServerConfig(**{"model": "m", "base_url": "http://localhost/v1", **settings})


def test_a_bad_address_does_not_show_its_password():
    with pytest.raises(ConfigError, match="base_url: wanted an address") as got:
        validate({"model": "m", "base_url": "ftp://user:hushhush@h/"}, ServerConfig, "recipe")
    assert "hushhush" not in str(got.value)


@pytest.mark.parametrize(
    "extra",
    [
        {"api_key": "hushhush"},
        {"apiKey": "hushhush"},
        {"key": "hushhush"},
        {"token": "hushhush"},
        {"access_token": "hushhush"},
        {"password": "hushhush"},
        {"client_secret": "hushhush"},
        {"extra_headers": [{"Authorization": "hushhush"}]},
        {"extra_headers": {"X-Api-Key": "hushhush"}},
    ],
)
def test_extra_holds_no_secrets(extra):
    with pytest.raises(ConfigError, match=r"extra: .* looks like a secret.*api_key_env") as got:
        validate({"model": "m", "base_url": "http://h/v1", "extra": extra}, ServerConfig, "recipe")
    assert "hushhush" not in str(got.value)


def test_extra_holds_what_only_sounds_like_a_secret():
    extra = {
        "max_thinking_tokens": 5,
        "logit_bias": {"50256": -100},
        "top_k": 1,
        "stop_token_ids": [1],
        "prompt_cache_key": "mine",
        "chat_template_kwargs": {"bos_token": "<s>", "monkey": True},
    }
    assert ServerConfig(model="m", base_url="http://h/v1", extra=extra).extra == extra


def test_a_budget_without_a_ledger_is_refused_when_it_is_loaded(tmp_path):
    budget = ServerConfig(model="m", base_url="http://localhost/v1", max_requests=5)
    with pytest.raises(ConfigError, match="a budget needs a ledger"):
        budget.load()
    with_ledger(budget, tmp_path / "ledger.jsonl").load()


def test_one_request_without_an_answer_leaves_the_others(scripted):
    scripted.script = lambda body, number: (
        {"delay": 2.0} if body["messages"][0]["content"] == "say 2" else echo(body, number)
    )
    generator = scripted.config(concurrency=2, timeout_seconds=0.5, max_retries=1).load()
    with pytest.raises(Unanswered, match="1 of 4 requests were not answered, the first r2") as got:
        generator.generate(asks(4), SAMPLING)
    assert [g and g.text for g in got.value.generations] == ["say 0!", "say 1!", None, "say 3!"]
    assert got.value.reasons == (None, None, "timeout", None)
    assert scripted.texts.count("say 2") == 2


def test_a_server_that_is_down_is_left_alone(scripted):
    scripted.script = lambda body, number: {"status": 502, "raw": "bad gateway"}
    with pytest.raises(ModelError, match=r"3 requests in a row .* status 502: bad gateway"):
        scripted.config(concurrency=1, max_retries=1).load().generate(asks(50), SAMPLING)
    assert len(scripted.bodies) == DOWN_AFTER * 2


def test_no_more_at_once_than_allowed_from_all_threads_together(scripted):
    scripted.script = lambda body, number: {"delay": 0.05}
    generator = scripted.config(concurrency=3).load()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: generator.generate(asks(8), SAMPLING), range(2)))
    assert len(scripted.bodies) == 16
    assert scripted.most_at_once == 3


def test_an_event_loop_that_runs_is_no_hindrance(scripted):
    scripted.script = echo
    generator = scripted.config().load()

    async def inside() -> list[str]:
        return [g.text for g in generator.generate(asks(2), SAMPLING)]

    assert asyncio.run(inside()) == ["say 0!", "say 1!"]


@pytest.mark.parametrize("reason", ["length", "content_filter"])
def test_a_cut_answer_is_not_finished(scripted, reason):
    scripted.script = lambda body, number: {"finish": reason}
    assert not scripted.config().load().generate(asks(1), SAMPLING)[0].finished


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"num_tokens": 3}, "exact number of tokens"),
        ({"corruption": MaskImageTokens(threshold=0.9, key="k")}, "cannot hide image tokens"),
        ({"prefill": "It is"}, "takes no start"),
    ],
)
def test_what_a_server_cannot_do_is_refused(scripted, asked, message):
    with pytest.raises(ModelError, match=f"request x: .*{message}.*engine: local"):
        scripted.config().load().generate([Request(id="x", prompt=user("?"), **asked)], SAMPLING)
    assert scripted.bodies == []


def test_a_begun_answer_is_continued_where_the_server_can(scripted):
    scripted.script = lambda body, number: {"text": " a dog."}
    generator = scripted.config(prefill="continue_final_message").load()
    made = generator.generate([Request(id="x", prompt=user("?"), prefill="It is")], SAMPLING)
    assert made[0].text == " a dog."
    body = scripted.bodies[0]
    assert body["messages"][-1] == {"role": "assistant", "content": "It is"}
    assert (body["continue_final_message"], body["add_generation_prompt"]) == (True, False)


def test_the_log_tells_tokens_retries_and_cost(scripted, caplog):
    caplog.set_level(logging.INFO, "mmalign")
    scripted.script = lambda body, number: {"status": 500} if number == 1 else {}
    config = scripted.config(price_prompt=1000.0, price_completion=4000.0, concurrency=1)
    config.load().generate(asks(2), SAMPLING)
    # 20 prompt tokens at 0.001 and 10 new ones at 0.004.
    wanted = "2 answered, 0 known, 0 unanswered, 1 retries, 20 + 10 tokens, cost 0.0600"
    assert wanted in caplog.text
