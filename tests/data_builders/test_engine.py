"""Which engine writes responses: old configs keep their meaning, mistakes are named."""

from __future__ import annotations

from typing import Any

import pytest

from data_builders.base import GeneratorConfig
from data_builders.on_policy import OnPolicy
from mmalign.config import validate
from mmalign.errors import ConfigError
from mmalign.generate.server import ServerConfig, ServerGenerator

SERVER = {"engine": "server", "model": "m", "base_url": "http://localhost:9/v1"}


def builder(generator: Any) -> OnPolicy:
    config = {"source": "in", "output": "out", "generator": generator}
    return validate(config, OnPolicy, "c.yaml")


def test_without_an_engine_the_model_is_local():
    for extra in ({}, {"engine": "local"}):
        generator = builder({"model": {"path": "p"}, "top_p": 0.5, **extra}).generator
        assert isinstance(generator, GeneratorConfig)
        assert (generator.model.path, generator.top_p) == ("p", 0.5)


def test_a_server_is_named(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    generator = builder(SERVER | {"concurrency": 3}).generator
    assert isinstance(generator, ServerConfig)
    assert isinstance(generator.load(), ServerGenerator)


def test_a_config_that_is_made_in_code_is_taken_as_it_is():
    for config in (ServerConfig(**SERVER), GeneratorConfig(model={"path": "p"})):
        assert builder(config).generator is config


@pytest.mark.parametrize(
    ("generator", "message"),
    [
        (
            {"engine": "servr", "model": "m"},
            "generator.engine: is 'servr'; one of 'local', 'server'",
        ),
        (SERVER | {"concurency": 1}, "did you mean generator.concurrency?"),
        ({"model": {"path": "p"}, "temprature": 1}, "did you mean generator.temperature?"),
        ({"model": "m", "base_url": "http://h/v1"}, "has a base_url; say engine: server as well"),
        ({"engine": "local"}, "generator.model: field required"),
        (SERVER | {"base_url": "http://me:sk-1@h/v1"}, "generator: base_url holds a password"),
        (SERVER | {"api_key": "sk-1"}, "generator.api_key: did you mean generator.api_key_env?"),
        (SERVER | {"batch_size": 4}, "generator.batch_size: unknown key"),
        ("m", "generator: input should be a valid dictionary"),
    ],
)
def test_mistakes_are_named(generator, message):
    with pytest.raises(ConfigError) as caught:
        builder(generator)
    assert message in str(caught.value)
    assert "sk-1" not in str(caught.value)


def test_a_manifest_tells_what_decides_the_answers_and_nothing_else():
    hard = {"concurrency": 64, "max_requests": 5, "ledger": "answers.jsonl", "api_key_env": "K"}
    told = builder(SERVER | hard).model_dump(mode="json")["generator"]
    assert (
        told == builder(SERVER | {"base_url": "http://h/v1"}).model_dump(mode="json")["generator"]
    )
    assert {"engine", "model", "temperature", "max_new_tokens"} <= told.keys()
